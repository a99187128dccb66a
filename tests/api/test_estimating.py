"""What a graph would take, by the clock of a test."""

from __future__ import annotations

from typing import Any

import dask
import pytest

from burst_dask import Session
from burst_dask.api.estimating import estimate
from burst_dask.client.statuses import OVERHEAD
from burst_dask.config import Settings
from burst_dask.errors import ConfigError
from burst_dask.graph import Outside, materialize
from burst_dask.protocol.keys import SessionId


class HandClock:
    """Time passes when a task says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def graph(clock: HandClock, tasks: int) -> dict[Any, Any]:
    """Loads of 2 s each, a step of 4 s on each, and one sum."""

    def load(number: int) -> int:
        clock.now += 2.0
        return number

    def step(number: int) -> int:
        clock.now += 4.0
        return number

    dsk: dict[Any, Any] = {("load", n): (load, n) for n in range(tasks)}
    dsk |= {("step", n): (step, ("load", n)) for n in range(tasks)}
    dsk["sum-1"] = (sum, [("step", n) for n in range(tasks)])
    return dict(materialize(dsk, ["sum-1"], Outside(SessionId("s"), {}))[0])


def test_what_runs_here_tells_of_the_rest() -> None:
    clock = HandClock()
    settings = Settings.of(threads=2, worker_price=0.5)
    found = estimate(graph(clock, 100), settings, 10, 15.0, clock, boot=180.0)  # type: ignore[arg-type]
    assert clock.now < 15 + 4
    assert (found.tasks, found.unknown) == (201, 1), "the sum waits for all"
    mean = found.sampled and clock.now / found.sampled
    assert found.work == pytest.approx(100 * 2 + 100 * 4 + mean + 201 * OVERHEAD)
    assert found.seconds == pytest.approx(180.0 + found.work / 20)
    assert found.cost == pytest.approx(10 * found.seconds / 3600 * 0.5)


def test_all_of_a_short_graph_runs_and_no_more_workers_are_reckoned_with_than_tasks() -> None:
    clock = HandClock()
    found = estimate(graph(clock, 2), Settings.of(), 50, 1000.0, clock)  # type: ignore[arg-type]
    assert (found.sampled, found.unknown, found.workers) == (5, 0, 5)
    assert found.cost == 0.0 and found.work == pytest.approx(12 + 5 * OVERHEAD)


def test_what_is_to_be_said_of_the_price_is_said() -> None:
    clock = HandClock()
    settings = Settings.of(worker_price=0.5)
    found = estimate(graph(clock, 2), settings, 50, 1000.0, clock, cost_note="at most: less on Spot")  # type: ignore[arg-type]
    assert "USD, at most: less on Spot" in str(found)


def test_nothing_is_submitted(alone: Session) -> None:
    said = alone.estimate(dask.delayed(sum)([dask.delayed(abs)(-1), 2]))
    assert said.tasks >= 2 and not alone.status().runs
    assert "tasks" in str(said) and said.to_frame().loc[0, "tasks"] == said.tasks
    with pytest.raises(ConfigError, match="nothing to estimate"):
        alone.estimate(1)
    with pytest.raises(ConfigError):
        alone.estimate(dask.delayed(1), within=0)


def test_a_task_that_fails_is_told_at_once(alone: Session) -> None:
    with pytest.raises(ZeroDivisionError):
        alone.estimate(dask.delayed(divmod)(1, 0))
