"""How large a fleet should be: never larger than its work, its goal and its money."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from burst_dask.scaling.sizing import RUNS_ON, Budget, Demand, Goal, affordable, is_spent, wanted

goals = st.tuples(st.integers(0, 500), st.integers(0, 500)).map(lambda both: Goal(min(both), max(both)))
demands = st.builds(Demand, st.integers(0, 10**6), st.none() | st.floats(0, 1e9))


@given(goals, demands, st.integers(1, 64))
def test_a_fleet_is_no_larger_than_asked_for_nor_than_the_work(goal: Goal, demand: Demand, threads: int) -> None:
    size = wanted(goal, demand, threads)
    assert 0 <= size <= goal.maximum
    assert (size - 1) * threads < demand.pending or size == 0
    if demand.pending >= threads * goal.minimum:
        assert size >= goal.minimum
    if demand.pending and goal.maximum:
        assert size > 0


@given(goals, st.integers(1, 10**6), st.floats(0, 1e9), st.floats(1, 10), st.integers(1, 64))
def test_more_work_never_makes_it_smaller(goal: Goal, pending: int, seconds: float, times: float, threads: int) -> None:
    assert wanted(goal, Demand(pending, seconds), threads) <= wanted(goal, Demand(pending, seconds * times), threads)


@given(st.floats(0.001, 50), st.floats(0.01, 1000), st.floats(0, 1), st.none() | st.floats(0.01, 1000))
def test_what_is_affordable_stays_within_the_total(
    price: float, total: float, share: float, hourly: float | None
) -> None:
    budget = Budget(price, total, total * share, hourly)
    most = affordable(budget)
    assert most is not None and most >= 0
    assert budget.spent + most * price * RUNS_ON / 3600 <= total * (1 + 1e-9)
    if hourly is not None:
        assert most * price <= hourly * (1 + 1e-6)
    assert is_spent(budget, most + 1) or (hourly is not None and most == int(hourly / price + 1e-9))


def test_without_a_price_or_a_limit_any_number_is_affordable() -> None:
    assert affordable(Budget(0.0, 5.0, 4.0, 1.0)) is None
    assert affordable(Budget(1.0, None, 4.0, None)) is None
    assert not is_spent(Budget(1.0, None, 4.0, None), 1000)
