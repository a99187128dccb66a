"""Finding work in a large run: through the heartbeats of others, at a price that does not grow with it."""

from __future__ import annotations

from typing import Any

import pytest
from stage import Stage, Task

from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import Beat, Claim, Commit, Ended, Held, Location, Outcomes, Release, encode
from burst_dask.store import Counting, requests_of
from burst_dask.worker.finder import Finder
from burst_dask.worker.roster import Roster


def constants(count: int) -> list[Task]:
    return [((lambda: 1), []) for _ in range(count)]


def beat(name: str, *holds: Held) -> Beat:
    return Beat(worker=WorkerId(name), host="h", pid=1, threads=1, started=0.0, holds=holds)


async def large(shards: int, tasks: int = 10) -> tuple[Stage, RunView]:
    """A run whose every shard counts as one of a large run."""
    stage = await Stage(large_run=1).open()
    view = await stage.submit(constants(shards * tasks), cuts=range(tasks, shards * tasks, tasks))
    return stage, view


async def append(stage: Stage, view: RunView, shard: ShardId, writer: str, action: Any) -> int:
    """Append as another worker; return the number of the entry that comes next."""
    author = log.Author(WorkerId(writer), stage.clock, stage.entropy)
    after = await log.append(stage.store, view.run, log.prepare(view.shard(shard), author, action))
    assert after is not None
    view.learn(after)
    return after.next


async def held_by(stage: Stage, view: RunView, spares: list[float]) -> None:
    """Shard n is held by worker n, whose heartbeat says so; it has reserved all if it has nothing to spare."""
    for number, spare in enumerate(spares):
        shard, name = keys.root_shard(number), f"w{number}"
        reserved = EMPTY if spare else view.shard(shard).index.tasks
        next = await append(stage, view, shard, name, Claim(reserved))
        key = keys.beat(stage.session, WorkerId(name))
        await stage.store.put(key, encode(beat(name, Held(view.run, shard, next, spare))))


async def test_the_shard_with_the_most_to_spare_is_split() -> None:
    stage, view = await large(3)
    await held_by(stage, view, [0.0, 60.0, 0.0])
    me = Finder(stage.context("me"), lambda: beat("me"))
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.shard.id == "00001-1"


async def test_a_search_costs_the_same_however_many_shards_there_are() -> None:
    costs = []
    for shards in (8, 64):
        stage, view = await large(shards, tasks=2)
        await held_by(stage, view, [60.0] * shards)
        context = stage.context("me")
        context.store = Counting(stage.store)
        me = Finder(context, lambda: beat("me"))
        me.roster.workers = shards
        view = await me.context.view(view.run)
        assert view is not None
        await view.list_shards()  # all are claimed, as a worker knows that has been there for long
        before = requests_of(context.store)
        assert await me.find(stage.state, True) is not None
        costs.append(sum(requests_of(context.store).values()) - sum(before.values()))
    assert max(costs) <= 20


class HandClock:
    """A monotonic clock that is set by hand."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(("spares", "soon"), [([0.0] * 4, True), ([], False)])
async def test_who_sees_no_other_idle_worker_judges_the_dead_sooner(spares: list[float], soon: bool) -> None:
    """Of ten thousand; nobody else may ever take a turn."""
    stage, view = await large(4)
    await held_by(stage, view, spares)
    for number in range(len(spares), 4):
        await stage.beat(f"w{number}")
    context = stage.context("me")
    context.clock = clock = HandClock()  # type: ignore[assignment]
    roster = Roster(context, lambda: beat("me"))
    assert (await roster.judge())[1]
    assert len(await roster.spare(view.run)) == len(spares)
    roster.workers, clock.now = 10_000, 200.0
    assert (await roster.judge())[1] is soon


async def test_what_a_dead_worker_held_last_is_taken_over() -> None:
    stage, view = await large(1, tasks=1)
    next = await append(stage, view, keys.root_shard(0), "dead", Claim(Bitmap.of([0])))
    key = keys.beat(stage.session, WorkerId("dead"))
    await stage.store.put(key, encode(beat("dead", Held(view.run, keys.root_shard(0), next, 0.0))))
    record = Ended(worker=WorkerId("dead"), reason="died", message="killed by SIGKILL")
    await stage.store.create(keys.ended(stage.session, WorkerId("dead")), encode(record))
    me = Finder(stage.context("me"), lambda: beat("me"))
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.shard.index.cause == "worker dead: killed by SIGKILL"


async def test_what_was_released_is_found_without_any_heartbeat() -> None:
    stage, view = await large(1, tasks=1)
    await append(stage, view, keys.root_shard(0), "gone", Claim(Bitmap.of([0])))
    await append(stage, view, keys.root_shard(0), "gone", Release(outcomes=Outcomes(), reason="stopped"))
    me = Finder(stage.context("me"), lambda: beat("me"))
    found = await me.find(stage.state, True)
    assert found is not None and found.shard.id == "00000"


async def test_who_has_seen_that_a_large_run_is_complete_tells_the_others() -> None:
    stage, view = await large(64, tasks=1)
    for number in range(64):
        await append(stage, view, keys.root_shard(number), "w", Claim(Bitmap.of([0])))
        done = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, 1)})
        await append(stage, view, keys.root_shard(number), "w", Commit(done, EMPTY, ("s",)))
    first = Finder(stage.context("first"), lambda: beat("first"))
    while view.run not in first.complete:  # whether it looks at all shards is drawn by lot
        assert await first.find(stage.state, True) is None
    assert await stage.store.get(keys.complete(view.run)) == b"first"
    second = Finder(stage.context("second"), lambda: beat("second"))
    second.roster.workers = 10**9  # it never looks itself
    assert await second.find(stage.state, True) is None
    assert second.complete == {view.run}
