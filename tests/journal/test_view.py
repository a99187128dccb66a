"""What a process knows of a run: where each task belongs, and how little it reads to know it."""

from __future__ import annotations

import pickle

import pytest

from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import CorruptObject, ProtocolError
from burst_dask.journal import log
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import (
    Action,
    Claim,
    Commit,
    Location,
    Outcomes,
    Place,
    Plan,
    ShardInfo,
    Split,
    encode,
)
from burst_dask.protocol.shard import Shard
from burst_dask.store import Store, open_store, requests_of

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
    await view.survey(lambda changed: [])
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
