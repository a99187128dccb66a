"""Intermediate results that nobody needs any more are deleted while a run goes on, and nothing else is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from operator import neg
from typing import Any

import pytest
from stage import Stage, Task

from burst_dask.client.replaying import prepare
from burst_dask.errors import ConfigError, ResultDiscarded, StoreUnavailable
from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Claim, Commit, Discard, Location, Outcomes
from burst_dask.protocol.shard import Shard
from burst_dask.serialize import dumps
from burst_dask.store.base import Store
from burst_dask.testing.facts import garbage, gather
from burst_dask.testing.needed import leftover
from burst_dask.worker.discarding import BUDGET

#: what gets a segment
LARGE = 100_000


def large(*_: Any) -> bytes:
    return b"x" * LARGE


def fails(_: bytes) -> None:
    raise ValueError("no")


async def segments(stage: Stage, run: RunId) -> dict[str, int]:
    """Return the sizes of the segments that are there, by shard."""
    found: dict[str, int] = {}
    async for page in stage.store.list(keys.run_prefix(run) + "segments/"):
        for meta in page:
            shard = meta.key.split("/")[-2]
            found[shard] = found.get(shard, 0) + meta.size
    return found


async def until(condition: Callable[[], Any]) -> None:
    """Return when `condition`, a coroutine function, gives something true; an event is what it waits for."""
    while not await condition():
        await asyncio.sleep(0.005)


async def swept(stage: Stage, view: RunView) -> None:
    """Wait until nothing is left that nobody needs."""

    async def none() -> bool:
        facts = await gather(stage.store, view.run)
        return not list(leftover(facts)) and not garbage(facts)

    await until(none)


async def newest(stage: Stage, run: RunId) -> RunView:
    view = await RunView.open(stage.store, run)
    assert view is not None
    await view.survey(discarded=True)
    return view


async def test_in_the_end_only_what_was_asked_for_is_left() -> None:
    stage = await Stage().open()
    chain: list[Task] = [(large, [n - 1] if n else []) for n in range(6)]
    view = await stage.submit(chain, cuts=[2, 4], outputs=[5])
    stage.start("a")
    stage.start("b")
    await stage.complete(view)
    await swept(stage, view)
    left = await segments(stage, view.run)
    assert set(left) == {"00002"} and LARGE < left["00002"] < 2 * LARGE
    assert await stage.results(await newest(stage, view.run), [5]) == [large()]
    await stage.story(view)  # no rule is broken
    await stage.stop()


async def test_the_log_says_what_is_gone_and_a_reader_is_told() -> None:
    stage = await Stage().open()
    view = await stage.submit([(large, []), (len, [0])], cuts=[1], outputs=[1])
    stage.start()
    await stage.complete(view)
    stale = await RunView.open(stage.store, view.run)
    assert stale is not None
    await swept(stage, view)
    view = await newest(stage, view.run)
    index = view.shard(keys.root_shard(0)).index
    assert list(index.discarded) == [0] and index.freed > LARGE and index.objects == ("",)
    outcome = view.outcome(0)
    assert outcome is not None and outcome.done and outcome.location is None
    with pytest.raises(ResultDiscarded, match=r"task 0 of run .*keep_intermediates"):
        await view.fetch([0])
    # Who has read the log before it said so finds the segment gone, and reads on.
    entry = await log.read(stage.store, view.run, keys.root_shard(0), index_before(view))
    assert entry is not None
    stale.learn(Shard.at(keys.root_shard(0), entry[0]))
    with pytest.raises(ResultDiscarded):
        await stale.fetch([0])
    await stage.stop()


async def test_a_task_that_is_done_may_have_no_inputs_to_be_replayed_with() -> None:
    stage = await Stage().open()
    view = await stage.submit([(large, []), (len, [0])], cuts=[1], outputs=[1])
    stage.start()
    await stage.complete(view)
    await view.survey(discarded=True)
    await swept(stage, view)
    with pytest.raises(ConfigError, match=r"'t-1' did not fail, so 't-0', which it needs, was deleted"):
        await prepare(view, "t-1")
    assert len((await prepare(view, "t-0"))()) == LARGE
    await stage.stop()


async def test_only_who_asks_for_it_reads_on_in_a_shard_that_is_complete() -> None:
    stage = await Stage().open()
    view, _ = await played(stage)
    await view.survey()
    stage.start()
    await swept(stage, view)
    await view.survey()
    assert view.shard(keys.root_shard(0)).index.freed == 0
    await view.survey(discarded=True)
    assert view.shard(keys.root_shard(0)).index.freed > LARGE
    await stage.stop()


def index_before(view: RunView) -> int:
    """Return the number of the entry before the last one."""
    return view.shard(keys.root_shard(0)).next - 2


async def test_a_holder_says_so_with_its_next_commit_while_its_shard_goes_on() -> None:
    stage = await Stage(reserve_ahead=0.01).open()
    gate = threading.Event()

    def waits() -> None:
        gate.wait(60)

    tasks: list[Task] = [(large, []), (large, [0]), (large, [1]), (waits, [])]
    # With a time limit it runs by itself, and not in a batch with the others.
    alone = {3: {"timeout": 100.0}}
    # The other shard has a task that can run at once, so it is begun before this one has ended.
    tasks += [(len, [0]), (len, [1]), (lambda: 0, [])]
    view = await stage.submit(tasks, cuts=[4], outputs=[2, 4, 5, 6], annotations=alone)
    stage.start("a")
    stage.start("b")

    async def discarded() -> bool:
        await view.survey()
        return list(view.shard(keys.root_shard(0)).index.discarded) == [0, 1]

    await until(discarded)
    assert view.shard(keys.root_shard(0)).index.pending  # it goes on
    gate.set()
    await stage.complete(view)
    entries = (await stage.story(view))["00000"]
    assert not any(isinstance(entry.action, Discard) for entry in entries if not entry.index.complete)
    assert any(isinstance(entry.action, Commit) and entry.action.discarded for entry in entries)
    await stage.stop()


async def test_nothing_is_deleted_if_intermediates_are_to_be_kept() -> None:
    stage = await Stage(keep_intermediates=True).open()
    view = await stage.submit([(large, []), (large, [0]), (len, [1])], cuts=[1, 2], outputs=[2])
    stage.start()
    await stage.complete(view)
    await stage.stop()
    assert set(await segments(stage, view.run)) == {"00000", "00001"}
    assert await stage.results(await newest(stage, view.run), [0]) == [large()]


async def test_inputs_of_a_task_that_failed_are_kept_and_those_of_its_dependents_are_not() -> None:
    stage = await Stage().open()
    tasks: list[Task] = [(large, []), (large, []), (fails, [0]), (lambda a, b: None, [1, 2]), (len, [1])]
    view = await stage.submit(tasks, cuts=[1, 2], outputs=[3, 4])
    stage.start()
    await stage.complete(view)
    await swept(stage, view)
    assert set(await segments(stage, view.run)) == {"00000"}
    assert await stage.results(await newest(stage, view.run), [0]) == [large()]
    await stage.story(view)
    await stage.stop()


async def test_outputs_and_intermediates_lie_in_segments_of_their_own() -> None:
    stage = await Stage().open()
    view = await stage.submit([(large, []), (large, [0]), (len, [0])], cuts=[2], outputs=[1, 2])
    stage.start()
    await stage.complete(view)
    await swept(stage, view)
    left = await segments(stage, view.run)
    assert left.keys() == {"00000"} and left["00000"] < 2 * LARGE
    await stage.stop()


async def test_a_later_run_finds_what_was_asked_for_in_an_earlier_one() -> None:
    """No consumer in its own run is left, and workers have swept it."""
    stage = await Stage().open()
    first = await stage.submit([(lambda: 20, []), (large, []), (len, [1])], cuts=[1, 2], outputs=[0, 1, 2])
    stage.start()
    await stage.complete(first)
    second = await stage.submit([(len, [2]), (neg, [0])], outputs=[1], externals=[(first.run, 1)])
    await stage.complete(second)
    await swept(stage, first)
    third = await stage.submit([(len, [1])], externals=[(first.run, 1)])
    await stage.complete(third)
    assert await stage.results(third, [0]) == [LARGE]
    await stage.stop()


async def test_an_intermediate_result_stays_while_another_run_that_names_it_goes_on() -> None:
    """As one does that takes up what an earlier run has left."""
    stage = await Stage().open()
    first, _ = await played(stage)
    second = await stage.submit([(len, [1])], externals=[(first.run, 0)])
    context = stage.context()
    live = [first.run, second.run]
    context.discarder.live_runs = lambda: live
    await context.discarder._look(await newest(stage, first.run), {1})
    assert not (await newest(stage, first.run)).shard(keys.root_shard(0)).index.discarded
    live.remove(second.run)  # it is over
    await context.discarder._look(await newest(stage, first.run), {1})
    await context.discarder.end()
    assert set(await segments(stage, first.run)) == {"00001"}


class Refusing:
    """A store that refuses to delete."""

    def __init__(self, store: Store) -> None:
        self.inner = store
        self.refused = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def delete(self, names: Iterable[str]) -> None:
        self.refused += 1
        raise StoreUnavailable("no deletes today")


async def test_a_store_that_does_not_delete_costs_storage_and_no_work() -> None:
    stage = await Stage().open()
    store = Refusing(stage.store)
    stage.store = store  # type: ignore[assignment]
    view = await stage.submit([(large, []), (large, [0]), (len, [1])], cuts=[1, 2], outputs=[2])
    stage.start()
    await stage.complete(view)

    async def refused() -> bool:
        return bool(store.refused)

    await until(refused)
    assert await stage.results(await newest(stage, view.run), [2]) == [LARGE]
    await stage.story(view)
    # What the log says to be gone and is there is garbage: a cleanup deletes it.
    assert any("/segments/" in line for line in garbage(await gather(stage.store, view.run)))
    await stage.stop()


async def played(stage: Stage) -> tuple[RunView, Shard]:
    """Play a worker by hand that commits the last outcome, and dies before it deletes what nobody needs."""
    view = await stage.submit([(large, []), (len, [0])], cuts=[1], outputs=[1])
    author = log.Author(WorkerId("gone"), stage.clock, stage.entropy)
    await stage.beat("gone")
    segment = b"".join(seal(dumps(large())))
    number = b"".join(seal(dumps(LARGE)))
    for place, body, name in ((0, segment, "00001-a"), (1, number, "00001-a" + keys.LASTING)):
        id = keys.root_shard(place)
        await stage.store.put(keys.segment(view.run, id, name), body)
        shard = view.shard(id)
        outcomes = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, len(body))})
        for action in (Claim(Bitmap.of([0])), Commit(outcomes, EMPTY, (name,))):
            attempt = log.prepare(shard, author, action)
            after = await log.append(stage.store, view.run, attempt)
            assert after is not None
            shard = after
    return view, shard


async def test_what_a_dead_worker_was_to_delete_is_swept_by_one_that_has_nothing_else_to_do() -> None:
    stage = await Stage().open()
    view, _ = await played(stage)
    assert set(await segments(stage, view.run)) == {"00000", "00001"}
    stage.start("sweeper")
    await swept(stage, view)
    assert set(await segments(stage, view.run)) == {"00001"}
    await stage.story(view)
    await stage.stop()


async def test_two_that_discard_the_same_do_it_once() -> None:
    stage = await Stage().open()
    view, _ = await played(stage)
    contexts = [stage.context("a"), stage.context("b")]
    views = [await newest(stage, view.run) for _ in contexts]
    for context, its in zip(contexts, views, strict=True):
        context.discarder.stir(its, 1, over=True)
    tasks = [asyncio.create_task(context.discarder.run()) for context in contexts]
    await swept(stage, view)
    for context in contexts:
        assert not context.discarder._due
    for task in tasks:
        task.cancel()
    entries = (await stage.story(view))["00000"]
    assert [type(entry.action) for entry in entries] == [Claim, Commit, Discard]


async def test_a_shard_that_somebody_else_holds_is_left_to_its_holder() -> None:
    stage = await Stage().open()
    view = await stage.submit([(large, []), (large, []), (len, [0])], cuts=[2], outputs=[1, 2])
    author = log.Author(WorkerId("other"), stage.clock, stage.entropy)
    body = b"".join(seal(dumps(large())))
    await stage.store.put(keys.segment(view.run, keys.root_shard(0), "a"), body)
    shard = view.shard(keys.root_shard(0))
    outcomes = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, len(body))})
    for action in (Claim(Bitmap.of([0, 1])), Commit(outcomes, Bitmap.of([1]), ("a",))):
        shard = await log.append(stage.store, view.run, log.prepare(shard, author, action)) or shard
    number = b"".join(seal(dumps(LARGE)))
    last = view.shard(keys.root_shard(1))
    outcomes = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, len(number))})
    for action in (Claim(Bitmap.of([0])), Commit(outcomes, EMPTY, ("@1",))):
        blobs = [number] if isinstance(action, Commit) else []
        last = await log.append(stage.store, view.run, log.prepare(last, author, action, blobs)) or last
    context, its = stage.context("me"), await newest(stage, view.run)
    await context.discarder._look(its, {1})
    assert (await newest(stage, view.run)).shard(keys.root_shard(0)).next == 2
    assert set(await segments(stage, view.run)) == {"00000"}


async def test_a_look_has_a_budget_and_what_is_left_has_its_turn() -> None:
    stage = await Stage().open()
    count = BUDGET + 10
    tasks: list[Task] = [(large, []), *((len, [0]) for _ in range(count))]
    view = await stage.submit(tasks, cuts=range(1, count + 1), outputs=range(1, count + 1))
    for name in "abc":
        stage.start(name)
    await stage.complete(view)
    await swept(stage, view)
    assert await segments(stage, view.run) == {}
    await stage.stop()
