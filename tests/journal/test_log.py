"""Appending: one wins, lost answers are settled, session entries all land."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import StoreUnavailable, TornObject
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, SessionId, ShardId, WorkerId
from burst_dask.protocol.records import Claim
from burst_dask.protocol.session import SessionState, fold
from burst_dask.protocol.session_records import AddRun, Open
from burst_dask.protocol.shard import Shard
from burst_dask.store import Store, open_store

RUN, SESSION, SHARD = RunId("s.r"), SessionId("s"), ShardId("00000")


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{Entropy().token()}")


def author(name: str) -> log.Author:
    return log.Author(WorkerId(name), SystemClock(), Entropy(name))


def claim(name: str) -> log.Attempt:
    return log.prepare(Shard.untouched(SHARD, Bitmap.full(4)), author(name), Claim(EMPTY))


async def test_of_all_that_append_one_wins(store: Store) -> None:
    """Rule 1."""
    results = await asyncio.gather(*(log.append(store, RUN, claim(f"w{n}")) for n in range(32)))
    (winner,) = [shard for shard in results if shard is not None]
    found = await log.read(store, RUN, SHARD, 0)
    assert found is not None
    assert found[0].writer == winner.index.holder
    assert await log.read(store, RUN, SHARD, 1) is None


@pytest.mark.parametrize("torn", [lambda body: b"", lambda body: bytes(len(body)), lambda body: body[: len(body) // 2]])
async def test_what_to_do_about_a_torn_entry_is_said_and_helps(store: Store, torn: Callable[[bytes], bytes]) -> None:
    """A power loss leaves files empty, full of zeros or cut short, where nothing is synced."""
    first = claim("w1")
    assert await log.append(store, RUN, first)
    key = keys.entry(keys.shard_log(RUN, SHARD), 0)
    await store.put(key, torn(await store.get(key) or b""))
    with pytest.raises(TornObject, match=f"{key}.*power loss.*delete it"):
        await log.read(store, RUN, SHARD, 0)
    with pytest.raises(TornObject, match="power loss"):
        await log.append(store, RUN, claim("w2"))
    await store.delete([key])
    assert await log.append(store, RUN, claim("w2"))

    await store.put(keys.entry(keys.session_log(SESSION), 0), b"")
    with pytest.raises(TornObject, match="power loss"):
        await log.append_session(store, SESSION, SessionState(), author("w"), Open())


class LosesAnswers:
    """A store whose creates land, or not, and never answer the first time."""

    def __init__(self, inner: Store, lands: Callable[[], bool]) -> None:
        self.inner, self.lands, self.url = inner, lands, inner.url

    async def create(self, key: str, body: object) -> bool:
        if self.lands():
            await self.inner.create(key, body)  # type: ignore[arg-type]
        raise StoreUnavailable("no answer")

    async def get(self, key: str) -> bytes | None:
        return await self.inner.get(key)


@pytest.mark.parametrize("landed", [True, False])
async def test_a_lost_answer_is_settled(store: Store, landed: bool) -> None:
    """Rule 5: the same attempt can be repeated at any time, and wins once."""
    mine = claim("mine")
    with pytest.raises(StoreUnavailable):
        await log.append(LosesAnswers(store, lambda: landed), RUN, mine)  # type: ignore[arg-type]
    others = await log.append(store, RUN, claim("other"))
    again = await log.append(store, RUN, mine)
    assert (again is not None) == landed
    assert (others is None) == landed


async def test_an_entry_comes_back_with_its_blobs(store: Store) -> None:
    shard = Shard.untouched(SHARD, Bitmap.full(4))
    await log.append(store, RUN, log.prepare(shard, author("w"), Claim(EMPTY), [b"abc", b"def"]))
    found = await log.read(store, RUN, SHARD, 0)
    assert found is not None
    assert bytes(found[1]) == b"abcdef"


async def test_session_entries_all_land(store: Store) -> None:
    opened = await log.append_session(store, SESSION, SessionState(), author("c"), Open())
    runs = [RunId(f"s.{n}") for n in range(12)]
    await asyncio.gather(*(log.append_session(store, SESSION, opened, author(run), AddRun(run)) for run in runs))
    entries = [entry async for entry in log.read_session(store, SESSION, 0)]
    assert set(fold(entries).runs) == set(runs)
    assert len(entries) == 13


async def test_a_session_entry_whose_answer_was_lost_lands_once(store: Store) -> None:
    state = await log.append_session(store, SESSION, SessionState(), author("c"), Open())
    lost = iter([True])

    class Once(LosesAnswers):
        async def create(self, key: str, body: object) -> bool:
            created = await self.inner.create(key, body)  # type: ignore[arg-type]
            return False if next(lost, False) else created

    run = RunId("s.r")
    after = await log.append_session(Once(store, bool), SESSION, state, author("c"), AddRun(run))  # type: ignore[arg-type]
    entries = [entry async for entry in log.read_session(store, SESSION, 0)]
    assert len(entries) == 2
    assert after == fold(entries)


async def test_keys_of_entries_list_in_log_order(store: Store) -> None:
    prefix = keys.session_log(SESSION)
    for number in (10, 2, 9, 100):
        await store.put(keys.entry(prefix, number), b"x")
    listed = [keys.entry_number(meta.key) async for page in store.list(prefix) for meta in page]
    assert listed == [2, 9, 10, 100]
