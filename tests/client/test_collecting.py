"""Collecting: what is done so far, only the news, lazily, as a stream, with errors among it; and replaying."""

import operator
import pdb
import subprocess
import sys
import threading
import traceback
from collections import namedtuple

import dask
import numpy as np
import psutil
import pytest

from burst_dask import Session, TaskError, attach, sync
from burst_dask.client import collecting
from burst_dask.client.collecting import LargeResultsWarning, Results, Seen
from burst_dask.errors import ConfigError, CorruptObject, RunCancelled, UnknownId, WaitTimeout
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId


@pytest.fixture
def burst(tmp_path):
    """A session with two workers in this process."""
    session = Session(f"memory://{tmp_path.name}", workers=2, progress=False, wait_poll_min=0.005, commit_interval=0.05)
    yield session
    session.cleanup(force=True)


def named(name, function, *args):
    return dask.delayed(function)(*args, dask_key_name=name)


def numbers(count):
    return [named(f"n-{n}", int, n) for n in range(count)]


# ---------------------------------------------------------------------------- so far, and the news


def test_what_is_done_so_far_and_then_the_news(burst, gate):
    run = burst.compute(*numbers(5), named("slow", gate.wait, "late"))
    while (first := run.collect()).pending > 1:
        threading.Event().wait(0.01)
    assert dict(first) == {f"n-{n}": n for n in range(5)} and first.pending == 1
    assert list(first) == [f"n-{n}" for n in range(5)]  # in the order in which they were asked for
    gate.open()
    run.wait(timeout=60)
    for since in (first, first.token):
        news = run.collect(since=since)
        assert dict(news) == {"slow": "late"} and news.pending == 0
    assert dict(attach(run.id, store=burst._link.store).collect(since=first.token)) == {"slow": "late"}
    assert not run.collect(since=news)
    assert len(run.collect()) == 6


def test_waiting_keeps_what_came(burst, gate):
    run = burst.compute(*numbers(3), named("slow", gate.wait, "late"))
    while run.collect().pending > 1:
        threading.Event().wait(0.01)
    with pytest.raises(WaitTimeout) as caught:
        run.collect(wait=True, timeout=0.05)
    assert dict(caught.value.results) == {"n-0": 0, "n-1": 1, "n-2": 2}
    with pytest.raises(WaitTimeout) as caught:
        burst.collect(wait=True, timeout=0.05)
    assert len(caught.value.results) == 3
    gate.open()
    assert list(run.collect(wait=True, timeout=60).values()) == [0, 1, 2, "late"]


def test_a_session_collects_all_its_runs(burst):
    burst.compute(*numbers(2)).wait(timeout=60)
    futures = [burst.submit(abs, -n, key=f"abs-{n}") for n in range(3)]
    found = burst.collect(wait=True, timeout=60)
    assert dict(found) == {"n-0": 0, "n-1": 1, "abs-0": 0, "abs-1": 1, "abs-2": 2}
    assert list(found)[2:] == [future.key for future in futures]
    more = burst.submit(abs, -9)
    more.result(60)
    assert dict(burst.collect(since=found)) == {more.key: 9}
    again = attach(burst.id, store=burst._link.store).collect(since=found.token)
    assert dict(again) == {more.key: 9}


def test_what_was_cancelled_is_not_waited_for(burst, gate):
    run = burst.compute(named("slow", gate.wait, 1))
    run.cancel()
    with pytest.raises(RunCancelled):
        run.wait(timeout=60)
    found = burst.collect(wait=True, timeout=60)
    assert found.pending + found.cancelled == 1  # it may run already


def test_a_token_names_any_set_of_tasks():
    runs = {RunId("s.a"): {0, 7, 8, 123_456}, RunId("s.b"): set()}
    assert Seen.of(Seen(runs).token).runs == runs
    assert Seen.of(None).runs == {}
    dense = Seen({RunId("s.a"): range(1_000_000)})
    assert len(dense.token) < 1000


def test_bad_arguments(burst):
    run = burst.compute(*numbers(1))
    for since in ("nonsense", "KLUv", 3):
        with pytest.raises(ConfigError, match="since="):
            run.collect(since=since)
    for call in (run.collect, burst.collect, run.result):
        with pytest.raises(ConfigError, match="on_error='ignore'"):
            call(on_error="ignore")
    for timeout in (0, -1):
        with pytest.raises(ConfigError, match="must be more than 0"):
            run.collect(wait=True, timeout=timeout)
        with pytest.raises(ConfigError, match="must be more than 0"):
            burst.collect(wait=True, timeout=timeout)
        with pytest.raises(ConfigError, match="must be more than 0"):
            list(run.as_completed(timeout=timeout))


