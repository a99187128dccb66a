"""Counting with prices, latency, and opening by URL."""

from itertools import pairwise

import pytest
from contract import StillClock, in_loop, listed

from burst_dask.clock import Entropy
from burst_dask.store import Counting, Delayed, Span, cost_of, open_store, requests_of
from burst_dask.store.requests import COALESCE, PART, cut, plan


@pytest.fixture
def name():
    return Entropy().token()


@in_loop
async def test_requests_are_counted_by_verb(name):
    store = open_store(f"memory://{name}")
    await store.create("a", b"1")
    await store.create("a", b"2")
    await store.put("b", bytes(3 * COALESCE))
    await store.get("a")
    await store.get("absent")
    await store.get_ranges("b", [Span(0, 1), Span(5, 9)])
    await store.get_ranges("b", [Span(0, 1), Span(2 * COALESCE, 2 * COALESCE + 1)])
    await listed(store)
    await listed(store, "none/")
    await store.delete(f"x{number}" for number in range(1001))
    await store.time("c")
    assert requests_of(store) == {"create": 2, "put": 2, "get": 6, "list": 2, "delete": 2}


@in_loop
async def test_pages_of_a_listing_are_counted(name):
    store = open_store(f"memory://{name}")
    for number in range(2001):
        await store.put(f"{number:04}", b"")
    before = requests_of(store)["list"]
    await listed(store)
    assert requests_of(store)["list"] - before == 3


@in_loop
async def test_pages_of_folders_are_counted_and_delayed(name):
    clock = StillClock()
    memory = open_store(f"memory://{name}")
    store = Counting(Delayed(memory, clock, {"list": 10.0}))
    assert await store.folders("log/") == []
    assert (store.requests["list"], clock.now) == (1, 10.0)
    for number in range(2001):
        await memory.put(f"log/{number:05}/0", b"")
    assert len(await store.folders("log/")) == 2001
    assert (store.requests["list"], clock.now) == (4, 40.0)


@in_loop
async def test_a_directory_without_objects_is_no_folder(tmp_path):
    """A writer that dies between making a directory and its object leaves the directory."""
    store = open_store(tmp_path)
    await store.put("log/00001/0", b"")
    (tmp_path / "log" / "00002").mkdir()
    (tmp_path / "log" / "00003" / "deeper").mkdir(parents=True)
    assert await store.folders("log/") == ["00001"]


@in_loop
async def test_failed_requests_are_counted(name):
    class Broken:
        async def put(self, key, body):
            raise OSError

    store = Counting(Broken())
    with pytest.raises(OSError):
        await store.put("a", b"")
    assert store.requests["put"] == 1


def test_prices_are_those_of_s3():
    million = 1_000_000
    for verb, price in {"put": 5.0, "create": 5.0, "list": 5.0, "get": 0.4, "delete": 0.0}.items():
        assert cost_of({verb: million}) == pytest.approx(price)


def test_a_store_that_nobody_counts_has_zeros():
    assert set(requests_of(object()).values()) == {0}


@in_loop
async def test_each_request_takes_its_latency(name):
    clock = StillClock()
    inner = open_store(f"memory://{name}")
    store = Delayed(inner, clock, {"put": 1.0, "get": 0.1, "list": 10.0, "delete": 100.0})
    await store.put("a", b"1")
    await store.create("b", b"1")  # as long as a put
    assert clock.now == pytest.approx(2.0)
    await store.get("a")
    await store.get_ranges("a", [Span(0, 1)])
    assert clock.now == pytest.approx(2.2)
    await listed(store)
    assert clock.now == pytest.approx(12.2)
    await store.delete(["a", "b"])
    assert clock.now == pytest.approx(112.2)
    await store.time("c")
    assert clock.now == pytest.approx(113.3)


@in_loop
async def test_slow_url_delays_beneath_the_counting(name):
    clock = StillClock()
    store = open_store(f"slow+memory://{name}?put=2&get=0.5", clock=clock)
    await store.create("a", b"1")
    await store.get("a")
    await listed(store)
    assert clock.naps == [2.0, 0.5, 0.04]
    assert requests_of(store)["create"] == 1
    assert store.url == f"slow+memory://{name}?get=0.5&put=2"


def test_spans_become_few_requests_of_bounded_size():
    far = Span(10 * COALESCE, 10 * COALESCE + 3 * PART)
    parts = plan([far, Span(0, 10), Span(COALESCE, COALESCE + 5)])
    assert parts[0] == Span(0, COALESCE + 5)
    assert len(parts) == 4
    assert (parts[1].start, parts[-1].end) == far
    assert all(one.end <= next.start for one, next in pairwise(parts))
    assert max(part.end - part.start for part in parts) <= PART


def test_a_span_within_one_request_is_not_copied():
    data = bytearray(b"0123456789")
    view = cut(Span(12, 14), [Span(10, 20)], [memoryview(data)])
    data[2] = ord("x")
    assert view == b"x3"


@in_loop
async def test_emptied_directories_are_removed(tmp_path):
    store = open_store(tmp_path / "store")
    await store.put("s/1/log/0", b"")
    await store.put("s/1/runs/2/log/3/4", b"")
    await store.delete(await listed(store))
    assert list((tmp_path / "store").iterdir()) == []
