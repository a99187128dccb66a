"""Calls as futures: grouped into runs, arguments of each other and of graphs, followed to their end."""

import asyncio
import concurrent.futures as cf
import operator
import os
import subprocess
import sys
import threading
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import pytest
from dask._task_spec import TaskRef
from dask.tokenize import tokenize

from burst_dask import Future, Session, TaskError, as_completed, attach, sync, wait
from burst_dask.errors import (
    ConfigError,
    StoreUnavailable,
    UnpicklableTask,
    UnsupportedGraph,
    WaitTimeout,
)
from burst_dask.grouping import MOST_CALLS, _Group
from burst_dask.journal.view import RunView
from burst_dask.protocol.records import Cancel
from burst_dask.store import Retrying, open_store
from burst_dask.store.wrappers import Fault, Faulty

QUICK = {"wait_poll_min": 0.005}


@pytest.fixture
def burst(tmp_path):
    """A session with two workers in this process."""
    session = Session(f"memory://{tmp_path.name}", workers=2, progress=False, **QUICK)
    yield session
    session.cleanup(force=True)


@pytest.fixture
def alone(tmp_path):
    """A session without workers."""
    session = Session(f"memory://{tmp_path.name}", fleet=None, progress=False, **QUICK)
    yield session
    session.cleanup(force=True)


@pytest.fixture
def unhurried(monkeypatch):
    """Groups are written when they are asked for, and not because time passes."""
    monkeypatch.setattr("burst_dask.grouping.QUIET", 3600.0)
    monkeypatch.setattr("burst_dask.grouping.MOST_WAIT", 3600.0)


class Gate:
    """A task waits here until the test opens it; a file, so that it pickles."""

    def __init__(self, place):
        self.place = Path(place)

    def wait(self, value=None):
        while not self.place.exists():
            threading.Event().wait(0.002)
        return value

    def open(self):
        self.place.touch()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # so that no thread is left waiting


def plans(session):
    """Return the plans of all runs of a session."""

    async def read():
        await session._link.follow()
        return [(await RunView.open(session._link.store, run)).plan for run in session._link.state.runs]

    return sync.run(read())


# ---------------------------------------------------------------------------- calls


def test_a_call_and_its_result(burst):
    future = burst.submit(divmod, 17, 5)
    assert future.result(timeout=60) == (3, 2)
    assert future.done() and future.status == "finished" and future.exception() is None
    assert future.traceback() is None and not future.cancelled() and not future.cancel()
    assert "finished" in repr(future) and future.key.startswith("divmod-")


def test_keyword_arguments_and_functions_defined_here(burst):
    def power(base, *, exponent):
        return base**exponent

    assert burst.submit(power, 2, exponent=5).result(60) == 32
    assert burst.submit(lambda: "no arguments").result(60) == "no arguments"


def test_futures_as_arguments_make_a_graph(burst, unhurried):
    one, two = burst.submit(int, 1), burst.submit(int, 2)
    nested = burst.submit(lambda *args, **kwargs: (args, kwargs), one, [two, {"k": one}], (two, 5), named={"x": [one]})
    assert nested.result(60) == ((1, [2, {"k": 1}], (2, 5)), {"named": {"x": [1]}})
    (plan,) = plans(burst)
    assert plan.tasks == 3 and not plan.externals


def test_a_future_of_an_earlier_group_is_read_from_its_run(burst, unhurried):
    one = burst.submit(int, 1)
    burst.flush()
    total = burst.submit(operator.add, one, burst.submit(int, 2))
    assert total.result(60) == 3
    first, second = plans(burst)
    assert second.tasks == 2 and second.externals == ((first.run, 0),)
    many = burst.submit(sum, [one, total, one])
    assert many.result(60) == 5
    assert set(plans(burst)[2].externals) == {(one.view.run, one.number), (total.view.run, total.number)}


def test_a_chain_over_many_runs(burst, unhurried):
    future = burst.submit(int, 0)
    for _ in range(12):
        burst.flush()
        future = burst.submit(operator.add, future, 1)
    assert future.result(60) == 12
    assert len(plans(burst)) == 13


