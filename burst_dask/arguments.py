"""Arguments of `Session`: what is wrong with them is told before anything is done."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from dask.utils import parse_bytes

from burst_dask.config import Settings
from burst_dask.errors import ConfigError
from burst_dask.worker.memory_watch import processors

_BRING_YOUR_OWN = (
    "with fleet=None the session starts no workers, and you bring your own: burst worker --session ID --store URL"
)


def split(given: Mapping[str, Any], endpoint_url: str | None) -> tuple[dict[str, str], Settings]:
    """Return the store's options, and the settings."""
    fields = Settings.__struct_fields__
    options = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    for name, value in given.items():
        if name in fields:
            continue
        if close := difflib.get_close_matches(name, fields, 1, 0.75):
            raise ConfigError(f"there is no setting {name!r}; did you mean {close[0]!r}?")
        options[name] = value
    return options, Settings.of(**{name: value for name, value in given.items() if name in fields})


def check_workers(workers: int | None, fleet: str | None) -> int | None:
    if fleet is None:
        if workers is not None:
            raise ConfigError(f"workers={workers} with fleet=None: {_BRING_YOUR_OWN}")
        return None
    if fleet != "local":
        raise ConfigError(f"fleet={fleet!r}: must be 'local' or None; {_BRING_YOUR_OWN}")
    if workers is None:
        return processors()
    check_count(workers)
    if workers < 1:
        raise ConfigError(f"workers={workers}: a session needs at least 1; {_BRING_YOUR_OWN}")
    return workers


def check_count(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise ConfigError(f"workers={workers!r}: must be a whole number")


def size(cpu: int | None, memory: str | int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
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
    if cpu is not None and (isinstance(cpu, bool) or not isinstance(cpu, int) or cpu < 1):
        raise ConfigError(f"cpu={cpu!r}: must be a whole number of threads for each worker, 1 or more")
    if memory is not None:
        try:
            found["memory_limit"] = parse_bytes(memory)
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"memory={memory!r}: must be an amount of memory for each worker, such as '8GB' or '512MiB'"
            ) from None
        if found["memory_limit"] <= 0:
            raise ConfigError(f"memory={memory!r}: must be more than 0")
    return found
