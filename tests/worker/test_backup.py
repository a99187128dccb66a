"""Second copies of stragglers: who runs them, and that the first commit wins."""

from __future__ import annotations

import threading
from typing import Any

from stage import Stage, Task

from burst_dask import serialize
from burst_dask.protocol import keys
from burst_dask.protocol.records import Backup

#: Every entry is old at once, so that nothing depends on how quick this machine is.
EAGER: dict[str, Any] = {"commit_interval": 0.001, "commit_interval_wanted": 0.001, "reserve_ahead": 0.01}


def first_call_waits(gate: threading.Event, entered: threading.Event) -> Task:
    """A task whose first execution ends only when `gate` opens; another ends at once."""

    def task() -> str:
        if not entered.is_set():
            entered.set()
            assert gate.wait(60)
            return "the first"
        return "the copy"

    return task, []


def one_each() -> list[Task]:
    """Two tasks of which each of two workers runs one: then both know how long such tasks take."""
    both = threading.Barrier(2, timeout=60)
    return [(both.wait, []), (both.wait, [])]


async def test_an_idle_worker_runs_a_copy_and_its_result_counts() -> None:
    stage = await Stage(**EAGER).open()
    gate, entered = threading.Event(), threading.Event()
    view = await stage.submit([*one_each(), first_call_waits(gate, entered), ((lambda x: x + "!"), [2])], cuts=[1, 2])
    stage.start("a")
    stage.start("b")
    await stage.complete(view)
    assert await stage.results(view, [2, 3]) == ["the copy", "the copy!"]
    story = await stage.story(view)
    assert any(isinstance(entry.action, Backup) for entries in story.values() for entry in entries)
    gate.set()
    await stage.stop()


async def test_a_copy_that_fails_leaves_the_task_to_its_holder() -> None:
    stage = await Stage(**EAGER).open()
    gate, entered, failed = threading.Event(), threading.Event(), threading.Event()

    def task() -> str:
        if not entered.is_set():
            entered.set()
            assert gate.wait(60)
            return "the first"
        failed.set()
        raise ValueError("the copy")

    view = await stage.submit([*one_each(), (task, [])], cuts=[1, 2])
    stage.start("a")
    stage.start("b")
    while not failed.is_set():
        await stage.clock.sleep(0.01)
    gate.set()
    await stage.complete(view)
    assert await stage.results(view, [2]) == ["the first"]
    await stage.stop()


async def test_impure_tasks_have_no_copies() -> None:
    stage = await Stage(**EAGER).open()
    gate, entered = threading.Event(), threading.Event()
    view = await stage.submit(
        [*one_each(), first_call_waits(gate, entered)], cuts=[1, 2], annotations={2: {"impure": True}}
    )
    stage.start("a")
    stage.start("b")
    while view.totals().done < 2 or not entered.is_set():
        await view.survey()
        await stage.clock.sleep(0.01)
    await stage.clock.sleep(0.5)  # long enough for some searches, were one to be found
    gate.set()
    await stage.complete(view)
    assert serialize.loads((await view.fetch([2]))[2]) == "the first"
    assert view.shard(keys.root_shard(2)).index.outcomes.ran == 1
    await stage.stop()
