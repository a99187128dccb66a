"""The probe: does a store keep the promises that the protocol rests on?

Some servers answer 200 to every create-if-absent, so that all of several racers believe that
they have won. It is run once for a store, when the first session opens on it, and leaves a
marker. Reading a run needs no probe.
"""

from __future__ import annotations

import asyncio

from burst_dask.clock import Entropy
from burst_dask.errors import CorruptObject, StoreUnsuitable
from burst_dask.store.base import Span, Store

#: The marker; also `burst_dask.protocol.keys.PROBED`, which this layer may not import.
PROBED = "probe-v1"
_SCRATCH = "probe/"
_RACERS = 8


async def probe(store: Store, entropy: Entropy) -> None:
    """Check a store on first use.

    Raises
    ------
    StoreUnsuitable
        The store breaks a promise; the message names the store and the promise.
    """
    if await store.get(PROBED) is not None:
        return
    key = f"{_SCRATCH}{entropy.token()}"
    try:
        winner = await _check_create(store, key, entropy)
        await _check_list(store, key, winner)
        await _check_ranges(store, key, winner)
    finally:
        await store.delete([key])
    if await store.get(key) is not None:
        raise _unsuitable(store, "an object can still be read after it was deleted")
    await store.put(PROBED, b"This store was found to keep the promises that burst_dask rests on.\n")


async def _check_create(store: Store, key: str, entropy: Entropy) -> bytes:
    """Race for `key`; return the winner's body."""
    bodies = [f"racer {number} {entropy.token()}".encode() for number in range(_RACERS)]
    won = await asyncio.gather(*(store.create(key, body) for body in bodies))
    if sum(won) != 1:
        raise _unsuitable(
            store,
            f"of {_RACERS} racing writers that each created the same object if absent, {sum(won)} were told that they "
            "did, where exactly one may be: it ignores the header If-None-Match",
        )
    winner = bodies[won.index(True)]
    if await store.create(key, f"late {entropy.token()}".encode()):
        raise _unsuitable(store, "it created an object that existed already: it ignores the header If-None-Match")
    if await store.get(key) != winner:
        raise _unsuitable(store, "an object does not hold what the writer stored who was told that it created it")
    return winner


async def _check_list(store: Store, key: str, body: bytes) -> None:
    sizes = {meta.key: meta.size async for page in store.list(_SCRATCH) for meta in page}
    if sizes.get(key) != len(body):
        raise _unsuitable(store, "a listing does not show an object that was just written")
    if key in {meta.key async for page in store.list(_SCRATCH, after=key) for meta in page}:
        raise _unsuitable(store, "a listing after a key still shows that key")


async def _check_ranges(store: Store, key: str, body: bytes) -> None:
    try:
        got = await store.get_ranges(key, [Span(2, 5)])
    except CorruptObject:
        got = None
    if got is None or bytes(got[0]) != body[2:5]:
        raise _unsuitable(store, "reading a range of an object does not give these bytes")


def _unsuitable(store: Store, reason: str) -> StoreUnsuitable:
    return StoreUnsuitable(
        f"{store.url} cannot be used: {reason}. Nothing was started. Use S3, GCS, Azure or another store that "
        "honours conditional writes (PROTOCOL.md, 'What a store must do')"
    )
