"""Reading the objects of a session or run, whether they are whole or damaged.

What is damaged or missing becomes a `Violation` or the reason why something is lost, never an error: so
whoever checks a run sees all that is wrong with it. Only a store that does not answer is an error.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

from burst_dask.errors import CorruptObject, UntrustedObject
from burst_dask.journal import log
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import unseal
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import (
    Entry,
    Logs,
    Place,
    Plan,
    Record,
    ShardIndex,
    ShardRecord,
    decode,
    decode_with_end,
)
from burst_dask.protocol.shard import is_segment, object_key_name
from burst_dask.store.base import Meta, Span, Store

#: Objects with results or constants read at once: each may be many megabytes.
LARGE_PARALLEL = 4

R = TypeVar("R", bound=Record)


class Violation(NamedTuple):
    """Something that must not be."""

    #: as in PROTOCOL.md: a number, ``"objects"``, ``"reservation"``, ``"splitting"``, ``"discarding"`` or
    #: ``"session log"``; or ``"complete"``, when a task lacks an outcome where all should have one
    rule: str
    #: one sentence that names the object or the task
    what: str
    #: the log of the shard in plain words
    story: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"rule {self.rule}: {self.what}", *self.story))


def slot(run: RunId, key: str) -> tuple[ShardId, int] | None:
    """Return the shard and the number of the entry that `key` names, or None if it names none."""
    parts = key.removeprefix(keys.run_logs(run)).split("/")
    if not key.startswith(keys.run_logs(run)) or len(parts) != 2 or not parts[1].isdecimal():
        return None
    if not all(part.isdecimal() for part in parts[0].split("-")):
        return None
    return keys.shard_of_entry(key), keys.entry_number(key)


async def listed(store: Store, prefix: str) -> list[Meta]:
    return [meta async for page in store.list(prefix) for meta in page]


async def fetched(store: Store, key: str, found: list[Violation]) -> bytes | None:
    """Return an object; None when it is not there, or is not signed with the key of a session that is."""
    try:
        return await store.get(key)
    except UntrustedObject as error:
        found.append(Violation("objects", str(error)))
        return None


def decoded(kind: type[R], key: str, body: bytes | None, found: list[Violation]) -> R | None:
    if body is None:
        return None
    try:
        return decode(kind, key, body)
    except CorruptObject as error:
        found.append(Violation("objects", str(error)))
        return None


class Reading:
    """Reads the parts of one run.

    Parameters
    ----------
    found
        Gets what is wrong.
    """

    def __init__(self, store: Store, run: RunId, found: list[Violation]) -> None:
        self._store = store
        self._run = run
        self._found = found
        self.logs: dict[ShardId, dict[int, Entry]] = {}
        self.unreadable: dict[ShardId, dict[int, str]] = {}
        self.task_records: dict[int, ShardRecord] = {}
        self.lost: dict[tuple[ShardId, int], str] = {}
        self.leaving: set[tuple[ShardId, int]] = set()
        self.lost_logs: dict[tuple[ShardId, str], str] = {}
        #: shard and number of an entry -> what follows it
        self._blobs: dict[tuple[ShardId, int], memoryview] = {}

    async def entry(self, key: str) -> None:
        shard, number = keys.shard_of_entry(key), keys.entry_number(key)
        try:
            body = await self._store.get(key)
            if body is None:
                return  # deleted since the listing: a gap in the log
            entry, end = decode_with_end(Entry, key, body)
        except CorruptObject as error:
            self.unreadable.setdefault(shard, {})[number] = str(error)
            self._found.append(Violation("objects", str(error)))
            return
        self.logs.setdefault(shard, {})[number] = entry
        self._blobs[shard, number] = memoryview(body)[end:]

    # ------------------------------------------------------------------ results

    async def results(self, indices: Mapping[ShardId, ShardIndex]) -> None:
        """Look at every stored outcome that a newest index names."""
        segments: dict[tuple[ShardId, str], list[tuple[int, Span]]] = {}
        for shard, index in indices.items():
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

    async def discarded_since(self, indices: Mapping[ShardId, ShardIndex], objects: Container[str]) -> None:
        """Look whether what is missing was discarded after the newest entry that was read: then nothing is lost."""
        for shard, index in indices.items():
            missing = {index.outcomes.stored[p].object for of, p in self.lost if of == shard}
            for place, name in enumerate(index.objects):
                if is_segment(name) and keys.segment(self._run, shard, name) not in objects:
                    missing.add(place)
            number = max(self.logs[shard]) + 1
            while missing and (found := await log.read(self._store, self._run, shard, number)) is not None:
                after = found[0].index.objects
                self.leaving.update((shard, place) for place in missing if place < len(after) and not after[place])
                number += 1
        for shard, position in list(self.lost):
            if (shard, indices[shard].outcomes.stored[position].object) in self.leaving:
                del self.lost[shard, position]

    # ------------------------------------------------------------------ what tasks have printed

    async def printed(self, indices: Mapping[ShardId, ShardIndex]) -> None:
        """Look at every object with output of tasks that a newest index names."""
        named = [(shard, name, of) for shard, index in indices.items() for name, of in index.outcomes.logs.items()]
        await in_parallel(self._printed, named, LARGE_PARALLEL)

    async def _printed(self, item: tuple[ShardId, str, Bitmap]) -> None:
        shard, name, tasks = item
        key = keys.task_logs(self._run, shard, name)
        try:
            body = await self._store.get(key)
            if body is None:
                self.lost_logs[shard, name] = f"{key} is not there"
            elif tasks - Bitmap.of(output.position for output in decode(Logs, key, body).tasks):
                self.lost_logs[shard, name] = f"{key} has none of some of these tasks"
        except CorruptObject as error:
            self.lost_logs[shard, name] = str(error)

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
