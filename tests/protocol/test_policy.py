"""Policies are pure functions of facts."""

from __future__ import annotations

from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import Claim, Commit, Outcomes, Takeover
from burst_dask.protocol.shard import Shard


def facts(**known: object) -> policy.CommitFacts:
    base = policy.CommitFacts(
        finished=0, wanted=False, size=0, since=0.0, ahead=10.0, left=100.0, reservable=False, excess=False, active=True
    )
    return base._replace(**known)  # type: ignore[arg-type]


def commit_in(**known: object) -> float | None:
    return policy.commit_in(facts(**known), 4.0, 1.0, 5.0)


def test_when_to_commit() -> None:
    assert commit_in() is None, "nothing has ended"
    assert commit_in(finished=3, since=1.0) == 3.0, "the group grows for a while"
    assert commit_in(finished=3, since=0.2, wanted=True) == 0.8, "a shorter while when others wait"
    assert commit_in(finished=3, since=4.0, left=1.5) == 1.5, "the end comes soon, and commits anyway"
    assert commit_in(finished=3, active=False) == 0.0, "nothing more will come"
    assert commit_in(finished=1, size=policy.COMMIT_BYTES) == 0.0, "enough for one request"
    assert commit_in(ahead=0.1, reservable=True) == 0.0, "threads would stand still"
    assert commit_in(ahead=0.1) is None, "… but there is nothing to reserve"
    assert commit_in(excess=True, since=5.0) == 0.0, "others may have what is too much here"
    assert commit_in(finished=1, since=60.0) == 0.0, "a long task commits as it ends"


def test_a_lease_dies_by_the_stores_clock_alone() -> None:
    """Rule 6: both dates are the store's, so it may be years off."""
    for off in (0.0, -1e9, 1e9):
        assert not policy.lease_is_dead(off + 130.0, off + 100.0, False, 30.0)
        assert policy.lease_is_dead(off + 130.1, off + 100.0, False, 30.0)
    assert policy.lease_is_dead(0.0, None, False, 30.0)
    assert policy.lease_is_dead(0.0, 0.0, True, 30.0)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("looked", [0, 1, 4])
def test_idle_workers_judge_together_as_often_as_if_all_were_idle_and_few_of_them_more_often(
    share: float, looked: int
) -> None:
    """However many are idle, and though each knows that by a few heartbeats only."""
    workers = 10_000
    pauses = [policy.between_judgements(10.0, workers, looked, idle) for idle in range(looked + 1)]
    chances = [comb(looked, idle) * share**idle * (1 - share) ** (looked - idle) for idle in range(looked + 1)]
    each = sum(chance / pause for chance, pause in zip(chances, pauses, strict=True))
    assert share * workers * each <= workers / pauses[-1] * (1 + 1e-9)
    assert pauses[0] == pytest.approx(pauses[-1] / (1 + looked)), "one who is alone has its turn sooner"


@given(st.lists(st.floats(0.001, 100), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 8))
def test_a_reservation_fills_the_threads_and_little_more(seconds: list[float], threads: int, busy: int) -> None:
    busy = min(busy, threads, len(seconds))
    running = Bitmap.of(range(busy))
    reserved = policy.reserve(range(len(seconds)), seconds.__getitem__, {}, running, threads, threads * 5.0)
    assert running <= reserved
    assert len(reserved) >= min(threads, len(seconds)), "every thread has something to do"
    ahead = sorted(set(reserved) - set(running))
    assert ahead == list(range(busy, busy + len(ahead))), "in order"
    if len(reserved) > threads:
        before_the_last = list(running) + ahead[:-1]
        assert sum(seconds[task] for task in before_the_last) < threads * 5.0 * policy.NEARLY


def test_long_tasks_are_reserved_only_for_free_threads() -> None:
    assert len(policy.reserve(range(20), lambda task: 600.0, {}, Bitmap.of([0, 1]), 4, 20.0)) == 4
    assert policy.reserve(range(20), lambda task: 600.0, {}, Bitmap.of([0]), 1, 5.0) == Bitmap.of([0])


def test_suspects_run_after_all_others_and_then_alone() -> None:
    strikes = {0: 2, 1: 1, 2: 1}

    def reserve(candidates: list[int], running: Bitmap = EMPTY) -> list[int]:
        return list(policy.reserve(candidates, lambda task: 0.1, strikes, running, 2, 10.0))

    assert reserve([0, 1, 2, 3, 4]) == [3, 4]
    assert reserve([0, 1, 2], Bitmap.of([3])) == [3]
    assert reserve([0, 1, 2]) == [1, 2]
    assert reserve([0]) == [0]


def test_a_killer_is_found_and_given_up() -> None:
    """Rule 10, as workers play it: one task of a thousand kills whoever runs it."""
    killer, count, allowed = 700, 1000, 3
    shard = Shard.untouched(ShardId("00000"), Bitmap.full(count))
    worker, deaths = 0, 0
    shard = shard.apply(WorkerId("w0"), Claim(EMPTY))
    while not policy.lost_for_good(shard.index.strikes.get(killer, 0), allowed):
        name = WorkerId(f"w{worker}")
        chosen = policy.reserve(shard.index.pending, lambda task: 0.01, shard.index.strikes, EMPTY, 1, 5.0)
        assert chosen, "there is always something to try"
        shard = shard.apply(name, Commit(outcomes=Outcomes(), reserved=chosen))
        if killer in chosen:
            worker, deaths = worker + 1, deaths + 1
            shard = shard.apply(WorkerId(f"w{worker}"), Takeover(lost=name, cause="test", reserved=EMPTY))
        else:
            shard = shard.apply(name, Commit(outcomes=Outcomes(done=chosen), reserved=EMPTY))
    innocent = [task for task, n in shard.index.strikes.items() if task != killer and policy.lost_for_good(n, allowed)]
    assert innocent == []
    assert deaths <= 2 + allowed, "it costs a bounded number of workers"


@given(st.integers(0, 50), st.none() | st.floats(1e-6, 100), st.floats(0.1, 10))
def test_a_thief_takes_half_if_it_pays(count: int, mean: float | None, minimum: float) -> None:
    taken = policy.steal(count, mean, minimum)
    assert taken in (0, (count + 1) // 2)
    if taken and mean is not None:
        assert taken * mean >= minimum


def test_storing_pays_for_long_tasks_only() -> None:
    assert not policy.worth_storing(0.01, 100)
    assert policy.worth_storing(1.0, 100)
    assert not policy.worth_storing(1.0, 100 << 20)
    assert policy.worth_storing(60.0, 100 << 20)