def test_map_and_gather(burst):
    futures = burst.map(pow, range(50), [2] * 50)
    assert burst.gather(futures) == [n**2 for n in range(50)]
    assert [f.key for f in burst.map(abs, [-1, -2], key="abs")] == ["abs-0", "abs-1"]
    assert [f.key for f in burst.map(abs, [-1, -2], key=["p", "q"])] == ["p", "q"]
    with pytest.raises(ConfigError, match="1 keys for 2 calls"):
        burst.map(abs, [-1, -2], key=["r"])
    bad = burst.map(lambda n: 1 // n, [1, 0, 2])
    assert burst.gather(bad, errors="skip") == [1, 0]
    with pytest.raises(ZeroDivisionError):
        burst.gather(bad)
    with pytest.raises(ConfigError, match="errors='ignore'"):
        burst.gather(bad, errors="ignore")


def test_keys_are_unique(burst):
    first = burst.submit(int, 1, key="one")
    with pytest.raises(ConfigError, match="key='one'"):
        burst.submit(int, 2, key="one")
    first.result(60)
    del first
    with pytest.raises(ConfigError, match="key='one'"):
        burst.submit(int, 2, key="one")


def test_a_pure_call_is_made_once(burst):
    one = burst.submit(np.arange, 3, pure=True)
    assert burst.submit(np.arange, 3, pure=True) is one
    assert burst.submit(np.arange, 4, pure=True) is not one
    assert burst.submit(np.arange, 3) is not one
    burst.flush()
    assert burst.submit(np.arange, 3, pure=True) is one
    assert one.cancel() or one.done()
    if one.cancelled():
        assert burst.submit(np.arange, 3, pure=True) is not one


def test_bad_calls(burst, alone):
    with pytest.raises(ConfigError, match="3 cannot be called"):
        burst.submit(3, 4)
    for keywords in ({"retries": -1}, {"priority": "high"}, {"timeout": 0}, {"resources": 1}):
        (name,) = keywords
        with pytest.raises(ConfigError, match=f"{name}="):
            burst.submit(abs, 1, **keywords)
    elsewhere = alone.submit(abs, 1)
    with pytest.raises(UnsupportedGraph, match="another scheduler or session"):
        burst.submit(abs, elsewhere)
    with pytest.raises(UnsupportedGraph, match="another scheduler or session"):
        burst.submit(abs, [TaskRef("who knows")])
    alone.cleanup(force=True)
    with pytest.raises(ConfigError, match="closed"):
        alone.submit(abs, 1)


def test_what_is_asked_for_is_stored_with_the_tasks(alone, unhurried):
    from burst_dask.journal import packs

    alone.submit(abs, 1, retries=2, priority=3, timeout=1.5, resources={"GPU": 1})
    with dask.annotate(retries=4):
        alone.submit(abs, 2)
    alone.flush()
    (plan,) = plans(alone)
    records = [sync.run(packs.read_shard(alone._link.store, plan, n))[0] for n in range(len(plan.shards))]
    found = [note for record in records for note in record.annotations.values()]
    notes = sorted(found, key=lambda note: note["retries"])
    assert notes == [{"retries": 2, "priority": 3, "timeout": 1.5, "resources": {"GPU": 1.0}}, {"retries": 4}]
    assert plan.priority == 3


def test_lists_may_be_changed_after_the_call(burst, unhurried):
    items, table = [1, [2]], {"a": [3]}
    future = burst.submit(lambda *args: args, items, table)
    items[1].append(9)
    items.append(9)
    table["a"].append(9)
    assert future.result(60) == ([1, [2]], {"a": [3]})


# ---------------------------------------------------------------------------- groups


def test_a_group_is_written_after_a_moment_without_a_call():
    group = _Group(first=0.0, last=0.0)
    assert group.due_in(0.0) == pytest.approx(0.05) and group.due_in(0.06) == 0.0
    group.last = 0.9
    assert group.due_in(0.92) == pytest.approx(0.03)
    group.last = 0.99
    assert group.due_in(0.99) == pytest.approx(0.01)  # its first call has waited for so long
    group.calls = dict.fromkeys(range(MOST_CALLS))
    assert group.due_in(0.0) == 0.0


def test_a_loop_of_calls_is_one_run(alone, unhurried):
    futures = [alone.submit(abs, n) for n in range(500)]
    alone.flush()
    (plan,) = plans(alone)
    assert plan.tasks == 500
    assert {future.view.run for future in futures} == {plan.run}


def test_a_group_has_a_bound(alone, unhurried, monkeypatch):
    monkeypatch.setattr("burst_dask.grouping.MOST_CALLS", 10)
    futures = [alone.submit(abs, n) for n in range(25)]
    alone.flush()
    assert sorted(plan.tasks for plan in plans(alone)) == [5, 10, 10]
    assert len({(future.view.run, future.number) for future in futures}) == 25


def test_nothing_is_written_without_a_call(alone):
    before = alone.requests
    alone.flush()
    alone.flush()
    assert alone.requests == before


def test_what_makes_calls_durable(alone, unhurried):
    def count():
        return sum(plan.tasks for plan in plans(alone))

    alone.submit(abs, 1)
    alone.flush()
    assert count() == 1
    alone.submit(abs, 2)
    assert alone.status().runs and count() == 2
    alone.submit(abs, 3)
    assert alone.collect().pending == 3 and count() == 3
    with alone:
        alone.submit(abs, 4)
    assert count() == 4
    alone.submit(abs, 5)
    assert alone.detach() == alone.id and count() == 5


PROGRAM = """
import os, sys
from burst_dask import Session
burst = Session(sys.argv[1], fleet=None, progress=False)
print(burst.id, flush=True)
futures = burst.map(abs, range(-100, 0))
{end}
"""


@pytest.mark.parametrize(("end", "tasks"), [("", 100), ("raise SystemExit(3)", 100), ("1 / 0", 100)])
def test_an_orderly_end_of_the_interpreter_loses_nothing(tmp_path, end, tasks):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), str(tmp_path / "store")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    session = attach(done.stdout.strip(), store=tmp_path / "store")
    assert sum(plan.tasks for plan in plans(session)) == tasks, done.stderr


