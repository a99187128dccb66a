"""The simulated bucket: what S3 promises, how long it takes, and each thing that goes wrong with a request."""

from __future__ import annotations

import asyncio
import functools
import statistics
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import contract
import pytest

from burst_dask.clock import Entropy
from burst_dask.errors import StoreUnavailable
from burst_dask.store import Counting
from burst_dask.testing.bucket import (
    EPOCH,
    GIVE_UP,
    PAGE,
    READ,
    WRITE,
    WRITES,
    Bucket,
    Connection,
    Fate,
    Latency,
    Network,
)
from burst_dask.testing.loop import VirtualLoop


class Place:
    """A bucket in a loop of its own, and one connection to it."""

    def __init__(self, network: Network | None = None, **options: Any) -> None:
        self.loop = VirtualLoop()  # type: ignore[abstract]
        self.bucket = Bucket(self.loop, Entropy(1), **options)
        self.store = self.connect(network)

    def connect(self, network: Network | None = None, seed: int = 2) -> Connection:
        return Connection(self.bucket, network or Network(), Entropy(seed))

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)


# ---------------------------------------------------------------------------- what a store must do


def test_of_all_that_create_one_key_one_wins() -> None:
    place = Place()
    stores = [place.connect(seed=seed) for seed in range(30)]

    async def race() -> list[bool]:
        return await asyncio.gather(*(store.create("slot", b"%d" % n) for n, store in enumerate(stores)))

    won = place.run(race())
    assert won.count(True) == 1
    assert place.run(place.store.get("slot")) == b"%d" % won.index(True)


def test_listings_come_in_pages_at_one_request_each() -> None:
    place = Place()
    names = [f"many/{number:05}" for number in range(2 * PAGE + 10)]
    for name in names:
        place.bucket.put(name, b"1")
    place.bucket.put("other", b"1")

    async def pages(after: str) -> list[list[str]]:
        return [[meta.key for meta in page] async for page in place.store.list("many/", after=after)]

    found = place.run(pages(""))
    assert [len(page) for page in found] == [PAGE, PAGE, 10]
    assert [name for page in found for name in page] == names
    assert place.run(pages(names[-2])) == [[names[-1]]]
    assert place.run(pages(names[-1])) == []
    assert sum(kinds["get"] for kinds in place.bucket.arrived.values()) == 3 + 1 + 1


def test_folders_cost_a_request_a_page_however_much_lies_below() -> None:
    place = Place()
    for number in range(PAGE + 1):
        for entry in range(3):
            place.bucket.put(f"log/{number:05}/{entry}", b"1")
    place.bucket.put("log/object", b"1")
    assert place.run(place.store.folders("log/")) == [f"{number:05}" for number in range(PAGE + 1)]
    assert sum(kinds["get"] for kinds in place.bucket.arrived.values()) == 2


def test_dates_are_those_of_the_bucket_and_wrong_by_no_more_than_its_skew() -> None:
    place = Place(skew=2.0)
    place.run(asyncio.sleep(100))
    for number in range(200):
        place.bucket.put(f"{number}", b"")
    wrong = [stored.modified - EPOCH - place.loop.time() for stored in place.bucket.objects.values()]
    assert -2 <= min(wrong) < -1.5 and 1.5 < max(wrong) <= 2


#: What only a store with a URL can do; and the simulated one deletes with one request, however many.
NOT_HERE = {"test_url_opens_the_same_store", "test_many_objects_are_listed_in_pages_and_deleted_in_batches"}


class InBucket(Counting):
    """A counted connection that knows its loop."""

    def __init__(self) -> None:
        place = Place()
        super().__init__(place.store)
        self.loop = place.loop


@pytest.fixture
def store() -> InBucket:
    return InBucket()


def _under_virtual_time(test: Callable[..., Any]) -> Callable[..., None]:
    """Run a test of the contract, a coroutine function, in the loop of its store."""
    plain = getattr(test, "__wrapped__", None)
    if plain is None:
        return test

    @functools.wraps(test)  # with the marks that say how it is parametrized
    def run(self: Any, store: InBucket, **more: Any) -> None:
        store.loop.run_until_complete(plain(self, store, **more))

    return run


TestContract = type(
    "TestContract",
    (),
    {
        name: _under_virtual_time(test)
        for name, test in vars(contract.StoreContract).items()
        if name.startswith("test_") and name not in NOT_HERE
    },
)


# ---------------------------------------------------------------------------- how long it takes


@pytest.mark.parametrize("latency", [READ, WRITE, Latency(1.0, 2.0)])
def test_latencies_have_the_stated_median_and_tail(latency: Latency) -> None:
    entropy = Entropy(7)
    drawn = sorted(latency.draw(entropy) for _ in range(40_000))
    assert statistics.median(drawn) == pytest.approx(latency.median, rel=0.03)
    assert drawn[int(0.95 * len(drawn))] == pytest.approx(latency.p95, rel=0.03)
    assert drawn[0] > 0
    very_slow = latency.median * (latency.p95 / latency.median) ** (4 / 1.645)  # 3 of 100,000 by the log-normal alone
    slow = sum(one > very_slow for one in drawn) / len(drawn)
    assert slow < 2 * latency.slow and drawn[-1] <= max(latency.slowest, 2 * very_slow)


def test_requests_take_their_latency_and_large_objects_longer() -> None:
    place = Place(Network(read=Latency(0.03, 0.03, slow=0), write=Latency(0.05, 0.05, slow=0)))

    def seconds(coroutine: Coroutine[Any, Any, Any]) -> float:
        before = place.loop.time()
        place.run(coroutine)
        return place.loop.time() - before

    near = functools.partial(pytest.approx, abs=1e-4)
    assert seconds(place.store.put("small", b"1")) == near(0.05)
    assert seconds(place.store.get("small")) == near(0.03)
    assert seconds(place.store.put("large", b"1" * 8_500_000)) == near(0.15)
    assert seconds(place.store.get("large")) == near(0.13)


