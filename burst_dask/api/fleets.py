"""Which fleet starts the workers of a session: chosen when it is opened, and the same for every later client."""

from __future__ import annotations

import contextlib
import os
import platform
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from burst_dask.api.arguments import PARTS, Given, check_workers
from burst_dask.aws import isolation
from burst_dask.aws.clients import Clients
from burst_dask.aws.secrets import reference, secret_name
from burst_dask.aws.stack import DEFAULT_NAME, Stack, read_stack
from burst_dask.client.link import Link
from burst_dask.config import Settings
from burst_dask.errors import BurstError, ConfigError
from burst_dask.fleet.base import Fleet
from burst_dask.fleet.ecs import EcsArguments, EcsFleet, EcsPlan, price_note, price_of, settings_of
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.fleet.local import LocalFleet
from burst_dask.protocol.keys import SessionId
from burst_dask.protocol.records import FleetChoice
from burst_dask.store.address import Address
from burst_dask.store.signing import key_in
from burst_dask.trust.keyring import FILE
from burst_dask.worker.memory_watch import processors

#: Workers on ECS of a session that does not say how many: they cost, so no more than a machine has processors.
ECS_WORKERS = 4
#: Names the stack where it is not called `DEFAULT_NAME`.
STACK_VARIABLE = "BURST_STACK"


class Chosen(NamedTuple):
    """What a session is opened with."""

    fleet: FleetChoice
    #: None: they are started by hand
    workers: int | None
    settings: Settings


def choose(fleet: str | None, address: Address, workers: int | None, cpu: float | None, given: Given) -> Chosen:
    """Return the fleet of a new session; on ECS, AWS is asked what is there, and nothing is started.

    Parameters
    ----------
    fleet
        As of `burst_dask.Session`.
    address
        Of the store.
    cpu
        Processors of a worker, as they were given.

    Raises
    ------
    ConfigError
        The arguments are wrong, or do not go together.
    CloudError
        AWS does not answer.
    """
    check_workers(workers, fleet)
    if given.cloud is not None:
        if fleet not in ("auto", "ecs"):
            name = next(iter(msgspec.structs.asdict(given.cloud)))
            named = {key: value for key, value in msgspec.structs.asdict(given.cloud).items() if value}
            raise ConfigError(f"{', '.join(named) or name} with fleet={fleet!r}: these are for fleet='ecs'")
        given.cloud.check()
    if fleet == "ecs" or (fleet == "auto" and given.cloud is not None):
        return _on_ecs(address, workers, cpu, given, None)
    if fleet == "distributed":
        return _in_cluster(workers, given.settings)
    if fleet == "auto" and (stack := _stack_by_default(address)) is not None:
        chosen = _on_ecs(address, workers, cpu, given, stack)
        warnings.warn(
            f"{chosen.workers} workers run on ECS, in the stack {stack.name} in {stack.region}, and cost: "
            f"{msgspec.convert(chosen.fleet.options, EcsPlan)}. fleet='local' runs them on this machine; either "
            "silences this",
            stacklevel=3,
        )
        return chosen
    if cpu in PARTS:
        raise ConfigError(f"cpu={cpu!r}: parts of a processor are had on Fargate, with fleet='ecs'")
    count = processors() if workers is None and fleet is not None else workers
    return Chosen(FleetChoice(), count, given.settings)


def _in_cluster(workers: int | None, settings: Settings) -> Chosen:
    """Return the choice of the cluster of this process's `distributed.Client`."""
    try:
        from burst_dask.fleet.cluster import address_of_default, size_of_default  # noqa: PLC0415 - of the extra, and heavy
    except ImportError:
        raise ConfigError(
            "fleet='distributed' needs distributed: pip install 'dask[distributed]'. Nothing was started"
        ) from None
    options = {"address": address_of_default()}
    return Chosen(FleetChoice("distributed", options), workers or size_of_default(), settings)


def _on_ecs(address: Address, workers: int | None, cpu: float | None, given: Given, stack: Stack | None) -> Chosen:
    """Return the choice of ECS; what its workers need is checked with AWS."""
    if address.scheme in ("file", "memory"):
        raise ConfigError(
            f"fleet='ecs' with the store {address.url}: its workers do not see this machine; use a store such as "
            "s3://bucket/prefix"
        )
    clients = Clients.of(region=None if "endpoint_url" in address.options else address.options.get("region"))
    name = os.environ.get(STACK_VARIABLE) or DEFAULT_NAME
    stack = stack or read_stack(clients, name)
    if stack is None:
        raise ConfigError(
            f"fleet='ecs': there is no stack {name} in {clients.region}; `burst setup aws` makes one, and "
            f"{STACK_VARIABLE} names another. Nothing was started"
        )
    if not stack.usable:
        raise ConfigError(
            f"fleet='ecs': the stack {name} is {stack.status}, not ready; wait, or see `burst doctor aws`. "
            "Nothing was started"
        )
    settings = given.settings
    cloud = given.cloud or EcsArguments()
    if cloud.isolated:
        _check_isolation(address, stack)
    threads = settings.threads if settings.threads != Settings().threads else None
    plan = EcsPlan.made(cloud, cpu if cpu is not None else threads, settings.memory_limit, clients, stack)
    priced: dict[str, float] = {}
    if not settings.worker_price:  # who says a price knows what it is of
        priced = {"worker_price": _price(clients, plan, settings)}
        plan = msgspec.structs.replace(plan, price_note=price_note(plan))
    checked = Settings.of(**(settings.to_dict() | settings_of(plan) | priced))
    return Chosen(FleetChoice("ecs", msgspec.to_builtins(plan)), workers or ECS_WORKERS, checked)


