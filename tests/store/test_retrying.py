"""The retrier: how often, how long, and what it does not repeat."""

import pytest
from contract import Once, StillClock, in_loop, listed

from burst_dask.clock import Entropy
from burst_dask.errors import StoreAccessDenied, StoreUnavailable
from burst_dask.store import Counting, Fault, Faulty, Retrying, Span, open_store


@pytest.fixture
def memory():
    return open_store(f"memory://{Entropy().token()}")


def retrying(store, script, **settings):
    """Return the retrier over a store that fails as told, its clock, and the count of its attempts."""
    clock = StillClock()
    counting = Counting(Faulty(store, script))
    return Retrying(counting, clock, Entropy(1), **settings), clock, counting.requests


@pytest.mark.parametrize("fault", [Fault.BEFORE, Fault.LOST])
@in_loop
async def test_every_verb_survives_a_fault(memory, fault):
    def store(verb):
        return retrying(memory, Once(verb, fault))[0]

    assert await store("create").create("a/1", b"1")
    await store("put").put("a/2", b"2")
    assert await store("get").get("a/1") == b"1"
    assert await store("get").get_ranges("a/1", [Span(0, 1)]) == [b"1"]
    assert await listed(store("list"), "a/") == ["a/1", "a/2"]
    assert await store("list").folders("") == ["a"]
    assert await store("put").time("a/3") > 0
    await store("delete").delete(["a/1", "a/2", "a/3"])
    assert await listed(memory, "a/") == []


@in_loop
async def test_waits_are_jittered_and_grow_to_their_cap(memory):
    store, clock, requests = retrying(memory, lambda verb, key: Fault.BEFORE, attempts=8, base=1.0, cap=4.0)
    with pytest.raises(StoreUnavailable, match=r"put a was not sent \(tried 8 times\)"):
        await store.put("a", b"")
    assert requests["put"] == 8
    assert len(clock.naps) == 7  # nobody waits for nothing
    assert all(0 <= nap <= limit for nap, limit in zip(clock.naps, [1, 2, 4, 4, 4, 4, 4], strict=True))
    assert len(set(clock.naps)) == 7


@in_loop
async def test_total_time_is_bounded(memory):
    store, clock, requests = retrying(memory, lambda verb, key: Fault.BEFORE, attempts=1000, total=20.0)
    with pytest.raises(StoreUnavailable):
        await store.get("a")
    assert clock.now <= 20.0
    assert requests["get"] < 20


@in_loop
async def test_other_errors_are_not_repeated(memory):
    def denied(verb, key):
        raise StoreAccessDenied("no")

    store, clock, requests = retrying(memory, denied)
    with pytest.raises(StoreAccessDenied):
        await store.create("a", b"")
    assert requests["create"] == 1
    assert clock.naps == []


@in_loop
async def test_listing_goes_on_behind_the_last_page(memory):
    keys = [f"k/{number:05}" for number in range(2500)]
    for key in keys:
        await memory.put(key, b"")
    store, _, requests = retrying(memory, Once("list", Fault.LOST, at=2))
    assert await listed(store, "k/") == keys
    assert requests["list"] == 4  # three pages and the lost one


@in_loop
async def test_lost_create_of_a_loser_loses(memory):
    await memory.create("slot", b"theirs")
    store, _, requests = retrying(memory, Once("create", Fault.LOST))
    assert not await store.create("slot", b"mine")
    assert await memory.get("slot") == b"theirs"
    assert (requests["create"], requests["get"]) == (2, 1)


@in_loop
async def test_plain_loss_costs_no_reading_back(memory):
    await memory.create("slot", b"theirs")
    store, _, requests = retrying(memory, lambda verb, key: None)
    assert not await store.create("slot", b"mine")
    assert (requests["create"], requests["get"]) == (1, 0)


@in_loop
async def test_create_that_fails_for_good_can_be_tried_again_later(memory):
    store, _, _ = retrying(memory, lambda verb, key: Fault.LOST, attempts=3)
    with pytest.raises(StoreUnavailable):
        await store.create("slot", [b"nonce ", b"1"])
    assert await memory.get("slot") == b"nonce 1"  # the caller finds its own nonce there
