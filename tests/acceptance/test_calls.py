"""Calls, collections and their results in a session: each test shows one thing that a user does.

On each kind of store, with real worker processes.
"""

from __future__ import annotations

import concurrent.futures
import operator
import os
import signal
import threading

import dask
import dask.array as da
import dask.dataframe as dd
import joblib
import pandas as pd
import pytest
from acting import QUICK, Marks, check
from sklearn.datasets import load_iris
from sklearn.model_selection import GridSearchCV
from sklearn.svm import SVC

import burst_dask.joblib  # noqa: F401 - makes joblib's backend known
from burst_dask import Session, TaskError, as_completed, attach
from burst_dask.errors import WaitTimeout


@pytest.fixture(scope="module")
def burst(any_store):
    session = Session(any_store, workers=2, progress=False, **QUICK)
    yield session
    session.cleanup(force=True)


def squared(n):
    return n * n


def reciprocal(n):
    return 1 / n


def wait_for(marks, gate):
    while not (marks.directory / gate).exists():
        threading.Event().wait(0.005)
    return gate


def test_cancel_a_call(any_store, marks):
    """What is cancelled is not made, nor what depends on it; the others go on."""
    session = Session(any_store, workers=1, progress=False, **QUICK)
    try:
        busy = session.submit(wait_for, marks, "gate")
        unwanted = session.map(squared, range(5))
        session.flush()  # it is in the store, and would be made without this process
        after = session.submit(sum, unwanted)
        other = session.submit(squared, 6)
        session.flush()

        assert unwanted[3].cancel() and after.cancelled()

        marks.open("gate")
        assert busy.result(timeout=120) == "gate" and other.result(timeout=120) == 36
        found = session.collect(wait=True, timeout=120)
        assert found.cancelled == 2 and unwanted[3].key not in found and after.key not in found
        assert [found[future.key] for future in unwanted if future is not unwanted[3]] == [0, 1, 4, 16]
        status = session.status()
        assert (status.totals["cancelled"], status.totals["failed"], status.totals["pending"]) == (2, 0, 0)
    finally:
        session.cleanup(force=True)


def test_submit_calls(burst):
    """Futures as with distributed.Client and concurrent.futures; the work goes on without this process."""
    squares = [burst.submit(squared, n) for n in range(100)]  # returns at once
    total = burst.submit(sum, squares)  # futures as arguments make a graph
    best = burst.submit(max, [total, *squares[:3]])

    burst.flush()  # from here on nothing depends on this process

    assert total.result(timeout=120) == best.result(timeout=120) == 328_350
    assert {future.result() for future in as_completed(squares)} == {n * n for n in range(100)}
    assert burst.gather(burst.map(pow, [2, 3], [5, 2])) == [32, 9]

    # A call that always gives the same is made once.
    assert burst.submit(squared, 12, pure=True) is burst.submit(squared, 12, pure=True)
    # Its key, its retries and more may be given, and another process finds it by its key.
    burst.submit(squared, 13, key="thirteen", retries=2, priority=1, timeout=60).result(timeout=120)
    assert attach(burst.id, store=burst.store).collect()["thirteen"] == 169
    for run in burst.status().runs:
        if run.state == "done":
            check(burst, run.id)


def test_submit_graphs(burst):
    """Collections whose data stays in the store, and goes from worker to worker."""
    frame = pd.DataFrame({"a": [n % 5 for n in range(1000)], "b": range(1000)})
    df = burst.persist(dd.from_pandas(frame, npartitions=4).assign(c=lambda d: d.b * 2))  # returns at once
    x = burst.persist(da.arange(1000, chunks=100) ** 2)

    (sums,) = burst.compute(df.groupby("a").c.sum()).result(timeout=120)
    total, rest = burst.compute(x.sum(), {"rest": x[::100]}).result(timeout=120)
    assert sums.to_dict() == (frame.groupby("a").b.sum() * 2).to_dict()
    assert total == sum(n * n for n in range(1000)) and rest["rest"][1] == 10_000

    with burst:  # Dask's own persist does the same
        y = (x + 1).persist()
        assert int(y.max().compute()) == 999 * 999 + 1

    # Futures are part of graphs, too.
    array = burst.submit(squared, 3)
    assert dask.delayed(operator.add)(array, 1).compute(scheduler=burst) == 10


