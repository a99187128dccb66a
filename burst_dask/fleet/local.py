"""Workers as detached processes of this machine, which outlive the client.

A supervisor (`burst_dask.worker.supervisor`) keeps the agents alive; it is started in a
session of its own, so that neither Ctrl-C nor a closed terminal reaches it. What runs is on
record in `directory` (`burst_dask.fleet.records`), so that any later client on this machine
finds and stops the workers of its session, and no others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import platformdirs
import psutil

from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import ConfigError, FleetError
from burst_dask.fleet import records
from burst_dask.fleet.base import ProcessLog
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.worker.memory_watch import system_memory
from burst_dask.worker.supervisor import AGENT, REPORTS, Options

#: supervisors that this process has started: kept to be reaped, or they would stay as zombies
_started: list[subprocess.Popen[bytes]] = []


class WorkerProcess(NamedTuple):
    """One worker process."""

    worker: WorkerId
    pid: int


def fleets_directory() -> Path:
    """Return where local fleets keep records and logs: where platformdirs puts user data."""
    return platformdirs.user_data_path("burst_dask") / "fleet"


class LocalFleet:
    """Detached worker processes on this machine.

    Parameters
    ----------
    session, store_url
        What the workers work for.
    threads
        Threads of each worker.
    memory_limit
        Bytes for each worker; None shares out what the machine has, 0 watches nothing.
    directory
        Where records and logs lie; by default below `fleets_directory`.
    memory
        Bytes that the workers share out; None is all that the machine has.
    environment
        What workers get besides this process's own environment.
    tied
        Whether the workers end with this process.
    key
        Where the key of a signed session is (`burst_dask.trust.keyring`); empty for one that is not.
    """

    #: the module that an agent runs; tests put a stand-in here
    agent = AGENT
    #: seconds until a worker that is started works: it imports Dask
    boot = 2.0

    def __init__(
        self,
        session: SessionId,
        store_url: str,
        *,
        threads: int = 1,
        memory_limit: int | None = None,
        directory: Path | None = None,
        memory: int | None = None,
        environment: Mapping[str, str] | None = None,
        tied: bool = False,
        key: str = "",
    ) -> None:
        self.directory = directory or fleets_directory() / session
        self._session = session
        self._store_url = store_url
        self._threads = threads
        self._memory_limit = memory_limit
        self._memory = memory
        self._tied = tied
        self._key = key
        self._environment = dict(environment or {})
        self._entropy = Entropy()
        self._clock = SystemClock()

    def start(self, count: int, number: int = -1) -> None:
        """Start `count` workers; they are ready within two seconds. `number` is that of the start, if it has one."""
        if count < 0:
            raise ConfigError(f"{count} workers cannot be started")
        if count:
            self.directory.mkdir(parents=True, exist_ok=True)
            with records.locked(self.directory):
                self._start(count, sum(self._slots().values()), number)

    def ensure(self, workers: int) -> int:
        """Start what is missing to `workers`; return how many that were."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with records.locked(self.directory):
            there = sum(self._slots().values())
            missing = workers - there
            if missing > 0:
                self._start(missing, there)
        return max(0, missing)

    def slots(self) -> dict[int, int]:
        """Return how many workers run or are about to, by the number of their start; others under -1."""
        if not self.directory.exists():
            return {}
        with records.locked(self.directory):
            return self._slots()

    async def counted(self) -> dict[int, int]:
        """Return what `slots` does."""
        return await asyncio.to_thread(self.slots)

    async def shrink(self, workers: int) -> None:
        """Do nothing: the machines are there anyway, and what is idle ends by itself."""

    async def resting(self) -> int:
        """Return 0: workers on machines that are there anyway may be started again at any time."""
        return 0

    async def begin(self, number: int, workers: int, still: Callable[[], bool] = lambda: True) -> None:
        """Start workers as start `number`."""
        await asyncio.to_thread(self.start, workers, number)

    def alive(self) -> int:
        """Return how many worker processes run on this machine."""
        return len(self.processes())

    def processes(self) -> list[WorkerProcess]:
        """Return the worker processes that run."""
        _reap()
        agents = (agent for record in records.read_all(self.directory).values() for agent in record.agents.items())
        return [WorkerProcess(WorkerId(worker), pid) for worker, pid in agents if records.find(pid, worker)]

    def reduce(self, workers: int) -> None:
        """Stop all if there are more than `workers`: which of them have nothing to do is not known."""
        if self.alive() > workers:
            self.stop()

    def stop(self, grace: float = 5.0) -> None:
        """Let the workers hand over within `grace` seconds, then kill them; returns when they are gone."""
        if not self.directory.exists():
            return
        with records.locked(self.directory):
            live = self._live()  # which drops records of what has not begun: it ends when it finds none
        supervisors = {found for path, record in live.items() if (found := records.find(record.pid, path.name))}
        theirs = _with_children(supervisors)
        strays = self._strays() - theirs
        for process in supervisors | strays:
            with contextlib.suppress(psutil.Error):
                process.terminate()
        # Supervisors kill theirs after the grace, and then tell how those ended.
        left = self._wait(theirs | strays, grace + REPORTS + 1)
        last = _with_children(left) | self._strays()
        for process in last:
            with contextlib.suppress(psutil.Error):
                process.kill()
        left = self._wait(last, grace + 1)
        if left:
            raise FleetError(f"these processes could not be ended: {', '.join(str(process.pid) for process in left)}")
        with records.locked(self.directory):
            for path in live:
                path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Stop the workers and delete their logs."""
        self.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def logs(self) -> list[Path]:
        """Return the log files, oldest first."""
        return sorted(self.directory.glob("*.log"), key=lambda path: path.stat().st_mtime)

    def process_logs(self, worker: str | None = None) -> list[ProcessLog]:
        """Return what the processes have written; only where the worker of that id ran, if one is given."""
        found = [ProcessLog(path.name, path.read_text(errors="replace")) for path in self.logs()]
        return [log for log in found if worker is None or log.tells_of(worker)]

    def describe(self) -> str:
        """Say in one line what runs, where its logs are, and how they end when nothing runs."""
        alive = self.alive()
        said = f"{alive} worker processes on this machine, logs in {self.directory}"
        if alive or not (logs := self.logs()):
            return said
        lines = logs[-1].read_text(errors="replace").strip().splitlines()
        return f"{said}, which end with: {lines[-1]}" if lines else said

    def _live(self) -> dict[Path, records.SupervisorRecord]:
        """Return the records of supervisors that run, and delete the others. The lock must be held."""
        _reap()
        live = {}
        for path, record in records.read_all(self.directory).items():
            if record.pid and records.find(record.pid, path.name):
                live[path] = record
            else:
                path.unlink(missing_ok=True)
        return live

    def _slots(self) -> dict[int, int]:
        """Return how many workers run or are about to, by the number of their start. The lock must be held."""
        counts: Counter[int] = Counter()
        for path, record in self._live().items():
            counts[records.number_of(path)] += record.slots
        return dict(counts)

    def _start(self, count: int, there: int, number: int = -1) -> None:
        """Start a supervisor of `count` agents besides those that are there. The lock must be held."""
        path = self.directory / records.name_of(self._entropy.token(), number)
        limit = self._memory_limit
        if limit is None:
            limit = (self._memory or system_memory()) // (there + count)
        options = Options(
            session=self._session,
            store=self._store_url,
            processes=count,
            threads=self._threads,
            memory_limit=limit,
            spill_directory=str(self.directory / "spill"),
            agent=self.agent,
            parent=os.getpid() if self._tied else 0,
            key=self._key,
        )
        command = [
            sys.executable,
            "-P",
            "-m",
            "burst_dask.fleet.launch",
            str(path),
            msgspec.json.encode(options).decode(),
        ]
        records.write(path, records.SupervisorRecord(count))
        try:
            with path.with_suffix(".log").open("ab") as log:
                process = subprocess.Popen(  # noqa: S603 - our own command line
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=self._environ(),
                )
        except OSError as error:
            path.unlink(missing_ok=True)
            raise FleetError(f"no worker could be started on this machine: {error}") from error
        _started.append(process)
        while process.poll() is None and not records.find(process.pid, path.name):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.001)  # for an instant after its start, a process has no command line
        records.write(path, records.SupervisorRecord(count, process.pid))

    def _environ(self) -> dict[str, str]:
        """Return the environment of workers: they import what this process can import."""
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        return {**os.environ, "PYTHONPATH": path, **self._environment}

    def _wait(self, processes: set[psutil.Process], timeout: float) -> set[psutil.Process]:
        """Wait until all have ended; return those that have not within `timeout` seconds."""
        until = self._clock.monotonic() + timeout
        while (left := {process for process in processes if _runs(process)}) and self._clock.monotonic() < until:
            psutil.wait_procs(left, timeout=0.05)
        _reap()
        return left

    def _strays(self) -> set[psutil.Process]:
        """Return agents of this session whose supervisor is gone, and that have not noticed it yet."""
        strays = set()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                if self.agent in words and self._session in words and self._store_url in words:
                    strays.add(process)
        return strays


def _runs(process: psutil.Process) -> bool:
    """Tell whether `process` still runs; whoever should reap a zombie may take long, or never do it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _with_children(processes: Iterable[psutil.Process]) -> set[psutil.Process]:
    found = set(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found.update(process.children(recursive=True))
    return found


def _reap() -> None:
    _started[:] = [process for process in _started if process.poll() is None]
