"""How large a fleet should be: never larger than its work, its goal and its money."""

from __future__ import annotations

import heapq
from math import ceil

from hypothesis import assume, given
from hypothesis import strategies as st

from burst_dask.scaling.sizing import (
    RUNS_ON,
    SPREAD,
    WORTH,
    Budget,
    Demand,
    Goal,
    Time,
    affordable,
    has_time,
    horizon,
    in_time,
    is_late,
    is_spent,
    payable,
    wanted,
)

goals = st.tuples(st.integers(0, 500), st.integers(0, 500)).map(lambda both: Goal(min(both), max(both)))
demands = st.builds(Demand, st.integers(0, 10**6), st.none() | st.floats(0, 1e9))
#: such as can be played through
small = st.builds(lambda count, mean: Demand(count, count * mean), st.integers(1, 400), st.floats(0.1, 300))
threads_of = st.integers(1, 4)
boots = st.floats(0, 200)


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


# ---------------------------------------------------------------------------- an end


def ends_after(demand: Demand, threads: int, there: int, workers: int, boot: float) -> float:
    """Play the work through: tasks as long as their mean, each begun by the first thread that is free."""
    new = max(0, workers - there) * threads
    free = [0.0] * (min(there, workers) * threads) + [boot + SPREAD] * new
    heapq.heapify(free)
    for _ in range(demand.pending):
        end = heapq.heappop(free) + demand.mean
        heapq.heappush(free, end)
    return max(free)


@given(small, threads_of, st.integers(0, 20), st.floats(1, 3000), boots)
def test_so_many_workers_end_the_work_in_time(
    demand: Demand, threads: int, there: int, left: float, boot: float
) -> None:
    workers = in_time(demand, threads, there, left, boot)
    assume(workers)
    # What runs as this is reckoned counts in full, so that those who are there may be a task late by this play.
    late = demand.mean if there else 0.0
    assert ends_after(demand, threads, there, workers, boot) <= left + late + 1e-3
    if workers > there:
        assert is_late(demand, threads, there, there, left, boot) and has_time(demand, Time(boot, left))
        each = left - boot - SPREAD - demand.mean
        assert there * threads * left + (workers - there - 1) * threads * each < (demand.seconds or 0.0), (
            "none too many"
        )


@given(small, threads_of, st.integers(0, 20), st.floats(1, 3000), boots, st.floats(0, 1))
def test_time_that_passes_asks_for_no_others(
    demand: Demand, threads: int, there: int, left: float, boot: float, share: float
) -> None:
    """Those that come up do not show yet in what is done."""
    workers = in_time(demand, threads, there, left, boot)
    assume(workers)
    later = share * (boot + SPREAD + demand.mean)
    done = int(there * threads * later / demand.mean)
    assume(done < demand.pending)
    rest = Demand(demand.pending - done, (demand.pending - done) * demand.mean)
    # A task that has almost ended counts in full.
    running = ceil(there * demand.mean / max(1e-9, left - later - boot - SPREAD - demand.mean))
    assert in_time(rest, threads, workers, left - later, boot) <= workers + running


@given(goals, small, threads_of, st.integers(0, 50), boots, st.floats(0, 3000), st.none() | st.floats(-100, 3000))
def test_an_end_makes_a_fleet_larger_and_never_too_large(
    goal: Goal, demand: Demand, threads: int, there: int, boot: float, session: float, work: float | None
) -> None:
    without = wanted(goal, demand, threads)
    size = wanted(goal, demand, threads, there, Time(boot, session, work))
    assert without <= size <= goal.maximum
    assert (size - 1) * threads < demand.pending or size == 0
    if min(session, work if work is not None else session) >= horizon(demand, boot):
        assert size <= max(without, there), "an end that is far asks for nobody"


@given(small, boots, st.floats(0, 3000))
def test_nobody_is_started_who_could_do_nothing(demand: Demand, boot: float, left: float) -> None:
    unknown = Demand(demand.pending, None)
    assert has_time(demand, Time(boot, left)) == (boot + demand.mean < left)
    assert has_time(unknown, Time(boot, left)) == (boot < left) and has_time(demand, Time(boot, None, 0.0))
    if not has_time(demand, Time(boot, left)):
        assert in_time(demand, 1, 0, left, boot) == 0


# ---------------------------------------------------------------------------- money


@given(small, threads_of, st.integers(0, 50), boots, st.floats(0.01, 50), st.floats(0.01, 1000))
def test_the_money_left_is_not_spent_on_starts(
    demand: Demand, threads: int, there: int, boot: float, price: float, left: float
) -> None:
    budget = Budget(price, left, 0.0, None)
    most = payable(budget, demand, threads, there, boot)
    assert most is not None

    def costs(workers: int) -> float:
        work = min(workers * WORTH, (demand.seconds or 0.0) / threads)
        return (workers * RUNS_ON + (workers - there) * boot + work) * price / 3600

    if most > there:
        assert costs(most) <= left * (1 + 1e-6)
    assert costs(max(there, most) + 1) >= left * (1 - 1e-6)
    assert payable(budget, Demand(demand.pending, None), threads, there, boot) is None
    assert payable(Budget(price, None, 0.0, None), demand, threads, there, boot) is None
