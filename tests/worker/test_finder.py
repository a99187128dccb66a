"""Finding work: claims, takeovers and splits, each decided by one append."""

from __future__ import annotations

import asyncio
import threading
from operator import add
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stage import Stage, Task

from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Beat, Claim, Commit, Ended, Location, Outcomes, Release, Takeover, encode
from burst_dask.protocol.shard import Phase, Shard
from burst_dask.store import requests_of
from burst_dask.worker.execution import broken_table
from burst_dask.worker.finder import BLOCKED, Finder, closed_part, takeable
from burst_dask.worker.table import TaskTable


def constants(count: int) -> list[Task]:
    return [((lambda: 1), []) for _ in range(count)]


def finder(stage: Stage, name: str = "me") -> Finder:
    context = stage.context(name)
    return Finder(context, lambda: Beat(worker=WorkerId(name), host="h", pid=1, threads=1, started=0.0))


async def append(stage: Stage, view: RunView, number: int, writer: str, action: Any) -> Shard:
    """Append as another worker."""
    id = keys.root_shard(number)
    await view.poll(id)
    author = log.Author(WorkerId(writer), stage.clock, stage.entropy)
    after = await log.append(stage.store, view.run, log.prepare(view.shard(id), author, action))
    assert after is not None
    view.learn(after)
    return after


async def test_workers_that_look_together_claim_different_shards() -> None:
    stage = await Stage().open()
    await stage.submit(constants(16), cuts=range(1, 16))
    finders = [finder(stage, f"w{n}") for n in range(8)]
    for one in finders:
        one.roster.workers = 8
    found = await asyncio.gather(*(one.find(stage.state, True) for one in finders))
    shards = [one.shard.id for one in found if one is not None]
    assert len(shards) == len(set(shards)) == 8


async def test_a_shard_with_nothing_to_begin_with_is_left_until_its_upstream_is_complete() -> None:
    stage = await Stage().open()
    view = await stage.submit([*constants(1), (lambda x: x, [0])], cuts=[1])
    me = finder(stage)
    first = await me.find(stage.state, True)
    assert first is not None
    assert first.shard.id == "00000"
    await stage.beat("me")
    assert await finder(stage, "other").find(stage.state, True) is None
    await append(stage, view, 0, "me", Commit(outcomes=Outcomes(done=Bitmap.of([0]), ran=1), reserved=EMPTY))
    second = await finder(stage, "other").find(stage.state, True)
    assert second is not None
    assert second.shard.id == "00001"


async def test_what_was_released_is_claimed_again() -> None:
    stage = await Stage().open()
    view = await stage.submit(constants(3))
    await append(stage, view, 0, "other", Claim(EMPTY))
    await append(stage, view, 0, "other", Release(outcomes=Outcomes(done=Bitmap.of([0]), ran=1), reason="stopped"))
    found = await finder(stage).find(stage.state, True)
    assert found is not None
    assert found.shard.index.pending == Bitmap.of([1, 2])


async def test_what_was_released_blocked_waits_for_its_upstream() -> None:
    stage = await Stage().open()
    view = await stage.submit([*constants(1), (lambda x: x, [0]), *constants(1)], cuts=[1])
    await append(stage, view, 0, "other", Claim(Bitmap.of([0])))
    await append(stage, view, 1, "other", Claim(EMPTY))
    blocked = Release(outcomes=Outcomes(done=Bitmap.of([1]), ran=1), reason=BLOCKED)
    await append(stage, view, 1, "other", blocked)
    await stage.beat("other")
    me = finder(stage)
    assert await me.find(stage.state, True) is None
    await append(stage, view, 0, "other", Commit(outcomes=Outcomes(done=Bitmap.of([0]), ran=1), reserved=EMPTY))
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.shard.id == "00001"


class DatedStore:
    """A store whose clock the test sets: what is written bears the date of that moment."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.url, self.date = inner, inner.url, 0.0
        self.dates: dict[str, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def put(self, key: str, body: Any) -> None:
        self.dates[key] = self.date
        await self.inner.put(key, body)

    async def list(self, prefix: str, **more: Any) -> Any:
        async for page in self.inner.list(prefix, **more):
            yield [meta._replace(modified=self.dates.get(meta.key, meta.modified)) for meta in page]


@pytest.mark.parametrize("off", [0.0, -1e9, 1e9])
async def test_a_lease_is_judged_by_one_listing(off: float) -> None:
    """Rule 6: only the store's dates count, and only their differences."""
    stage = await Stage().open()
    store = DatedStore(stage.store)
    stage.store = store
    store.date = off
    for name in ("dead", "quiet", "ended"):
        await stage.beat(name)
    store.date = off + 0.5
    await stage.beat("quiet")
    record = Ended(worker=WorkerId("ended"), reason="died", message="test")
    await stage.store.create(keys.ended(stage.session, WorkerId("ended")), encode(record))
    store.date = off + stage.settings.lease + 0.4
    liveness = await finder(stage).roster.liveness()
    assert set(liveness.dead) == {"dead", "ended"}
    assert liveness.alive == {"quiet", "me"}


async def test_a_takeover_says_why_and_counts_the_suspects() -> None:
    stage = await Stage().open()
    view = await stage.submit(constants(4))
    await append(stage, view, 0, "dead", Claim(Bitmap.of([0, 1])))
    record = Ended(worker=WorkerId("dead"), reason="died", message="killed by SIGKILL")
    await stage.store.create(keys.ended(stage.session, WorkerId("dead")), encode(record))
    found = await finder(stage).find(stage.state, True)
    assert found is not None
    assert found.shard.index.cause == "worker dead: killed by SIGKILL"
    assert found.shard.index.strikes == {0: 1, 1: 1}
    entry = await log.read(stage.store, view.run, keys.root_shard(0), 1)
    assert entry is not None
    assert isinstance(entry[0].action, Takeover)


