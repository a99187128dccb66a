"""What a worker does with cancelled runs and tasks."""

from __future__ import annotations

import asyncio
import threading

from stage import Stage, Task, constant, ended

from burst_dask.errors import TaskCancelled
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.session_records import Cancel
from burst_dask.protocol.shard import Phase
from burst_dask.serialize import load_failure


async def test_running_tasks_of_a_cancelled_run_are_let_finish() -> None:
    stage = await Stage(release_grace=0.001).open()
    entered, gate = threading.Event(), threading.Event()

    def waits() -> int:
        entered.set()
        gate.wait(60)
        return 1

    view = await stage.submit([(waits, []), *[constant(n) for n in range(50)]], cuts=[1])
    stage.start(threads=2)
    await asyncio.to_thread(entered.wait)
    await stage.append(Cancel(view.run))
    await stage.complete(await stage.submit([constant(1)]))  # the worker knows by now, and its other thread works
    root = keys.root_shard(0)
    await view.survey()
    assert view.shard(root).index.holder == "w"
    gate.set()
    while view.shard(root).phase is Phase.HELD:
        await view.survey()
        await asyncio.sleep(0.01)
    assert view.shard(root).index.outcomes.done
    await stage.stop()


async def test_a_cancellation_by_force_ends_the_worker_of_a_running_task() -> None:
    stage = await Stage().open()
    entered, gate, finish = threading.Event(), threading.Event(), threading.Event()

    def waits() -> None:
        entered.set()
        gate.wait(60)

    def finishes() -> int:
        finish.wait(60)
        return 5

    view = await stage.submit([(waits, [])])
    other = await stage.submit([(finishes, [])])
    stage.start(threads=2)
    await asyncio.to_thread(entered.wait)
    while not other.shards:
        await other.survey()
        await asyncio.sleep(0.01)
    finish.set()  # what else it has is handed over with its outcome
    await stage.append(Cancel(view.run))
    await stage.append(Cancel(view.run, force=True))  # also once it is being let finish
    assert await stage.agents.pop("w") == "killed"
    assert (await ended(stage, "w")).message == f"run {view.run} was cancelled by force while it ran a task of it"
    await view.survey()
    await other.survey()
    root = keys.root_shard(0)
    assert (view.shard(root).phase, view.shard(root).index.cause) == (Phase.FREE, "cancelled by force")
    assert other.totals().done == 1
    gate.set()


async def test_a_cancellation_by_force_leaves_other_workers_alone() -> None:
    stage = await Stage().open()
    view = await stage.submit([constant(1)])
    stage.start()
    await stage.complete(view)
    await stage.append(Cancel(view.run, force=True))
    await stage.complete(await stage.submit([constant(2)]))
    await stage.stop()
    assert (await ended(stage, "w")).reason == "stopped"


async def test_single_tasks_are_cancelled_and_those_that_run_are_let_finish() -> None:
    stage = await Stage().open()
    entered, gate = threading.Event(), threading.Event()

    def waits() -> int:
        entered.set()
        gate.wait(60)
        return 1

    def negative(value: int) -> int:
        return -value

    # 0 runs; 1 and 5 wait, 2 needs 1, 3 needs 2 in another shard, 4 needs what runs
    tasks: list[Task] = [(waits, []), constant(1), (negative, [1]), (negative, [2]), (negative, [0]), constant(5)]
    view = await stage.submit(tasks, cuts=[3])
    stage.start()
    await asyncio.to_thread(entered.wait)
    await stage.append(Cancel(view.run, tasks=Bitmap.of([0, 1, 5])))
    while not view.totals().cancelled:  # the worker knows by now
        await view.survey()
        await asyncio.sleep(0.01)
    gate.set()
    await stage.complete(view)
    outcomes = [view.outcome(number) for number in range(6)]
    assert [one is not None and one.done for one in outcomes] == [True, False, False, False, True, False]
    assert [one is not None and one.cancelled for one in outcomes] == [False, True, True, True, False, True]
    assert [one.cause for one in outcomes if one is not None] == [None, 1, 1, 1, None, 5]
    failure = load_failure((await view.fetch([5]))[5])
    assert isinstance(failure.exception, TaskCancelled) and failure.key == "t-5"
    assert (view.totals().cancelled, view.totals().failed) == (4, 0)
    await stage.story(view)
    await stage.stop()


async def test_a_task_that_is_to_be_tried_again_is_cancelled() -> None:
    stage = await Stage(retry_delay=3600.0).open()
    failed = threading.Event()

    def fails() -> None:
        failed.set()
        raise ConnectionError

    view = await stage.submit([(fails, [])], annotations={0: {"retries": 5}})
    stage.start()
    await asyncio.to_thread(failed.wait)
    await stage.append(Cancel(view.run, tasks=Bitmap.of([0])))
    await stage.complete(view)
    assert view.totals().cancelled == 1
    await stage.stop()


async def test_a_single_task_that_runs_is_ended_by_force() -> None:
    stage = await Stage().open()
    entered, gate = threading.Event(), threading.Event()

    def waits() -> None:
        entered.set()
        gate.wait(60)

    view = await stage.submit([(waits, []), constant(1)])
    stage.start()
    await asyncio.to_thread(entered.wait)
    await stage.append(Cancel(view.run, force=True, tasks=Bitmap.of([0])))
    assert await stage.agents.pop("w") == "killed"
    stage.start("next")
    await stage.complete(view)
    assert (view.totals().cancelled, view.totals().done) == (1, 1)
    await stage.stop()
    gate.set()
