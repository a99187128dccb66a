"""What every store must do: one suite, run on each kind by ``test_contract.py``."""

from __future__ import annotations

import array
import asyncio
import functools

import pytest

from burst_dask.clock import Entropy
from burst_dask.errors import CorruptObject
from burst_dask.store import Fault, Faulty, Retrying, Span, Store, open_store, probe, requests_of

MIB = 1 << 20
ODD_KEYS = ["a b/ü+%20&=x", "~-_.!'()@$,;/0", "日本/é", "dots/..x/...", "UP/low"]


def in_loop(test):
    """Run an async test to its end in a loop of its own."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        return asyncio.run(test(*args, **kwargs))

    return run


class StillClock:
    """Time that passes only when somebody sleeps."""

    def __init__(self):
        self.now = 0.0
        self.naps = []

    def monotonic(self):
        return self.now

    def wall(self):
        return self.now

    async def sleep(self, seconds):
        self.naps.append(seconds)
        self.now += seconds


class Once:
    """A script of faults: the n-th request of a verb fails as told, everything else works."""

    def __init__(self, verb, fault, *, at=1):
        self.verb, self.fault, self.left = verb, fault, at

    def __call__(self, verb, key):
        self.left -= verb == self.verb
        return self.fault if verb == self.verb and self.left == 0 else None


async def listed(store, prefix="", **options):
    return [meta.key async for page in store.list(prefix, **options) for meta in page]


class StoreContract:
    """Takes a fixture `store`: an empty one, opened by `open_store`."""

    def test_is_a_store(self, store):
        assert isinstance(store, Store)

    @in_loop
    async def test_exactly_one_of_racing_writers_wins(self, store):
        for key in ("race/0", "race/1", "race/2"):
            bodies = [f"writer {number} of {key}".encode() * 50 for number in range(32)]
            won = await asyncio.gather(*(store.create(key, body) for body in bodies))
            assert sum(won) == 1
            assert await store.get(key) == bodies[won.index(True)]

    @in_loop
    async def test_create_never_overwrites(self, store):
        assert await store.create("log/0", b"first")
        assert not await store.create("log/0", b"second")
        assert not await store.create("log/0", b"first")  # the same bytes, but nothing was lost: not ours
        assert await store.get("log/0") == b"first"

    @in_loop
    async def test_put_replaces(self, store):
        await store.put("beat", b"1")
        await store.put("beat", b"22")
        assert await store.get("beat") == b"22"
        assert not await store.create("beat", b"3")

    @in_loop
    async def test_absent_object_is_none(self, store):
        assert await store.get("none/such") is None
        assert await store.get_ranges("none/such", [Span(0, 1)]) is None
        assert await store.get_ranges("none/such", [Span(0, 0)]) is None
        assert await listed(store, "none/") == []

    @in_loop
    async def test_spans_come_as_asked_for(self, store):
        body = bytes(range(256)) * 20_000  # 5 MB: near spans and far ones
        await store.put("segment", body)
        spans = [Span(4_000_000, 4_000_010), Span(0, 5), Span(3, 9), Span(7, 7), Span(len(body) - 1, len(body))]
        got = await store.get_ranges("segment", spans)
        assert [bytes(view) for view in got] == [body[start:end] for start, end in spans]
        assert all(isinstance(view, memoryview) for view in got)
        assert await store.get_ranges("segment", []) == []

    @pytest.mark.parametrize("span", [Span(2, 5), Span(4, 9), Span(400, 500)])
    @in_loop
    async def test_span_past_the_end_is_corrupt(self, store, span):
        await store.put("short", b"1234")
        with pytest.raises(CorruptObject, match="short"):
            await store.get_ranges("short", [Span(0, 1), span])

    @in_loop
    async def test_empty_bodies(self, store):
        assert await store.create("empty/0", b"")
        await store.put("empty/1", [])
        assert await store.get("empty/0") == await store.get("empty/1") == b""
        assert [meta.size async for page in store.list("empty/") for meta in page] == [0, 0]

    @in_loop
    async def test_body_of_many_buffers(self, store):
        numbers = array.array("d", range(MIB // 4))
        parts = [b"head", bytearray(b"x" * 17 * MIB), memoryview(numbers), b"", memoryview(b"tail")]
        whole = b"".join(bytes(part) for part in parts)
        await store.put("large/put", parts)
        assert await store.create("large/create", parts)
        assert await store.get("large/put") == await store.get("large/create") == whole
        middle = Span(10, len(whole) - 10)  # longer than one request reads
        (got,) = await store.get_ranges("large/put", [middle])
        assert got == whole[middle.start : middle.end]

    @in_loop
    async def test_keys_keep_their_characters(self, store):
        for key in ODD_KEYS:
            assert await store.create(key, key.encode())
        assert await listed(store) == sorted(ODD_KEYS)
        for key in ODD_KEYS:
            assert await store.get(key) == key.encode()
        await store.delete(ODD_KEYS)
        assert await listed(store) == []

    @in_loop
    async def test_listing_shows_what_was_just_written(self, store):
        for number in range(20):
            await store.create(f"l/{number:03}", b"x" * number)
            found = {meta.key: meta.size async for page in store.list("l/") for meta in page}
            assert found[f"l/{number:03}"] == number
        await store.delete(["l/000"])
        assert "l/000" not in await listed(store, "l/")

    @in_loop
    async def test_prefix_is_a_folder(self, store):
        for key in ("ab/1", "ab/2/3", "abc/1", "b", "ab.x"):
            await store.put(key, b"1")
        assert await listed(store, "ab/") == ["ab/1", "ab/2/3"]
        assert await listed(store, "ab/", after="ab/1") == ["ab/2/3"]
        assert await listed(store) == ["ab.x", "ab/1", "ab/2/3", "abc/1", "b"]
        assert await listed(store, after="ab/2/3") == ["abc/1", "b"]

    @in_loop
    async def test_folders_are_what_has_objects_below(self, store):
        assert await store.folders("log/") == await store.folders("") == []
        nested = ["log/00012/0", "log/00012/1", "log/00012-3/0", "log/00012-30/deep/er/0", "log/a b/ü+%20&=x"]
        for key in [*nested, "log/object", "logs/other/0", "log.x"]:
            await store.put(key, b"1")
        assert await store.folders("log/") == ["00012", "00012-3", "00012-30", "a b"]
        assert await store.folders("log/00012/") == []
        assert await store.folders("log/00012-30/") == ["deep"]
        assert await store.folders("log/0001/") == []
        assert await store.folders("") == ["log", "logs"]
        await store.delete(["log/00012-3/0", "log/00012-30/deep/er/0"])
        assert await store.folders("log/") == ["00012", "a b"]

    @in_loop
    async def test_many_folders_cost_a_request_a_thousand(self, store):
        names = [f"{number:05}" for number in range(1100)]
        for start in range(0, len(names), 50):
            await asyncio.gather(*(store.put(f"many/{name}/0", b"1") for name in names[start : start + 50]))
        before = requests_of(store)["list"]
        assert await store.folders("many/") == names
        assert requests_of(store)["list"] - before == 2

    @in_loop
    async def test_listing_begins_anywhere_in_nested_keys(self, store):
        keys = ["k", "l/00012-3/0", "l/00012-3/1", "l/00012/0", "l/00012/1", "l/00012/x/y", "l/a", "l/b/c", "m/0"]
        for key in keys:
            await store.put(key, b"1")
        for after in [*keys, "l", "l/00012", "l/00012-", "l/00012/00", "l/0", "l/b", "l/z", "m"]:
            assert await listed(store, "l/", after=after) == [k for k in keys[1:-1] if k > after]
            assert await listed(store, after=after) == [key for key in keys if key > after]

    @in_loop
    async def test_many_objects_are_listed_in_pages_and_deleted_in_batches(self, store):
        keys = [f"many/{number:05}" for number in range(2500)]
        for start in range(0, len(keys), 50):
            await asyncio.gather(*(store.put(key, b"1") for key in keys[start : start + 50]))
        assert await listed(store, "many/") == keys
        assert [len(page) async for page in store.list("many/")] == [1000, 1000, 500]
        assert await listed(store, "many/", after=keys[1200]) == keys[1201:]
        assert [len(page) async for page in store.list("many/", after=keys[1200])] == [1000, 299]
        assert await listed(store, "many/", after=keys[-1]) == []
        before = requests_of(store)["delete"]
        await store.delete([*keys[:1400], *(f"absent/{number}" for number in range(100))])
        assert requests_of(store)["delete"] - before == 2
        assert await listed(store, "many/") == keys[1400:]
        await store.delete(keys)
        await store.delete([])
        assert await listed(store) == []

    @in_loop
    async def test_time_is_the_stores_own_and_goes_forward(self, store):
        first = await store.time("beat")
        await store.put("other", b"")
        second = await store.time("beat")
        dates = {meta.key: meta.modified async for page in store.list("") for meta in page}
        assert first <= dates["other"] <= second
        assert dates["beat"] == pytest.approx(second, abs=1)  # headers tell whole seconds, listings more

    @in_loop
    async def test_url_opens_the_same_store(self, store):
        await store.put("here", b"1")
        again = open_store(store.url)
        assert again.url == store.url
        assert await again.get("here") == b"1"

    @in_loop
    async def test_probe_passes_once(self, store):
        await probe(store, Entropy(1))
        before = requests_of(store)
        await probe(store, Entropy(2))
        after = requests_of(store)
        assert sum(after.values()) - sum(before.values()) == after["get"] - before["get"] == 1
        assert await listed(store) == ["probe-v1"]

    @in_loop
    async def test_lost_answer_is_settled_by_reading_back(self, store):
        for verb in ("create", "get"):  # the answer to the write, then also that to the reading back
            lossy = Faulty(store, Once("create", Fault.LOST))
            if verb == "get":
                lossy = Faulty(lossy, Once("get", Fault.LOST))
            retrying = Retrying(lossy, StillClock(), Entropy(1))
            assert await retrying.create(f"mine/{verb}", b"nonce 1")
            assert await store.get(f"mine/{verb}") == b"nonce 1"

    @in_loop
    async def test_lost_request_does_not_win_anothers_slot(self, store):
        await store.create("theirs", b"nonce 2")
        retrying = Retrying(Faulty(store, Once("create", Fault.BEFORE)), StillClock(), Entropy(1))
        assert not await retrying.create("theirs", b"nonce 1")
        assert await store.get("theirs") == b"nonce 2"
