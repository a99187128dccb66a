"""How the tasks of a held shard move from one state to the next.

::

    waiting ──▶ loadable ──▶ ready ──▶ running ──▶ finished ──▶ (committed)
       │            (inputs must be read)  │             ▲
       └── a dependency failed ────────────┼─────────────┘
                                           └── failed, retries left ──▶ resting ──▶ ready

``parked`` are tasks that could be loadable or ready, were they reserved (PROTOCOL.md,
"Reservation"): only the newest entry's reserved tasks may start.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any, Protocol

from burst_dask.journal.outcomes import Source, TaskOutcome
from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.shard import Shard
from burst_dask.worker.durations import Durations
from burst_dask.worker.memory import Scope
from burst_dask.worker.output import size_of
from burst_dask.worker.ran import Finished, Ran
from burst_dask.worker.table import TaskTable, fits


class Known(Protocol):
    """What is known of the whole run: a `RunView`."""

    def outcome(self, task: int, /) -> TaskOutcome | None:
        """Return the outcome of the task with that global number, or None while there is none."""

    def source(self, task: int, /) -> Source:
        """Return what shows whether anything was learned that the outcome of a task may be among."""


class Moves:
    """A shard that this worker holds.

    Parameters
    ----------
    shard
        Its folded state, with this worker as the holder.
    table
        Its tasks.
    values
        Results in memory by global number; private to this holding.
    known
        What is known of the other tasks of the run.
    durations
        How long tasks of each kind take.
    resources
        What the worker has, by name.
    """

    def __init__(
        self,
        shard: Shard,
        table: TaskTable,
        values: Scope,
        known: Known,
        durations: Durations,
        resources: dict[str, float] | None = None,
    ) -> None:
        self.shard = shard
        self.table = table
        self.values = values
        self.durations = durations
        #: tasks that need more of a resource than this worker has: others may run them
        self.lacking = {p for p, need in table.resources.items() if not fits(need, resources or {})}
        #: tasks that a thread runs by themselves
        self.alone = table.resources.keys() | table.timeouts.keys()
        self._known = known
        #: positions to run: those without an outcome, and `revived`
        self.todo: set[int] = set()
        #: done before, by a holder that died with their results; run again, not committed again
        self.revived: set[int] = set()
        #: position -> dependencies without an outcome, or outside of memory with no place in the store
        self.unmet: dict[int, int] = {}
        #: … of which in other shards
        self.unmet_foreign: Counter[int] = Counter()
        #: global number of an awaited outcome elsewhere -> positions here that need it, in order; perhaps none any more
        self.waiting: dict[int, dict[int, None]] = {}
        #: the same numbers by what will show that there is news of them, and how many changes that had when looked at
        self._sources: dict[Source, set[int]] = {}
        self._looked: dict[Source, int] = {}
        self.parked: set[int] = set()
        self.loadable: list[tuple[int, int]] = []
        self.loading: set[int] = set()
        self.ready: list[tuple[int, int]] = []
        self.running: set[int] = set()
        #: tasks that failed and are to be tried again after a pause
        self.resting: set[int] = set()
        self.attempts: Counter[int] = Counter(shard.index.outcomes.tries)
        self.finished = Finished()
        #: what the entry on its way reserves; it may land at any moment, and what it gives back may be split off then
        self.sent: Bitmap | None = None
        #: global number -> how many positions to run still need its value
        self.uses: Counter[int] = Counter()
        #: positions whose results tasks of other shards wait for …
        self.consumed: Bitmap = EMPTY
        #: … and all whose results somebody outside the shard needs, the client too
        self.wanted: Bitmap = EMPTY
        #: bytes of uncommitted results, and whether tasks of other shards wait for one
        self.finished_size = 0
        self.finished_consumed = False
        self._plan_todo()

    # ------------------------------------------------------------------ beginning

    def _plan_todo(self) -> None:
        index, table = self.shard.index, self.table
        self.todo = set(index.pending)
        stack = list(self.todo)
        while stack:
            for dependency in table.dependencies[stack.pop()]:
                position = dependency - table.first
                if self._lost(position) and position not in self.todo:
                    self.todo.add(position)
                    self.revived.add(position)
                    stack.append(position)
        self._find_wanted()
        for position in self.todo:
            self.uses.update(table.dependencies[position])
        for position in sorted(self.todo):
            self._connect(position)

    def _lost(self, position: int) -> bool:
        """Tell whether an own task is done, but its result was only in a dead worker's memory."""
        outcomes = self.shard.index.outcomes
        return position in self.shard.index.tasks and position in outcomes.done and position not in outcomes.stored

    def _find_wanted(self) -> None:
        tasks, table = self.shard.index.tasks, self.table
        self.consumed = table.consumed & tasks
        if len(tasks) < table.count:
            # Part of the plan's shard lies in another one: what crosses the cut is needed outside.
            self.consumed |= Bitmap.of(p for p in tasks if any(d not in tasks for d in table.dependents[p]))
        self.wanted = self.consumed | (table.outputs & tasks)

    def _connect(self, position: int) -> None:
        """Count what a task waits for; it may turn out ready, or failed upstream."""
        unmet = 0
        failed: TaskOutcome | None = None
        for dependency in self.table.dependencies[position]:
            if dependency - self.table.first in self.todo:
                unmet += 1
                continue
            outcome = self._known.outcome(dependency)
            if outcome is None:
                self._await(dependency, position)
                unmet += 1
            elif not outcome.done and failed is None:
                failed = outcome
        self.unmet[position] = unmet
        if failed is not None:
            assert failed.cause is not None
            self._fail_upstream([position], failed.cause, failed.cancelled)
        elif not unmet:
            self._enable(position)

    def _await(self, number: int, position: int) -> None:
        """Note that a task here needs an outcome that is told elsewhere."""
        if number not in self.waiting:
            self.waiting[number] = {}
            self._sources.setdefault(self._known.source(number), set()).add(number)
        self.waiting[number][position] = None
        self.unmet_foreign[position] += 1

    # ------------------------------------------------------------------ events

    def news(self) -> bool:
        """Take in outcomes of other shards that have become known; tell whether any mattered."""
        mattered = False
        for number, outcome in self._told():
            mattered = True
            positions = self.waiting.pop(number)
            if outcome.done:
                for position in positions:
                    self.unmet_foreign[position] -= 1
                    self._met(position)
            else:
                assert outcome.cause is not None
                self._fail_upstream(positions, outcome.cause, outcome.cancelled)
        return mattered

    def _told(self) -> list[tuple[int, TaskOutcome]]:
        """Return the awaited outcomes that have become known, by global number, each once."""
        told = []
        for source, numbers in list(self._sources.items()):
            # Thousands of tasks may be awaited, and most looks come when nothing of them can have become known.
            if self._looked.get(source) == source.changes:
                continue
            self._looked[source] = source.changes
            found = [(n, outcome) for n in sorted(numbers) if (outcome := self._known.outcome(n)) is not None]
            numbers.difference_update(number for number, _ in found)
            if not numbers:
                del self._sources[source], self._looked[source]
            told += found
        return told

    def loaded(self, positions: Iterable[int], values: dict[int, tuple[Any, int]]) -> None:
        """Take in inputs read for `positions`, which become ready: values with their sizes."""
        for number, (value, size) in values.items():
            if self.uses.get(number):
                self.values.put(number, value, size)
        for position in positions:
            self.loading.discard(position)
            if position in self.todo:
                self._enable(position)

    def give_up(self, ran: Ran) -> None:
        """Record an outcome without another try: it is cancelled, an input cannot be read, or workers die of it."""
        self.loading.discard(ran.position)
        self._end(ran)

    def unstarted(self, numbers: Bitmap) -> list[int]:
        """Return the positions of those tasks, given by global number, that have no outcome and do not run."""
        first, idle = self.table.first, self.todo - self.revived - self.running
        return sorted(position for position in idle if first + position in numbers)

    def under_way(self, numbers: Bitmap) -> bool:
        """Tell whether one of those tasks runs here."""
        return any(self.table.first + position in numbers for position in self.running)

    def finish(self, ran: Ran) -> bool:
        """Record that an execution has ended; tell whether it is to be tried again, when `rested`."""
        position = ran.position
        self.running.discard(position)
        if position not in self.todo:
            return False  # taken by a backup copy meanwhile
        if ran.output is not None:
            self.finished.outputs.append(ran.output)
            self.finished_size += size_of(ran.output)
        if not ran.failed or not self._may_retry(ran):
            self._end(ran)
            return False
        if position not in self.revived:
            self.finished.tries[position] = self.attempts[position]
        self.resting.add(position)
        return True

    def _may_retry(self, ran: Ran) -> bool:
        tries, table = self.attempts[ran.position], self.table
        allowed = tries <= table.retries.get(ran.position, 0)
        return allowed and policy.may_retry(ran.raised, table.retry_on.get(ran.position))

    def rested(self, position: int) -> None:
        """Let a task be tried again."""
        if position in self.resting:
            self.resting.discard(position)
            self._enable(position)

    def give_back(self, position: int) -> None:
        """Record that a task taken for a batch was not started after all."""
        self.running.discard(position)
        self.attempts[position] -= 1
        if position in self.todo and not self.unmet[position]:
            self._enable(position)

    def refold(self, shard: Shard) -> None:
        """Take in what others appended: tasks split off, or finished by a backup copy."""
        gone = self.shard.index.tasks - shard.index.tasks
        covered = shard.index.outcomes.all - self.shard.index.outcomes.all
        self.shard, self.sent = shard, None
        for position in gone:
            # What stays here and depends on it now awaits another shard's outcome.
            self._forget(position)
            for dependent in self.table.dependents[position]:
                if dependent in self.todo and dependent not in gone:
                    self._await(self.table.first + position, dependent)
        if gone:
            self._find_wanted()
        for position in covered:
            self._beaten(position)
        self.news()
        self._unpark()

    def _beaten(self, position: int) -> None:
        """Take in that a backup copy brought the result of a task first."""
        ran = self.finished.ran.pop(position, None)
        self.finished.cancelled.discard(position)
        if position in self.todo:
            self._forget(position)
            self._settle_dependents(position)
        elif ran is not None and ran.failed:
            # It failed here, and what that made fail upstream can run after all.
            revoked = sorted(self.finished.upstream.pop(self.table.first + position, ()))
            self.todo.update(revoked)
            self.finished.cancelled.difference_update(revoked)
            for dependent in revoked:
                self.uses.update(self.table.dependencies[dependent])
            for dependent in revoked:
                self._connect(dependent)

    def sending(self, shard: Shard) -> None:
        """Note that the entry which leads to `shard` is on its way: only what it reserves, too, may start."""
        self.sent = shard.index.reserved

    def committed(self, shard: Shard) -> None:
        """Take in the state after an entry of one's own."""
        self.shard, self.sent = shard, None
        self._unpark()

    def collect(self) -> Finished:
        """Return what has finished, which from now on is being committed."""
        finished, self.finished = self.finished, Finished()
        self.finished_size, self.finished_consumed = 0, False
        return finished

    # ------------------------------------------------------------------ how tasks move

    def _met(self, position: int) -> None:
        self.unmet[position] -= 1
        if not self.unmet[position] and position in self.todo and position not in self.running:
            self._enable(position)

    def _may_start(self, position: int) -> bool:
        if position in self.lacking:
            return False
        if position in self.revived:
            return True
        return position in self.shard.index.reserved and (self.sent is None or position in self.sent)

    def _enable(self, position: int) -> None:
        """Queue a task whose dependencies all have outcomes."""
        if not self._may_start(position):
            self.parked.add(position)
            return
        missing = any(number not in self.values for number in self.table.dependencies[position])
        heapq.heappush(self.loadable if missing else self.ready, self._rank(position))

    def _unpark(self) -> None:
        for position in [p for p in self.parked if self._may_start(p)]:
            self.parked.discard(position)
            self._enable(position)

    def _end(self, ran: Ran) -> None:
        """Give a task its outcome, to be committed."""
        position = ran.position
        number = self.table.first + position
        self._forget(position)
        if position not in self.revived:
            self.finished.ran[position] = ran
            if ran.cancelled:
                self.finished.cancelled.add(position)
            self.finished_size += sum(memoryview(part).nbytes for part in ran.body or ())
            self.finished_consumed |= position in self.consumed
        if not ran.failed:
            if self.uses.get(number):
                self.values.put(number, ran.value, ran.size)
            ran.value = None
            self._settle_dependents(position)
        elif position in self.revived:
            # It was done once and now is not: whoever needs it fails with this error.
            for dependent in self.table.dependents[position]:
                if dependent in self.todo:
                    self._end(Ran(dependent, body=ran.body, failed=True))
        else:
            self._fail_upstream(self.table.dependents[position], number, ran.cancelled)

    def _settle_dependents(self, position: int) -> None:
        for dependent in self.table.dependents[position]:
            if dependent in self.todo:
                self._met(dependent)

    def _fail_upstream(self, positions: Iterable[int], cause: int, cancelled: bool) -> None:
        """Give tasks, and all that depend on them here, the outcome `upstream failed` (rule 4)."""
        stack = list(positions)
        while stack:
            position = stack.pop()
            if position not in self.todo:
                continue
            self._forget(position)
            if position not in self.revived:
                self.finished.upstream[cause].add(position)
                if cancelled:
                    self.finished.cancelled.add(position)
            stack.extend(self.table.dependents[position])

    def _forget(self, position: int) -> None:
        """Take a task out of what is to run, and let go of inputs that nothing else needs."""
        if position not in self.todo:
            return
        self.todo.discard(position)
        self.parked.discard(position)
        self.resting.discard(position)
        self.finished.tries.pop(position, None)
        self.unmet_foreign.pop(position, None)
        for number in self.table.dependencies[position]:
            self.waiting.get(number, {}).pop(position, None)
            self.uses[number] -= 1
            if not self.uses[number]:
                del self.uses[number]
                self.values.pop(number, None)

    def _rank(self, position: int) -> tuple[int, int]:
        return (-self.table.priority.get(position, 0), position)