@pytest.mark.parametrize("verb", ["put", "get"])
def test_a_prefix_answers_503_beyond_its_rate(verb: str) -> None:
    place = Place(put_rate=50, get_rate=50)

    async def one(number: int) -> bool:
        try:
            await (place.store.put(f"{number}", b"") if verb == "put" else place.store.get("x"))
        except StoreUnavailable as error:
            assert "503" in str(error)
            return False
        return True

    async def together(count: int) -> int:
        return (await asyncio.gather(*map(one, range(count)))).count(True)

    admitted = place.run(together(500))
    assert 50 <= admitted < 110  # a second's worth, and what comes in while the slower ones arrive
    assert place.bucket.throttled == 500 - admitted
    if verb == "put":
        assert len(place.bucket.objects) == admitted, "what was refused has no effect"
    place.run(asyncio.sleep(5))
    assert place.run(together(40)) == 40


# ---------------------------------------------------------------------------- what goes wrong


def always(fate: Fate) -> Network:
    return Network({fate: 1.0})


def test_faults_come_as_often_as_stated() -> None:
    network, entropy = Network({Fate.NEVER: 0.1, Fate.CONFLICT: 0.2, Fate.UNANSWERED: 0.05}), Entropy(3)
    drawn = Counter(network.fate("create", entropy) for _ in range(20_000))
    for fate, share in {**network.faults, Fate.ARRIVES: 0.65}.items():
        assert drawn[fate] / 20_000 == pytest.approx(share, abs=0.01)
    assert all(always(Fate.CONFLICT).fate(verb, entropy) is Fate.ARRIVES for verb in {*WRITES, "get"} - {"create"})


def test_a_request_that_never_arrives() -> None:
    place = Place(always(Fate.NEVER))
    with pytest.raises(StoreUnavailable, match="did not arrive"):
        place.run(place.store.put("a", b""))
    place.run(asyncio.sleep(1000))
    assert not place.bucket.objects and not place.bucket.arrived


def test_a_conflict_leaves_nothing() -> None:
    place = Place(always(Fate.CONFLICT))
    with pytest.raises(StoreUnavailable, match="409"):
        place.run(place.store.create("a", b""))
    place.run(asyncio.sleep(1000))
    assert not place.bucket.objects


def test_a_late_request_lands_after_its_sender_gave_up() -> None:
    place = Place(always(Fate.LATE))
    with pytest.raises(StoreUnavailable, match="no answer"):
        place.run(place.store.create("a", b"late"))
    assert place.loop.time() == pytest.approx(GIVE_UP, abs=0.01)
    assert not place.bucket.objects
    place.run(asyncio.sleep(place.store.network.late))
    assert place.bucket.get("a") == b"late"
    assert place.bucket.objects["a"].modified - EPOCH > GIVE_UP


def test_a_late_request_may_find_its_slot_taken() -> None:
    place = Place(always(Fate.LATE))
    with pytest.raises(StoreUnavailable):
        place.run(place.store.create("a", b"late"))
    assert place.run(place.connect().create("a", b"other"))
    place.run(asyncio.sleep(place.store.network.late))
    assert place.bucket.get("a") == b"other"


def test_an_unanswered_request_has_landed() -> None:
    place = Place(always(Fate.UNANSWERED))
    with pytest.raises(StoreUnavailable, match="no answer"):
        place.run(place.store.create("a", b"1"))
    assert place.loop.time() == pytest.approx(GIVE_UP, abs=0.01)
    assert place.bucket.objects["a"].modified - EPOCH < 5


def test_nothing_gets_through_while_the_network_is_cut() -> None:
    place = Place()
    place.store.network.cut = True
    with pytest.raises(StoreUnavailable):
        place.run(place.store.put("a", b""))
    assert not place.bucket.objects
    place.store.network.cut = False
    place.run(place.store.put("a", b""))
    assert "a" in place.bucket.objects


def test_an_answer_is_lost_when_the_network_is_cut_meanwhile() -> None:
    place = Place(Network(write=Latency(1.0, 1.0, slow=0)))
    place.loop.call_later(0.5, lambda: setattr(place.store.network, "cut", True))
    with pytest.raises(StoreUnavailable, match="no answer"):
        place.run(place.store.put("a", b""))
    assert "a" in place.bucket.objects


def test_a_request_lands_although_its_sender_was_killed() -> None:
    place = Place(Network(write=Latency(1.0, 1.0, slow=0)))
    process = place.loop.process("sender")
    sending = process.start(place.store.create("a", b"1"))
    place.loop.call_later(0.1, process.kill)
    place.run(asyncio.sleep(10))
    assert place.bucket.get("a") == b"1"
    assert not sending.done(), "and nobody hears the answer"


def test_who_is_told_of_a_key_may_end_its_sender() -> None:
    place = Place()
    place.store.network.admit = lambda key: key != "plan"
    place.run(place.store.put("pack", b""))
    sending = place.loop.create_task(place.store.put("plan", b""))
    place.run(asyncio.sleep(1000))
    assert not sending.done() and list(place.bucket.objects) == ["pack"]


def test_once_it_is_over_requests_are_cancelled() -> None:
    place = Place()
    place.bucket.closed = True
    with pytest.raises(asyncio.CancelledError):
        place.run(place.store.get("a"))
