"""What cancelling leaves undone: in the same run, in others of the session, and how it is told."""

from __future__ import annotations

import concurrent.futures as cf
import operator
from collections.abc import Callable
from typing import Any

import dask
import pytest
from acting import Gate, check, plans

from burst_dask import Session, TaskError, attach, sync
from burst_dask.client.cancelling import undone
from burst_dask.clock import Entropy
from burst_dask.errors import RunCancelled
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.session_records import Cancel


@pytest.fixture
def alone(unhurried: None) -> Session:
    """A session without workers, whose calls are written when they are asked for."""
    return Session(f"memory://{Entropy().token()}", fleet=None, progress=False, wait_poll_min=0.005)


def flushed(session: Session, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    future = session.submit(function, *args, **keywords)
    session.flush()
    return future


def told(session: Session) -> None:
    """Wait until what futures have cancelled is in the session log."""
    cf.wait(set(session._futures.follower._cancelling), 60)


def by_state(session: Session) -> dict[str, int]:
    return {name: count for name, count in session.status().totals.items() if count}


def elsewhere(session: Session) -> Session:
    """Return the session as another process has it."""
    return attach(session.id, store=session._link.store)


def work(session: Session) -> InProcessFleet:
    fleet = InProcessFleet(session._link.session, session._link.store)
    fleet.ensure(1)
    return fleet


# ---------------------------------------------------------------------------- runs


def test_dependents_in_other_runs_become_cancelled(alone: Session) -> None:
    one, other = flushed(alone, abs, -1), flushed(alone, abs, -2)
    after = flushed(alone, operator.add, one, other)
    last, free = alone.submit(str, after), alone.submit(str, other)
    alone.flush()
    run = attach(one.view.run, store=alone._link.store)
    waiting = attach(last.view.run, store=alone._link.store)

    assert run.cancel()

    assert by_state(alone) == by_state(elsewhere(alone)) == {"total": 5, "cancelled": 3, "pending": 2}
    states = [one.state for one in alone.status().runs]
    assert states == ["cancelled", "pending", "cancelled", "pending"]
    with pytest.raises(RunCancelled, match=f"run {one.view.run}, of which it needs a result, was cancelled"):
        waiting.wait(timeout=60)
    found = alone.collect()
    assert (found.pending, found.cancelled) == (2, 3) and "2 pending, 3 cancelled" in repr(found)
    sync.run(alone._futures.follower._drop_cancelled())
    assert [future.status for future in (one, after, last, other, free)] == ["cancelled"] * 3 + ["pending"] * 2

    fleet = work(alone)
    assert dict(alone.collect(wait=True, timeout=60)) == {other.key: 2, free.key: "2"}
    alone.cleanup()  # nothing is left that anybody works on
    fleet.stop()


def test_a_collection_that_was_persisted_and_cancelled(alone: Session) -> None:
    kept = alone.persist(dask.delayed(abs)(-1, dask_key_name="kept"))
    run = alone.compute(kept + 1, dask.delayed(abs)(-3, dask_key_name="own"))
    alone.cancel()
    again = alone.compute(kept + 2, dask.delayed(abs)(-3, dask_key_name="own"))
    assert [one.state for one in alone.status().runs] == ["cancelled", "cancelled", "pending"]
    status = again.status()
    assert (status.cancelled, status.pending, run.status().cancelled) == (1, 1, 2)
    fleet = work(alone)
    found = alone.collect(wait=True, timeout=60)  # waits for what can be had
    assert dict(found) == {"own": 3} and found.cancelled == 4
    assert again.status().state == "cancelled"
    fleet.stop()


def test_what_had_its_outcome_before_is_not_cancelled(alone: Session) -> None:
    one = flushed(alone, abs, -1)
    fleet = work(alone)
    assert attach(one.view.run, store=alone._link.store).result(timeout=60) == (1,)
    fleet.stop()
    sync.run(alone._link.append(Cancel(one.view.run)))
    after = flushed(alone, str, one)
    assert by_state(alone) == {"total": 2, "completed": 1, "pending": 1}
    sync.run(alone._futures.follower._drop_cancelled())
    assert one.result(timeout=60) == 1 and after.status == "pending"


def test_after_a_cleanup_it_is_told_though_the_graphs_are_gone(alone: Session) -> None:
    one = flushed(alone, abs, -1)
    alone.cancel()
    flushed(alone, str, one)
    alone.cleanup()
    assert by_state(elsewhere(alone)) == {"total": 2, "cancelled": 2}
    assert elsewhere(alone).collect().cancelled == 2


def test_nothing_is_asked_while_nothing_is_cancelled(alone: Session) -> None:
    run = alone.compute(dask.delayed(abs)(-1))
    before = alone.requests
    assert sync.run(undone(alone._link, [run._view])) == {}
    assert alone.requests == before


def test_of_10_000_dependents_each_shard_takes_one_request(alone: Session) -> None:
    seed = flushed(alone, abs, -1)
    alone.map(operator.add, range(5000), [seed] * 5000)
    alone.flush()
    alone.map(operator.add, range(5000), [seed] * 5000)
    alone.flush()
    attach(seed.view.run, store=alone._link.store).cancel()
    there = attach(alone.id, store=alone.store)  # with a store of its own, so that others' requests do not count
    before = sum(there.requests.values())
    assert by_state(there) == {"total": 10_001, "cancelled": 10_001}
    shards = sum(len(plan.shards) for plan in plans(alone))
    assert sum(there.requests.values()) - before < shards + 30


# ---------------------------------------------------------------------------- single calls


def test_a_call_that_was_written_is_not_made(alone: Session) -> None:
    one, two, after = (flushed(alone, abs, -1), flushed(alone, abs, -2), None)
    many = alone.map(abs, range(6), key="many")
    after = alone.submit(sum, [many[0], many[1], two], key="after")
    alone.flush()
    assert many[1].cancel() and after.cancelled() and not many[0].cancelled()
    told(alone)
    assert by_state(alone) == by_state(elsewhere(alone)) == {"total": 9, "pending": 7, "cancelled": 2}
    assert elsewhere(alone).status().runs[2].state == "pending"

    fleet = work(alone)
    found = elsewhere(alone).collect(wait=True, timeout=60)
    assert dict(found) == {one.key: 1, two.key: 2} | {f"many-{n}": n for n in (0, 2, 3, 4, 5)}
    run = attach(many[0].view.run, store=alone._link.store)
    while run.status().left:  # its worker writes down what was cancelled
        pass
    status = run.status()
    assert (status.state, status.completed, status.cancelled, status.failed) == ("cancelled", 5, 2, 0)
    assert sync.run(elsewhere(alone)._link.view(run.id)).run == run.id
    assert set(elsewhere(alone).collect()) == set(found) and elsewhere(alone).collect().cancelled == 2
    (error,) = [value for key, value in run.as_completed() if key == "after"]
    assert isinstance(error, TaskError) and error.cause == "many-1" and isinstance(error.exception, cf.CancelledError)
    assert "was cancelled" in str(run.story("after")) and "was cancelled" in str(run.story("many-1"))
    check(alone, run.id)
    fleet.stop()


def test_cancelled_and_written_down_it_reaches_later_runs(alone: Session) -> None:
    one, other = alone.submit(abs, -1, key="one"), alone.submit(abs, -2)
    alone.flush()
    one.cancel()
    told(alone)
    fleet = work(alone)
    assert other.result(timeout=60) == 2
    fleet.stop()
    later = alone.compute(dask.delayed(abs)(dask.delayed(one)))
    assert later.status().state == "cancelled"
    there = elsewhere(alone)
    fleet = work(alone)
    with pytest.raises((RunCancelled, cf.CancelledError)):
        later.result(timeout=60)
    assert there.collect(wait=True, timeout=60).cancelled == 2
    fleet.stop()


def test_a_running_call_is_let_finish(burst: Session, gate: Gate) -> None:
    running, queued = burst.submit(gate.wait, 1), [burst.submit(gate.wait, n) for n in range(30)]
    burst.flush()
    while not burst.status().totals["running"]:
        pass
    assert all(future.cancel() for future in (running, *queued))
    gate.open()
    found = burst.collect(wait=True, timeout=60)
    assert set(found.values()) <= set(range(31)) and not found.errors
    assert burst.submit(abs, -7).result(timeout=60) == 7


def test_by_force_a_running_call_is_ended(burst: Session, gate: Gate) -> None:
    running, other = burst.submit(gate.wait, 1), burst.submit(abs, -2)
    assert other.result(timeout=60) == 2
    after = burst.submit(abs, -3)
    burst.flush()
    assert running.cancel(force=True)
    assert after.result(timeout=60) == 3
    told(burst)
    while burst.status().totals["running"]:
        pass
    found = burst.collect(wait=True, timeout=60)
    assert dict(found) == {other.key: 2, after.key: 3} and found.cancelled == 1


def test_many_cancellations_share_entries(alone: Session) -> None:
    futures = alone.map(abs, range(500))
    alone.flush()
    before = alone._link.state.next
    for future in futures[:-1]:
        future.cancel()
    told(alone)
    assert alone._link.state.next - before < 100
    (tasks,) = alone._link.state.cancelled_tasks.values()
    assert tasks == Bitmap.of(future.number for future in futures[:-1])


def test_cancelling_a_session_cancels_calls_that_were_not_written(alone: Session) -> None:
    future = alone.submit(abs, -1)
    alone.cancel()
    assert by_state(alone) == {"total": 1, "cancelled": 1}
    sync.run(alone._futures.follower._drop_cancelled())
    assert future.cancelled()
