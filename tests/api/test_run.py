"""Runs: waiting with few requests, collecting, failing, detaching, and what is told of them."""

import asyncio
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import dask
import msgspec
import numpy as np
import pytest
from acting import ReadOnly

from burst_dask import Session, attach, sync
from burst_dask.client.link import Link
from burst_dask.client.submission import Asked
from burst_dask.errors import (
    ConfigError,
    CorruptObject,
    EnvironmentFailed,
    FleetError,
    RunCancelled,
    UnstorableResult,
    VersionMismatch,
    WaitTimeout,
)
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.protocol import keys
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Beat, Ended, Manifest, decode, encode
from burst_dask.protocol.session_records import Scale
from burst_dask.store import open_store

Point = namedtuple("Point", "x y")


@dataclass
class Holder:
    value: object


# ---------------------------------------------------------------------------- collecting


def test_the_result_is_what_dask_compute_returns(burst):
    one = dask.delayed(1) + 1
    given = ({"a": [one, (one, 3)]}, Point(one, 2), Holder(one), {7}, "text", one)
    run = burst.compute(*given)
    assert run.result(timeout=30) == dask.compute(*given, scheduler="sync")
    assert run.done()
    # Also where nothing is known of the collections:
    assert attach(run.id, store=burst._link.store).result() == run.result()


def test_large_results_are_collected_in_portions(burst, monkeypatch):
    monkeypatch.setattr("burst_dask.client.collecting.COLLECT_BYTES", 1_000_000)
    arrays = [dask.delayed(np.full)(100_000, n) for n in range(12)]
    found = dask.compute(*arrays, scheduler=burst)
    assert all(np.array_equal(array, np.full(100_000, n)) for n, array in enumerate(found))


def test_the_first_failure_is_raised_while_others_run(burst, gate):
    def fail():
        raise LookupError("no such thing")

    run = burst.compute(dask.delayed(gate.wait)(1), dask.delayed(fail)())
    with pytest.raises(LookupError, match="no such thing"):
        run.result(timeout=60)
    assert run.status().state == "running"  # a detached run goes on
    gate.open()
    run.wait(timeout=30)
    assert run.status().state == "failed"
    with pytest.raises(LookupError):
        run.result(timeout=5)


def test_a_result_that_cannot_be_pickled_is_named(burst):
    with pytest.raises(UnstorableResult, match="lock"):
        dask.compute(dask.delayed(threading.Lock)(), scheduler=burst)


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_damaged_result_is_named(burst, damage):
    run = burst.compute(dask.delayed("x".join)(["y"] * 30_000))  # larger than what rides in an entry
    run.wait(timeout=30)
    store = burst._link.store

    async def spoil():
        async for page in store.list(keys.run_prefix(run.id) + "segments/"):
            for meta in page:
                await store.put(meta.key, damage(await store.get(meta.key)))
                return meta.key

    key = sync.run(spoil())
    with pytest.raises(CorruptObject, match=key):
        run.result(timeout=5)


def test_a_damaged_plan_is_named(alone):
    run = alone.compute(dask.delayed(1))
    sync.run(alone._link.store.put(keys.plan(run.id), b"bDsk"))
    with pytest.raises(CorruptObject, match=r"plan: truncated to 4 bytes"):
        attach(run.id, store=alone._link.store)


# ---------------------------------------------------------------------------- waiting


def test_timeouts(alone):
    run = alone.compute(dask.delayed(1))
    with pytest.raises(WaitTimeout, match="It goes on") as caught:
        run.wait(timeout=0.05)
    assert isinstance(caught.value, TimeoutError)
    with pytest.raises(WaitTimeout):
        run.result(timeout=0.05)
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match="more than 0"):
            run.wait(timeout=wrong)
    for wrong in ("5", True, [1]):
        with pytest.raises(ConfigError, match="must be a number of seconds; None waits"):
            run.wait(timeout=wrong)
    assert not run.done()


class Enough(Exception):
    """Ends a wait."""


def test_a_waiting_client_sends_few_requests(alone, monkeypatch):
    """A look comes a tenth of the time waited after the one before, or after `wait_poll_max`."""
    run = alone.compute(*[dask.delayed(n) for n in range(50)])
    before = alone.requests
    now = 0.0

    class Fast:
        def monotonic(self):
            return now

        def wall(self):
            return now

        async def sleep(self, seconds):
            nonlocal now
            now += seconds
            await asyncio.sleep(0)
            if now > 100:
                raise Enough

    monkeypatch.setattr(Link, "clock", Fast())
    with pytest.raises(Enough), pytest.warns(UserWarning, match="burst worker --session"):
        run.wait()
    sent = {verb: count - before[verb] for verb, count in alone.requests.items()}
    assert sent["get"] < 130 and sent["list"] < 12 and sent["put"] + sent["create"] == 0


