"""What tests act with: real workers, their deaths, and files that tell who is where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from burst_dask import Session, sync
from burst_dask.errors import StoreAccessDenied
from burst_dask.fleet import records
from burst_dask.journal.view import RunView
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan
from burst_dask.store import Store
from burst_dask.testing.invariants import assert_run_invariants

#: Quick to notice a death, and to look for work.
QUICK = {
    "heartbeat": 0.3,
    "lease": 1.5,
    "idle_poll_min": 0.05,
    "idle_poll_max": 0.2,
    "commit_interval": 0.2,
    "commit_interval_wanted": 0.1,
    "release_grace": 0.3,
    "session_poll": 0.5,
}


class Marks:
    """Files by which tasks tell the test what they do, and the test tells them to go on."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def count(self, name: str) -> int:
        return len(list(self.directory.glob(f"{name}.*")))

    def wait(self, name: str, count: int = 1) -> None:
        """Wait until that many tasks have left a mark."""
        deadline = time.monotonic() + 60
        while self.count(name) < count:
            assert time.monotonic() < deadline, f"{self.count(name)} of {count} marks {name!r}"
            time.sleep(0.005)

    def open(self, gate: str) -> None:
        (self.directory / gate).touch()

    def wait_for(self, gate: str) -> None:
        """Wait, in a task, until the test has opened that gate."""
        while not (self.directory / gate).exists():
            time.sleep(0.005)


class Gate:
    """A task waits here until the test opens it; a file, so that it pickles."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def wait(self, value: Any = None) -> Any:
        while not self.place.exists():
            time.sleep(0.002)
        return value

    def open(self) -> None:
        self.place.touch()


def fails_twice(place: str) -> str:
    """A task that works at the third try; `place` is a file in which it counts."""
    with Path(place).open("a+") as file:
        file.write(".")
        file.seek(0)
        if len(file.read()) < 3:
            raise OSError("not yet")
    return "done"


def until(condition: Callable[[], object]) -> None:
    """Wait for what other processes will do."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def plans(session: Session) -> list[Plan]:
    """Return the plans of all runs of a session."""

    async def read() -> list[Plan]:
        await session._link.follow()
        views = [await RunView.open(session._link.store, run) for run in session._link.state.runs]
        return [view.plan for view in views if view is not None]

    return sync.run(read())


def start_worker(session: Session, processes: list[subprocess.Popen[bytes]]) -> subprocess.Popen[bytes]:
    """Start one worker as a container would."""
    command = ["burst_dask.worker", "--session", session.id, "--store", session.store, "--processes", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # tasks are functions of test modules
    process = subprocess.Popen([sys.executable, "-m", *command, "--threads", "1"], env=environment)
    processes.append(process)
    return process


def agent_of(process: subprocess.Popen[bytes]) -> psutil.Process:
    """Return the agent below a worker's supervisor, once it runs."""
    deadline = time.monotonic() + 30
    while True:
        for child in children(process.pid):
            if "burst_dask.worker.process" in child.cmdline():
                return child
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(session: Session) -> None:
    """Kill the session's workers and their supervisors, as a machine's end would."""
    fleet = session._link.fleet
    # A record without a pid is that of one which is being started, and 0 would be this process's own group.
    supervisors = [record.pid for record in records.read_all(fleet.directory).values() if record.pid]
    agents = [agent.pid for agent in fleet.processes()]
    for pid in supervisors + agents:
        os.kill(pid, signal.SIGKILL)


def check(session: Session, run: str) -> None:
    """Check that a run keeps every rule and that each task has its outcome."""
    sync.run(assert_run_invariants(session._link.store, RunId(run), complete=True))


class ReadOnly:
    """A store as somebody sees it who may only read."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def put(self, key: str, body: Any) -> None:
        raise StoreAccessDenied(f"{key} may not be written")

    create = put

    async def delete(self, keys: Any) -> None:
        raise StoreAccessDenied(f"{list(keys)} may not be deleted")

    async def time(self, key: str) -> float:
        raise StoreAccessDenied(f"{key} may not be written")
