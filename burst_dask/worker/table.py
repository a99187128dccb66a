"""The tasks of a plan shard, decoded and ready to run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from burst_dask.protocol.bitmap import EMPTY, Bitmap


@dataclass
class TaskTable:
    """A column for each field, a row for each position."""

    #: global number of position 0
    first: int
    #: Dask keys
    keys: list[Any]
    #: callables that take a dict of Dask key -> value and return the result
    nodes: list[Any]
    #: global numbers of what each task depends on
    dependencies: tuple[tuple[int, ...], ...]
    #: positions in the same plan shard that depend on each task
    dependents: list[list[int]]
    #: global number -> Dask key, of dependencies outside the plan shard
    foreign_keys: dict[int, Any]
    #: positions whose results were asked for …
    outputs: Bitmap = EMPTY
    #: … or that tasks of other plan shards depend on
    consumed: Bitmap = EMPTY
    #: position -> allowed automatic retries
    retries: dict[int, int] = field(default_factory=dict)
    #: position -> priority; higher runs first
    priority: dict[int, int] = field(default_factory=dict)
    #: position -> name of a resource -> how much of it the task needs
    resources: dict[int, dict[str, float]] = field(default_factory=dict)
    #: positions of tasks that must not run twice at once
    impure: Bitmap = EMPTY
    #: position -> seconds that a try of the task may take
    timeouts: dict[int, float] = field(default_factory=dict)
    #: position -> names of the exceptions after which it may be tried again; any, where there is none
    retry_on: dict[int, tuple[str, ...]] = field(default_factory=dict)
    #: position -> seconds before its second try, where it is not that of the session
    retry_delay: dict[int, float] = field(default_factory=dict)
    #: what kind of task each is: tasks of a kind take about the same time
    kinds: list[str] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.nodes)

    def name(self, number: int) -> Any:
        """Return the Dask key of a task here, or of one elsewhere that a task here depends on."""
        own = number - self.first
        return self.keys[own] if 0 <= own < len(self.keys) else self.foreign_keys[number]


def fits(need: Mapping[str, float], free: Mapping[str, float]) -> bool:
    """Tell whether what is free of each resource covers what a task needs."""
    return all(amount <= free.get(name, 0.0) for name, amount in need.items())
