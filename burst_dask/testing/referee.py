"""Watches a simulated store while it is written, and says at once which rule of the protocol is broken.

What can be seen in the store afterwards is `invariants`; here is what only shows at the moment:
whether an entry was legal when it landed, whether its segment was there before it, whether a
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
from burst_dask.protocol.shard import Shard, describe
from burst_dask.testing.bucket import EPOCH, Bucket
from burst_dask.testing.scenario import Scenario
from burst_dask.testing.work import Work


class Referee:
    """Folds every log as it grows.

    Attributes
    ----------
    broken : list of str
        What has been seen that must not be, with the story of the shard.
    """

    def __init__(self, bucket: Bucket, scenario: Scenario) -> None:
        self.broken: list[str] = []
        self.starts: Counter[tuple[str, int]] = Counter()
        self._bucket = bucket
        self._scenario = scenario
        self._plans: dict[RunId, Plan] = {}
        self._shards: dict[tuple[RunId, ShardId], Shard] = {}
        self._written: dict[str, bytes] = {}
        #: run and worker -> tasks that it ever reserved, by global number
        self._reserved: dict[tuple[str, str], set[int]] = {}
        bucket.watchers.append(self._see)

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
            self.starts[work.run, work.number] += 1
            reserved = self._reserved.get((work.run, worker), set())
            if (
                work.number not in reserved
                and not self._done(run, work.number)
                and not self._backed_up(run, work.number)
            ):
                home = keys.root_shard(self._plans[run].locate(work.number)[0])
                self.complain(f"{worker} started task {work.number}, which it had not reserved", run, home)

        return note

    def _backed_up(self, run: RunId, number: int) -> bool:
        """Tell whether a second copy of a task may run: somebody else has reserved it."""
        plan_shard, position = self._plans[run].locate(number)
        return self._scenario.settings.backups and any(
            position in shard.index.reserved
            for (of, id), shard in self._shards.items()
            if of == run and keys.root_number(id) == plan_shard
        )

    def _done(self, run: RunId, number: int) -> bool:
        plan_shard, position = self._plans[run].locate(number)
        return any(
            position in shard.index.outcomes.done
            for (of, id), shard in self._shards.items()
            if of == run and keys.root_number(id) == plan_shard
        )

    # ------------------------------------------------------------------ objects

    def _see(self, key: str, body: bytes) -> None:
        if key.endswith("/plan"):
            plan = decode(Plan, key, body)
            self._plans[plan.run] = plan
        elif "/runs/" in key and "/log/" in key:
            self._see_entry(key, body)
        if "/log/" in key or "/segments/" in key:
            if self._written.get(key, body) != body:
                again = "after it had been deleted" if key in self._bucket.deleted else "over what was there"
                self.complain(f"{key} was written {again} (rules 1 and 8)")
            self._written[key] = body

    def _see_entry(self, key: str, body: bytes) -> None:
        session, _, rest = key.removeprefix("s/").partition("/runs/")
        run, shard = RunId(f"{session}.{rest.partition('/')[0]}"), keys.shard_of_entry(key)
        entry = decode(Entry, key, body)
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
        self._check_segments(run, shard, before, after)
        if isinstance(entry.action, Claim | Commit | Takeover):
            first = self._plans[run].shards[keys.root_number(shard)].first
            mine = self._reserved.setdefault((run, entry.writer), set())
            mine.update(first + position for position in after.index.reserved)
        if isinstance(entry.action, Split):
            child = entry.action.child
            self._shards.setdefault((run, child), Shard.untouched(child, entry.action.tasks))
        if isinstance(entry.action, Takeover) and not self._scenario.processes_fail:
            self.complain(f"{entry.writer} took over from {entry.action.lost}, which lives (rule 6)", run, shard)

    def _shard(self, run: RunId, shard: ShardId) -> Shard:
        known = self._shards.get((run, shard))
        if known is None:
            count = self._plans[run].shards[keys.root_number(shard)].count
            known = Shard.untouched(shard, EMPTY if "-" in shard else Bitmap.full(count))
        return known

    def _check_segments(self, run: RunId, shard: ShardId, before: Shard, after: Shard) -> None:
        for name in after.index.objects[len(before.index.objects) :]:
            if not name.startswith("@") and keys.segment(run, shard, name) not in self._bucket.objects:
                self.complain(f"entry {before.next} names segment {name}, which is not there yet (rule 2)", run, shard)
