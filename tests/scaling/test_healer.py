"""Fleets that nobody looks after but their own workers, in the simulator."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from stage import Stage

from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.journal import log
from burst_dask.protocol.session_records import Adapt, Afford, Scale
from burst_dask.scaling import healer, sizing
from burst_dask.testing.fleet import BOOT, Recovery, SimulatedFleet
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
