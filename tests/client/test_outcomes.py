"""Futures until they end: waited for, failed, cancelled, and as part of graphs."""

import asyncio
import concurrent.futures as cf
import operator
import os
import threading

import dask
import dask.array as da
import numpy as np
import pytest
from acting import fails_twice, plans
from dask.tokenize import tokenize

from burst_dask import Future, Session, TaskError, as_completed, attach, sync, wait
from burst_dask.errors import (
    ConfigError,
    WaitTimeout,
)
from burst_dask.protocol.session_records import Cancel

QUICK = {"wait_poll_min": 0.005}


# ---------------------------------------------------------------------------- waiting


def test_time_runs_out(burst, gate):
    future = burst.submit(gate.wait, 1)
    with pytest.raises(WaitTimeout, match=r"no outcome after 0\.01 s"):
        future.result(0.01)
    with pytest.raises(TimeoutError):
        future.exception(timeout=0)
    assert future.status == "pending" and not future.done()
    with pytest.raises(WaitTimeout):
        list(as_completed([future], timeout=0.01))
    gate.open()
    assert future.result(60) == 1


def test_as_completed_and_wait(burst, gate):
    slow, quick = burst.submit(gate.wait, "slow"), burst.submit(str, "quick")
    stream = as_completed([slow, quick], timeout=60)
    assert next(stream) is quick
    found = wait([slow, quick], timeout=60, return_when="FIRST_COMPLETED")
    assert quick in found.done and slow in found.not_done
    gate.open()
    assert next(stream).result() == "slow"
    assert not wait([slow, quick]).not_done


def test_the_futures_are_those_of_the_standard_library(burst):
    futures = [burst.submit(abs, -n) for n in range(5)]
    assert all(isinstance(future, cf.Future) for future in futures)
    assert {future.result() for future in cf.as_completed(futures, timeout=60)} == set(range(5))
    failed = burst.submit(operator.truediv, 1, 0)
    done, _ = cf.wait([failed, burst.submit(abs, 1)], timeout=60, return_when=cf.FIRST_EXCEPTION)
    assert failed in done

    async def coroutine():
        return await asyncio.wrap_future(burst.submit(abs, -7))

    assert asyncio.run(coroutine()) == 7


def test_callbacks_may_ask_for_results(burst):
    called = threading.Event()
    found = []

    def callback(future):
        found.append(burst.submit(operator.neg, future.result()).result(60))
        called.set()

    future = burst.submit(abs, -3)
    future.add_done_callback(callback)
    future.add_done_callback(lambda _: None)
    assert called.wait(60) and found == [-3]


def test_many_pending_futures_have_one_watcher(burst, gate):
    futures = []
    for n in range(10):
        futures.append(burst.submit(gate.wait, n))
        burst.flush()
    assert len(burst._futures.follower._runs) == 10
    assert sum(thread.name == "burst-client" for thread in threading.enumerate()) == 1
    gate.open()
    assert burst.gather(futures) == list(range(10))


def test_a_look_at_all_that_is_pending_takes_few_requests(alone):
    def requests_of_a_look():
        before = sum(alone.requests.values())
        assert not sync.run(alone._futures.follower._look())
        return sum(alone.requests.values()) - before

    for runs, most in ((1, 4), (12, 24)):
        while len(alone._futures.follower._runs) < runs:
            alone.map(abs, range(100))
            alone.flush()
        # The follower itself looks meanwhile, but no more than once in the time of a look here.
        assert min(requests_of_a_look() for _ in range(5)) <= most


# ---------------------------------------------------------------------------- failing


def test_an_exception_of_a_task(burst, unhurried):
    def fail(n):
        raise LookupError(f"no {n}") from KeyError(n)

    future = burst.submit(fail, 3, key="fails")
    after = burst.submit(abs, future, key="after")
    later = burst.submit(abs, after)
    with pytest.raises(LookupError, match="no 3") as caught:
        future.result(60)
    assert caught.traceback[-1].name == "fail" and isinstance(caught.value.__cause__, KeyError)
    assert isinstance(future.exception(), LookupError) and future.status == "error"
    assert future.traceback().tb_frame.f_code.co_name == "fail"
    for dependent in (after, later):
        with pytest.raises(LookupError) as caught:
            dependent.result(60)
        assert "because task 'fails', which it depends on, failed" in caught.value.__notes__[0]


def test_a_failure_reaches_later_groups(burst):
    bad = burst.submit(operator.truediv, 1, 0, key="bad")
    burst.flush()
    middle = burst.submit(abs, bad)
    burst.flush()
    last = burst.submit(abs, middle)
    error = last.outcome(60)
    assert isinstance(error, TaskError) and error.cause == "bad" and error.upstream and error.key == last.key
    with pytest.raises(ZeroDivisionError):
        last.replay()