def test_a_crash_loses_only_what_was_not_written(tmp_path):
    end = "burst.flush(); burst.submit(abs, 1); os._exit(9)"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end), str(tmp_path / "store")],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 9
    session = attach(done.stdout.strip(), store=tmp_path / "store")
    assert sum(plan.tasks for plan in plans(session)) == 100


def test_a_call_that_cannot_be_pickled_fails_alone(burst, unhurried):
    good = burst.submit(abs, -1)
    bad = burst.submit(type, threading.Lock())
    after = burst.submit(str, bad)
    with pytest.raises(UnpicklableTask, match=r"argument 1 is a _thread\.lock"):
        burst.flush()
    assert good.result(60) == 1
    for future in (bad, after):
        assert future.status == "error" and isinstance(future.exception(), UnpicklableTask)
        with pytest.raises(UnpicklableTask, match="lock"):
            future.result()
    with pytest.raises(ConfigError, match="not submitted"):
        bad.replay()
    burst.flush()  # it is told once


def test_a_store_that_fails_tells_the_futures(tmp_path):
    broken = threading.Event()

    def script(verb, key):
        return Fault.BEFORE if broken.is_set() and "/packs/" in key else None

    session = Session(Faulty(open_store(f"memory://{tmp_path.name}"), script), fleet=None, **QUICK)
    broken.set()
    future = session.submit(abs, 1)
    with pytest.raises(StoreUnavailable):
        session.flush()
    assert isinstance(future.exception(), StoreUnavailable)
    broken.clear()
    session.submit(abs, 2)
    session.flush()
    assert sum(plan.tasks for plan in plans(session)) == 1
    session.cleanup(force=True)


def test_a_group_that_could_be_written_after_a_retry_is(tmp_path):
    failures = iter([True, True])

    def script(verb, key):
        return Fault.BEFORE if "/packs/" in key and next(failures, False) else None

    store = Retrying(Faulty(open_store(f"memory://{tmp_path.name}"), script), *_time())
    session = Session(store, fleet=None, **QUICK)
    session.submit(abs, 1)
    session.flush()
    assert sum(plan.tasks for plan in plans(session)) == 1
    session.cleanup(force=True)


def _time():
    from burst_dask.clock import Entropy, SystemClock

    return SystemClock(), Entropy()


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
    def fails_twice(place):
        with Path(place).open("a+") as file:
            file.write(".")
            file.seek(0)
            if len(file.read()) < 3:
                raise OSError("not yet")
        return "done"

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
    alone._futures.follower._drop_cancelled()
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
