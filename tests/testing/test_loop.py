"""The virtual loop: time that only timers move, and processes that die and pause."""

from __future__ import annotations

import asyncio
import contextlib
import gc

import pytest

from burst_dask.testing.loop import TURN, Deadlock, VirtualLoop

#: Turns of the loop take time, a little.
NEARLY = 1000 * TURN


@pytest.fixture
def loop() -> VirtualLoop:
    return VirtualLoop()  # type: ignore[abstract]


def test_time_jumps_to_the_next_timer(loop: VirtualLoop) -> None:
    assert loop.run_until_complete(asyncio.sleep(86_400, "tomorrow")) == "tomorrow"
    assert loop.time() == pytest.approx(86_400, abs=NEARLY)
    assert loop.steps < 10


def test_timers_run_in_the_order_of_their_time_and_then_of_their_making(loop: VirtualLoop) -> None:
    ran: list[str] = []
    for name, at in (("late", 3.0), ("first", 1.0), ("second", 1.0), ("middle", 2.0)):
        loop.call_at(at, ran.append, name)
    loop.call_later(1.5, ran.append, "never").cancel()
    loop.run_until_complete(asyncio.sleep(4))
    assert ran == ["first", "second", "middle", "late"]


def test_callbacks_at_one_moment_run_in_the_order_of_their_calls(loop: VirtualLoop) -> None:
    ran: list[int] = []
    for number in range(5):
        loop.call_soon(ran.append, number)
    loop.call_soon(ran.append, 9).cancel()
    loop.run_until_complete(asyncio.sleep(0))
    assert ran == [0, 1, 2, 3, 4]


def test_what_waits_for_time_to_pass_without_sleeping_comes_to_an_end(loop: VirtualLoop) -> None:
    async def spin() -> None:
        while loop.time() < 100 * TURN:
            await asyncio.sleep(0)

    loop.run_until_complete(spin())
    assert loop.steps <= 110


def test_timeouts(loop: VirtualLoop) -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(60)
        return loop.time()

    assert loop.run_until_complete(main()) == pytest.approx(5, abs=NEARLY)


def test_a_task_group_cancels_the_others_when_one_fails(loop: VirtualLoop) -> None:
    ended: list[str] = []

    async def sleeps() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append(f"cancelled at {loop.time():.0f}")
            raise

    async def fails() -> None:
        await asyncio.sleep(2)
        raise ValueError("no")

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(sleeps())
            group.create_task(fails())

    with pytest.raises(ExceptionGroup) as caught:
        loop.run_until_complete(main())
    assert caught.group_contains(ValueError, match="no")
    assert ended == ["cancelled at 2"]


def test_locks_queues_and_events_work_on_it(loop: VirtualLoop) -> None:
    async def main() -> list[int]:
        queue: asyncio.Queue[int] = asyncio.Queue(maxsize=1)
        event, lock, found = asyncio.Event(), asyncio.Lock(), []

        async def produce() -> None:
            for number in range(3):
                async with lock:
                    await queue.put(number)
            event.set()

        producing = asyncio.create_task(produce())
        while not (event.is_set() and queue.empty()):
            found.append(await queue.get())
        await producing
        return found

    assert loop.run_until_complete(main()) == [0, 1, 2]


def test_executors_run_at_once_and_pass_errors_on(loop: VirtualLoop) -> None:
    async def main() -> int:
        with pytest.raises(ZeroDivisionError):
            await asyncio.to_thread(lambda: 1 // 0)
        return await asyncio.to_thread(sum, [1, 2])

    assert loop.run_until_complete(main()) == 3
    assert loop.time() < NEARLY


def test_a_killed_process_runs_no_more_code_not_even_cleanup(loop: VirtualLoop) -> None:
    ran: list[str] = []

    async def works() -> None:
        try:
            for number in range(10):
                await asyncio.sleep(1)
                ran.append(f"{number}")
        finally:
            ran.append("cleanup")

    process = loop.process("victim")
    task = process.start(works())
    process.start(asyncio.sleep(100))
    loop.call_at(3.5, process.kill)
    loop.run_until_complete(asyncio.sleep(50))
    assert ran == ["0", "1", "2"]
    assert not task.done() and not process.alive
    process.resume()  # a dead one stays dead
    process.call(lambda: ran.append("called"))
    loop.run_until_complete(asyncio.sleep(50))
    assert ran == ["0", "1", "2"]


def test_garbage_collection_runs_no_cleanup_of_the_dead(loop: VirtualLoop) -> None:
    ran: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()  # which only this task knows
        finally:
            ran.append("cleanup")

    process = loop.process("victim")
    process.start(waits())
    loop.run_until_complete(asyncio.sleep(1))
    process.kill()
    gc.collect()
    assert ran == []
    loop.finish()


def test_what_a_process_starts_dies_with_it_and_others_go_on(loop: VirtualLoop) -> None:
    ran: list[str] = []

    async def note(name: str) -> None:
        await asyncio.sleep(2)
        ran.append(name)

    async def parent() -> None:
        asyncio.create_task(note("child"))  # noqa: RUF006
        loop.call_later(2, ran.append, "timer")
        await asyncio.sleep(10)

    victim, other = loop.process("victim"), loop.process("other")
    victim.start(parent())
    other.start(note("other"))
    loop.call_at(1, victim.kill)
    loop.run_until_complete(asyncio.sleep(20))
    assert ran == ["other"]


def test_a_paused_process_goes_on_later_with_all_that_came_due(loop: VirtualLoop) -> None:
    ran: list[tuple[str, int]] = []

    async def works() -> None:
        for name in "abc":
            await asyncio.sleep(1)
            ran.append((name, round(loop.time())))

    process = loop.process("paused")
    task = process.start(works())
    loop.call_at(1.5, process.pause)
    loop.call_at(1.7, lambda: process.call(lambda: ran.append(("signal", round(loop.time())))))
    loop.run_until_complete(asyncio.sleep(30))
    assert process.paused and ran == [("a", 1)]
    process.resume()
    loop.run_until_complete(task)
    # The signal came before the timer was due; both were waiting.
    assert ran == [("a", 1), ("signal", 30), ("b", 30), ("c", 31)]


def test_a_wait_without_end_is_told(loop: VirtualLoop) -> None:
    with pytest.raises(Deadlock, match="nothing is left to happen"):
        loop.run_until_complete(loop.create_future())


def test_the_loop_that_ran_before_is_current_again(loop: VirtualLoop) -> None:
    async def outer() -> bool:
        mine = asyncio.get_running_loop()
        loop.run_until_complete(asyncio.sleep(1))
        return asyncio.get_running_loop() is mine

    assert asyncio.run(outer())
    with pytest.raises(RuntimeError):
        asyncio.get_running_loop()


def test_finish_leaves_no_task_not_even_of_the_dead(loop: VirtualLoop) -> None:
    async def stubborn() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(1000)
        await asyncio.sleep(1)

    dead, paused = loop.process("dead"), loop.process("paused")
    tasks = [dead.start(stubborn()), paused.start(stubborn()), loop.create_task(stubborn())]
    loop.run_until_complete(asyncio.sleep(1))
    dead.kill()
    paused.pause()
    loop.run_until_complete(asyncio.sleep(1))
    loop.finish()
    assert all(task.done() for task in tasks)
    assert not asyncio.all_tasks(loop)
    loop.run_until_complete(asyncio.sleep(0))  # nothing of the past runs here
    assert loop.time() < 10
