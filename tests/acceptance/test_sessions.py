"""Sessions as a user sees them: open one, leave, look from anywhere, extend, cancel, and clean up.

Each test is one row of what a session can do, on a directory with real worker processes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import dask
import numpy as np
import pytest
from acting import QUICK, ReadOnly, until

from burst_dask import Session, attach, list_sessions, sync
from burst_dask.errors import ConfigError, RunCancelled, SessionEnded, UnknownId
from burst_dask.store import open_store


def double(number):
    return 2 * number


def waits(marks, name, gate):
    """Leave a mark, and go on when the test opens the gate."""
    (marks.directory / f"{name}.{os.urandom(4).hex()}").touch()
    while not (marks.directory / gate).exists():
        time.sleep(0.005)
    return name


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "store")


@pytest.fixture
def sessions(place):
    """Opens sessions with quick workers; cleans them up."""
    opened = []

    def open_session(**settings):
        opened.append(Session(place, progress=False, **{**QUICK, **settings}))
        return opened[-1]

    yield open_session
    for session in opened:
        session.cleanup(force=True)


def burst(*arguments):
    """Run the command as a user does, elsewhere."""
    command = [sys.executable, "-m", "burst_dask.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


def stored(place, session_id):
    """Return the keys in the store that speak of a session."""

    async def listed():
        return [meta.key async for page in open_store(place).list("") for meta in page if session_id in meta.key]

    return sync.run(listed())


# ---------------------------------------------------------------------------- create


def test_create(sessions, place):
    session = sessions(workers=2, cpu=2, memory="1GB", session_timeout=7200, absolute_timeout=86400, name="nightly")
    # What was asked for is kept with the session, for workers and for whoever looks later.
    seen = attach(session.id, store=place).status()
    assert (seen.name, seen.state) == ("nightly", "open")
    assert seen.settings["threads"] == 2 and seen.settings["memory_limit"] == 1_000_000_000
    assert 7000 < seen.time_left <= 7200
    assert "session_timeout=7200" in str(seen) and "memory_limit=1000000000" in str(seen)
    assert session.compute(dask.delayed(double)(4)).result(timeout=60) == (8,)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"memory": "8XB"}, "memory='8XB': must be an amount of memory for each worker, such as '8GB'"),
        ({"memory": "-1GB"}, "memory='-1GB'"),
        ({"memory": 8}, "memory=8 is 8 bytes for each worker: must be 64.0 MiB at least; write it with its unit"),
        ({"memory": "GB"}, "memory='GB': must be an amount of memory"),
        ({"memory": True}, "memory=True: must be an amount of memory"),
        ({"memory": float("inf")}, "memory=inf: must be an amount of memory"),
        ({"cpu": 0}, "cpu=0: must be a whole number of threads"),
        ({"cpu": 2, "threads": 2}, "are the same setting: give one"),
        ({"session_timeout": 0}, "session_timeout=0.0: must be more than 0; None means no limit"),
        ({"absolute_timeout": -5}, "absolute_timeout=-5.0: must be more than 0; None means no limit"),
        ({"idle_timeout": 0}, "idle_timeout=0.0: must be more than 0"),
        ({"session_timeout": "1h"}, "session_timeout"),
        (
            {"session_timeout": float("inf")},
            "session_timeout=inf: must be at most 3.1536e+09 seconds; None means no limit",
        ),
        ({"idle_timeout": float("inf")}, "idle_timeout=inf: must be finite"),
        ({"name": 5}, "name=5: must be a text such as 'nightly'"),
        ({"name": ""}, "name='': must be a line of 1 to 200 characters"),
        ({"name": "nightly\n"}, "must be a line of 1 to 200 characters without spaces around it"),
        ({"workers": "many"}, "workers='many': must be a whole number"),
        ({"sesion_timeout": 5}, "did you mean 'session_timeout'"),
        ({"signed": "my own key"}, "signed: must be True or False; the key is made, and never given"),
    ],
)
def test_create_with_bad_input(place, asked, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Session(place, **asked)
    assert list_sessions(place) == []  # what is refused leaves nothing


# ---------------------------------------------------------------------------- status


def test_status(sessions, marks):
    session = sessions(workers=2, worker_price=36.0)
    tasks = [dask.delayed(waits)(marks, "in", "gate") for _ in range(3)]
    run = session.compute(*tasks, dask.delayed(divmod)(1, 0), dask.delayed(double)(1))
    marks.wait("in", 2)
    status = run.status()
    assert status.total == 5 and status.running >= 1 and status.left + status.completed + status.failed == 5
    assert status.workers.alive >= 1 and status.workers.oldest_heartbeat is not None
    marks.open("gate")
    run.wait(timeout=60)
    status = run.status()
    assert (status.completed, status.failed, status.pending, status.running, status.cancelled) == (4, 1, 0, 0, 0)
    assert (status.state, status.progress) == ("failed", 100.0)
    assert status.cost > 0 and status.size > 0 and status.elapsed > 0
    # For people, for scripts, for pandas, for notebooks:
    assert "completed" in str(status) and "2 alive" in str(status)
    assert status.to_dict()["failed"] == 1
    assert status.to_frame().completed.tolist() == [4]
    assert "<td>failed</td>" in status._repr_html_()
    assert session.status().totals == {
        "total": 5,
        "pending": 0,
        "running": 0,
        "completed": 4,
        "failed": 1,
        "cancelled": 0,
    }


# ---------------------------------------------------------------------------- attach


def test_attach_by_id_by_name_and_again_after_the_end(sessions, place):
    session = sessions(workers=1, name="nightly")
    run = session.compute(dask.delayed(double)(21))
    assert attach(run.id, store=place).result(timeout=60) == (42,)
    assert attach("nightly", store=place).id == session.id
    session.cleanup()
    assert attach(run.id, store=place).result(timeout=60) == (42,)
    assert attach("nightly", store=place).status().state == "closed"


def test_attach_with_a_wrong_id(sessions, place):
    session = sessions(fleet=None, name="nightly")
    with pytest.raises(UnknownId, match=f"did you mean {session.id}"):
        attach(session.id[:-1], store=place)
    with pytest.raises(UnknownId, match="did you mean nightly"):
        attach("nightli", store=place)
    with pytest.raises(UnknownId, match=f"did you mean {session.id}"):
        attach(session.id.upper(), store=place)
    assert attach(f" {session.id}\n", store=place).id == session.id  # as it comes from a line that was copied


def test_two_sessions_of_one_name(sessions, place):
    one, two = sessions(fleet=None, name="nightly"), sessions(fleet=None, name="nightly")
    with pytest.raises(ConfigError, match=r"2 sessions .* have the name 'nightly'") as caught:
        attach("nightly", store=place)
    assert f"{one.id}, opened 20" in str(caught.value) and f"{two.id}, opened 20" in str(caught.value)
    assert attach(two.id, store=place).id == two.id


def test_attach_where_only_reading_is_allowed(sessions, place):
    session = sessions(workers=1)
    run = session.compute(dask.delayed(double)(3))
    run.wait(timeout=60)
    read_only = ReadOnly(open_store(place))
    reader = attach(run.id, store=read_only)
    assert reader.result(timeout=60) == (6,)
    assert reader.status().state == "done"
    assert len(reader.story()) > 0
    assert attach(session.id, store=read_only).status().totals["completed"] == 1
    assert [row.id for row in list_sessions(read_only)] == [session.id]


def test_more_workers_from_anywhere(sessions, place, marks):
    session = sessions(workers=1)
    run = session.compute(*[dask.delayed(waits)(marks, "in", "gate") for _ in range(3)])
    attach(session.id, store=place).scale(3)
    marks.wait("in", 3)  # all at once, so on three workers
    marks.open("gate")
    run.wait(timeout=60)


# ---------------------------------------------------------------------------- deadline, extend


def test_past_its_deadline_a_session_can_be_read_and_extended(sessions, place, marks, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.3)
    session = sessions(workers=1, session_timeout=3)
    done = session.compute(dask.delayed(double)(4))
    assert done.result(timeout=60) == (8,)  # who waits keeps the session alive
    stuck = session.compute(dask.delayed(waits)(marks, "in", "gate"), dask.delayed(double)(5))
    until(lambda: stuck.status().state == "stopped" and not stuck.status().workers.alive)

    late = attach(stuck.id, store=place)
    with pytest.raises(SessionEnded, match="past its deadline"):
        late.wait(timeout=60)
    assert attach(done.id, store=place).result() == (8,)
    again = attach(session.id, store=place)
    assert again.status().state == "expired"
    for refused in (lambda: again.scale(2), lambda: again.compute(dask.delayed(1))):
        with pytest.raises(
            ConfigError, match=rf"past its deadline; .*extend\(seconds=3600\), or burst extend {session.id}"
        ):
            refused()

    deadline = again.extend(seconds=600)
    assert deadline > datetime.fromtimestamp(time.time() + 500, tz=UTC)
    assert again.extend(seconds=5) == deadline  # never shortens
    marks.open("gate")
    again.scale(1)
    assert late.result(timeout=60) == ("in", 10)


def test_nothing_moves_the_absolute_timeout(sessions):
    session = sessions(fleet=None, session_timeout=60, absolute_timeout=600)
    with pytest.raises(
        ConfigError, match=r"beyond the session's absolute_timeout of 600 s .*extend\(seconds=5\d\d\) would do"
    ):
        session.extend(seconds=3600)
    assert 400 < session.extend(seconds=500).timestamp() - time.time() < 600
    for nonsense in (0, -3, "1h", True, float("nan")):
        with pytest.raises(ConfigError, match="must be a number of seconds, more than 0"):
            session.extend(nonsense)
    unlimited = sessions(fleet=None)
    before = unlimited.status().time_left
    with pytest.raises(ConfigError, match="at most"):
        unlimited.extend(1e12)
    assert unlimited.status().time_left <= before  # what is refused changes nothing
    assert sessions(fleet=None, session_timeout=None).extend(60) is None


# ---------------------------------------------------------------------------- cancel


def test_cancel_lets_running_tasks_finish(sessions, marks):
    session = sessions(workers=1, cpu=2)
    first = dask.delayed(waits)(marks, "in", "gate")
    run = session.compute(*[dask.delayed(double)(first) for _ in range(3)])
    marks.wait("in")
    assert run.cancel()
    with pytest.raises(RunCancelled):
        run.wait(timeout=60)
    assert session.compute(dask.delayed(double)(2)).result(timeout=60) == (4,)  # the session goes on
    assert run.status().running >= 1
    marks.open("gate")
    until(lambda: not run.status().running)
    status = run.status()
    assert (status.state, status.completed, status.cancelled, status.pending) == ("cancelled", 1, 3, 0)


def test_what_depends_on_a_cancelled_run_is_cancelled_too(sessions, place):
    """In other runs of the session, for every client, with workers or without."""
    session = sessions(fleet=None)
    kept = session.persist(dask.delayed(double)(1))
    run = session.compute(dask.delayed(double)(kept), dask.delayed(double)(3))
    first = session.status().runs[0]
    assert attach(first.id, store=place).cancel()
    status = run.status()
    assert (status.state, status.cancelled, status.pending) == ("pending", 1, 1)
    with pytest.raises(RunCancelled, match=f"run {first.id}, of which it needs a result, was cancelled"):
        run.wait(timeout=60)
    session.scale(1)
    found = attach(session.id, store=place).collect(wait=True, timeout=60)  # what can be had
    assert (list(found.values()), found.pending, found.cancelled) == ([6], 0, 2)
    assert run.status().state == "cancelled"


def test_cancel_by_force_ends_running_tasks(sessions, marks):
    session = sessions(workers=1)
    run = session.compute(dask.delayed(waits)(marks, "in", "never"))
    marks.wait("in")
    (before,) = session._link.fleet.processes()
    assert run.cancel(force=True)
    assert session.compute(dask.delayed(double)(2)).result(timeout=60) == (4,)
    (after,) = session._link.fleet.processes()
    assert after != before  # threads cannot be ended, so the worker was replaced
    status = run.status()
    assert (status.state, status.running, status.cancelled) == ("cancelled", 0, 1)


# ---------------------------------------------------------------------------- list


def test_list(sessions, place):
    old = sessions(workers=1, name="old")
    old.compute(dask.delayed(double)(3)).result(timeout=60)
    new = sessions(fleet=None, name="new")
    new.compute(dask.delayed(double)(3))
    old.cleanup()
    rows = {row.name: row for row in list_sessions(place)}
    assert rows["old"].state == "closed" and rows["new"].state == "open"
    assert rows["old"].tasks["completed"] == 1 and rows["new"].tasks["pending"] == 1
    assert rows["old"].cost > 0 and rows["new"].workers == 0
    frame = list_sessions(place).to_frame()
    assert set(frame.id) == {old.id, new.id} and frame.tasks_total.sum() == 2
    assert "2 sessions in" in str(list_sessions(place))


# ---------------------------------------------------------------------------- cleanup


def test_cleanup_keeps_outputs_and_deletes_the_rest(sessions, place):
    session, other = sessions(workers=1), sessions(fleet=None)
    large = dask.delayed(np.arange)(100_000)
    run = session.compute(large.sum() + large.max())
    answer = run.result(timeout=60)
    before = stored(place, other.id)
    session.cleanup()
    assert session._link.fleet.alive() == 0
    assert not [key for key in stored(place, session.id) if "/packs/" in key]
    assert attach(run.id, store=place).result() == answer
    session.cleanup()  # again does no harm
    session.cleanup(force=True)
    assert stored(place, session.id) == []
    assert stored(place, other.id) == before
    with pytest.raises(UnknownId):
        attach(run.id, store=place)


def test_cleanup_refuses_while_work_is_going_on(sessions, place, marks):
    session = sessions(workers=1)
    run = session.compute(dask.delayed(waits)(marks, "in", "gate"))
    marks.wait("in")
    with pytest.raises(ConfigError, match=f"still works on {run.id}; nothing was done"):
        session.cleanup()
    run.cancel(force=True)
    session.cleanup()
    assert attach(run.id, store=place).status().state == "cancelled"


# ---------------------------------------------------------------------------- story


def test_story(sessions, place):
    session = sessions(workers=1)
    bad = dask.delayed(divmod)(1, 0, dask_key_name="bad")
    run = session.compute(
        dask.delayed(double)(bad, dask_key_name="after"), dask.delayed(double)(7, dask_key_name="good")
    )
    run.wait(timeout=60)
    whole = [line.what for line in run.story()]
    assert "the session was opened" in whole and f"run {run.id} was submitted" in whole
    assert any("claimed, reserving" in what for what in whole)
    assert [line.time for line in run.story()] == sorted(line.time for line in run.story())
    told = attach(run.id, store=place).story("bad")
    assert any(line.what.startswith("was reserved by") for line in told)
    assert any(line.what.startswith("failed on") for line in told)
    assert any("did not run, because task" in line.what for line in run.story("after"))
    assert any(line.what.startswith("was completed by") for line in run.story("good"))
    with pytest.raises(UnknownId, match="has no task 'goood'; did you mean 'good'"):
        run.story("goood")


# ---------------------------------------------------------------------------- the command line


def test_the_command_line(sessions, place, marks):
    session = sessions(workers=1, name="nightly")
    run = session.compute(dask.delayed(waits)(marks, "in", "gate", dask_key_name="it"))
    there = ("--store", place)
    marks.wait("in")
    assert "nightly" in burst("ls", *there).stdout
    assert "running" in burst("status", run.id, *there).stdout
    assert burst("extend", "nightly", "2d", *there).stdout.startswith("nightly lasts until 20")
    marks.open("gate")
    watched = burst("watch", run.id, *there)
    assert watched.returncode == 0
    assert watched.stdout.splitlines()[-1].startswith(f"{run.id} done: 1 completed of 1")
    assert "was completed by" in burst("story", run.id, "it", *there).stdout
    failing = session.compute(dask.delayed(divmod)(1, 0))
    assert burst("watch", failing.id, *there).returncode == 1
    assert burst("cancel", run.id, *there).stdout == f"{run.id} had nothing left to cancel\n"
    assert burst("scale", session.id, "0", *there).returncode == 0
    assert session._link.fleet.alive() == 0
    assert burst("cleanup", session.id, *there).stdout == f"{session.id} is cleaned up\n"
    refused = burst("extend", session.id, *there)
    assert (refused.returncode, refused.stderr) == (
        1,
        f"Error: session {session.id} is closed; open a new one with Session(…)\n",
    )
