"""What the workers of a session on ECS are: checked arguments, and the plan that the session's manifest keeps."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from burst_dask.aws import capacity, prices
from burst_dask.aws.capacity import UNITS, InstanceType, Size
from burst_dask.aws.clients import Clients
from burst_dask.aws.prices import Price
from burst_dask.aws.stack import ARCHITECTURES, Stack
from burst_dask.errors import ConfigError
from burst_dask.fleet.ecs import instances
from burst_dask.protocol.records import FleetChoice

FARGATE, EC2 = "FARGATE", "EC2"
WITH_FALLBACK = "with-fallback"
#: MiB of a worker for each of its processors unless it is said otherwise: twice the least that Fargate has, and
#: half of the most.
DEFAULT_MEMORY = 4096
#: MiB of a container that are the supervisor's, which takes about 30.
SUPERVISOR = 64
#: Limits of RunTask.
_MOST_SUBNETS, _MOST_GROUPS, _MOST_TAGS = 16, 5, 40
_MOST_KEY, _MOST_VALUE = 128, 256


class EcsArguments(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of `Session` that say how its workers run on ECS, as they were given.

    Examples
    --------
    >>> EcsArguments(instance_type="c8a.xlarge", spot=True).check()
    >>> EcsArguments(spot="sometimes").check()
    Traceback (most recent call last):
    ...
    burst_dask.errors.ConfigError: spot='sometimes': must be True, False or 'with-fallback'
    """

    #: ``"FARGATE"``, or ``"EC2"`` for instances of the stack's capacity providers; None: as `instance_type` implies
    launch_type: str | None = None
    #: such as ``"c8a.xlarge"``; a worker takes all of one unless `cpu` or `memory` say otherwise
    instance_type: str | None = None
    #: True: machines that AWS may take back with a notice of two minutes, and that cost about a third;
    #: ``"with-fallback"``: others while there are none
    spot: bool | str = False
    #: ``"x86_64"`` or ``"arm64"``; None: that of the instance type, or x86_64
    arch: str | None = None
    #: on Fargate: where workers run; None: those of the stack
    subnets: Sequence[str] | None = None
    security_groups: Sequence[str] | None = None
    #: URI of another image than the stack's
    image: str | None = None
    #: on all tasks, for those who read bills
    tags: Mapping[str, str] = {}
    #: whether the session's workers have a role of their own, which may do nothing outside of the session
    isolated: bool = False

    def check(self) -> None:
        """Raise `ConfigError` for what cannot be meant; nothing is asked for it."""
        if self.launch_type not in (None, FARGATE, EC2):
            raise ConfigError(f"launch_type={self.launch_type!r}: must be 'FARGATE' or 'EC2'")
        if self.instance_type is not None and not _is_name(self.instance_type):
            raise ConfigError(f"instance_type={self.instance_type!r}: must be a name such as 'c8a.xlarge'")
        if self.instance_type and self.launch_type == FARGATE:
            raise ConfigError(
                f"instance_type={self.instance_type!r} with launch_type='FARGATE', which has no instances: "
                "give cpu= and memory=, or launch_type='EC2'"
            )
        if not isinstance(self.spot, bool) and self.spot != WITH_FALLBACK:
            raise ConfigError(f"spot={self.spot!r}: must be True, False or {WITH_FALLBACK!r}")
        if self.arch not in (None, *ARCHITECTURES):
            raise ConfigError(f"arch={self.arch!r}: must be {' or '.join(map(repr, ARCHITECTURES))}")
        if not isinstance(self.isolated, bool):
            raise ConfigError(f"isolated={self.isolated!r}: must be True or False")
        if self.image is not None and not _is_name(self.image):
            raise ConfigError(f"image={self.image!r}: must be the URI of an image, such as 'registry/repository:tag'")
        self._check_network()
        _check_tags(self.tags)

    @property
    def on_instances(self) -> bool:
        return self.launch_type == EC2 or (self.launch_type is None and self.instance_type is not None)

    def _check_network(self) -> None:
        for name, given, prefix, most in (
            ("subnets", self.subnets, "subnet-", _MOST_SUBNETS),
            ("security_groups", self.security_groups, "sg-", _MOST_GROUPS),
        ):
            if given is None:
                continue
            if isinstance(given, str) or not all(isinstance(one, str) and one.startswith(prefix) for one in given):
                raise ConfigError(f"{name}={given!r}: must be a list of ids such as ['{prefix}0a1b2c3d']")
            if not 1 <= len(given) <= most:
                raise ConfigError(f"{name}: there are {len(given)}, and RunTask takes 1 to {most}")
            if self.on_instances:
                raise ConfigError(
                    f"{name}={given!r} with launch_type='EC2': instances stand in the network of the stack, "
                    "which `burst setup aws` sets. Leave it out, or use launch_type='FARGATE'"
                )


class EcsPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What each worker of a fleet is and where it runs, so that any client can start another one like it.

    Examples
    --------
    >>> stack = Stack.of("burst-dask", "eu-west-1", {"Cluster": "burst-dask"})
    >>> plan = EcsPlan(stack=stack, image="i", cpu=256, memory=512, spot="with-fallback")
    >>> print(plan)
    0.25 vCPU with 0.5 GiB each on Fargate Spot, with others as a fallback (x86_64)
    >>> plan.threads, plan.providers()
    (1, ['FARGATE_SPOT', 'FARGATE'])
    """

    #: as it was when the session was opened. Kept, since whoever starts workers later, such as a worker, may not
    #: ask for it
    stack: Stack
    #: CPU units, 1,024 a processor, and MiB
    cpu: int
    memory: int
    launch_type: str = FARGATE
    spot: bool | str = False
    arch: str = ARCHITECTURES[0]
    #: empty: whatever the stack's capacity provider starts
    instance_type: str = ""
    #: whether no other instances will do: only where the stack starts no others, or they would wait for ever
    only_that_type: bool = False
    #: how many workers such an instance has room for; 0 when that is not known
    per_instance: int = 0
    #: how many processors it has; 0 when that is not known
    vcpus: int = 0
    image: str
    #: empty: those of the stack
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    tags: dict[str, str] = {}
    #: what to say of the price that was found for a worker; empty: nothing
    price_note: str = ""
    #: whether the session has a role of its own, and its ARN once it is made; else workers have that of the stack
    isolated: bool = False
    task_role: str = ""

    @property
    def size(self) -> Size:
        return Size(self.cpu, self.memory)

    @property
    def threads(self) -> int:
        """Threads of a worker: one for each processor."""
        return max(1, self.cpu // UNITS)

    @property
    def worker_memory(self) -> int:
        """Bytes that a worker process may use: all but what is its supervisor's."""
        return (self.memory - SUPERVISOR) << 20

    def __str__(self) -> str:
        where = f"{self.instance_type or 'EC2'}" if self.launch_type == EC2 else "Fargate"
        kind = {False: "", True: " Spot", WITH_FALLBACK: " Spot, with others as a fallback"}[self.spot]
        alone = ", with a role of their own" if self.isolated else ""
        return f"{self.size} each on {where}{kind} ({self.arch}){alone}"

    @classmethod
    def of(cls, choice: FleetChoice) -> EcsPlan:
        """Return the plan that a manifest keeps."""
        try:
            return msgspec.convert(choice.options, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"how workers of this session run on ECS was written by another version of burst_dask: {error}; "
                "update this one"
            ) from None

    @classmethod
    def made(
        cls, wanted: EcsArguments, cpu: float | None, memory: int | None, clients: Clients, stack: Stack
    ) -> EcsPlan:
        """Return the plan for checked arguments.

        Parameters
        ----------
        cpu
            Processors of a worker.
        memory
            Bytes of a worker.

        Raises
        ------
        ConfigError
            No machine is so large, or the stack lacks what is asked for.
        """
        instance = capacity.instance_type(clients, wanted.instance_type) if wanted.instance_type else None
        arch = wanted.arch or (instance.arch if instance else ARCHITECTURES[0])
        if instance and arch != instance.arch:
            raise ConfigError(f"arch={arch!r}, but {instance.name} is {instance.arch}: leave arch= out")
        size = _size(cpu, memory, instance)
        only_that_type = False
        if wanted.on_instances:
            there = instances.started(clients, stack, arch)
            if instance is not None:
                instances.check_type(there, stack, instance)
            room = _room(size, instance) if instance is not None else 0
            only_that_type = instances.check_fit(clients, there, stack, size, instance)
        else:
            size, room = _on_fargate(size), 0
        plan = cls(
            stack=stack,
            cpu=size.cpu,
            memory=size.memory,
            launch_type=EC2 if wanted.on_instances else FARGATE,
            spot=wanted.spot,
            arch=arch,
            instance_type=wanted.instance_type or "",
            only_that_type=only_that_type,
            per_instance=room,
            vcpus=instance.cpus if wanted.on_instances and instance is not None else 0,
            image=wanted.image or stack.image,
            subnets=tuple(wanted.subnets or ()),
            security_groups=tuple(wanted.security_groups or ()),
            tags=dict(wanted.tags),
            isolated=wanted.isolated,
        )
        plan.check()
        return plan

    def check(self) -> None:
        """Raise `ConfigError` if the stack lacks what the plan needs."""
        stack = self.stack
        if not self.image:
            raise ConfigError(
                f"the stack {stack.name} has no image for workers yet: `burst image push` makes one; "
                "or name one of yours with image="
            )
        if self.launch_type == FARGATE and not (self.subnets or stack.subnets):
            raise ConfigError(f"the stack {stack.name} names no subnets: pass subnets=, or run `burst setup aws` again")
        if self.isolated and not stack.boundary:
            raise ConfigError(
                f"isolated=True: the stack {stack.name} is of an older version and has no boundary for roles of single "
                "sessions; `burst setup aws` brings it. Nothing was started"
            )
        missing = [
            name for name in self.providers() if self.launch_type == EC2 and name not in stack.capacity_providers
        ]
        if missing:
            there = ", ".join(sorted(stack.capacity_providers)) or "none"
            raise ConfigError(
                f"launch_type='EC2' needs a capacity provider {missing[0]}; the stack {stack.name} has {there}. "
                "Run `burst setup aws` again to have one, or use launch_type='FARGATE'"
            )

    def providers(self) -> list[str]:
        """Return what to try, in this order: keys of `Stack.capacity_providers`, or names of Fargate's own."""
        plain, spot = (FARGATE, f"{FARGATE}_SPOT") if self.launch_type == FARGATE else (self.arch, f"{self.arch}-spot")
        return {False: [plain], True: [spot], WITH_FALLBACK: [spot, plain]}[self.spot]


