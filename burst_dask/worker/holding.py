"""One held shard in a worker's memory: what can run, what runs, what has ended.

Pure bookkeeping in the manner of `dask.local` and of distributed's worker state machine: the
agent tells it events (`news`, `loaded`, `finish`, `refold`; see `moves`) and asks it questions
(`take`, `to_load`, `awaited`, `reserve`). No I/O, no clock.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.worker.moves import Moves
from burst_dask.worker.table import fits


class Holding(Moves):
    """A shard that this worker holds, and what there is to do in it."""

    def take(self, seconds: float, free: Mapping[str, float] | None = None) -> list[int]:
        """Return tasks for one thread, in an order in which they can run one after another.

        They take about `seconds` together, so that tiny tasks pay for one thread hop in many;
        a dependent that only needs tasks of the same batch is part of it. A task of unknown
        kind, longer than that, with a time limit, or in need of a resource (of which `free` is left)
        comes alone.
        """
        batch: list[int] = []
        members: set[int] = set()
        unmet: dict[int, int] = {}
        followers: list[int] = []
        while seconds > 0 and (position := self._next(followers, free or {})) is not None:
            estimate = self.durations.known(self.table.kinds[position])
            estimate = seconds if estimate is None or position in self.alone else estimate
            if batch and estimate >= seconds:
                if position not in unmet:
                    heapq.heappush(self.ready, self._rank(position))
                break
            seconds -= estimate
            batch.append(position)
            members.add(position)
            for dependent in self.table.dependents[position]:
                left = unmet[dependent] = unmet.get(dependent, self.unmet.get(dependent, 0)) - 1
                if not left and self._follows(dependent, members):
                    heapq.heappush(followers, dependent)
        self.running |= members
        self.attempts.update(batch)
        return batch

    def _next(self, followers: list[int], free: Mapping[str, float]) -> int | None:
        if followers:
            return heapq.heappop(followers)
        unfit = []
        found = None
        while self.ready and found is None:
            item = heapq.heappop(self.ready)
            position = item[1]
            if position not in self.todo or position in self.running:
                continue
            if not self._may_start(position):
                self.parked.add(position)  # it was given back
            elif fits(self.table.resources.get(position, {}), free):
                found = position
            else:
                unfit.append(item)
        for item in unfit:
            heapq.heappush(self.ready, item)
        return found

    def _follows(self, position: int, members: set[int]) -> bool:
        return (
            position in self.todo
            and self._may_start(position)
            and position not in self.alone
            and all(n in self.values or n - self.table.first in members for n in self.table.dependencies[position])
        )

    def startable(self, free: Mapping[str, float] | None = None) -> bool:
        """Tell whether `take` would return anything."""
        found = self._next([], free or {})
        if found is None:
            return False
        heapq.heappush(self.ready, self._rank(found))
        return True

    def to_load(self, limit: int, size: Callable[[int], int]) -> tuple[list[int], set[int]]:
        """Return the next tasks whose inputs are to be read, and the global numbers of those.

        As many as fit in `limit` bytes by `size`, at least one.
        """
        positions: list[int] = []
        numbers: set[int] = set()
        while self.loadable and (limit > 0 or not positions):
            _, position = heapq.heappop(self.loadable)
            if position not in self.todo:
                continue
            missing = {n for n in self.table.dependencies[position] if n not in self.values} - numbers
            limit -= sum(map(size, missing))
            numbers |= missing
            positions.append(position)
            self.loading.add(position)
        return positions, numbers

    def awaited(self) -> Iterator[int]:
        """Yield, ascending, the global number of the first outcome elsewhere that each waiting task lacks.

        A task that waits for many needs all of them, so looking for one is enough for now.
        """
        held_up = {position for position, count in self.unmet_foreign.items() if count > 0}
        for number in sorted(self.waiting):
            if not held_up.isdisjoint(self.waiting[number]):
                held_up.difference_update(self.waiting[number])
                yield number
            if not held_up:
                return

    def candidates(self) -> Iterator[int]:
        """Yield, in order, pending tasks that can run now or after others of this shard."""
        reach: set[int] = set()
        first = self.table.first
        for position in sorted(self.todo):
            if self.unmet_foreign.get(position, 0) > 0 or position in self.lacking:
                continue
            own = (number - first for number in self.table.dependencies[position])
            if self.unmet[position] and any(p in self.todo and p not in reach for p in own):
                continue
            if position not in self.shard.index.strikes:
                reach.add(position)  # suspects run after all others, so nothing is reached through them
            if position not in self.revived:
                yield position

    def reserve(self, threads: int, seconds: float) -> Bitmap:
        """Return the tasks to reserve with the next entry, for that many threads and thread-seconds."""
        candidates, strikes = self.candidates(), self.shard.index.strikes
        resting = Bitmap.of(self.resting - self.revived)
        if resting:  # it stays reserved, takes no time, and no suspect is alone with it
            candidates = (p for p in candidates if p not in resting and p not in strikes)
        running = Bitmap.of((self.running & self.todo) - self.revived)
        return resting | policy.reserve(candidates, self.guess, strikes, running, threads, seconds)

    def guess(self, position: int) -> float:
        """Return how many seconds the task at `position` probably takes."""
        return self.durations.guess(self.table.kinds[position])

    def ahead(self) -> float:
        """Return the probable seconds of reserved work that can run and has not begun."""
        reserved = self.shard.index.reserved
        begun = self.running | self.resting
        return sum(self.guess(p) for p in self.candidates() if p in reserved and p not in begun)

    def left(self) -> float:
        """Return the probable seconds of work here that needs no news, running tasks included in full."""
        return sum(self.guess(p) for p in self.candidates())

    def spare(self) -> float:
        """Return roughly how many seconds of work here could be split off."""
        count = len(self.shard.splittable)
        return count * self.guess(next(iter(self.todo))) if count and self.todo else 0.0

    def remaining(self) -> float:
        """Return roughly how many seconds of work that can run now are left here."""
        queued = len(self.ready) + len(self.loadable) + len(self.loading) + len(self.parked)
        return queued * self.guess(next(iter(self.todo))) if queued and self.todo else 0.0

    def only_here(self) -> dict[int, Any]:
        """Return what would be lost with this holder and is needed here yet: results in memory, by position."""
        first, stored, ran = self.table.first, self.shard.index.outcomes.stored, self.finished.ran
        return {
            number - first: self.values[number]
            for number in self.uses
            if number - first in self.shard.index.tasks
            and number in self.values
            and number - first not in stored
            and (number - first not in ran or ran[number - first].body is None)
        }

    @property
    def unfit(self) -> bool:
        """Whether all that is left needs a resource that this worker lacks, or comes after such tasks."""
        if not self.lacking & self.todo or self.active or any(self.waiting.values()):
            return False
        return next(self.candidates(), None) is None

    @property
    def blocked(self) -> bool:
        """Whether nothing can be done here before other shards' outcomes are known."""
        return not (self.active or self.finished) and next(self.candidates(), None) is None

    @property
    def finished_positions(self) -> Bitmap:
        """Positions with outcomes that are not yet committed."""
        return Bitmap.of(p for group in (self.finished.ran, *self.finished.upstream.values()) for p in group)

    @property
    def active(self) -> bool:
        """Whether a task here runs, or may start without any news."""
        return bool(self.running or self.ready or self.loadable or self.loading)
