"""Reading the task records of a shard, and the constants beside them, out of packs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

from burst_dask.errors import CorruptObject
from burst_dask.protocol import keys
from burst_dask.protocol.frames import unseal
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Place, Plan, ShardRecord, decode
from burst_dask.store.base import Span, Store

#: Takes a key and spans; as `Store.get_ranges`.
GetRanges = Callable[[str, Sequence[Span]], Awaitable["list[memoryview] | None"]]


async def read_shard(store: Store, plan: Plan, number: int) -> tuple[ShardRecord, list[memoryview]]:
    """Return the record of plan shard `number` and its buffers.

    Raises
    ------
    CorruptObject
        A pack is damaged or gone.
    """
    record = await read_record(store.get_ranges, plan.run, plan.shards[number].place)
    return record, await read_buffers(store.get_ranges, plan.run, record.buffers)


async def read_record(get: GetRanges, run: RunId, place: Place) -> ShardRecord:
    """Return the record that lies there."""
    key = keys.pack(run, place.pack)
    (data,) = await _ranges(get, key, [Span(place.start, place.end)])
    return decode(ShardRecord, key, data)


async def read_buffers(get: GetRanges, run: RunId, places: Sequence[Place]) -> list[memoryview]:
    """Return the constants that lie there, with one request for each pack."""
    by_pack: dict[int, list[int]] = {}
    for position, place in enumerate(places):
        by_pack.setdefault(place.pack, []).append(position)
    buffers: list[memoryview] = [memoryview(b"")] * len(places)
    for pack, positions in by_pack.items():
        key = keys.pack(run, pack)
        blobs = await _ranges(get, key, [Span(places[p].start, places[p].end) for p in positions])
        for position, blob in zip(positions, blobs, strict=True):
            buffers[position] = unseal(key, blob)
    return buffers


async def _ranges(get: GetRanges, key: str, spans: Sequence[Span]) -> list[memoryview]:
    found = await get(key, spans)
    if found is None:
        raise CorruptObject(f"{key}: the plan names it, and it is gone")
    return found
