"""Calls as futures: what is submitted, and how calls are grouped into runs."""

import operator
import subprocess
import sys
import threading

import dask
import numpy as np
import pytest
from acting import plans
from dask._task_spec import TaskRef

from burst_dask import Session, attach, sync
from burst_dask.api.grouping import MOST_CALLS, _Group
from burst_dask.errors import (
    ConfigError,
    StoreUnavailable,
    UnpicklableTask,
    UnsupportedGraph,
)
from burst_dask.store import Retrying, open_store
from burst_dask.store.wrappers import Fault, Faulty

QUICK = {"wait_poll_min": 0.005}


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
    for keywords in (
        *({"retries": -1}, {"priority": "high"}, {"timeout": 0}, {"resources": 1}),
        *({"retry_on": 3}, {"retry_delay": -1}, {"retry_delay": float("inf")}),
    ):
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

    alone.submit(abs, 1, retries=2, priority=3, timeout=1.5, resources={"GPU": 1}, retry_on=OSError, retry_delay=0)
    with dask.annotate(retries=4):
        alone.submit(abs, 2)
    alone.flush()
    (plan,) = plans(alone)
    records = [sync.run(packs.read_shard(alone._link.store, plan, n))[0] for n in range(len(plan.shards))]
    found = [note for record in records for note in record.annotations.values()]
    notes = sorted(found, key=lambda note: note["retries"])
    asked = {"retries": 2, "priority": 3, "timeout": 1.5, "resources": {"GPU": 1.0}}
    assert notes == [asked | {"retry_on": ["builtins.OSError"], "retry_delay": 0.0}, {"retries": 4}]
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
    monkeypatch.setattr("burst_dask.api.grouping.MOST_CALLS", 10)
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


def run_program(end, store):
    """Run a program that submits 100 calls and ends like that; return its exit code, its session, and what it wrote."""
    command = [sys.executable, "-c", PROGRAM.format(end=end), str(store)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    return done.returncode, attach(done.stdout.strip(), store=store), done.stderr


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)", "1 / 0"])
def test_an_orderly_end_of_the_interpreter_loses_nothing(tmp_path, end):
    _, session, errors = run_program(end, tmp_path / "store")
    assert sum(plan.tasks for plan in plans(session)) == 100, errors


def test_a_crash_loses_only_what_was_not_written(tmp_path):
    code, session, _ = run_program("burst.flush(); burst.submit(abs, 1); os._exit(9)", tmp_path / "store")
    assert code == 9
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