def test_a_run_with_many_outputs_has_their_names_beside_the_plan(burst, monkeypatch):
    monkeypatch.setattr("burst_dask.client.submission.NAMES_INLINE", 100)
    run = burst.compute(*numbers(40))
    assert not run._view.plan.names
    run.wait(timeout=60)
    burst.cleanup()  # keeps what is needed to collect
    again = attach(run.id, store=burst._link.store)
    assert list(again.collect()) == [f"n-{n}" for n in range(40)]
    sync.run(burst._link.store.delete([keys.names(run.id)]))
    with pytest.raises(CorruptObject, match="the plan leaves the names to it"):
        attach(run.id, store=burst._link.store).collect()


# ---------------------------------------------------------------------------- lazily, and as a stream


def test_results_are_fetched_when_they_are_looked_at(burst):
    run = burst.compute(*[named(f"a-{n}", np.full, 10_000, n) for n in range(6)])
    run.wait(timeout=60)
    results = attach(run.id, store=burst._link.store).results()
    assert isinstance(results, Results) and len(results) == 6 and list(results)[:2] == ["a-0", "a-1"]
    before = burst.requests["get"]
    assert "a-3" in results and "b-3" not in results
    assert burst.requests["get"] == before
    assert results["a-3"].sum() == 30_000
    assert burst.requests["get"] == before + 1
    with pytest.raises(KeyError, match="no task 'b-3' was asked for"):
        results["b-3"]
    assert "6 of 6 done" in repr(results)


def test_iterating_fetches_in_portions(burst, monkeypatch):
    monkeypatch.setattr("burst_dask.client.collecting.COLLECT_BYTES", 200_000)
    run = burst.compute(*[named(f"a-{n}", np.full, 10_000, n) for n in range(12)])
    run.wait(timeout=60)
    results = run.results()
    items = iter(results.items())
    key, value = next(items)
    before = burst.requests["get"]
    assert key == "a-0" and value[0] == 0
    assert [value[0] for _, value in items] == list(range(1, 12))
    assert burst.requests["get"] > before  # the rest came later
    assert [value[0] for value in results.values()] == list(range(12))


def test_what_is_pending_is_not_in_the_results(burst, gate):
    run = burst.compute(*numbers(1), named("slow", gate.wait, 1))
    while run.collect().pending > 1:
        threading.Event().wait(0.01)
    results = run.results()
    assert dict(results) == {"n-0": 0}
    with pytest.raises(KeyError, match="'slow' was not done when these results were asked for"):
        results["slow"]
    gate.open()
    run.wait(timeout=60)
    assert dict(run.results()) == {"n-0": 0, "slow": 1}


def test_a_stream_of_results(burst, gate):
    run = burst.compute(named("slow", gate.wait, "late"), *numbers(3), named("bad", operator.truediv, 1, 0))
    stream = run.as_completed(timeout=60)
    come = dict(next(stream) for _ in range(4))
    assert isinstance(come.pop("bad"), TaskError) and come == {"n-0": 0, "n-1": 1, "n-2": 2}
    gate.open()
    assert list(stream) == [("slow", "late")]
    assert len(list(attach(run.id, store=burst._link.store).as_completed())) == 5


def test_a_stream_goes_on_with_what_is_learned_otherwise(burst, gate):
    run = burst.compute(*numbers(3), named("slow", gate.wait, "late"))
    stream = run.as_completed(timeout=60)
    assert dict(next(stream) for _ in range(3)) == {"n-0": 0, "n-1": 1, "n-2": 2}
    gate.open()
    run.wait(timeout=60)
    assert len(run.collect()) == 4
    assert list(stream) == [("slow", "late")]


def test_a_stream_runs_out_of_time(alone):
    run = alone.compute(*numbers(2))
    with pytest.raises(WaitTimeout, match="not complete"):
        list(run.as_completed(timeout=0.05))


