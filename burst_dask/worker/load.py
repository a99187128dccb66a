"""What the threads of a worker are busy with, and for how long yet."""

from __future__ import annotations

from dataclasses import dataclass, field

from burst_dask.clock import Clock
from burst_dask.worker.holding import Holding


@dataclass(eq=False)
class Batch:
    """Tasks that one thread runs one after another."""

    holding: Holding
    positions: list[int]
    #: seconds it probably takes; None when it has a task of a kind that never ran here
    expected: float | None
    started: float

    def remaining(self, now: float) -> float:
        """Return the seconds it probably takes yet.

        What is overdue takes about as long again as it already did: durations have long tails.
        """
        if self.expected is None:
            return float("inf")
        elapsed = now - self.started
        return self.expected - elapsed if elapsed < self.expected else elapsed


@dataclass
class Load:
    """The batches that run."""

    clock: Clock
    threads: int
    #: what the worker has, by name of the resource
    resources: dict[str, float] = field(default_factory=dict)
    batches: dict[Batch, None] = field(default_factory=dict)

    def begin(self, holding: Holding, positions: list[int]) -> Batch:
        """Note that a thread runs `positions`."""
        seconds = [holding.durations.known(holding.table.kinds[p]) for p in positions]
        expected = None if None in seconds else sum(s for s in seconds if s is not None)
        batch = Batch(holding, positions, expected, self.clock.monotonic())
        self.batches[batch] = None
        return batch

    def end(self, batch: Batch) -> None:
        """Note that the thread is free again."""
        self.batches.pop(batch, None)

    @property
    def free(self) -> int:
        """Threads with nothing to do."""
        return self.threads - len(self.batches)

    def free_resources(self) -> dict[str, float]:
        """Return what the running tasks leave of each resource."""
        free = dict(self.resources)
        for batch in self.batches:
            for position in batch.positions:
                for name, amount in batch.holding.table.resources.get(position, {}).items():
                    free[name] -= amount
        return free

    def remaining(self) -> float:
        """Return the seconds that the running batches probably take yet, added up."""
        now = self.clock.monotonic()
        return sum(batch.remaining(now) for batch in self.batches)

    def room_for(self, holding: Holding, ahead: float) -> tuple[int, float]:
        """Return how many threads, and thread-seconds of the next `ahead` seconds, `holding` may use."""
        now = self.clock.monotonic()
        others = [batch for batch in self.batches if batch.holding is not holding]
        busy = sum(min(ahead, batch.remaining(now)) for batch in others)
        return self.threads - len(others), self.threads * ahead - busy
