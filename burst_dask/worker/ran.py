"""What came of executions, on its way to a commit."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.records import TaskOutput


@dataclass(slots=True)
class Ran:
    """What came of one execution of a task."""

    position: int
    #: seconds it took
    seconds: float = 0.0
    value: Any = None
    #: bytes of the value in memory
    size: int = 0
    #: the result or error as stored (unsealed); None when only this shard needs it
    body: list[Buffer] | None = None
    failed: bool = False
    #: it failed because it was cancelled before it ran
    cancelled: bool = False
    #: what it has printed, if anything
    output: TaskOutput | None = None
    #: ``module.name`` of the class of what it raised, and of its bases
    raised: tuple[str, ...] = ()
    #: it is past its time limit and was given up: ends when its thread does
    stuck: asyncio.Future[Any] | None = None


@dataclass
class Finished:
    """Outcomes that are not yet committed."""

    ran: dict[int, Ran] = field(default_factory=dict)
    #: first cause (global number) -> positions that failed because of it
    upstream: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    #: positions among both that were cancelled, or need what was
    cancelled: set[int] = field(default_factory=set)
    #: what tasks have printed, also in tries that are followed by another …
    outputs: list[TaskOutput] = field(default_factory=list)
    #: … of which there were so many, by position
    tries: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ran) + sum(map(len, self.upstream.values()))