def test_executor(burst):
    """Whatever takes an executor, or uses joblib, runs on the session's workers."""
    with burst.get_executor() as executor:
        assert list(executor.map(squared, range(10), timeout=120)) == [n * n for n in range(10)]
        futures = [executor.submit(squared, n) for n in range(3)]
        done, pending = concurrent.futures.wait(futures, timeout=120)
        assert not pending and {future.result() for future in done} == {0, 1, 4}

    x, y = load_iris(return_X_y=True)
    with burst, joblib.parallel_config("burst"):
        search = GridSearchCV(SVC(), {"C": [0.1, 1, 10]}).fit(x, y)
    assert search.best_params_ == GridSearchCV(SVC(), {"C": [0.1, 1, 10]}).fit(x, y).best_params_


def test_collect(burst, marks: Marks):
    """What is done, when it is done: at once, only the news, lazily, or as a stream."""
    slow = dask.delayed(wait_for)(marks, "gate", dask_key_name="slow")
    quick = [dask.delayed(squared)(n, dask_key_name=f"quick-{n}") for n in range(4)]
    run = burst.compute(*quick, slow)

    stream = run.as_completed(timeout=120)
    come = dict(next(stream) for _ in range(4))
    assert come == {f"quick-{n}": n * n for n in range(4)}

    found = run.collect()  # never waits
    assert list(found) == [f"quick-{n}" for n in range(4)] and found.pending == 1
    with pytest.raises(WaitTimeout) as caught:
        run.collect(wait=True, timeout=0.1)
    assert dict(caught.value.results) == dict(found)  # what came is kept

    marks.open("gate")
    run.wait(timeout=120)
    assert dict(run.collect(since=found)) == {"slow": "gate"}  # only the news …
    elsewhere = attach(run.id, store=burst.store)
    assert dict(elsewhere.collect(since=found.token)) == {"slow": "gate"}  # … in another process, too
    assert list(stream) == [("slow", "gate")]

    results = elsewhere.results()  # fetches a result when it is looked at
    assert len(results) == 5 and results["quick-3"] == 9
    assert list(burst.collect(wait=True, timeout=120).items())[-5:] == list(results.items())


def test_errors(burst):
    """A task that failed is a result like others, says all that is known of it, and can be run again here."""
    bad = dask.delayed(reciprocal)(0, dask_key_name="bad")
    run = burst.compute(dask.delayed(reciprocal)(4, dask_key_name="good"), bad + 1, retries=1)

    found = run.collect(wait=True, timeout=120)
    assert found["good"] == 0.25
    (error,) = found.errors.values()
    assert isinstance(error, TaskError) and isinstance(error.exception, ZeroDivisionError)
    assert error.upstream and error.cause == "bad"  # what was asked for did not run: this is the first cause
    assert error.message.startswith("did not run, because task 'bad', which it depends on, failed: ZeroDivisionError")
    assert error.attempts == 2 and error.worker and "in reciprocal" in error.traceback

    with pytest.raises(ZeroDivisionError):  # the task's own exception
        run.result(timeout=120)
    assert run.result(on_error="return")[0] == 0.25
    with pytest.raises(ZeroDivisionError) as caught:  # here, with its real inputs: pdb.post_mortem() sees them
        run.replay("bad")
    assert caught.traceback[-1].frame.f_locals["n"] == 0


def test_a_worker_dies_and_nothing_is_lost(burst, marks: Marks):
    """Futures of several groups that depend on each other, with a worker killed on the way."""
    first = burst.submit(squared, 3)
    burst.flush()
    waiting = burst.submit(wait_and_add, first, marks)
    burst.flush()
    last = burst.submit(squared, waiting)
    marks.wait("begun")
    kill_one(burst)
    marks.open("gate")
    assert last.result(timeout=120) == 100


def wait_and_add(n, marks):
    (marks.directory / f"begun.{marks.count('begun')}").touch()
    wait_for(marks, "gate")
    return n + 1


def kill_one(session):
    os.kill(session._link.fleet.processes()[0].pid, signal.SIGKILL)
