"""A session and a run as they lie in the store, read once, whether they are whole or damaged.

A run may go on while it is read. So that nothing looks wrong that is only new, its logs are listed twice:
what a task has (its outcome) is taken from the first listing, what it must have had before (the outcomes of
its dependencies) from the second one, which is newer. Results are read one object after another and only
checked, because all of them together may be larger than this machine's memory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple, TypeVar

from burst_dask.config import Settings
from burst_dask.errors import ConfigError, CorruptObject, IllegalTransition
from burst_dask.journal import across
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import unseal
from burst_dask.protocol.keys import RunId, SessionId, ShardId
from burst_dask.protocol.records import (
    Entry,
    Manifest,
    Outcomes,
    Place,
    Plan,
    Record,
    SessionEntry,
    ShardIndex,
    ShardRecord,
    decode,
    decode_with_end,
)
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.shard import describe, object_key_name
from burst_dask.store.base import Meta, Span, Store
from burst_dask.submission import numbers

#: Objects with results or constants read at once: each may be many megabytes.
LARGE_PARALLEL = 4

R = TypeVar("R", bound=Record)


class Violation(NamedTuple):
    """Something that must not be."""

    #: as in PROTOCOL.md: a number, ``"objects"``, ``"reservation"``, ``"splitting"`` or ``"session log"``; or
    #: ``"complete"``, when a task lacks an outcome where all should have one
    rule: str
    #: one sentence that names the object or the task
    what: str
    #: the log of the shard in plain words
    story: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"rule {self.rule}: {self.what}", *self.story))


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
    manifest = _decoded(Manifest, key, await store.get(key), found)
    settings = Settings()
    try:
        if manifest is not None:
            settings = Settings.of(**manifest.settings)
    except ConfigError as error:
        found.append(Violation("objects", f"{key}: {error}"))
    names = [meta.key async for page in store.list(keys.session_log(session)) for meta in page]
    bodies = await in_parallel(store.get, names)
    decoded = [_decoded(SessionEntry, name, body, found) for name, body in zip(names, bodies, strict=True)]
    state = _fold_session([entry for entry in decoded if entry is not None], found)
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
        newest = self.settled.get(shard, -1)
        known = [number for number in self.logs.get(shard, {}) if number <= newest]
        return self.logs[shard][max(known)].index.outcomes if known else Outcomes()

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


# ---------------------------------------------------------------------------- reading


async def gather(store: Store, run: RunId, session: SessionFacts | None = None) -> Facts:
    """Read a run.

    Parameters
    ----------
    session
        Its session, if that was read already.
    """
    session = session or await gather_session(store, keys.session_of(run))
    settled: dict[ShardId, int] = {}
    for meta in await _listed(store, keys.run_logs(run)):
        if (place := slot(run, meta.key)) is not None:
            settled[place[0]] = max(settled.get(place[0], -1), place[1])
    # In one listing, logs come before segments: so those that an entry names are in it, too.
    objects = {meta.key: meta.size for meta in await _listed(store, keys.run_prefix(run))}
    found: list[Violation] = []
    key = keys.plan(run)
    plan = _decoded(Plan, key, await store.get(key), found)
    reading = _Reading(store, run, found)
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
        await reading.results(facts)
        if not facts.is_swept:
            await reading.records(plan)
    return replace(
        facts,
        records=dict(sorted(reading.task_records.items())),
        lost=reading.lost,
        externals={} if plan is None else await across.outcomes(store, plan),  # read last: newer than what needs them
        violations=tuple(found),
    )


def slot(run: RunId, key: str) -> tuple[ShardId, int] | None:
    """Return the shard and the number of the entry that `key` names, or None if it names none."""
    parts = key.removeprefix(keys.run_logs(run)).split("/")
    if not key.startswith(keys.run_logs(run)) or len(parts) != 2 or not parts[1].isdecimal():
        return None
    if not all(part.isdecimal() for part in parts[0].split("-")):
        return None
    return keys.shard_of_entry(key), keys.entry_number(key)


async def _listed(store: Store, prefix: str) -> list[Meta]:
    return [meta async for page in store.list(prefix) for meta in page]


def _decoded(kind: type[R], key: str, body: bytes | None, found: list[Violation]) -> R | None:
    if body is None:
        return None
    try:
        return decode(kind, key, body)
    except CorruptObject as error:
        found.append(Violation("objects", str(error)))
        return None


class _Reading:
    """Reads the parts of one run; what is damaged becomes a violation, not an error."""

    def __init__(self, store: Store, run: RunId, found: list[Violation]) -> None:
        self._store = store
        self._run = run
        self._found = found
        self.logs: dict[ShardId, dict[int, Entry]] = {}
        self.unreadable: dict[ShardId, dict[int, str]] = {}
        self.task_records: dict[int, ShardRecord] = {}
        self.lost: dict[tuple[ShardId, int], str] = {}
        #: shard and number of an entry -> what follows it
        self._blobs: dict[tuple[ShardId, int], memoryview] = {}

    async def entry(self, key: str) -> None:
        body = await self._store.get(key)
        if body is None:
            return  # deleted since the listing: a gap in the log
        shard, number = keys.shard_of_entry(key), keys.entry_number(key)
        try:
            entry, end = decode_with_end(Entry, key, body)
        except CorruptObject as error:
            self.unreadable.setdefault(shard, {})[number] = str(error)
            self._found.append(Violation("objects", str(error)))
            return
        self.logs.setdefault(shard, {})[number] = entry
        self._blobs[shard, number] = memoryview(body)[end:]

    # ------------------------------------------------------------------ results

    async def results(self, facts: Facts) -> None:
        """Look at every stored outcome that a newest index names."""
        segments: dict[tuple[ShardId, str], list[tuple[int, Span]]] = {}
        for shard in facts.known_shards:
            index = facts.index(shard)
            for position, location in index.outcomes.stored.items():
                if not 0 <= location.object < len(index.objects):
                    self.lost[shard, position] = "the object it lies in has no name"
                    continue
                number, name = object_key_name(location, index)
                span = Span(location.start, location.end)
                if number is None:
                    segments.setdefault((shard, name), []).append((position, span))
                else:
                    self._inline(shard, position, number, span)
        await in_parallel(self._segment, segments.items(), LARGE_PARALLEL)
        self._blobs.clear()

    def _inline(self, shard: ShardId, position: int, number: int, span: Span) -> None:
        key = keys.entry(keys.shard_log(self._run, shard), number)
        blobs = self._blobs.get((shard, number))
        why = f"{key} cannot be read" if blobs is None else _fault(key, blobs[span.start : span.end], span)
        if why is not None:
            self.lost[shard, position] = why

    async def _segment(self, item: tuple[tuple[ShardId, str], list[tuple[int, Span]]]) -> None:
        (shard, name), places = item
        key = keys.segment(self._run, shard, name)
        found = await self._faults(key, [span for _, span in places])
        self.lost.update({(shard, position): why for (position, _), why in zip(places, found, strict=True) if why})

    async def _faults(self, key: str, spans: Sequence[Span]) -> list[str | None]:
        """Return for each span why there is no blob, or None if there is."""
        try:
            blobs = await self._store.get_ranges(key, spans)
        except CorruptObject as error:
            if len(spans) == 1:
                return [str(error)]
            return [why for span in spans for why in await self._faults(key, [span])]
        if blobs is None:
            return [f"{key} is not there"] * len(spans)
        return [_fault(key, blob, span) for blob, span in zip(blobs, spans, strict=True)]

    # ------------------------------------------------------------------ the graph

    async def records(self, plan: Plan) -> None:
        """Read the task records that the plan names, and look at the constants that these name."""
        by_pack: dict[int, list[int]] = {}
        for number, info in enumerate(plan.shards):
            by_pack.setdefault(info.place.pack, []).append(number)
        await in_parallel(partial(self._pack, plan), by_pack.items(), LARGE_PARALLEL)
        constants: dict[int, dict[Place, int]] = {}
        for number, record in self.task_records.items():
            for place in record.buffers:
                constants.setdefault(place.pack, {})[place] = number
        await in_parallel(self._constants, constants.items(), LARGE_PARALLEL)

    async def _pack(self, plan: Plan, item: tuple[int, list[int]]) -> None:
        pack, numbers = item
        key = keys.pack(self._run, pack)
        places = [plan.shards[number].place for number in numbers]
        try:
            bodies = await self._store.get_ranges(key, [Span(place.start, place.end) for place in places])
        except CorruptObject as error:
            self._found.append(Violation("objects", str(error)))
            return
        if bodies is None:
            self._found.append(Violation("7", f"the plan names {key}, which is not there"))
            return
        for number, body in zip(numbers, bodies, strict=True):
            try:
                self.task_records[number] = decode(ShardRecord, key, body)
            except CorruptObject as error:
                self._found.append(Violation("objects", f"the task records of shard {number}: {error}"))

    async def _constants(self, item: tuple[int, Mapping[Place, int]]) -> None:
        pack, places = item
        key = keys.pack(self._run, pack)
        faults = await self._faults(key, [Span(place.start, place.end) for place in places])
        for number, why in zip(places.values(), faults, strict=True):
            if why is not None:
                self._found.append(Violation("objects", f"a constant that tasks of shard {number} need: {why}"))


def _fault(key: str, blob: memoryview, span: Span) -> str | None:
    if len(blob) != span.end - span.start:
        return f"{key} ends before {span.end} bytes"
    try:
        unseal(key, blob)
    except CorruptObject as error:
        return str(error)
    return None
