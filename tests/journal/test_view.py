"""What a process knows of a run: where each task belongs, and how little it reads to know it."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import CorruptObject, ProtocolError, StoreAccessDenied
from burst_dask.journal import listing, log
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Action, Claim, Commit, Location, Outcomes, Place, Plan, ShardInfo, Split, encode
from burst_dask.protocol.shard import Phase, Shard
from burst_dask.store import Meta, Store, open_store, requests_of

RUN = RunId("s.r")
ROOT, SECOND = keys.root_shard(0), keys.root_shard(1)


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{Entropy().token()}")


@pytest.fixture
async def view(store: Store) -> RunView:
    infos = (ShardInfo(0, 6, Place(0, 0, 1), (), 6, 0), ShardInfo(6, 4, Place(0, 1, 2), (0,), 4, 0))
    plan = Plan(run=RUN, tasks=10, shards=infos, outputs=pickle.dumps(9), created=0.0, size=2)
    await store.create(keys.plan(RUN), encode(plan))
    view = await RunView.open(store, RUN)
    assert view is not None
    return view


async def write(store: Store, shard: Shard, writer: str, action: Action, blobs: tuple[bytes, ...] = ()) -> Shard:
    attempt = log.prepare(shard, log.Author(WorkerId(writer), SystemClock(), Entropy()), action, blobs)
    after = await log.append(store, RUN, attempt)
    assert after is not None
    return after


async def split_and_done(store: Store) -> None:
    """Shard 0: tasks 4 and 5 go to a child, which has done 5; task 0 is done, 1 failed, 2 fails because of it."""
    root = await write(store, Shard.untouched(ROOT, Bitmap.full(6)), "a", Claim(Bitmap.of([0, 1])))
    root = await write(store, root, "b", Split(child=keys.child_shard(ROOT, 1), tasks=Bitmap.of([4, 5])))
    blobs = [b"".join(seal([b"zero"])), b"".join(seal([b"one"]))]
    end = len(blobs[0])
    outcomes = Outcomes(
        done=Bitmap.of([0]),
        failed=Bitmap.of([1, 2]),
        stored={0: Location(0, 0, end), 1: Location(0, end, end + len(blobs[1]))},
        upstream={1: Bitmap.of([2])},
        ran=2,
    )
    await write(store, root, "a", Commit(outcomes=outcomes, reserved=EMPTY, segments=("@2",)), tuple(blobs))
    child = Shard.untouched(keys.child_shard(ROOT, 1), Bitmap.of([4, 5]))
    child = await write(store, child, "b", Claim(EMPTY))
    await write(store, child, "b", Commit(outcomes=Outcomes(done=Bitmap.of([5]), ran=1), reserved=EMPTY))


async def open_large(store: Store, shards: int, run: RunId = RUN) -> RunView:
    """Return the view of a run with that many plan shards of four tasks each."""
    infos = tuple(ShardInfo(4 * number, 4, Place(0, 0, 1), (), 4, 0) for number in range(shards))
    plan = Plan(run=run, tasks=4 * shards, shards=infos, outputs=pickle.dumps(0), created=0.0, size=2)
    await store.create(keys.plan(run), encode(plan))
    view = await RunView.open(store, run)
    assert view is not None
    return view


async def grow(store: Store, shard: Shard, entries: int) -> Shard:
    """Append entries to a log: what they reserve tells them apart."""
    for _ in range(entries):
        if shard.phase is Phase.FREE:
            shard = await write(store, shard, "a", Claim(EMPTY))
        else:
            reserved = Bitmap.of([shard.next % 2]) & shard.index.pending
            shard = await write(store, shard, "a", Commit(outcomes=Outcomes(), reserved=reserved))
    return shard


async def finish(store: Store, shard: Shard) -> Shard:
    """Append the entry that completes a claimed shard."""
    outcomes = Outcomes(done=shard.index.pending, ran=len(shard.index.pending))
    shard = await write(store, shard, "a", Commit(outcomes=outcomes, reserved=EMPTY))
    assert shard.phase is Phase.COMPLETE
    return shard


async def grow_large(store: Store, view: RunView, lengths: Sequence[int]) -> list[Shard]:
    """Grow the logs of the plan shards to those lengths; every third has a child, and that one too."""

    async def one(number: int, length: int) -> list[Shard]:
        shard = await grow(store, view.shard(keys.root_shard(number)), length)
        if number % 3:
            return [shard]
        child_id = keys.child_shard(shard.id, shard.next)
        shard = await write(store, shard, "b", Split(child=child_id, tasks=Bitmap.of([2, 3])))
        child = await grow(store, Shard.untouched(child_id, Bitmap.of([2, 3])), 3)
        grandchild_id = keys.child_shard(child_id, child.next)
        child = await write(store, child, "b", Split(child=grandchild_id, tasks=Bitmap.of([3])))
        grandchild = await grow(store, Shard.untouched(grandchild_id, Bitmap.of([3])), 2)
        return [shard, child, grandchild]

    grown = await asyncio.gather(*(one(number, length) for number, length in enumerate(lengths) if length))
    return [shard for family in grown for shard in family]


class Cost:
    """The requests of one step: `cost()` tells those since it was last called."""

    def __init__(self, store: Store) -> None:
        self._store, self._before = store, requests_of(store)

    def __call__(self) -> dict[str, int]:
        before, self._before = self._before, requests_of(self._store)
        return {verb: count - before[verb] for verb, count in self._before.items() if count > before[verb]}


class Watched:
    """A store that tells how many listings were under way at once, and what they began behind."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.now = self.most = 0
        self.begun: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        self.begun.append(after)
        self.now += 1
        self.most = max(self.most, self.now)
        page = await anext(self.inner.list(prefix, after=after), None)
        self.now -= 1
        assert page is not None, "a listing that finds nothing was one too many"
        yield page
        raise AssertionError("nobody reads on: the next page could be listed elsewhere meanwhile")


