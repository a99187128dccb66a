"""What is said of what is yet to come."""

from __future__ import annotations

from typing import Any

import pytest

from burst_dask.client.outlook import Facts, told
from burst_dask.scaling.sizing import Bound, Demand, Goal, Time

#: 10 h of one thread
WORK = Demand(pending=1000, seconds=36_000.0)
FACTS = Facts("s1", WORK, 1, 10, Goal(0, 10), None, Time(60.0), price=0.0, money=None)


def said(**facts: Any) -> list[str]:
    return told(FACTS._replace(**facts))


def test_nothing_is_said_of_what_goes_well() -> None:
    assert (
        said() == said(time=Time(60.0, 3700.0, 3650.0)) == said(demand=Demand(1000, None), time=Time(60.0, 100.0)) == []
    )
    assert said(price=0.5, money=6.0) == said(bound=Bound(10, "why")) == []


def test_work_that_cannot_end_before_the_session() -> None:
    assert said(time=Time(60.0, 1800.0)) == [
        "what waits takes 10 workers 1 h 0 min, and the session ends in 30 min 0 s: burst extend s1 1h, "
        "or burst adapt s1 0 21"
    ]
    (fixed,) = said(time=Time(60.0, 1800.0), goal=Goal(10, 10))
    assert fixed.endswith("burst extend s1 1h, or burst scale s1 21")
    (by_hand,) = said(time=Time(60.0, 1800.0), goal=None)
    assert by_hand.endswith("burst extend s1 1h, or 21 workers")
    (hopeless,) = said(time=Time(60.0, 130.0))
    assert hopeless.endswith("ends in 2 min 10 s: burst extend s1 1h"), "no number of workers would do"


def test_work_that_is_wanted_sooner() -> None:
    wanted = said(time=Time(60.0, 7200.0, 1800.0), there=1, goal=Goal(1, 10))
    assert wanted == ["what waits takes 10 workers 1 h 0 min, and should be done in 30 min 0 s: burst adapt s1 1 22"]
    assert said(time=Time(60.0, None, 65.0))[0].endswith(
        "should be done in 1 min 5 s: no more workers would end it in time"
    )
    assert said(time=Time(60.0, None, -120.0)) == [
        "what waits takes 10 workers 1 h 0 min, and should have been done 2 min 0 s ago"
    ]


def test_nobody_is_started_any_more() -> None:
    assert said(time=Time(60.0, 50.0), there=0) == [
        "no worker is started any more: it would have nothing done when the session ends, in 50 s: burst extend s1 1h"
    ]


def test_a_fleet_that_may_not_grow() -> None:
    quota = Bound(4, "Fargate: 16 vCPU at a time. Ask for more")
    assert said(bound=quota, there=4, time=Time(60.0, 6000.0)) == [
        "of the 10 workers that were asked for, 4 can run at a time: Fargate: 16 vCPU at a time. Ask for more",
        "what waits takes 4 workers 2 h 30 min, and the session ends in 1 h 40 min: burst extend s1 1h, or 7 workers",
    ]


@pytest.mark.parametrize(("money", "left"), [(1.0, "1.00 USD"), (-0.5, "0 USD")])
def test_money_that_does_not_pay_for_the_rest(money: float, left: str) -> None:
    assert said(price=0.5, money=money) == [
        f"what waits costs about 5.00 USD, and {left} are left: burst extend s1 --max-cost lets more be spent"
    ]