def test_retries(burst, tmp_path):
    assert burst.submit(fails_twice, str(tmp_path / "tries"), retries=2).result(60) == "done"


# ---------------------------------------------------------------------------- cancelling


def test_a_call_that_was_not_written_is_never_made(alone, unhurried):
    future, other = alone.submit(abs, 1), alone.submit(abs, 2)
    after = alone.submit(abs, future)
    assert future.cancel() and future.cancelled() and after.cancelled() and not other.cancelled()
    alone.flush()
    (plan,) = plans(alone)
    assert plan.tasks == 1 and other.view.run == plan.run
    for one in (future, after):
        assert one.status == "cancelled"
        with pytest.raises(cf.CancelledError):
            one.result()
        with pytest.raises(cf.CancelledError):
            one.exception()
    assert cf.wait([future, after], timeout=10).done == {future, after}


def test_a_run_is_cancelled_with_its_last_future(alone, unhurried):
    one, two = alone.submit(abs, 1), alone.submit(abs, 2)
    alone.flush()
    one.cancel()
    sync.run(alone._link.follow())
    assert not alone._link.state.cancelled
    two.cancel()
    two.cancel()
    for _ in range(500):
        sync.run(alone._link.follow())
        if alone._link.state.cancelled:
            break
        threading.Event().wait(0.01)
    assert alone._link.state.cancelled == {one.view.run}


def test_a_run_that_somebody_else_cancels(alone, monkeypatch):
    future = alone.submit(abs, 1)
    alone.flush()
    after = alone.submit(abs, future)
    alone.flush()
    sync.run(alone._link.append(Cancel(future.view.run)))
    sync.run(alone._futures.follower._drop_cancelled())
    assert future.cancelled() and after.cancelled()


def test_cleanup_cancels_what_is_pending(tmp_path, unhurried):
    session = Session(f"memory://{tmp_path.name}", fleet=None, **QUICK)
    written = session.submit(abs, 1)
    session.flush()
    waiting = session.submit(abs, 2)
    with pytest.raises(ConfigError, match="still works"):
        session.cleanup()
    session.cleanup(force=True)
    assert written.cancelled() and waiting.cancelled()


# ---------------------------------------------------------------------------- in graphs


def test_futures_in_dask_graphs(burst):
    one, array = burst.submit(int, 1), burst.submit(np.arange, 4)
    assert dask.delayed(operator.add)(one, 2).compute(scheduler=burst) == 3
    assert dask.delayed(sum)([one, [one, 2][1]]).compute(scheduler=burst) == 3
    assert dask.delayed(dict)(a=one).compute(scheduler=burst) == {"a": 1}
    assert dask.delayed(array).compute(scheduler=burst).tolist() == [0, 1, 2, 3]
    x = da.from_delayed(dask.delayed(array), shape=(4,), dtype=int)
    assert (x + 1).sum().compute(scheduler=burst) == 10
    assert burst.get({"x": one, "y": (operator.add, "x", one)}, ["x", "y"]) == (1, 2)
    assert burst.get({}, one.key) == 1
    assert dask.compute({"a": [dask.delayed(one) + 1]}, scheduler=burst) == ({"a": [2]},)
    assert tokenize(one) == tokenize(one) != tokenize(array)


def test_the_data_of_futures_in_graphs_does_not_pass_through_here(burst):
    big = burst.submit(np.zeros, 1_000_000)
    assert dask.delayed(np.sum)(big).compute(scheduler=burst) == 0.0
    plan = plans(burst)[-1]
    assert plan.externals == ((big.view.run, big.number),) and plan.size < 10_000


def test_other_schedulers_refuse_it(burst):
    future = burst.submit(int, 1)
    assert isinstance(future, Future)
    with pytest.raises(ValueError, match="Missing dependency int-"):
        dask.delayed(abs)(future).compute(scheduler="sync")


# ---------------------------------------------------------------------------- with real workers


def test_with_worker_processes(tmp_path):
    session = Session(tmp_path / "store", workers=2, progress=False)
    try:
        squares = session.map(pow, range(20), [2] * 20)
        session.flush()
        total = session.submit(sum, squares)
        pids = {session.submit(os.getpid).result(120)}
        assert total.result(120) == 2470 and os.getpid() not in pids
        found = attach(session.id, store=tmp_path / "store").collect(wait=True, timeout=120)
        assert [found[future.key] for future in squares] == [n**2 for n in range(20)]
    finally:
        session.cleanup(force=True)