@pytest.mark.parametrize("how", ["survey", "poll"])
async def test_outcomes_are_found_where_tasks_went(store: Store, view: RunView, how: str) -> None:
    await split_and_done(store)
    if how == "survey":
        await view.survey()
    else:
        assert await view.poll(ROOT)
        assert await view.poll(keys.child_shard(ROOT, 1))
        assert not await view.poll(ROOT)
    assert view.owner(5)[0].id == "00000-1"
    assert view.owner(7) == (view.shard(SECOND), 1)
    first, failed, upstream, child = (view.outcome(task) for task in (0, 1, 2, 5))
    assert first is not None
    assert first.done
    assert failed is not None
    assert (failed.done, failed.cause) == (False, 1)
    assert upstream is not None
    assert (upstream.done, upstream.cause, upstream.location) == (False, 1, None)
    assert child is not None
    assert child.done
    assert view.outcome(4) is None
    assert view.outcome(9) is None
    totals = view.totals()
    assert (totals.done, totals.failed, totals.pending) == (2, 2, 6)
    assert not view.complete(0)
    assert view.touched(0)
    assert not view.touched(1)


async def test_a_survey_reads_the_newest_entries_only(store: Store, view: RunView) -> None:
    await split_and_done(store)
    before = requests_of(store)["get"]
    await view.survey()
    assert requests_of(store)["get"] - before == 2
    await view.survey()
    assert requests_of(store)["get"] - before == 2, "what is known is not read again"


async def test_a_survey_of_many_entries_finds_the_newest_of_each(store: Store) -> None:
    view = await open_large(store, 40)
    lengths = [60 + number for number in range(36)] + [1, 0, 1150, 5]
    grown = await grow_large(store, view, lengths)
    entries = sum(shard.next for shard in grown)
    assert entries > 3000
    cost = Cost(store)
    await view.survey()
    spent = cost()
    assert view.shards == {shard.id: shard for shard in grown}
    assert spent["get"] == len(grown)
    assert entries / 1000 < spent["list"] <= entries / 1000 + 5
    await view.survey()
    assert "get" not in cost(), "what is known is not read again"
    changed = [await grow(store, shard, 2) for shard in grown[::5]]
    cost()
    await view.survey()
    assert cost()["get"] == len(changed)
    assert all(view.shards[shard.id] == shard for shard in changed)


async def test_a_large_survey_lists_in_parallel_and_each_page_once(store: Store) -> None:
    watched = Watched(store)
    view = await open_large(store, 250)
    grown = await grow_large(store, view, [50] * 250)
    view.store = watched
    await view.survey()
    assert len(view.shards) == len(grown) > 400
    assert 4 <= watched.most <= listing.PARALLEL
    assert len(set(watched.begun)) == len(watched.begun) <= sum(shard.next for shard in grown) / 1000 + 8