def _check_isolation(address: Address, stack: Stack) -> None:
    """Raise `ConfigError` if a session's own role could not reach the store: its boundary is the stack's own."""
    if (address.scheme, address.place) != ("s3", stack.bucket) or not f"{address.path}/".startswith(f"{stack.prefix}/"):
        raise ConfigError(
            f"isolated=True with the store {address.url}: roles of single sessions are bound to the stack's own store, "
            f"{stack.store}, and what is below it. Nothing was started"
        )


@contextlib.contextmanager
def made_ready(choice: FleetChoice, session: SessionId, url: str, before: Link | None) -> Iterator[FleetChoice]:
    """Make what a new session's fleet has of its own, and unmake it if the session is not opened after all.

    Parameters
    ----------
    url
        Of the store.
    before
        The session whose results are used, if there is one.
    """
    if choice.kind != "ecs" or not (plan := EcsPlan.of(choice)).isolated:
        yield choice
        return
    clients, address = Clients.of(region=plan.stack.region), Address.parse(url)
    earlier = None if before is None else before.session
    role = isolation.make_role(clients, plan.stack, session, address.place, address.path, earlier)
    plan = msgspec.structs.replace(plan, task_role=role)
    try:
        yield FleetChoice("ecs", msgspec.to_builtins(plan))
    except BaseException:
        release(EcsFleet(session, url, plan, clients=clients))
        raise


def check_resumed(link: Link, choice: FleetChoice) -> None:
    """Raise `ConfigError` if a session that goes on is less isolated than the script wants it to be."""
    wanted = choice.options.get("isolated") if choice.kind == "ecs" else False
    if wanted and not link.manifest.fleet.options.get("isolated"):
        raise ConfigError(
            f"isolated=True, but session {link.session} of that name was opened without, and cannot be changed: give "
            "another name=, or clean it up first. Nothing was started"
        )


def release(fleet: Fleet) -> None:
    """Delete what a session's fleet has had of its own, when its workers have ended; what cannot be is a warning."""
    if isinstance(fleet, EcsFleet):
        try:
            fleet.release()
        except BurstError as error:
            warnings.warn(str(error), stacklevel=3)


def _price(clients: Clients, plan: EcsPlan, settings: Settings) -> float:
    """Return what a worker costs an hour; 0 when nobody says, which no limit of costs may go by."""
    price = price_of(clients, plan)
    if price is not None:
        return price.hourly
    for name in ("max_cost", "max_hourly_cost"):
        if getattr(settings, name) is not None:
            raise ConfigError(
                f"{name}={getattr(settings, name):g}: what a worker costs is not known, since AWS does not tell the "
                f"price of {plan.instance_type or 'an instance of any type'}: give worker_price=, in USD an hour. "
                "Nothing was started"
            )
    return 0.0


def _stack_by_default(address: Address) -> Stack | None:
    """Return the stack whose workers a session on this store has unless it asks for others; None if there is none."""
    elsewhere = "endpoint_url" in address.options or os.environ.get("AWS_ENDPOINT_URL_S3")
    if address.scheme != "s3" or elsewhere:
        return None  # not Amazon's: workers there would be far from it
    name = os.environ.get(STACK_VARIABLE) or DEFAULT_NAME
    try:
        clients = Clients.of(region=address.options.get("region"))
        stack = read_stack(clients, name)
        if stack is None:
            why = f"there is no stack {name} in {clients.region}, which `burst setup aws` makes"
        elif not stack.usable:
            why = f"the stack {name} is {stack.status}"
        elif not stack.image:
            why = f"the stack {name} has no image for workers, which `burst image push` makes"
        else:
            return stack
    except BurstError as error:
        why = str(error)
    warnings.warn(
        f"workers run on this machine, as fleet='local' would have it without this warning: {why}", stacklevel=4
    )
    return None


# ---------------------------------------------------------------------------- of a session that is there


def can_start(link: Link) -> bool:
    """Tell whether this client can start workers like those that the session has."""
    if link.manifest.fleet.kind in ("ecs", "distributed"):
        return True
    return link.manifest.host == platform.node() and "memory://" not in link.store.url


def key_place(choice: FleetChoice, session: SessionId) -> str:
    """Return where the key of a session that is signed is kept: where its workers find it."""
    if choice.kind != "ecs":
        return FILE
    plan = EcsPlan.of(choice)
    return reference(plan.stack.region, secret_name(plan.stack.name, session, isolated=plan.isolated))


def fleet_of(link: Link) -> Fleet:
    """Return the fleet of a session; nothing is asked or started yet."""
    settings, choice, key = link.settings, link.manifest.fleet, link.manifest.key
    if choice.kind == "ecs":
        plan = EcsPlan.of(choice)
        return EcsFleet(link.session, link.store.url, plan, opened=link.manifest.created, key=key)
    if choice.kind == "distributed":
        from burst_dask.fleet.cluster import ClusterFleet  # noqa: PLC0415 - of the extra, and heavy

        return ClusterFleet(
            link.session,
            link.store.url,
            choice.options["address"],
            threads=settings.threads,
            memory_limit=settings.memory_limit,
            key=key_in(link.store, link.session),
        )
    if "memory://" in link.store.url:
        return InProcessFleet(link.session, link.store, threads=settings.threads)
    limit = settings.memory_limit
    return LocalFleet(link.session, link.store.url, threads=settings.threads, memory_limit=limit, key=key)
