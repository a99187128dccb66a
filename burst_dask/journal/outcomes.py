"""What a `RunView` tells of tasks."""

from __future__ import annotations

from typing import NamedTuple

from burst_dask.protocol.records import Location
from burst_dask.protocol.shard import Shard


class TaskOutcome(NamedTuple):
    """What is known of one task."""

    done: bool
    #: global number of the task whose error this is; itself, unless it failed upstream
    cause: int | None
    #: where its result or error is stored, if it is
    shard: Shard
    location: Location | None
    #: whether it was cancelled, or needs what was; it counts as not done
    cancelled: bool = False


class Totals(NamedTuple):
    """Counts over all tasks of a run, as far as known."""

    total: int
    done: int
    failed: int
    #: have the outcome cancelled
    cancelled: int
    #: reserved by a live or dead holder; an upper bound of what runs
    reserved: int
    #: seconds spent in tasks
    seconds: float

    @property
    def pending(self) -> int:
        return self.total - self.done - self.failed - self.cancelled


class Source:
    """Where the outcomes of the tasks of one plan shard become known.

    Attributes
    ----------
    changes : int
        How often anything new was learned of it: while that stays, no outcome there has become known.
    """

    __slots__ = ("changes",)

    def __init__(self) -> None:
        self.changes = 0