def test_more_results_than_memory_are_warned_of(burst, monkeypatch):
    run = burst.compute(named("big", np.zeros, 1_000_000))
    run.wait(timeout=60)
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(1_000_000))
    for call in (run.collect, run.result, burst.collect):
        with pytest.warns(
            LargeResultsWarning, match=r"0\.0 GB of memory are free here\. run\.results\(\) is a mapping"
        ):
            call()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory(100_000_000))
    with pytest.warns() as caught:
        run.collect()
        import warnings

        warnings.warn("one, so that there is any", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["one, so that there is any"]


# ---------------------------------------------------------------------------- errors


def fail(n):
    try:
        raise KeyError(n)
    except KeyError as error:
        raise LookupError(f"no {n}") from error


def test_a_failed_task_stays_in_the_results(burst):
    bad = named("bad", fail, 3)
    run = burst.compute(bad, named("after", abs, bad), *numbers(1), retries=1)
    found = run.collect(wait=True, timeout=60)
    assert found["n-0"] == 0 and set(found.errors) == {"bad", "after"}
    error = found["bad"]
    assert isinstance(error, TaskError) and isinstance(error.exception, LookupError)
    assert error.message == "LookupError: no 3" and error.key == error.cause == "bad" and not error.upstream
    assert error.attempts == 2 and error.worker
    assert "KeyError: 3" in error.traceback and "direct cause" in error.traceback and "in fail" in error.traceback
    assert isinstance(error.exception.__cause__, KeyError)
    assert traceback.extract_tb(error.exception.__traceback__)[-1].name == "fail"
    assert "2 of them errors" in repr(found)


def test_upstream_failures_name_the_first_cause(burst):
    bad = named("bad", fail, 3)
    last = named("last", abs, named("middle", abs, bad))
    run = burst.compute(last)
    error = run.collect(wait=True, timeout=60)["last"]
    assert error.upstream and error.cause == "bad" and error.key == "last"
    assert error.message == "did not run, because task 'bad', which it depends on, failed: LookupError: no 3"
    with pytest.raises(LookupError) as caught:
        run.result()
    assert caught.value.__notes__ == ["task 'last' did not run, because task 'bad', which it depends on, failed"]


def test_what_is_done_about_errors(burst):
    run = burst.compute({"good": dask.delayed(int)(1), "bad": [named("bad", fail, 3)]})
    (found,) = run.result(timeout=60, on_error="return")
    assert found["good"] == 1 and isinstance(found["bad"][0], TaskError)
    with pytest.raises(LookupError):
        run.result()
    with pytest.raises(LookupError):
        run.collect(on_error="raise")
    with pytest.raises(LookupError):
        found["bad"][0].reraise()


# ---------------------------------------------------------------------------- replaying


def test_a_failed_task_is_run_again_here(burst):
    inputs = [named(f"in-{n}", np.full, 3, n) for n in range(3)]

    def total(arrays, by):
        where = threading.current_thread() is threading.main_thread()
        raise ArithmeticError(float(sum(a.sum() for a in arrays)) / by, where)

    run = burst.compute(named("total", total, inputs, 2), named("fine", sum, [1, 2]))
    with pytest.raises(ArithmeticError) as caught:
        run.result(timeout=60)
    assert caught.value.args == (4.5, False)
    with pytest.raises(ArithmeticError) as caught:
        run.replay("total")
    assert caught.value.args == (4.5, True)  # here, with its real inputs
    frame = caught.traceback[-1].frame
    assert [a.tolist() for a in frame.f_locals["arrays"]] == [[n] * 3 for n in range(3)]
    assert run.replay("fine") == 3
    assert attach(run.id, store=burst._link.store).replay("in-2").tolist() == [2, 2, 2]


def test_a_task_that_failed_upstream_replays_the_cause(burst):
    run = burst.compute(named("after", abs, named("bad", fail, 3)))
    run.wait(timeout=60)
    with pytest.raises(LookupError, match="no 3"):
        run.replay("after")


def test_a_debugger_sees_the_task(burst, monkeypatch):
    run = burst.compute(named("bad", fail, 3))
    run.wait(timeout=60)
    seen = []
    monkeypatch.setattr(
        pdb.Pdb, "interaction", lambda self, frame, tb: seen.append(self.setup(frame, tb) or self.curframe)
    )
    try:
        run.replay("bad")
    except LookupError as error:
        pdb.post_mortem(error.__traceback__)
    assert seen and seen[0].f_code.co_name == "fail" and seen[0].f_locals["n"] == 3


def test_inputs_come_from_other_runs(burst):
    kept = burst.persist(named("kept", np.arange, 4))
    future = burst.submit(int, 3)
    run = burst.compute(named("bad", fail, named("sum", np.sum, kept)), named("twice", pow, future, 2))
    run.wait(timeout=60)
    with pytest.raises(LookupError, match="no 6"):
        run.replay("bad")
    assert run.replay("sum") == 6 and run.replay("twice") == 9
    bad = burst.submit(operator.truediv, future, 0)
    with pytest.raises(ZeroDivisionError):
        bad.replay()


def test_what_cannot_be_replayed(burst, gate):
    slow = named("slow", gate.wait, 1)
    run = burst.compute(named("next", abs, slow), *numbers(2))
    with pytest.raises(UnknownId, match=r"has no task 'n-O'; did you mean 'n-[01]'"):
        run.replay("n-O")
    with pytest.raises(ConfigError, match="'next' cannot be replayed yet: its input 'slow' has no outcome"):
        run.replay("next")
    gate.open()
    run.wait(timeout=60)
    burst.cleanup()
    with pytest.raises(CorruptObject, match="was the session cleaned up"):
        attach(run.id, store=burst._link.store).replay("next")


def test_an_error_in_a_program_reads_well(tmp_path):
    """What a person sees at the end of a script."""
    program = """
import dask
from burst_dask import Session
burst = Session("memory://program", workers=1, progress=False)
def work(n):
    return 1 / n
try:
    burst.submit(abs, burst.submit(work, 0, key="zero"), key="after").result(60)
finally:
    burst.cleanup(force=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    *_, last, note = done.stderr.strip().splitlines()
    assert last == "ZeroDivisionError: division by zero"
    assert note == "task 'after' did not run, because task 'zero', which it depends on, failed"
    assert collecting.__name__ not in last
