"""Arguments of `Session`: what is wrong with them is told before anything is done."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from dask.utils import parse_bytes

from burst_dask.config import LONGEST, Settings
from burst_dask.errors import ConfigError
from burst_dask.fleet.ecs import EcsArguments
from burst_dask.worker.memory_watch import format_bytes

#: Characters of a session's name at most.
NAME_LENGTH = 200
#: Bytes for each worker at least; one takes 41 MiB before its first task.
LEAST_MEMORY = 64 << 20

#: Fleets that a session may ask for; "auto" is one of the others.
FLEETS = ("auto", "local", "ecs", "distributed")
#: Processors of a worker that are a part of one, as Fargate has them.
PARTS = (0.25, 0.5)

_BRING_YOUR_OWN = (
    "with fleet=None the session starts no workers, and you bring your own: burst worker --session ID --store URL"
)


class Given(NamedTuple):
    """The arguments of a session that it takes by name."""

    #: of the store
    options: dict[str, str]
    settings: Settings
    #: how workers run in the cloud; None when nothing was said of it
    cloud: EcsArguments | None


def split(given: Mapping[str, Any], endpoint_url: str | None) -> Given:
    """Return the arguments by whom they are for."""
    fields = (*Settings.__struct_fields__, *EcsArguments.__struct_fields__)
    options = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    for name, value in given.items():
        if name in fields:
            continue
        if close := difflib.get_close_matches(name, fields, 1, 0.75):
            raise ConfigError(f"there is no setting {name!r}; did you mean {close[0]!r}?")
        options[name] = value
    settings = Settings.of(**{name: given[name] for name in given if name in Settings.__struct_fields__})
    cloud = {name: given[name] for name in given if name in EcsArguments.__struct_fields__}
    return Given(options, settings, EcsArguments(**cloud) if cloud else None)


def check_workers(workers: int | None, fleet: str | None) -> None:
    """Raise unless such a fleet can have so many workers; None is as many as suit it."""
    if fleet is None:
        if workers is not None:
            raise ConfigError(f"workers={workers} with fleet=None: {_BRING_YOUR_OWN}")
        return
    if fleet not in FLEETS:
        raise ConfigError(f"fleet={fleet!r}: must be {', '.join(map(repr, FLEETS))} or None; {_BRING_YOUR_OWN}")
    if workers is None:
        return
    check_count(workers)
    if workers < 1:
        raise ConfigError(f"workers={workers}: a session needs at least 1; {_BRING_YOUR_OWN}")


def check_count(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise ConfigError(f"workers={workers!r}: must be a whole number")


def check_name(name: str | None) -> None:
    """Raise unless `name` is one that people can read and type.

    >>> check_name("nightly"), check_name(None)
    (None, None)
    """
    if name is None:
        return
    if not isinstance(name, str):
        raise ConfigError(f"name={name!r}: must be a text such as 'nightly', or None")
    if not name or name != name.strip() or not name.isprintable() or len(name) > NAME_LENGTH:
        raise ConfigError(
            f"name={name!r}: must be a line of 1 to {NAME_LENGTH} characters without spaces around it, as 'nightly'"
        )


def check_resume(resume: bool, name: str | None) -> None:
    """Raise unless a session that is to be resumed can be found again.

    >>> check_resume(True, None)
    Traceback (most recent call last):
        ...
    burst_dask.errors.ConfigError: resume=True needs name='…': by that the session is found when the script runs again
    """
    if not isinstance(resume, bool):
        raise ConfigError(f"resume={resume!r}: must be True or False")
    if resume and name is None:
        raise ConfigError("resume=True needs name='…': by that the session is found when the script runs again")


def check_signed(signed: bool) -> None:
    """Raise unless it is a yes or a no."""
    if not isinstance(signed, bool):
        raise ConfigError("signed: must be True or False; the key is made, and never given")  # which this may be


def check_seconds(what: str, seconds: float) -> None:
    """Raise unless `seconds` is a time that a session can last; `what` names the argument."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST:
        raise ConfigError(f"{what}={seconds!r}: must be a number of seconds, more than 0 and at most {LONGEST:g}")


def check_cost(cost: float) -> float:
    """Return a sum of USD, or raise `ConfigError`."""
    if isinstance(cost, bool) or not isinstance(cost, int | float) or not 0 < cost < float("inf"):
        raise ConfigError(f"max_cost={cost!r}: must be a number of USD, more than 0")
    return float(cost)


def size(cpu: float | None, memory: str | int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `cpu` and `memory` stand for.

    >>> size(4, "8GB", {})
    {'threads': 4, 'memory_limit': 8000000000}
    """
    found: dict[str, Any] = {}
    for name, value, setting in (("cpu", cpu, "threads"), ("memory", memory, "memory_limit")):
        if value is None:
            continue
        if setting in settings:
            raise ConfigError(f"{name}={value!r} and {setting}={settings[setting]!r} are the same setting: give one")
        found[setting] = value
    if cpu in PARTS:
        found["threads"] = 1
    elif cpu is not None and (isinstance(cpu, bool) or not isinstance(cpu, int) or cpu < 1):
        raise ConfigError(
            f"cpu={cpu!r}: must be a whole number of threads for each worker, 1 or more; on Fargate also 0.25 and 0.5"
        )
    if memory is not None:
        found["memory_limit"] = _bytes(memory)
    return found


def _bytes(memory: str | int) -> int:
    """Return an amount of memory in bytes, if a worker can live in it."""
    try:
        if isinstance(memory, bool) or not any(map(str.isdigit, str(memory))):  # "GB" would be one
            raise ValueError
        amount = int(parse_bytes(memory))
    except (ValueError, TypeError, AttributeError, OverflowError):
        raise ConfigError(
            f"memory={memory!r}: must be an amount of memory for each worker, such as '8GB' or '512MiB'"
        ) from None
    if amount < LEAST_MEMORY:
        raise ConfigError(
            f"memory={memory!r} is {amount} bytes for each worker: must be {format_bytes(LEAST_MEMORY)} at least; "
            "write it with its unit, such as '8GB'"
        )
    return amount
