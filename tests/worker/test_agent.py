"""The agent against a real store, with tasks in real threads."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from operator import add
from pathlib import Path

import pytest
from stage import Stage, Task, constant, ended

from burst_dask.errors import TaskTimeout, VersionMismatch
from burst_dask.protocol import keys
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Claim, Commit, Ended, Release, Split, Takeover
from burst_dask.protocol.session_records import Close, Extend
from burst_dask.protocol.shard import Phase
from burst_dask.serialize import load_failure
from burst_dask.worker.agent import STUCK
from burst_dask.worker.tender import UNFIT


async def test_a_run_completes() -> None:
    stage = await Stage().open()
    tasks = [constant(n) for n in range(20)] + [(lambda *values: sum(values), list(range(20)))]
    view = await stage.submit(tasks, cuts=[7, 14])
    stage.start()
    await stage.complete(view)
    assert await stage.results(view, [3, 20]) == [3, 190]
    story = await stage.story(view)
    assert all(isinstance(entries[0].action, Claim) for entries in story.values())
    await stage.stop()
    assert (await ended(stage, "w")).reason == "stopped"


async def test_two_workers_share_a_run() -> None:
    stage = await Stage().open()
    both = threading.Barrier(2, timeout=60)
    # Each of the first two waits for the other: only two workers can get past them.
    tasks: list[Task] = [(lambda: both.wait() * 0 + 1, []), (lambda: both.wait() * 0 + 2, []), (add, [0, 1])]
    view = await stage.submit(tasks, cuts=[1, 2])
    stage.start("a")
    stage.start("b")
    await stage.complete(view)
    assert await stage.results(view, [2]) == [3]
    await stage.stop()


async def test_without_faults_no_task_runs_twice(tmp_path: Path) -> None:
    stage = await Stage().open()
    ran: Counter[int] = Counter()

    def count(n: int) -> Task:
        def function(*_: int) -> int:
            ran[n] += 1
            return n

        return function, [n - 10] if n >= 10 else []

    view = await stage.submit([count(n) for n in range(200)], cuts=range(20, 200, 20))
    for name in "abc":
        stage.start(name)
    await stage.complete(view)
    assert ran == Counter(range(200))
    await stage.story(view)
    await stage.stop()


async def test_an_idle_worker_splits_a_busy_shard() -> None:
    stage = await Stage(split_from=0.01, reserve_ahead=0.3).open()
    gate, entered = threading.Event(), threading.Event()

    def first() -> int:
        entered.set()
        assert gate.wait(60)
        return 0

    view = await stage.submit([(first, [])] + [constant(n) for n in range(1, 30)])
    stage.start("busy")
    await asyncio.to_thread(entered.wait)
    stage.start("thief")
    while view.totals().done < 15:  # a second worker took more than half; the first is still in its first task
        await view.survey()
        await asyncio.sleep(0.01)
    gate.set()
    await stage.complete(view)
    story = await stage.story(view)
    splits = [entry for entries in story.values() for entry in entries if isinstance(entry.action, Split)]
    assert splits
    assert {entry.writer for entry in splits} == {"thief"}
    assert await stage.results(view, list(range(30))) == list(range(30))
    await stage.stop()


async def test_a_dead_holders_work_is_taken_over() -> None:
    stage = await Stage().open()
    entered, gate = threading.Event(), threading.Event()
    first_time = iter([True])

    def hangs_once() -> int:
        if next(first_time, False):
            entered.set()
            gate.wait(60)
        return 1

    view = await stage.submit([(hangs_once, []), (lambda x: x + 1, [0])])
    stage.start("dies")
    await asyncio.to_thread(entered.wait)
    await stage.kill("dies")
    stage.start("heir")
    await stage.complete(view)
    gate.set()
    assert await stage.results(view, [1]) == [2]
    (entries,) = (await stage.story(view)).values()
    takeovers = [entry for entry in entries if isinstance(entry.action, Takeover)]
    assert [entry.action.lost for entry in takeovers] == ["dies"]
    await stage.stop()


async def test_a_fenced_holder_drops_its_work() -> None:
    """Rule 1: it comes back after its shard was taken over, and what it finished does not count."""
    stage = await Stage().open()
    entered, gate = threading.Event(), threading.Event()
    first_time = iter([True])

    def who() -> str:
        if next(first_time, False):
            entered.set()
            gate.wait(60)
            return "the fenced one"
        return "the heir"

    view = await stage.submit([(who, [])])
    stage.start("fenced")
    await asyncio.to_thread(entered.wait)
    # As if its heartbeat had stopped: the same record that a supervisor writes for a dead agent.
    await stage.store.create(keys.ended(stage.session, WorkerId("fenced")), b"")
    record = Ended(worker=WorkerId("fenced"), reason="died", message="test")
    from burst_dask.protocol.records import encode

    await stage.store.put(keys.ended(stage.session, WorkerId("fenced")), encode(record))
    stage.start("heir")
    await stage.complete(view)
    gate.set()
    await stage.stop("heir")
    assert await stage.results(view, [0]) == ["the heir"]
    (entries,) = (await stage.story(view)).values()
    assert {entry.writer for entry in entries if isinstance(entry.action, Commit | Release)} == {"heir"}
    await stage.stop("fenced")


async def test_stopping_hands_over_what_is_done() -> None:
    stage = await Stage(commit_interval=60, commit_interval_wanted=60).open()
    entered, gate = threading.Event(), threading.Event()
    ran: Counter[str] = Counter()

    def quick() -> int:
        ran["quick"] += 1
        return 7

    def slow() -> int:
        ran["slow"] += 1
        if ran["slow"] == 1:
            entered.set()
            gate.wait(60)
        return 8

    view = await stage.submit([(quick, []), (slow, [])])
    stage.start("a")
    await asyncio.to_thread(entered.wait)
    await stage.stop("a")
    assert (await ended(stage, "a")).reason == "stopped"
    stage.start("b")
    await stage.complete(view)
    gate.set()
    assert ran == {"quick": 1, "slow": 2}
    assert await stage.results(view, [0, 1]) == [7, 8]
    (entries,) = (await stage.story(view)).values()
    assert entries[-1].index.strikes == {}, "an orderly end is no death"
    await stage.stop()


async def test_a_failing_task_fails_its_dependents_in_all_shards() -> None:
    stage = await Stage().open()

    def fails() -> int:
        raise ValueError("no")

    tasks: list[Task] = [(fails, []), (lambda x: x, [0]), (lambda x: x, [1]), constant(5), (add, [2, 3])]
    view = await stage.submit(tasks, cuts=[1, 3])
    stage.start()
    await stage.complete(view)
    assert [view.outcome(n).done for n in range(5)] == [False, False, False, True, False]  # type: ignore[union-attr]
    assert [view.outcome(n).cause for n in (1, 2, 4)] == [0, 0, 0]  # type: ignore[union-attr]
    await stage.stop()


async def test_past_the_deadline_workers_take_no_new_work_and_commit_what_they_have() -> None:
    stage = await Stage(session_timeout=0.5).open()
    entered, gate = threading.Event(), threading.Event()

    def waits() -> int:
        entered.set()
        gate.wait(60)
        return 7

    view = await stage.submit([constant(3), (waits, []), constant(4)], cuts=[1])
    stage.start()
    await asyncio.to_thread(entered.wait)
    assert await stage.agents.pop("w") == "expired"
    gate.set()
    await view.survey()
    assert view.shard(keys.root_shard(1)).phase is Phase.FREE
    assert view.totals().pending == 2
    stage.start("late")  # whoever comes after the deadline does nothing
    assert await stage.agents.pop("late") == "expired"
    assert (await ended(stage, "late")).message == "the session's deadline has passed; its work was handed over"
    await stage.append(Extend(await stage.store.time("now") + 600))
    stage.start("later")
    await stage.complete(view)
    await stage.stop()


async def test_a_closed_session_ends_its_workers() -> None:
    stage = await Stage().open()
    stage.start()
    await stage.append(Close())
    assert await stage.agents.pop("w") == "closed"
    assert (await ended(stage, "w")).reason == "closed"


async def test_an_idle_worker_ends() -> None:
    stage = await Stage(idle_timeout=0.1, idle_poll_max=0.03).open()  # it looks several times before
    stage.start()
    assert await stage.agents.pop("w") == "idle"


async def test_another_python_is_refused_for_all_to_see(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = await Stage().open()
    from burst_dask.worker import process

    ours = process.own_versions()
    theirs = type(ours)(python="3.9", dask="2020.1", burst_dask="0")
    monkeypatch.setattr(process, "own_versions", lambda: theirs)
    stage.start()
    with pytest.raises(VersionMismatch, match=r"Python 3.9 here.*; Dask 2020.1 here"):
        await stage.agents.pop("w")
    record = await ended(stage, "w")
    assert record.reason == "refused"
    assert "Python 3.9" in record.message


async def test_a_damaged_shard_record_fails_its_tasks_and_no_others() -> None:
    stage = await Stage().open()
    view = await stage.submit([constant(1), constant(2), (add, [0, 1])], cuts=[1, 2])
    key = keys.pack(view.run, 0)
    data = bytearray(await stage.store.get(key) or b"")
    data[view.plan.shards[1].place.start + 30] ^= 1
    await stage.store.put(key, bytes(data))
    stage.start()
    await stage.complete(view)
    assert [view.outcome(n).done for n in range(3)] == [True, False, False]  # type: ignore[union-attr]
    await stage.stop()


async def test_tasks_go_to_workers_that_have_what_they_need() -> None:
    stage = await Stage().open()
    view = await stage.submit([constant(1), constant(2)], cuts=[1], annotations={0: {"resources": {"GPU": 1}}})
    stage.start("without")
    while not (outcome := view.outcome(1)) or view.shard(keys.root_shard(0)).index.cause != UNFIT:
        await view.survey()
        await asyncio.sleep(0.01)
    assert outcome.done
    stage.start("with", resources={"GPU": 1.0})
    await stage.complete(view)
    (first, *_), _ = (await stage.story(view)).values(), None
    assert [entry.writer for entry in first if isinstance(entry.action, Commit)] == ["with"]
    await stage.stop()


async def test_retries_come_from_annotations() -> None:
    stage = await Stage().open()
    tries = iter(range(3))

    def third_time_lucky() -> int:
        if next(tries) < 2:
            raise ValueError("not yet")
        return 1

    view = await stage.submit([(third_time_lucky, [])], annotations={0: {"retries": 2}})
    stage.start()
    await stage.complete(view)
    assert await stage.results(view, [0]) == [1]
    await stage.stop()


async def test_a_task_past_its_time_limit_fails_and_the_others_go_on() -> None:
    stage = await Stage().open()
    gate = threading.Event()
    tasks: list[Task] = [(lambda: gate.wait(60), []), (lambda: 1, []), (lambda: 2, [])]
    view = await stage.submit(tasks, annotations={0: {"timeout": 0.05}})
    stage.start(threads=2)
    await stage.complete(view)
    failure = load_failure((await view.fetch([0]))[0])
    assert isinstance(failure.exception, TaskTimeout)
    assert await stage.results(view, [1, 2]) == [1, 2]
    gate.set()
    await stage.stop()
    assert (await ended(stage, "w")).reason == "stopped"


async def test_a_worker_without_threads_hands_over_and_ends() -> None:
    stage = await Stage().open()
    gate = threading.Event()
    tasks: list[Task] = [(lambda: gate.wait(60), []), (lambda: 1, [])]
    view = await stage.submit(tasks, annotations={0: {"timeout": 0.05, "priority": 1}})
    stage.start("stuck", threads=1)
    assert await stage.agents.pop("stuck") == STUCK
    assert (await ended(stage, "stuck")).reason == "stuck"
    await view.survey()
    index = view.shard(keys.root_shard(0)).index
    assert index.holder is None and sorted(index.outcomes.failed) == [0]  # released, with what was over
    stage.start("fresh", threads=1)
    await stage.complete(view)
    assert await stage.results(view, [1]) == [1]
    gate.set()
    await stage.stop()


async def test_a_thread_that_comes_back_works_again() -> None:
    stage = await Stage().open()
    first, second = threading.Event(), threading.Event()
    tasks: list[Task] = [(lambda: first.wait(60), []), (lambda: second.wait(60), [])]
    view = await stage.submit(tasks, annotations={n: {"timeout": 0.05} for n in range(2)})
    stage.start(threads=3)  # one stays
    await stage.complete(view)
    for event in (first, second):
        event.set()
    both = threading.Barrier(3, timeout=60)
    view = await stage.submit([(lambda: both.wait() >= 0, [])] * 3)
    await stage.complete(view)
    assert await stage.results(view, [0, 1, 2]) == [True] * 3
    await stage.stop()


async def test_other_tasks_run_while_one_rests_between_its_tries() -> None:
    stage = await Stage(retry_delay=0.5).open()
    order: list[int] = []

    def fail_at_first() -> int:
        order.append(0)
        if order.count(0) == 1:
            raise ValueError("not yet")
        return 0

    tasks: list[Task] = [(fail_at_first, []), (lambda: order.append(1), [])]
    view = await stage.submit(tasks, annotations={0: {"retries": 1, "priority": 1}})
    stage.start(threads=1)
    await stage.complete(view)
    assert order == [0, 1, 0]
    await stage.stop()