def _size(cpu: float | None, memory: int | None, instance: InstanceType | None) -> Size:
    """Return the size that is asked for; what is not said follows from the rest."""
    mib = None if memory is None else -(-memory // (1 << 20))
    if instance is not None:  # a worker takes all of it, or its share
        whole = instance.usable
        units = int(cpu * UNITS) if cpu is not None else whole.cpu
        return Size(units, mib if mib is not None else min(whole.memory, whole.memory * units // whole.cpu))
    units = int(cpu * UNITS) if cpu is not None else UNITS
    return Size(units, mib if mib is not None else DEFAULT_MEMORY * units // UNITS)


def _on_fargate(size: Size) -> Size:
    """Return a size that Fargate has, and say so if it is another one."""
    found = capacity.fargate_size(size)
    # "16GB" is 14.9 GiB: who gets 15 needs no telling
    if found.cpu != size.cpu or found.memory - size.memory >= 1024:
        warnings.warn(
            f"Fargate has no {size}: workers get {found}, the nearest that is at least as large", stacklevel=6
        )
    return found


def _room(size: Size, instance: InstanceType) -> int:
    """Return how many workers an instance has room for."""
    room = capacity.per_instance(size, instance)
    if room < 1:
        raise ConfigError(
            f"a worker of {size} does not fit on {instance.name}, which has {instance.usable} for workers: "
            "ask for less with cpu= and memory=, or for a larger instance_type="
        )
    return room


def _is_name(text: object) -> bool:
    return isinstance(text, str) and bool(text) and not any(letter.isspace() for letter in text)


def _check_tags(tags: object) -> None:
    if not isinstance(tags, Mapping) or not all(isinstance(one, str) for pair in tags.items() for one in pair):
        raise ConfigError(f"tags={tags!r}: must be a dict of texts, such as {{'project': 'ice'}}")
    for key, value in tags.items():
        if not 1 <= len(key) <= _MOST_KEY or len(value) > _MOST_VALUE or key.lower().startswith("aws:"):
            raise ConfigError(
                f"tags: {key!r}={value!r}: a key has 1 to {_MOST_KEY} characters and does not begin with 'aws:', "
                f"a value has {_MOST_VALUE} at most"
            )
    if len(tags) > _MOST_TAGS:
        raise ConfigError(f"tags: there are {len(tags)}, and {_MOST_TAGS} is the most")


def settings_of(plan: EcsPlan) -> dict[str, Any]:
    """Return the settings of a session that follow from its plan."""
    return {"threads": plan.threads, "memory_limit": plan.worker_memory}


def price_note(plan: EcsPlan) -> str:
    """Return what to say of the price that `price_of` finds; empty when it is the price."""
    return prices.SPOT_NOTE if plan.launch_type == FARGATE and plan.spot else ""


def price_of(clients: Clients, plan: EcsPlan) -> Price | None:
    """Return what a worker costs an hour; None when that is not known."""
    if plan.launch_type == FARGATE:
        return prices.of_fargate(clients, plan.size, plan.arch)
    if not plan.instance_type or not plan.per_instance:
        return None  # the stack starts whatever is cheapest
    whole = prices.of_instance(clients, plan.instance_type, plan.spot is True)
    return None if whole is None else whole._replace(hourly=whole.hourly / plan.per_instance)
