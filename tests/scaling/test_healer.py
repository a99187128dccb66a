"""Fleets that nobody looks after but their own workers, in the simulator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stage import Stage

from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.journal import log
from burst_dask.protocol.session_records import Adapt, Afford, Scale, SessionAction
from burst_dask.scaling import healer, sizing
from burst_dask.testing.fleet import BOOT, Recovery, Seen, SimulatedFleet
from burst_dask.worker.agent import Agent

Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def losing(seed: int, refuses: float = 0.0) -> Recovery:
    """A fleet that loses 90 % of its workers, but not the last one, and has work for several minutes more."""
    entropy = Entropy(f"recovery {seed}")
    workers = entropy.integer(5, 30)
    seconds = [entropy.uniform(5.0, 15.0) for _ in range(workers * 40)]
    lost = {entropy.uniform(100.0, 200.0): 0.9}
    return Recovery(seed, seconds, Scale(workers), Settings.of(), lost, refuses)


@pytest.mark.parametrize("seed", range(6))
def test_a_fleet_that_loses_most_of_its_workers_comes_back_and_never_overshoots(seed: int) -> None:
    world = losing(seed)
    fleet = world.run(patience=3000.0)
    assert world.done is not None
    assert isinstance(world.goal, Scale)
    assert fleet.most == world.goal.workers
    low = next(number for number, size in enumerate(world.sizes) if size < world.goal.workers / 2)
    assert world.goal.workers in world.sizes[low:], "it has come back"


@pytest.mark.parametrize("seed", range(3))
def test_what_is_refused_for_want_of_capacity_is_asked_for_again(seed: int) -> None:
    world = losing(seed, refuses=0.7)
    fleet = world.run(patience=5000.0)
    assert world.done is not None
    assert isinstance(world.goal, Scale)
    assert fleet.most == world.goal.workers and len(fleet.begun) > 2


def overshoots() -> bool:
    worlds = [losing(seed) for seed in range(5)]
    return any(world.run(patience=800.0).most > world.goal.workers for world in worlds if isinstance(world.goal, Scale))


def test_without_the_condition_two_would_start_the_same_workers(monkeypatch: Patch) -> None:
    """The check above can fail."""

    async def behind_whatever_others_wrote(*args: Any) -> Any:
        return await log.append_session(*args)

    monkeypatch.setattr(log, "try_append_session", behind_whatever_others_wrote)
    monkeypatch.setattr(healer.Healer, "pause", lambda self: 1.0)  # so that some look at the same time
    assert overshoots()


def test_without_the_starts_those_that_boot_would_be_started_again(monkeypatch: Patch) -> None:
    monkeypatch.setattr("burst_dask.testing.fleet.LISTED_AFTER", BOOT[1])
    monkeypatch.setattr(healer.Healer, "_is_settled", lambda self, number, wrote, now: True)
    assert overshoots()


def test_a_fleet_adapts_to_its_work() -> None:
    """It begins small, grows when tasks prove long, and has gone when nothing is left."""
    seconds = [60.0] * 600
    world = Recovery(1, seconds, Adapt(2, 40), Settings.of(idle_timeout=60.0), {})
    fleet = world.run(patience=4000.0)
    assert world.done is not None
    assert world.sizes[0] == sizing.FIRST and fleet.most == 40
    short = Recovery(2, [0.1] * 600, Adapt(2, 40), Settings.of(), {})
    assert short.run(patience=4000.0).most == sizing.FIRST
    assert short.done is not None


@pytest.mark.parametrize("workers", [2, 20])
def test_money_that_is_spent_ends_the_work_and_no_more_is_spent(workers: int) -> None:
    price = 3.6
    settings = Settings.of(worker_price=price, max_cost=workers * 1.0)  # 1,000 s of each
    world = Recovery(3, [10.0] * (workers * 400), Scale(workers), settings, {200.0: 0.5})
    fleet = world.run(patience=3000.0)
    assert world.done is None and fleet.running == 0
    cost = fleet.seconds / 3600 * price
    assert settings.max_cost is not None
    assert 0.8 * settings.max_cost < cost <= settings.max_cost


def test_no_more_workers_run_than_may_be_paid_for_an_hour() -> None:
    settings = Settings.of(worker_price=0.5, max_hourly_cost=3.0)
    world = Recovery(4, [10.0] * 300, Scale(20), settings, {})
    assert world.run(patience=3000.0).most == 6
    assert world.done is not None


def test_nobody_is_started_for_work_that_others_will_have_done() -> None:
    """Three tasks, and ten workers wanted."""
    world = Recovery(5, [200.0] * 3, Scale(10), Settings.of(), {})
    fleet: SimulatedFleet = world.run(patience=1000.0)
    assert fleet.most == 3 and world.done is not None


def test_workers_that_had_nothing_to_do_are_not_missed() -> None:
    """While one works on what all others wait for."""
    chain = [400.0] + [1.0] * 400
    world = Recovery(6, chain, Scale(8), Settings.of(idle_timeout=30.0), {}, behind_the_first=True)
    fleet = world.run(patience=3000.0)
    assert world.done is not None
    assert len(fleet.containers) == 8, "nobody is started to wait again"


# ---------------------------------------------------------------------------- ends, quotas, money left


def hurried(seed: int, **settings: Any) -> Recovery:
    """Work that a hundred workers, of which each has two minutes, end too late: 220 s are wanted."""
    return Recovery(seed, [10.0] * 1200, Adapt(0, 400), Settings.of(**settings), {})


def by_the_old_rule(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sizing, "in_time", lambda *facts: 0)


@pytest.mark.parametrize("seed", range(3))
def test_a_fleet_is_as_large_as_ends_the_work_in_time(seed: int) -> None:
    world = hurried(seed)
    world.within = 220.0
    fleet = world.run(patience=1000.0)
    assert world.done is not None and world.done <= world.within
    assert 100 < fleet.most < 250 and world.sizes[-1] == fleet.most, "it grows once, and for what is needed"


def test_without_that_rule_it_would_be_late(monkeypatch: Patch) -> None:
    by_the_old_rule(monkeypatch)
    world = hurried(0)
    world.within = 220.0
    assert world.run(patience=1000.0).most == 100
    assert world.done is not None and world.done > 220.0


def test_work_ends_before_the_session_does(monkeypatch: Patch) -> None:
    world = hurried(1, session_timeout=220.0)
    world.run(patience=1000.0)
    assert world.done is not None and world.done <= 220.0
    by_the_old_rule(monkeypatch)
    left = hurried(1, session_timeout=220.0)
    assert left.run(patience=300.0).running == 0
    assert left.done is None, "its workers have ended, and work is left"


def too_late() -> list[float]:
    """Return when containers are asked for, in a session that ends after 400 s and loses most of its fleet at 330 s."""
    world = Recovery(7, [15.0] * 600, Scale(12), Settings.of(session_timeout=400.0), {330.0: 0.9})
    return [container.asked for container in world.run(patience=600.0).containers]


def test_nobody_is_started_who_could_do_nothing_before_the_end(monkeypatch: Patch) -> None:
    assert len(too_late()) == 12
    monkeypatch.setattr(sizing, "has_time", lambda *facts: True)
    assert len(too_late()) > 12


def within_a_quota(goal: SessionAction) -> SimulatedFleet:
    world = Recovery(8, [20.0] * 300, goal, Settings.of(), {150.0: 0.6}, quota=7)
    fleet = world.run(patience=3000.0)
    assert world.done is not None
    return fleet


@pytest.mark.parametrize("goal", [Scale(20), Adapt(3, 50)])
def test_no_more_are_asked_for_than_the_quota_allows(goal: SessionAction, monkeypatch: Patch) -> None:
    fleet = within_a_quota(goal)
    assert (fleet.most, fleet.beyond) == (7, 0)

    async def unknown(seen: Seen) -> None:
        return None

    monkeypatch.setattr(Seen, "bound", unknown)
    assert within_a_quota(goal).beyond > 0


def poor() -> tuple[int, SimulatedFleet]:
    """Return how many tasks are done of work that is worth a hundred workers, for a third of the money."""
    settings = Settings.of(worker_price=3.6, max_cost=4.0)  # 4,000 s of a worker
    world = Recovery(9, [30.0] * 400, Adapt(0, 200), settings, {})
    fleet = world.run(patience=2000.0)
    assert world.done is None and fleet.running == 0 and fleet.seconds <= 4000
    return world.completed, fleet


def test_money_that_is_short_is_spent_on_work_and_not_on_starts(monkeypatch: Patch) -> None:
    done, fleet = poor()
    assert sizing.FIRST < fleet.most < 20
    monkeypatch.setattr(sizing, "payable", lambda *facts: None)
    less, larger = poor()
    assert larger.most > fleet.most and less < done


class Cloud:
    """A fleet elsewhere, of which nothing is alive; it notes what it starts."""

    boot = 60.0

    def __init__(self) -> None:
        self.begun: dict[int, int] = {}

    async def counted(self) -> dict[int, int]:
        return {}

    async def shrink(self, workers: int) -> None:
        raise AssertionError

    async def resting(self) -> int:
        return 0

    async def begin(self, number: int, workers: int, still: Callable[[], bool]) -> None:
        assert still()
        self.begun[number] = workers


async def test_a_machine_that_slept_carries_out_no_old_start(monkeypatch: Patch) -> None:
    """Its monotonic clock has slept as well: the other one tells."""
    stage = await Stage().open()
    await stage.append(Scale(3))
    cloud, slept = Cloud(), 0.0
    monkeypatch.setattr(stage.clock, "wall", lambda: SystemClock().wall() + slept)
    append = log.try_append_session

    async def asleep(*args: Any) -> Any:
        nonlocal slept
        after = await append(*args)
        slept = 3600.0
        return after

    monkeypatch.setattr(log, "try_append_session", asleep)
    state = await healer.Healer(stage.store, stage.session, stage.settings, stage.author, cloud).heal(stage.state, True)
    assert [workers for workers, _ in state.starts.values()] == [3] and cloud.begun == {}
    monkeypatch.setattr(log, "try_append_session", append)
    other = healer.Healer(stage.store, stage.session, stage.settings, stage.author, cloud)
    state = await other.heal(state, True)
    assert list(cloud.begun.values()) == [3], "the old one has settled, by the clock of who looks now"


async def test_money_that_pays_for_nobody_is_spent() -> None:
    """Else nobody would be there, and nobody would say why."""
    stage = await Stage(worker_price=3.6, max_cost=0.05).open()  # 50 s of a worker
    await stage.append(Scale(3))
    cloud = Cloud()
    state = await healer.Healer(stage.store, stage.session, stage.settings, stage.author, cloud).heal(stage.state, True)
    assert state.halted is not None and cloud.begun == {}


async def test_no_request_is_sent_for_an_end_that_is_far() -> None:
    async def now() -> float:
        raise AssertionError

    stage = await Stage(session_timeout=7200.0).open()
    await stage.append(Adapt(0, 5, done_by=stage.clock.wall() + 7200.0))
    cloud = Cloud()
    await healer.Healer(stage.store, stage.session, stage.settings, stage.author, cloud, now).heal(stage.state, True)
    assert list(cloud.begun.values()) == [1]


async def test_a_worker_outlives_whatever_its_fleet_answers() -> None:
    class Broken:
        async def counted(self) -> dict[int, int]:
            raise KeyError("tasks")

    stage = await Stage().open()
    await stage.append(Scale(3))
    context = stage.context()
    broken = healer.Healer(stage.store, stage.session, stage.settings, context.author, Broken())  # type: ignore[arg-type]
    assert await healer.heal_quietly(broken, stage.state) == stage.state


async def test_a_limit_that_is_set_later_holds_too(monkeypatch: Patch) -> None:
    """Of workers that nobody can start anew, in a session that was opened without one."""
    monkeypatch.setattr(healer.Healer, "pause", lambda self: 0.01)
    stage = await Stage(worker_price=360.0).open()
    context = stage.context()
    watching = healer.Healer(stage.store, stage.session, stage.settings, context.author, None)
    assert not watching.watches(stage.state), "it costs no request"
    agent = Agent(context, healer=watching)
    running = asyncio.create_task(agent.run())
    await stage.append(Afford(5.0))  # less than the worker costs until it has ended
    async with asyncio.timeout(30):
        assert await running == "halted"
