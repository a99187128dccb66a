"""Watches a simulated store while it is written, and says at once which rule of the protocol is broken.

What can be seen in the store afterwards is `invariants`; here is what only shows at the moment:
whether an entry was legal when it landed, whether what it names was there before it, whether a
task was reserved when it started.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from burst_dask.errors import BurstError, IllegalTransition
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Claim, Commit, Entry, Plan, Split, Takeover, decode
from burst_dask.protocol.shard import Shard, describe, is_segment
from burst_dask.testing.bucket import EPOCH, Bucket
from burst_dask.testing.needed import Fate, fate_of, needed
from burst_dask.testing.scenario import Scenario
from burst_dask.testing.work import Work


class Referee:
    """Folds every log as it grows.

    Attributes
    ----------
    broken : list of str
        What has been seen that must not be, with the story of the shard.
    actions : Counter of str
        Kind of entry -> how many have landed.
    printed : int
        How many objects with what tasks have printed were named.
    deleted : int
        How many segments were deleted.
    starts : Counter of tuple of (str, int)
        Run and task -> how often it was started, not counting second copies.
    """

    def __init__(self, bucket: Bucket, scenario: Scenario) -> None:
        self.broken: list[str] = []
        self.actions: Counter[str] = Counter()
        self.printed = self.deleted = 0
        self.starts: Counter[tuple[str, int]] = Counter()
        self._bucket = bucket
        self._scenario = scenario
        self._plans: dict[RunId, Plan] = {}
        self._shards: dict[tuple[RunId, ShardId], Shard] = {}
        self._written: dict[str, bytes] = {}
        #: run and worker -> tasks that it ever reserved, by global number
        self._reserved: dict[tuple[str, str], set[int]] = {}
        bucket.watchers.append(self._see)
        bucket.mourners.append(self._see_deletion)

    def complain(self, what: str, run: RunId | None = None, shard: ShardId | None = None) -> None:
        """Note that something is wrong."""
        at = f"at {self._bucket.loop.time():.3f} s: {what}"
        self.broken.append("\n    ".join([at, *(self.story(run, shard) if run and shard else ())]))

    def story(self, run: RunId, shard: ShardId) -> list[str]:
        """Return the log of a shard in plain words, with times."""
        log = keys.shard_log(run, shard)
        lines = []
        for key in sorted(key for key in self._bucket.objects if key.startswith(log)):
            stored = self._bucket.objects[key]
            try:
                lines.append(f"{stored.modified - EPOCH:9.3f} s  {describe(decode(Entry, key, stored.body))}")
            except BurstError as error:
                lines.append(f"{stored.modified - EPOCH:9.3f} s  {error}")
        return [f"shard {shard} of run {run}:", *lines]

    def stories(self) -> list[str]:
        """Return all logs of all runs in plain words."""
        return [line for run, shard in sorted(self._shards) for line in self.story(run, shard)]

    # ------------------------------------------------------------------ tasks

    def started(self, worker: str) -> Callable[[Work], None]:
        """Return what the executor of `worker` calls when a task starts."""

        def note(work: Work) -> None:
            run = RunId(work.run)
            home, position = self._plans[run].locate(work.number)
            family = [s for (of, id), s in self._shards.items() if of == run and keys.root_number(id) == home]
            done = any(position in shard.index.outcomes.done for shard in family)
            # A second copy runs while another worker has the task reserved, as far as its news of that go.
            reserved = any(
                work.number in tasks for (of, name), tasks in self._reserved.items() if of == run and name != worker
            )
            holds = any(shard.index.holder == worker and position in shard.index.tasks for shard in family)
            copy = self._scenario.settings.backups and reserved and not holds
            if not copy:
                self.starts[work.run, work.number] += 1
            if not (copy or done or work.number in self._reserved.get((work.run, worker), set())):
                what = f"{worker} started task {work.number}, which it had not reserved"
                self.complain(what, run, keys.root_shard(home))

        return note

    # ------------------------------------------------------------------ objects

    def _see(self, key: str, body: bytes) -> None:
        if key.endswith("/plan"):
            plan = decode(Plan, key, body)
            self._plans[plan.run] = plan
        elif "/runs/" in key and "/log/" in key:
            self._see_entry(key, body)
        if any(part in key for part in ("/log/", "/segments/", "/logs/")):
            if self._written.get(key, body) != body:
                again = "after it had been deleted" if key in self._bucket.deleted else "over what was there"
                self.complain(f"{key} was written {again} (rules 1 and 8)")
            self._written[key] = body

    def _see_entry(self, key: str, body: bytes) -> None:
        session, _, rest = key.removeprefix("s/").partition("/runs/")
        run, shard = RunId(f"{session}.{rest.partition('/')[0]}"), keys.shard_of_entry(key)
        entry = decode(Entry, key, body)
        self.actions[type(entry.action).__name__.lower()] += 1
        if run not in self._plans:
            self.complain(f"{entry.writer} wrote to the log of run {run}, which has no plan (rule 7)")
            return
        before = self._shard(run, shard)
        try:
            if entry.number != before.next:
                raise IllegalTransition(f"entry {entry.number} follows entry {before.next - 1}")
            after = before.apply(entry.writer, entry.action)
            if after.index != entry.index:
                raise IllegalTransition("its index is not what folding the log gives")
        except IllegalTransition as error:
            self.complain(f"{error.reason} (rule 1 or 3)", run, shard)
            after = Shard.at(shard, entry)
        self._shards[run, shard] = after
        self._check_objects(run, shard, before, after)
        self._check_discarded(run, shard, after.index.discarded - before.index.discarded)
        if isinstance(entry.action, Claim | Commit | Takeover):
            first = self._plans[run].shards[keys.root_number(shard)].first
            mine = self._reserved.setdefault((run, entry.writer), set())
            mine.update(first + position for position in after.index.reserved)
        if isinstance(entry.action, Split):
            child = entry.action.child
            self._shards.setdefault((run, child), Shard.untouched(child, entry.action.tasks))
        if isinstance(entry.action, Takeover) and not self._scenario.processes_fail:
            self.complain(f"{entry.writer} took over from {entry.action.lost}, which lives (rule 6)", run, shard)

    def _see_deletion(self, key: str) -> None:
        """Entries are never deleted, and segments only when an entry has said so."""
        if "/runs/" in key and "/log/" in key:
            self.complain(f"{key} was deleted (rule 8)")
        if "/segments/" not in key:
            return
        self.deleted += 1
        for (run, shard), state in self._shards.items():
            if key in [keys.segment(run, shard, name) for name in state.index.objects if is_segment(name)]:
                self.complain(f"{key} was deleted, and no entry has said that nobody needs it (rule 8)", run, shard)

    def _check_discarded(self, run: RunId, shard: ShardId, tasks: Bitmap) -> None:
        if not tasks:
            return
        graph, plan = self._scenario.graph, self._plans[run]

        def fate(task: int) -> Fate:
            home, position = plan.locate(task)
            for (of, id), state in self._shards.items():
                if of == run and keys.root_number(id) == home and position in state.index.tasks:
                    return fate_of(state.index.outcomes, position)
            return Fate.PENDING

        why = needed([work.inputs for work in graph.work], graph.outputs, fate)
        first = plan.shards[keys.root_number(shard)].first
        for task in (first + position for position in tasks):
            if task in why:
                self.complain(f"the result of task {task} was discarded, and {why[task]} (discarding)", run, shard)

    def _shard(self, run: RunId, shard: ShardId) -> Shard:
        known = self._shards.get((run, shard))
        if known is None:
            count = self._plans[run].shards[keys.root_number(shard)].count
            known = Shard.untouched(shard, EMPTY if "-" in shard else Bitmap.full(count))
        return known

    def _check_objects(self, run: RunId, shard: ShardId, before: Shard, after: Shard) -> None:
        names = after.index.objects[len(before.index.objects) :]
        named = [keys.segment(run, shard, name) for name in names if is_segment(name)]
        logs = after.index.outcomes.logs.keys() - before.index.outcomes.logs.keys()
        self.printed += len(logs)
        for key in (*named, *(keys.task_logs(run, shard, name) for name in sorted(logs))):
            if key not in self._bucket.objects:
                self.complain(f"entry {before.next} names {key}, which is not there yet (rule 2)", run, shard)