async def test_a_live_holder_is_left_alone() -> None:
    stage = await Stage().open()
    view = await stage.submit(constants(1))
    await append(stage, view, 0, "alive", Claim(Bitmap.of([0])))
    await stage.beat("alive")
    assert await finder(stage).find(stage.state, True) is None


async def test_a_busy_worker_only_looks_for_untouched_shards() -> None:
    stage = await Stage().open()
    view = await stage.submit(constants(10))
    await append(stage, view, 0, "other", Claim(EMPTY))
    await stage.beat("other")
    me = finder(stage)
    assert await me.find(stage.state, False) is None
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.shard.id == "00000-1"


@st.composite
def held_shards(draw: st.DrawFn) -> tuple[TaskTable, Shard]:
    """A shard at work, in any state that its holder may have left it in."""
    count = draw(st.integers(1, 20))
    dependencies = [sorted(draw(st.sets(st.integers(0, p - 1), max_size=3))) if p else [] for p in range(count)]
    table = broken_table(0, count, ValueError())
    table.dependencies = tuple(map(tuple, dependencies))
    done: set[int] = set()
    for position in range(count):
        if set(dependencies[position]) <= done and draw(st.booleans()):
            done.add(position)
    stored = {p: Location(0, 0, 1) for p in done if draw(st.booleans())}
    reserved = Bitmap.of(p for p in range(count) if p not in done and draw(st.booleans()))
    shard = Shard.untouched(keys.root_shard(0), Bitmap.full(count)).apply(WorkerId("other"), Claim(EMPTY))
    outcomes = Outcomes(done=Bitmap.of(done), stored=stored, ran=len(done))
    return table, shard.apply(WorkerId("other"), Commit(outcomes=outcomes, reserved=reserved, segments=("@1",)))


@given(held_shards(), st.integers(1, 10))
def test_what_is_split_off_can_run_elsewhere(held: tuple[TaskTable, Shard], count: int) -> None:
    """PROTOCOL.md, "Splitting"."""
    table, shard = held
    chosen = closed_part(takeable(None, shard, table), table, count)  # type: ignore[arg-type]
    assert chosen <= shard.splittable
    assert len(chosen) <= count + count // 2
    for position in chosen:
        for number in table.dependencies[position]:
            assert number in chosen or number in shard.index.outcomes.stored


async def test_a_thief_that_loses_the_race_takes_nothing() -> None:
    stage = await Stage().open()
    view = await stage.submit(constants(10))
    await append(stage, view, 0, "holder", Claim(EMPTY))
    await stage.beat("holder")
    thieves = [finder(stage, f"t{n}") for n in range(4)]
    found = [one for one in await asyncio.gather(*(t.find(stage.state, True) for t in thieves)) if one]
    taken = [position for one in found for position in one.shard.index.tasks]
    assert len(taken) == len(set(taken))
    story = await stage.story(view)
    assert all(entry.index.holder for entries in story.values() for entry in entries)


async def test_results_that_cross_a_split_reach_who_needs_them() -> None:
    """A whole run in which the tail of a shard is split off and its head depends on it."""
    stage = await Stage(split_from=0.001, reserve_ahead=0.2).open()
    gate, entered = threading.Event(), threading.Event()

    def slow() -> int:
        entered.set()
        assert gate.wait(60)
        return 100

    tasks: list[Task] = [(slow, []), *[((lambda n=n: n), []) for n in range(1, 9)], (lambda *v: sum(v), list(range(9)))]
    view = await stage.submit(tasks, outputs=[9])
    stage.start("holder")
    await asyncio.to_thread(entered.wait)
    stage.start("thief")
    while view.totals().done < 4:
        await view.survey()
        await asyncio.sleep(0.01)
    gate.set()
    await stage.complete(view)
    assert await stage.results(view, [9]) == [136]
    await stage.story(view)
    await stage.stop()


async def test_a_new_run_comes_before_one_in_which_nothing_was_found() -> None:
    """The old one may be over; to learn that takes requests for which somebody waits."""
    stage = await Stage().open()
    old = await stage.submit(constants(1))
    await append(stage, old, 0, "other", Claim(Bitmap.of([0])))
    await stage.beat("other")
    me = finder(stage)
    assert await me.find(stage.state, True) is None
    new = await stage.submit(constants(2), cuts=[1])
    listed = requests_of(stage.store)["list"]
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.view.run == new.run
    assert requests_of(stage.store)["list"] == listed
    # Then the older one comes first again: what it waited for may have come meanwhile.
    await append(stage, old, 0, "other", Release(outcomes=Outcomes(), reason="stopped"))
    found = await me.find(stage.state, True)
    assert found is not None
    assert found.view.run == old.run


async def test_a_complete_run_is_not_looked_at_again() -> None:
    stage = await Stage().open()
    view = await stage.submit([*constants(2), (add, [0, 1])])
    stage.start()
    await stage.complete(view)
    await stage.stop()
    me = finder(stage)
    assert await me.find(stage.state, True) is None
    assert me.complete == {view.run}
    assert view.shard(keys.root_shard(0)).phase is Phase.COMPLETE


def test_half_is_taken_when_it_pays() -> None:
    assert policy.steal(10, 1.0, 0.5) == 5
    assert policy.steal(10, 0.01, 0.5) == 0
