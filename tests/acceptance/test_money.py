"""What a session may cost, and how many workers it has for that, as its user sees it."""

from __future__ import annotations

import re
import time

import dask
import pytest
from acting import QUICK, until

from burst_dask import Session, attach
from burst_dask.errors import ConfigError, SessionEnded


def double(number):
    return 2 * number


def waits(marks, name, gate):
    (marks.directory / f"{name}.1").touch()
    marks.wait_for(gate)
    return name


@pytest.fixture
def sessions(tmp_path):
    made = []

    def make(**arguments):
        made.append(Session(str(tmp_path / "store"), progress=False, **QUICK, **arguments))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)


def test_a_session_that_has_spent_its_money_stops_and_goes_on_when_there_is_more(sessions, marks, monkeypatch):
    """No client is needed for it to stop: a task that hangs costs no more than was meant."""
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.3)
    burst = sessions(workers=1, worker_price=360.0, max_cost=10.0)  # 0.10 USD a second
    assert burst.compute(dask.delayed(double)(4)).result(timeout=60) == (8,)
    run = burst.compute(dask.delayed(waits)(marks, "in", "gate"), dask.delayed(double)(5))
    until(lambda: run.status().state == "stopped" and not run.status().workers.alive)

    status = burst.status()
    assert status.state == "halted" and 1.0 <= status.cost <= 10.0
    for refused in (lambda: burst.scale(1), lambda: burst.compute(dask.delayed(1))):
        with pytest.raises(ConfigError, match=r"of its max_cost of 10.00 USD.*extend\(max_cost=20\)"):
            refused()
    with pytest.raises(SessionEnded, match=rf"burst extend {burst.id} --max-cost 20"):
        attach(run.id, store=burst.store).wait(timeout=60)

    marks.open("gate")
    burst.extend(max_cost=1000)
    burst.scale(1)
    assert run.result(timeout=60) == ("in", 10)


def test_a_fleet_that_adapts_has_no_more_workers_than_the_work_is_worth(sessions):
    burst = sessions(workers=1)
    burst.adapt(maximum=4)
    assert burst.map(double, range(100))[99].result(timeout=60) == 198
    assert 1 <= burst.status().workers.alive <= 4
    burst.adapt(minimum=2, maximum=3)
    for wrong in ({"minimum": 3, "maximum": 2}, {"minimum": -1}, {"maximum": 0}, {"maximum": 1.5}):
        with pytest.raises(ConfigError):
            burst.adapt(**wrong)


def behind(first, marks, name):
    return waits(marks, name, "gate")


def test_the_status_says_what_cannot_end_in_time(sessions, marks):
    """And what would help."""
    burst = sessions(workers=1, session_timeout=60.0)
    first = dask.delayed(time.sleep)(0.5)
    run = burst.compute(*[dask.delayed(behind)(first, marks, f"task {number}") for number in range(200)])
    until(lambda: run.status().completed == 1)
    (note,) = burst.status().notes
    assert re.search(r"what waits takes one worker 1 min .*, and the session ends in 5\d s: burst extend", note)
    assert f"or burst scale {burst.id} " in note and "what waits takes" in str(burst.status())
    burst.extend(3600)
    assert burst.status().notes == ()

    burst.adapt(minimum=1, maximum=1, within=30.0)
    assert "and should be done in" in burst.status().notes[0]
    with pytest.raises(ConfigError, match="within"):
        burst.adapt(maximum=2, within=0)
    marks.open("gate")
    run.wait(timeout=120)
    assert burst.status().notes == ()


@pytest.mark.parametrize("cost", [0, -1, "10", True, float("inf"), float("nan")])
def test_nonsense_is_no_limit(sessions, cost):
    burst = sessions(fleet=None)
    with pytest.raises(ConfigError, match="max_cost"):
        burst.extend(max_cost=cost)
    with pytest.raises(ConfigError, match="max_cost"):
        sessions(fleet=None, max_cost=cost)