def test_cancel(burst, gate):
    done, held = burst.compute(dask.delayed(1)), burst.compute(*[dask.delayed(gate.wait)(n) for n in range(40)])
    done.wait(timeout=30)
    assert not done.cancel()
    assert held.cancel()
    with pytest.raises(RunCancelled, match="was cancelled"):
        held.result(timeout=30)
    assert held.status().state == "cancelled"
    gate.open()


def test_a_client_sees_what_another_one_cancels(alone, monkeypatch):
    run = alone.compute(dask.delayed(1))
    attach(run.id, store=alone._link.store).cancel()
    monkeypatch.setattr("burst_dask.client.watching.policy.patience", lambda waited, low, high: 0.001)
    with pytest.raises(RunCancelled):
        run.wait(timeout=10)


def test_ctrl_c_detaches_and_says_how_to_come_back(burst, gate, capsys):
    threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        dask.delayed(gate.wait)("kept").compute(scheduler=burst)
    told = capsys.readouterr().err
    (run,) = burst._link.state.runs
    assert f'attach("{run}", store="{burst.store}").result()' in told
    gate.open()
    assert attach(run, store=burst._link.store).result(timeout=30) == ("kept",)


def test_attaching_tells_the_workers_that_somebody_waits(burst):
    run = burst.compute(dask.delayed(1))
    run.wait(timeout=30)
    before = len(burst._link.state.runs), burst._link.state.next
    other = attach(run.id, store=burst._link.store)
    other.status()
    other.result()
    other.result()
    sync.run(burst._link.follow())
    assert burst._link.state.next == before[1] + 1


def test_who_may_only_read_can_wait(burst):
    run = burst.compute(dask.delayed(sum)([1, 2]))
    run.wait(timeout=30)

    reader = attach(run.id, store=ReadOnly(burst._link.store))
    assert reader.result(timeout=30) == (3,)
    assert reader.status().completed == run.status().completed


# ---------------------------------------------------------------------------- somebody must work


def test_without_workers_it_says_once_how_to_start_some(alone, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 0.01)
    run = alone.compute(dask.delayed(1))
    message = f"burst worker --session {alone.id} --store 'memory://"
    with pytest.warns(UserWarning, match=message) as told, pytest.raises(WaitTimeout):
        run.wait(timeout=0.2)
    assert len(told) == 1


def test_dead_workers_are_started_again(burst, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.01)
    run = burst.compute(dask.delayed(sum)([1, 2]))
    burst._link.fleet.stop()
    assert run.result(timeout=30) == (3,)


class Refusing:
    """A fleet whose workers end at once."""

    def __init__(self, link, reason, message):
        self.link = link
        self.record = Ended(worker="w1", reason=reason, message=message, wrote=1.0)

    def ensure(self, workers):
        key = keys.ended(self.link.session, "w1")
        sync.start(self.link.store.put(key, encode(self.record)))
        return workers

    def describe(self):
        return "nothing"

    def remove(self):
        pass

    def alive(self):
        return 0


@pytest.mark.parametrize(
    ("reason", "error", "message"),
    [
        ("refused", VersionMismatch, "Python 3.1 here, 3.2 in the client"),
        ("unprepared", EnvironmentFailed, "pip said: no such package"),
        ("died", FleetError, "killed by SIGILL"),
    ],
)
def test_a_fleet_that_cannot_work_ends_the_wait(alone, monkeypatch, reason, error, message):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.01)
    sync.run(alone._link.append(Scale(1)))
    run = alone.compute(dask.delayed(1))
    alone._link.fleet = Refusing(alone._link, reason, message)
    with pytest.raises(error, match=message):
        run.wait(timeout=30)


