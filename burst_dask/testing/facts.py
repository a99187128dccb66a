"""A session and a run as they lie in the store, read once, whether they are whole or damaged.

A run may go on while it is read. So that nothing looks wrong that is only new, its logs are listed twice:
what a task has (its outcome) is taken from the first listing, what it must have had before (the outcomes of
its dependencies) from the second one, which is newer. Results are only checked, a few objects at a time, and not
kept, because all of them together may be larger than this machine's memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from burst_dask.client.shapes import numbers
from burst_dask.config import Settings
from burst_dask.errors import ConfigError, IllegalTransition
from burst_dask.journal import across
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, SessionId, ShardId
from burst_dask.protocol.records import Entry, Manifest, Outcomes, Plan, ShardIndex, ShardRecord
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import SessionEntry
from burst_dask.protocol.shard import describe, is_segment
from burst_dask.store.base import Store
from burst_dask.testing.reading import Reading, Violation, decoded, fetched, listed, slot

# ---------------------------------------------------------------------------- a session


@dataclass(frozen=True)
class SessionFacts:
    """A session as it lies in the store."""

    session: SessionId
    #: None when there is none, or it cannot be read
    manifest: Manifest | None
    settings: Settings
    #: as folded, up to an entry that does not fit
    state: SessionState
    entries: int
    violations: tuple[Violation, ...]


async def gather_session(store: Store, session: SessionId) -> SessionFacts:
    """Read the manifest and the log of a session."""
    found: list[Violation] = []
    key = keys.manifest(session)
    manifest = decoded(Manifest, key, await store.get(key), found)
    settings = Settings()
    try:
        if manifest is not None:
            settings = Settings.of(**manifest.settings)
    except ConfigError as error:
        found.append(Violation("objects", f"{key}: {error}"))
    names = [meta.key for meta in await listed(store, keys.session_log(session))]
    bodies = await in_parallel(lambda name: fetched(store, name, found), names)
    entries = [decoded(SessionEntry, name, body, found) for name, body in zip(names, bodies, strict=True)]
    state = _fold_session([entry for entry in entries if entry is not None], found)
    return SessionFacts(session, manifest, settings, state, len(names), tuple(found))


def _fold_session(entries: Iterable[SessionEntry], found: list[Violation]) -> SessionState:
    state = SessionState()
    nonces: set[str] = set()
    for entry in entries:
        if entry.nonce in nonces:
            found.append(Violation("session log", f"entry {entry.number} has a nonce that was used before"))
        nonces.add(entry.nonce)
        try:
            state = state.apply(entry)
        except IllegalTransition as error:
            found.append(Violation("session log", error.reason))
            break
    return state


# ---------------------------------------------------------------------------- a run


@dataclass(frozen=True)
class Facts:
    """A run as it lies in the store."""

    run: RunId
    session: SessionFacts
    #: all objects of the run, with their sizes in bytes
    objects: Mapping[str, int] = field(default_factory=dict)
    #: None when there is none, or it cannot be read
    plan: Plan | None = None
    #: plan number -> its task records; those that cannot be read are missing
    records: Mapping[int, ShardRecord] = field(default_factory=dict)
    #: shard -> number by its key -> entry, in order; entries that cannot be read are missing
    logs: Mapping[ShardId, Mapping[int, Entry]] = field(default_factory=dict)
    #: shard -> numbers of entries that cannot be read -> why
    unreadable: Mapping[ShardId, Mapping[int, str]] = field(default_factory=dict)
    #: shard -> number of the newest entry of the first of two listings
    settled: Mapping[ShardId, int] = field(default_factory=dict)
    #: shard and position -> why the stored outcome cannot be read
    lost: Mapping[tuple[ShardId, int], str] = field(default_factory=dict)
    #: shard and place in its `ShardIndex.objects` of segments that were discarded while all of this was read
    leaving: frozenset[tuple[ShardId, int]] = frozenset()
    #: shard and name of an object with what tasks have printed -> why it cannot be read
    lost_logs: Mapping[tuple[ShardId, str], str] = field(default_factory=dict)
    #: global number of an external -> whether it is done; None without an outcome; unknown ones are missing
    externals: Mapping[int, bool | None] = field(default_factory=dict)
    #: what was found while reading
    violations: tuple[Violation, ...] = ()

    def story(self, shard: ShardId) -> tuple[str, ...]:
        """Return the log of a shard in plain words."""
        lines = {number: f"  {describe(entry)}" for number, entry in self.logs.get(shard, {}).items()}
        lines |= {
            number: f"  {number}: cannot be read: {why}" for number, why in self.unreadable.get(shard, {}).items()
        }
        return (f"shard {shard}:", *(lines[number] for number in sorted(lines)))

    @property
    def is_swept(self) -> bool:
        """Whether the session was closed and its graphs deleted, as `cleanup` does: only outputs are left."""
        return self.session.state.closed and not any("/packs/" in key for key in self.objects)

    def is_kept(self, shard: ShardId, position: int) -> bool:
        """Tell whether a `cleanup` keeps the outcome of a task: an output of the run, or an error."""
        if self.plan is None or position in self.index(shard).outcomes.failed:
            return True
        return self.plan.shards[keys.root_number(shard)].first + position in numbers(self.plan.outputs)

    @property
    def is_marked_complete(self) -> bool:
        return keys.complete(self.run) in self.objects

    # ------------------------------------------------------------------ shards

    def index(self, shard: ShardId) -> ShardIndex:
        """Return the newest state of a shard."""
        entries = self.logs.get(shard)
        return entries[max(entries)].index if entries else ShardIndex(tasks=self.beginning(shard) or EMPTY)

    def settled_outcomes(self, shard: ShardId) -> Outcomes:
        """Return the outcomes as of the first listing."""
        return self.settled_index(shard).outcomes

    def settled_index(self, shard: ShardId) -> ShardIndex:
        """Return the state as of the first listing."""
        newest = self.settled.get(shard, -1)
        known = [number for number in self.logs.get(shard, {}) if number <= newest]
        return self.logs[shard][max(known)].index if known else ShardIndex(tasks=EMPTY)

    def beginning(self, shard: ShardId) -> Bitmap | None:
        """Return the tasks that a shard began with; None for one that neither the plan nor a SPLIT names."""
        assert self.plan is not None
        parent, dash, _ = shard.rpartition("-")
        if dash:
            return self.index(ShardId(parent)).children.get(shard) if self.logs.get(ShardId(parent)) else None
        number = keys.root_number(shard)
        return Bitmap.full(self.plan.shards[number].count) if number < len(self.plan.shards) else None

    def first(self, shard: ShardId) -> int:
        """Return the global number of position 0."""
        assert self.plan is not None
        return self.plan.shards[keys.root_number(shard)].first

    def steps(self, shard: ShardId) -> Iterator[tuple[ShardIndex, Entry]]:
        """Yield each entry with the state before it, where that is known."""
        before: tuple[int, ShardIndex] = (-1, ShardIndex(tasks=self.beginning(shard) or EMPTY))
        for number, entry in self.logs[shard].items():
            if number == before[0] + 1:
                yield before[1], entry
            before = (number, entry.index)

    @cached_property
    def known_shards(self) -> list[ShardId]:
        """The shards with a log that the plan or a SPLIT names."""
        return sorted(shard for shard in self.logs if self.beginning(shard) is not None)

    @cached_property
    def families(self) -> list[list[ShardId]]:
        """By plan number: the shard and all that was split off it, whether they have a log or not."""
        assert self.plan is not None
        families = []
        for number in range(len(self.plan.shards)):
            family = [keys.root_shard(number)]
            for shard in family:
                # Of an entry that a bug has written, a child may have any name.
                family.extend(child for child in self.index(shard).children if child.rpartition("-")[0] == shard)
            families.append(family)
        return families

    @cached_property
    def uncertain(self) -> frozenset[int]:
        """Plan numbers of shards some of whose outcomes are not known: a newest entry cannot be read."""
        return frozenset(
            keys.root_number(shard)
            for shard, numbers in self.unreadable.items()
            if max(numbers) > max(self.logs.get(shard, {}), default=-1)
        )

    # ------------------------------------------------------------------ tasks

    def locate(self, task: int) -> tuple[int, int]:
        """Return the plan number of the shard of a task, and its position there."""
        number = bisect_right(self._firsts, task) - 1
        return number, task - self._firsts[number]

    @property
    def tasks(self) -> int:
        """How many tasks there are; the numbers from here on are externals."""
        return 0 if self.plan is None else self.plan.tasks

    @cached_property
    def _firsts(self) -> list[int]:
        assert self.plan is not None
        return [info.first for info in self.plan.shards]

    @cached_property
    def done(self) -> list[Bitmap]:
        """By plan number: positions of tasks that are done."""
        return [self._union(family, lambda outcomes: outcomes.done) for family in self.families]

    @cached_property
    def failed(self) -> list[Bitmap]:
        """By plan number: positions of tasks that failed, by themselves or upstream."""
        return [self._union(family, lambda outcomes: outcomes.failed) for family in self.families]

    def _union(self, family: Iterable[ShardId], part: Callable[[Outcomes], Bitmap]) -> Bitmap:
        bits = 0
        for shard in family:
            bits |= part(self.index(shard).outcomes).bits
        return Bitmap(bits)

    @cached_property
    def causes(self) -> dict[int, int]:
        """Global number of each failed task -> that of the task whose failure it is."""
        found: dict[int, int] = {}
        for shard in (shard for family in self.families for shard in family):
            first, outcomes = self.first(shard), self.index(shard).outcomes
            found.update((first + position, first + position) for position in outcomes.failed)
            for cause, positions in outcomes.upstream.items():
                found.update((first + position, cause) for position in positions)
        return found

    def dependencies(self, number: int, position: int) -> tuple[int, ...]:
        """Return the global numbers of what a task needs of this run and, behind those, of others, ascending.

        Nothing, if its records cannot be read.
        """
        record = self.records.get(number)
        if record is None or position >= len(record.dependencies):
            return ()
        return record.dependencies[position]

    def needs(self, number: int, position: int) -> int:
        """Return as bits the positions in the same plan shard that a task needs."""
        masks = self._needs.get(number, ())
        return masks[position] if position < len(masks) else 0

    @cached_property
    def _needs(self) -> dict[int, list[int]]:
        return {
            number: [
                _bits(record.first, record.first + len(record.dependencies), needs) for needs in record.dependencies
            ]
            for number, record in self.records.items()
        }


def _bits(first: int, end: int, needs: tuple[int, ...]) -> int:
    bits = 0
    for need in needs:
        if first <= need < end:  # behind the last of all are externals
            bits |= 1 << (need - first)
    return bits


def own_failures(outcomes: Outcomes) -> Bitmap:
    """Return the tasks that failed by themselves."""
    bits = outcomes.failed.bits
    for positions in outcomes.upstream.values():
        bits &= ~positions.bits
    return Bitmap(bits)


# ---------------------------------------------------------------------------- gathering


async def gather(store: Store, run: RunId, session: SessionFacts | None = None) -> Facts:
    """Read a run.

    Parameters
    ----------
    session
        Its session, if that was read already.
    """
    session = session or await gather_session(store, keys.session_of(run))
    settled: dict[ShardId, int] = {}
    for meta in await listed(store, keys.run_logs(run)):
        if (place := slot(run, meta.key)) is not None:
            settled[place[0]] = max(settled.get(place[0], -1), place[1])
    # In one listing, logs come before segments: so those that an entry names are in it, too.
    objects = {meta.key: meta.size for meta in await listed(store, keys.run_prefix(run))}
    found: list[Violation] = []
    key = keys.plan(run)
    plan = decoded(Plan, key, await fetched(store, key, found), found)
    reading = Reading(store, run, found)
    await in_parallel(reading.entry, (key for key in objects if slot(run, key) is not None))
    facts = Facts(
        run,
        session,
        objects,
        plan,
        logs={shard: dict(sorted(log.items())) for shard, log in sorted(reading.logs.items())},
        unreadable=reading.unreadable,
        settled=settled,
    )
    if plan is not None:
        indices = {shard: facts.index(shard) for shard in facts.known_shards}
        await reading.results(indices)
        await reading.discarded_since(indices, objects)
        await reading.printed(indices)
        if not facts.is_swept:
            await reading.records(plan)
    return replace(
        facts,
        records=dict(sorted(reading.task_records.items())),
        lost=reading.lost,
        leaving=frozenset(reading.leaving),
        lost_logs=reading.lost_logs,
        externals={} if plan is None else await across.outcomes(store, plan),  # read last: newer than what needs them
        violations=tuple(found),
    )


def garbage(facts: Facts) -> list[str]:
    """Return what lies there and belongs to nothing: that is no violation, and `cleanup` deletes it.

    A segment, or what tasks have printed, is also among these until the entry that names it is written.
    """
    if facts.plan is None:
        return [f"{len(facts.objects)} objects of run {facts.run}, whose submission ended before its plan was written"]
    found = []
    if facts.run not in facts.session.state.runs:
        found.append(f"run {facts.run}: no entry of the session log names it, so nobody works on it")
    named = {keys.plan(facts.run), keys.complete(facts.run), keys.names(facts.run)}
    for info in facts.plan.shards:
        named.add(keys.pack(facts.run, info.place.pack))
    for record in facts.records.values():
        named.update(keys.pack(facts.run, place.pack) for place in record.buffers)
    for shard in facts.known_shards:
        index = facts.index(shard)
        named.update(keys.segment(facts.run, shard, name) for name in index.objects if is_segment(name))
        named.update(keys.task_logs(facts.run, shard, name) for name in index.outcomes.logs)
    for key, size in facts.objects.items():
        if key not in named and slot(facts.run, key) is None:
            found.append(f"{key} ({size} bytes): nothing names it")
    return found
