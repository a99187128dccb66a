"""Runs that depend on results of other runs: waiting, failing and being released across them."""

from __future__ import annotations

import asyncio
import threading
from operator import add, neg, truediv

import msgspec
import pytest
from stage import Stage

from burst_dask import serialize
from burst_dask.errors import CorruptObject, ProtocolError
from burst_dask.journal import across, log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Beat, Claim, Outcomes, Release, encode
from burst_dask.store import requests_of
from burst_dask.testing.facts import gather
from burst_dask.testing.invariants import violations_of
from burst_dask.worker.finder import BLOCKED, Finder


async def fresh(stage: Stage, view: RunView) -> RunView:
    """Return a view that knows nothing yet but the plans."""
    found = await RunView.open(stage.store, view.run)
    assert found is not None
    return found


async def test_a_result_of_another_run_is_an_input() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 20), []), ((lambda: 22), [])], cuts=[1])
    second = await stage.submit([(neg, [2]), (add, [0, 3])], externals=[(first.run, 0), (first.run, 1)])
    stage.start()
    await stage.complete(second)
    assert await stage.results(second, [0, 1]) == [-20, 2]
    assert set(await stage.story(second)) == {"00000"}
    await stage.stop()


async def test_a_task_waits_for_another_run_while_others_run() -> None:
    stage = await Stage().open()
    gate = threading.Event()
    first = await stage.submit([(lambda: gate.wait(60) and 3, [])])
    second = await stage.submit([((lambda: 1), []), (neg, [2])], cuts=[1], externals=[(first.run, 0)])
    stage.start("a")
    stage.start("b")
    while second.outcome(0) is None:
        await second.survey()
        await asyncio.sleep(0.005)
    assert second.totals().done == 1
    gate.set()
    await stage.complete(second)
    assert await stage.results(second, [1]) == [-3]
    await stage.stop()


async def test_a_failure_crosses_runs_and_leads_back_to_its_cause() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 0), []), (lambda n: truediv(1, n), [0]), (neg, [1])])
    second = await stage.submit([(neg, [2]), (neg, [0])], externals=[(first.run, 2)])
    third = await stage.submit([(neg, [1])], externals=[(second.run, 1)])
    stage.start()
    await stage.complete(third)
    outcome = third.outcome(0)
    assert outcome is not None and not outcome.done
    assert outcome.cause == third.plan.tasks  # the external, by its number here
    view, number = await across.culprit(await read(stage, third), 0)
    assert (view.run, number) == (first.run, 1)
    failure = serialize.load_failure(await across.error(third, 0))
    assert isinstance(failure.exception, ZeroDivisionError) and failure.key == "t-1"
    await stage.stop()


async def read(stage: Stage, view: RunView) -> RunView:
    found = await fresh(stage, view)
    await found.survey()
    return found


async def test_what_did_not_fail_has_no_culprit() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), [])])
    second = await stage.submit([(neg, [1])], externals=[(first.run, 0)])
    with pytest.raises(ProtocolError, match=r"task 0 of run .* has no outcome"):
        await across.settled(second, 1)
    stage.start()
    await stage.complete(second)
    view, number, outcome = await across.settled(second, 1)
    assert (view.run, number, outcome.done) == (first.run, 0, True)
    with pytest.raises(ProtocolError, match="did not fail"):
        await across.culprit(second, 1)
    await stage.stop()


async def test_a_view_fetches_from_all_runs_at_once() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda n=n: n), []) for n in range(4)])
    second = await stage.submit(
        [((lambda a, b, c: a + b + c), [1, 2, 3])], externals=[(first.run, 1), (first.run, 3), (first.run, 3)]
    )
    stage.start()
    await stage.complete(second)
    view = await read(stage, second)
    await across.open_others(view, known={first.run: await read(stage, first)})
    bodies = await view.fetch([0, 1, 2, 3])
    assert {n: serialize.loads(body) for n, body in bodies.items()} == {0: 7, 1: 1, 2: 3, 3: 3}
    await stage.stop()