async def test_what_is_complete_is_not_listed_again(store: Store) -> None:
    view = await open_large(store, 6)
    grown = [await grow(store, view.shard(keys.root_shard(number)), 600) for number in (0, 2, 3, 4)]
    for shard in grown[:3]:
        await finish(store, shard)
    await view.survey()
    last = await grow(store, grown[3], 1)
    begun = await grow(store, view.shard(keys.root_shard(1)), 1)
    watched = view.store = Watched(store)  # type: ignore[assignment]
    cost = Cost(store)
    await view.survey()
    # The folders, the shard that is new in between, then straight on to what was known of the last.
    assert cost() == {"list": 3, "get": 2}
    assert watched.begun == [keys.shard_log(RUN, begun.id) + 7 * "0", keys.entry(keys.shard_log(RUN, last.id), 599)]
    assert view.shards[last.id] == last
    assert view.shards[begun.id] == begun


async def test_a_small_survey_is_one_listing_and_none_when_all_is_complete(store: Store) -> None:
    view = await open_large(store, 3)
    cost = Cost(store)
    await view.survey()
    assert cost() == {"list": 1}
    grown = await grow_large(store, view, [3, 3, 3])
    cost()
    await view.survey()
    assert cost() == {"list": 1, "get": 5}
    await view.survey()
    assert cost() == {"list": 1}
    for shard in grown:
        await finish(store, shard)
    cost()
    await view.survey()
    assert cost() == {"list": 1, "get": 5}
    assert view.totals().pending == 0
    await view.survey()
    assert cost() == {}


async def test_shards_are_listed_without_their_entries(store: Store) -> None:
    view = await open_large(store, 4)
    await grow_large(store, view, [500, 0, 600, 0])
    cost = Cost(store)
    await view.list_shards()
    assert cost() == {"list": 1}
    assert [view.touched(number) for number in range(4)] == [True, False, True, False]
    assert view.shards == {}


async def test_reading_on_in_a_log_that_has_grown_long_skips_most_of_it(store: Store, view: RunView) -> None:
    cost = Cost(store)
    assert not await view.poll(ROOT)
    assert cost() == {"get": 1}
    for entries, requests in [
        (1, {"get": 2}),
        (3, {"get": 4}),
        (4, {"get": 4, "list": 1}),
        (1200, {"get": 5, "list": 2}),
    ]:
        shard = await grow(store, view.shard(ROOT), entries)
        cost()
        assert await view.poll(ROOT)
        assert cost() == requests
        assert view.shards == {ROOT: shard}
        assert not await view.poll(ROOT)
        assert cost() == {"get": 1}


async def test_reading_on_begins_where_a_listing_ended(store: Store, view: RunView) -> None:
    shard = await grow(store, view.shard(ROOT), 40)
    await view.glance(lambda changed: [])
    assert view.shards == {}
    cost = Cost(store)
    assert await view.poll(ROOT)
    assert cost() == {"get": 2}
    assert view.shards == {ROOT: shard}
    assert view.touched(0)


@pytest.mark.parametrize("how", ["survey", "poll"])
async def test_the_last_change_is_dated_by_the_store(store: Store, how: str) -> None:
    view = await open_large(store, 3)
    assert await view.last_change() == 0.0
    grown = await grow_large(store, view, [400, 900, 2])
    for shard in grown:
        if how == "survey":
            await view.survey()
        else:
            await view.poll(shard.id)
    cost = Cost(store)
    changed = await view.last_change()
    pages = [page async for page in store.list(keys.run_logs(RUN))]
    assert changed == max(meta.modified for page in pages for meta in page)
    listings = cost().get("list", 0) - len(pages)
    assert listings == 0 if how == "survey" else 1 <= listings <= 2, "what a listing has shown is not listed again"


async def test_what_a_heartbeat_tells_of_has_no_date_until_it_is_listed(store: Store, view: RunView) -> None:
    shard = await grow(store, view.shard(ROOT), 3)
    view.hear(ROOT, shard.next)
    assert view.touched(0)
    assert await view.poll(ROOT)
    assert view.shards == {ROOT: shard}
    written = [meta.modified async for page in store.list(keys.run_logs(RUN)) for meta in page]
    assert await view.last_change() == max(written) > 0.0
    view.hear(ROOT, shard.next - 1)
    assert await view.last_change() == max(written), "old news change nothing"