class OneAfterAnother:
    """A fleet whose workers end unprepared, each when the next has come up."""

    def __init__(self, link):
        self.link = link
        self.started = 0

    def ensure(self, workers):
        self.started += 1
        self.end(self.started - 1)
        name = WorkerId(f"w{self.started}")
        beat = Beat(worker=name, host="h", pid=1, threads=1, started=0.0)
        sync.run(self.link.store.put(keys.beat(self.link.session, name), encode(beat)))
        return 1

    def remove(self):
        pass

    def end(self, number):
        name = WorkerId(f"w{number}")
        record = Ended(worker=name, reason="unprepared", message="pip said: no", wrote=float(number))
        sync.run(self.link.store.put(keys.ended(self.link.session, name), encode(record)))


def test_workers_that_cannot_be_prepared_are_not_started_for_ever(alone, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.0)
    alone._link.fleet = fleet = OneAfterAnother(alone._link)
    sync.run(alone._link.append(Scale(1)))
    guard = alone._link.guard
    for _ in range(3):  # one is alive and may do better, but no others are started
        sync.run(guard.check())
        assert fleet.started == 1
    fleet.end(1)
    for _ in range(2):
        with pytest.raises(EnvironmentFailed, match=r"could not be prepared for it\. The last one: pip said: no"):
            sync.run(guard.check())
    assert fleet.started == 1
    guard.renew()  # somebody has called scale(…)
    sync.run(guard.check())
    assert fleet.started == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_workers_of_another_version_refuse(alone, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 0.01)
    key = keys.manifest(alone.id)
    store = alone._link.store

    async def pretend():
        manifest = decode(Manifest, key, await store.get(key))
        other = msgspec.structs.replace(manifest.versions, dask="1.0")
        await store.put(key, encode(msgspec.structs.replace(manifest, versions=other)))

    sync.run(pretend())
    run = alone.compute(dask.delayed(1))
    fleet = InProcessFleet(alone.id, store)
    fleet.start(1)
    with pytest.raises(VersionMismatch, match=r"Dask .* here, 1\.0 in the client"):
        run.wait(timeout=30)
    fleet.stop()


# ---------------------------------------------------------------------------- what is told


def test_status(burst, gate):
    run = burst.compute(*[dask.delayed(gate.wait)(n) for n in range(4)])
    while (status := run.status()).workers.alive < 2:
        pass  # the second one has not written its heartbeat yet
    assert (status.completed, status.failed, status.left, status.total) == (0, 0, 4, run._view.plan.tasks)
    assert status.workers.alive == 2 and status.workers.oldest_heartbeat < 5
    gate.open()
    run.wait(timeout=30)
    status = run.status()
    assert (
        status.state == "done"
        and status.progress == 100
        and status.pending == status.running == 0
        and status.completed == 4
    )
    assert status.to_dict()["workers"] == {"alive": 2, "oldest_heartbeat": status.workers.oldest_heartbeat}
    assert str(status).startswith(f"Run {run.id}") and "<td>done</td>" in status._repr_html_()


def test_status_of_many_tasks_takes_few_requests(alone):
    dsk = {("x", n): (abs, n) for n in range(10_000)}
    run = alone._submit(dsk, list(dsk), Asked())
    before = alone.requests
    status = run.status()
    assert (status.state, status.total, status.workers.alive) == ("pending", 10_000, 0)
    sent = {verb: count - before[verb] for verb, count in alone.requests.items()}
    assert sum(sent.values()) < 20


def test_progress_is_shown_only_to_people():
    """Not a terminal: a script whose output goes to a file gets nothing but its own output."""
    code = (
        "import dask; from burst_dask import Session; b = Session('memory://quiet', workers=1);"
        "print(dask.compute(dask.delayed(sum)([1, 2]), scheduler=b)); b.cleanup(force=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert (done.stdout, done.stderr) == ("(3,)\n", "")


def test_progress_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("burst_dask.client.watching.SURVEY_EVERY", 0.01)
    session = Session(open_store(f"memory://{tmp_path.name}"), workers=1, progress=True, wait_poll_min=0.005)
    assert session.get({"x": (sum, [1, 2])}, "x") == 3
    session.cleanup(force=True)
    assert session.id in capsys.readouterr().err


def test_progress_in_a_notebook(burst, monkeypatch):
    shown = []
    handle = SimpleNamespace(update=shown.append)
    display = SimpleNamespace(HTML=str, display=lambda html, display_id: shown.append(html) or handle)
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("burst_dask.client.watching.SURVEY_EVERY", 0.0)
    burst._progress = None
    burst.get({"x": (sum, [1, 2])}, "x")
    (run,) = burst._link.state.runs
    assert len(shown) > 1 and shown[0] == f'{run} <progress value="0" max="1"></progress> 0 of 0'