async def test_plans_of_other_runs_are_read_once_and_shared() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), []), ((lambda: 2), [])])
    second = await stage.submit([(add, [1, 2])], externals=[(first.run, 0), (first.run, 1)])
    context = stage.context()
    one = await context.view(first.run)
    before = requests_of(stage.store)["get"]
    two = await context.view(second.run)
    assert two is not None and two.others == {first.run: one}
    assert requests_of(stage.store)["get"] == before + 1
    lost = await stage.submit([(neg, [1])], externals=[(RunId(f"{stage.session}.gone"), 0)])
    with pytest.raises(CorruptObject, match=r"gone/plan: run .* depends on it"):
        await context.view(lost.run)


async def test_what_was_released_blocked_waits_for_other_runs() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), [])])
    second = await stage.submit([(neg, [1])], externals=[(first.run, 0)])
    author = log.Author(WorkerId("other"), stage.clock, stage.entropy)
    root = keys.root_shard(0)
    for action in (Claim(EMPTY), Release(Outcomes(), BLOCKED)):
        after = await log.append(stage.store, second.run, log.prepare(second.shard(root), author, action))
        assert after is not None
        second.learn(after)

    context = stage.context()
    finder = Finder(context, lambda: Beat(worker=WorkerId("me"), host="h", pid=1, threads=1, started=0.0))
    found = await finder.find(stage.state, idle=True)
    assert found is not None and found.view.run == first.run
    assert await finder.find(stage.state, idle=True) is None

    view = found.view
    commit = log.prepare(found.shard, context.author, Release(Outcomes(done=found.shard.index.tasks), "test"))
    assert await log.append(stage.store, first.run, commit) is not None
    again = await finder.find(stage.state, idle=True)
    assert again is not None and again.view.run == second.run and again.view.others[first.run] is view


# ---------------------------------------------------------------------------- what the checks say


async def by_hand(stage: Stage, view: RunView, outcomes: Outcomes) -> list[str]:
    """Give a run's first shard these outcomes, and return what is found wrong with it."""
    author = log.Author(WorkerId("bug"), stage.clock, stage.entropy)
    shard = view.shard(keys.root_shard(0))
    for action in (Claim(EMPTY), Release(outcomes, "test")):
        shard = await log.append(stage.store, view.run, log.prepare(shard, author, action))
    return [str(violation) for violation in violations_of(await gather(stage.store, view.run))]


async def test_a_run_that_waits_for_another_is_healthy() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), [])])
    second = await stage.submit([(neg, [2]), (neg, [0])], cuts=[1], externals=[(first.run, 0)])
    assert violations_of(await gather(stage.store, second.run)) == []
    stage.start()
    await stage.complete(second)
    assert violations_of(await gather(stage.store, second.run)) == []
    await stage.stop()


async def test_a_task_that_ran_before_its_input_of_another_run_is_found() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), [])])
    second = await stage.submit([(neg, [1])], outputs=[], externals=[(first.run, 0)])
    found = await by_hand(stage, second, Outcomes(done=Bitmap.of([0]), ran=1))
    what = f"task 0 is done, and needs ['task 0 of run {first.run}, which has no outcome']"
    assert any(what in one for one in found), found


async def test_a_wrong_cause_in_another_run_is_found() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), []), ((lambda: 1 // 0), [])])
    stage.start()
    await stage.complete(first)
    await stage.stop()
    for cause, what in [
        (2, f"failed because of task 0 of run {first.run}, which did not fail"),
        (3, f"failed because of task 1 of run {first.run}, and needs nothing that failed of it"),
        (9, "failed because of task 9, which does not exist"),
    ]:
        second = await stage.submit([(neg, [2]), (neg, [3])], externals=[(first.run, 0), (first.run, 1)])
        failed = Bitmap.of([0])
        found = await by_hand(stage, second, Outcomes(failed=failed, upstream={cause: failed}))
        assert any(what in one for one in found), found


async def test_a_plan_that_names_other_results_is_found() -> None:
    stage = await Stage().open()
    first = await stage.submit([((lambda: 1), [])])
    second = await stage.submit([(neg, [1])], externals=[(first.run, 0)])
    (info,) = second.plan.shards
    wrong = msgspec.structs.replace(info, externals=())
    plan = msgspec.structs.replace(second.plan, shards=(wrong,), externals=((RunId("elsewhere.run"), 0),))
    await stage.store.put(keys.plan(second.run), encode(plan))
    found = "; ".join(str(violation) for violation in violations_of(await gather(stage.store, second.run)))
    assert "the plan says other results of other runs for shard 0" in found
    assert "the plan names results of another session" in found