async def test_a_leap_reads_the_newest_entry_alone(store: Store, view: RunView) -> None:
    cost = Cost(store)
    await view.leap(ROOT)
    assert cost() == {"list": 1} and view.shards == {}, "there is none"
    for entries, listings in [(1, 1), (40, 1), (1500, 2)]:
        shard = await grow(store, view.shard(ROOT), entries)
        cost()
        await view.leap(ROOT)
        assert cost() == {"list": listings, "get": 1}
        assert view.shards == {ROOT: shard}
    await view.leap(ROOT)
    assert cost() == {"list": 1}, "no news"
    shard = await grow(store, shard, 1100)
    cost()
    view.hear(ROOT, shard.next - 5)
    await view.leap(ROOT)
    assert cost() == {"list": 1, "get": 1}, "only what came after the heartbeat is listed"
    assert view.shards == {ROOT: shard}


async def test_a_survey_reads_no_more_at_once_than_it_may(store: Store) -> None:
    class Gate:
        now = most = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(store, name)

        async def get(self, key: str) -> bytes | None:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0)
            data = await store.get(key)
            self.now -= 1
            return data

    view = await open_large(store, 20)
    grown = await grow_large(store, view, [1] * 20)
    for limit in (3, 7):
        view, gate = RunView(store, view.plan), Gate()
        view.store = gate  # type: ignore[assignment]
        await view.survey(parallel=limit)
        assert gate.most == limit
        assert len(view.shards) == len(grown)


async def test_a_failed_listing_fails_the_survey_as_itself(store: Store) -> None:
    class Failing(Watched):
        async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
            if len(self.begun) == 5:
                raise StoreAccessDenied("no")
            async for page in super().list(prefix, after=after):
                yield page

    view = await open_large(store, 100)
    await grow_large(store, view, [100] * 100)
    view.store = Failing(store)
    with pytest.raises(StoreAccessDenied, match=r"^no$"):
        await view.survey()
    view.store = store
    await view.survey()
    assert view.totals().total == 400
    assert len(view.shards) == 168


async def test_stored_bodies_come_with_what_was_read_anyway(store: Store, view: RunView) -> None:
    await split_and_done(store)
    await view.survey()
    before = requests_of(store)["get"]
    bodies = await view.fetch([0, 1])
    assert {task: bytes(body) for task, body in bodies.items()} == {0: b"zero", 1: b"one"}
    assert requests_of(store)["get"] == before


async def test_what_is_not_stored_cannot_be_fetched(store: Store, view: RunView) -> None:
    await split_and_done(store)
    await view.survey()
    for task in (2, 5, 9):
        with pytest.raises(ProtocolError, match=f"task {task} "):
            await view.fetch([task])


async def test_an_entry_that_was_listed_and_is_gone_is_named(store: Store, view: RunView) -> None:
    await split_and_done(store)
    await view.glance(lambda changed: [])
    await store.delete([keys.entry(keys.shard_log(RUN, ROOT), 2)])
    with pytest.raises(CorruptObject, match="entry 2 of shard 00000"):
        await view._jump(ROOT)


async def test_there_is_no_view_of_a_run_without_a_plan(store: Store) -> None:
    """Rule 7: what a submission that died left is no run."""
    assert await RunView.open(store, RunId("s.other")) is None


async def test_the_first_error_of_many_requests_is_raised_as_itself() -> None:
    async def fails(item: int) -> int:
        if item == 3:
            raise CorruptObject("three")
        return item

    assert await in_parallel(fails, [1, 2]) == [1, 2]
    with pytest.raises(CorruptObject, match="three"):
        await in_parallel(fails, range(10))


async def test_shards_that_were_read_and_never_listed_are_open_until_they_are_complete(
    store: Store, view: RunView
) -> None:
    root = await write(store, Shard.untouched(ROOT, Bitmap.full(6)), "a", Claim(EMPTY))
    child = keys.child_shard(ROOT, 1)
    await write(store, root, "b", Split(child=child, tasks=Bitmap.of([4, 5])))
    await view.poll(ROOT)
    held = await write(store, view.shard(child), "b", Claim(Bitmap.of([4, 5])))
    await view.poll(child)
    assert view.open_shards() == [ROOT, child]
    await write(store, held, "b", Commit(Outcomes(done=Bitmap.of([4, 5]), ran=2), EMPTY))
    await view.poll(child)
    assert view.open_shards() == [ROOT]
