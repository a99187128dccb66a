"""Keeps agent processes alive: starts them, watches their memory, says why they died, replaces them.

::

    burst worker ── supervisor ─┬─ agent (a process of its own; runs tasks)
                                ├─ agent
                                └─ agent

An agent that dies takes its worker id with it: the supervisor writes the `Ended` record that
lets others take over its shards at once, and starts another agent under a new id. An agent
that exits with 0 has ended in an orderly way (idle, closed, stopped) and is not replaced, unless
somebody has asked for workers while it ended; one that asks for it by exiting with 4, is: it has
handed over, and has threads that cannot be ended.

The supervisor must outlive its agents, so it does little: it imports no Dask, opens the store
only when an agent has ended, and survives a store that cannot be written. Should it be killed all
the same, its agents notice that the pipe they share with it (the *lifeline*) is closed, and
stop as if they had received SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from burst_dask.clock import Clock, Entropy, SystemClock
from burst_dask.errors import BurstError
from burst_dask.fleet.base import opening_line
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Ended
from burst_dask.worker.memory_watch import TERMINATE_AT, format_bytes, resident

if TYPE_CHECKING:
    from burst_dask.worker.ends import Ends

log = logging.getLogger("burst_dask.supervisor")

#: the module that an agent runs
AGENT = "burst_dask.worker.process"

#: exit codes of an agent and of the supervisor, see ``worker/README.md``; the last one of an agent only
#: Seconds in which a supervisor that ends tells how its agents did, after they have: the store may be slow.
REPORTS = 5.0
ORDERLY, FAILED, USAGE, REFUSED, REPLACE = 0, 1, 2, 3, 4
#: what an agent exits with when starting another one would change nothing
_FINAL = {ORDERLY: "ended", USAGE: "did not understand its options", REFUSED: "refused the session"}

#: what every agent gets unless the environment says otherwise: one thread for each native
#: library, since agents are as many as processors; memory handed back to the system (both as
#: distributed's nanny does); a stack for crashes in native code; logs that survive a SIGKILL
AGENT_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "PYTHONFAULTHANDLER": "1",
    "PYTHONUNBUFFERED": "1",
}

_NATIVE_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}
_STDERR_TAIL = 8192


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What ``burst worker`` is told. Times are in seconds."""

    session: SessionId
    #: URL of the store
    store: str
    #: how many agents to keep alive
    processes: int = 1
    #: threads of each
    threads: int = 1
    #: bytes for each; 0 does not watch
    memory_limit: int = 0
    #: where agents spill results; None is the system's temporary directory
    spill_directory: str | None = None
    #: how long agents may take to hand over after SIGTERM before they are killed
    grace: float = 5.0
    #: time between looks at the agents and their memory
    poll: float = 0.2
    #: a death sooner than this after the start counts towards giving up
    quick: float = 60.0
    #: as many quick deaths in a row are a crash loop: no more restarts
    give_up_after: int = 10
    #: what an agent runs; tests put a stand-in here
    agent: str = AGENT
    #: where the key of a signed session is; empty: where its manifest says, if it is signed
    key: str = ""
    #: pid of the process that has started it and with which it stops; 0: it goes on alone
    parent: int = 0


def agent_command(options: Options, worker: WorkerId, spill: Path, lifeline: int) -> list[str]:
    """Return the command line of one agent."""
    return [
        sys.executable,
        *(["-P"] if sys.flags.safe_path else []),
        *("-m", options.agent),
        *("--session", options.session, "--store", options.store, "--worker", worker),
        *("--threads", str(options.threads), "--memory-limit", str(options.memory_limit)),
        *("--spill-directory", str(spill), "--supervisor-fd", str(lifeline)),
        *(("--key", options.key) if options.key else ()),
    ]


def restart_delay(deaths: int, give_up_after: int) -> float | None:
    """Return the wait before the next start after `deaths` quick ones in a row; None gives up.

    The first is replaced at once, since what killed it may well be gone.

    Examples
    --------
    >>> [restart_delay(deaths, 10) for deaths in (0, 1, 2, 3, 6, 9, 10)]
    [0.0, 0.0, 1.0, 2.0, 16.0, 30.0, None]
    """
    if deaths >= give_up_after:
        return None
    return min(30.0, 2.0 ** (deaths - 2)) if deaths > 1 else 0.0


def describe_exit(code: int, last_line: str, memory: int) -> str:
    """Say in words how a process ended.

    Examples
    --------
    >>> describe_exit(1, "ModuleNotFoundError: No module named 'spam'", 0)
    "exit code 1: ModuleNotFoundError: No module named 'spam'"
    >>> describe_exit(-11, "", 0)
    'SIGSEGV: crashed in native code'
    """
    if code >= 0:
        return f"exit code {code}: {last_line}" if last_line else f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    if -code in _NATIVE_CRASHES:
        return f"{name}: crashed in native code"
    seen = f" ({format_bytes(memory)} resident when last seen)" if memory else ""
    return f"killed by {name}{seen}"


class Stderr:
    """Passes on what an agent writes to stderr, and keeps the end of it.

    A pipe of our own rather than `subprocess.PIPE`: a grandchild that keeps it open must not
    delay the news of a death.
    """

    def __init__(self) -> None:
        self._reading, self.writing = os.pipe()
        os.set_blocking(self._reading, False)
        self._tail = b""
        asyncio.get_running_loop().add_reader(self._reading, self._read)

    @property
    def last_line(self) -> str:
        lines = self._tail.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""

    def close(self) -> None:
        """Take what is left and let go of the pipe."""
        while self._read():
            pass
        asyncio.get_running_loop().remove_reader(self._reading)
        os.close(self._reading)

    def _read(self) -> bool:
        try:
            data = os.read(self._reading, 65536)
        except BlockingIOError:
            return False
        if not data:
            asyncio.get_running_loop().remove_reader(self._reading)
            return False
        self._tail = (self._tail + data)[-_STDERR_TAIL:]
        with contextlib.suppress(OSError):  # a log that cannot be written must not stop the work
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        return True


class Child:
    """One agent process, the leader of a process group of its own.

    The group makes Ctrl-C at a terminal reach the supervisor alone, and lets what tasks have
    started be killed together with their agent.
    """

    def __init__(self, worker: WorkerId, spill: Path, process: subprocess.Popen[bytes], stderr: Stderr) -> None:
        self.worker = worker
        self.process = process
        self.stderr = stderr
        self.spill = spill
        #: bytes, as last seen
        self.memory = 0
        #: why the supervisor killed it, if it did
        self.verdict = ""

    def terminate(self) -> None:
        """Ask it to hand over and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it, and whatever its tasks have started, now."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Clear up after it has ended."""
        self.kill()
        self.stderr.close()
        shutil.rmtree(self.spill, ignore_errors=True)


class Supervisor:
    """Keeps `options.processes` agents alive until they have ended, or it is told to stop.

    Parameters
    ----------
    options
        What to keep alive, and how.
    ends
        Where ends of workers are recorded; by default the store of `options`.
    changed
        Called whenever `children` or `slots` have changed.
    """

    def __init__(
        self,
        options: Options,
        *,
        clock: Clock | None = None,
        entropy: Entropy | None = None,
        ends: Ends | None = None,
        changed: Callable[[Supervisor], None] = lambda supervisor: None,
    ) -> None:
        self.options = options
        #: agents that run now
        self.children: dict[WorkerId, Child] = {}
        #: agents that run or will be restarted
        self.slots = options.processes
        self._clock = clock or SystemClock()
        self._entropy = entropy or Entropy()
        self._ends = ends
        self._changed = changed
        self._stop_by: float | None = None
        self._reports: set[asyncio.Task[None]] = set()
        self._lifeline = -1

    async def run(self) -> int:
        """Return the exit code once every agent has ended and none is to be restarted."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        self._lifeline, ours = os.pipe()
        try:
            codes = await asyncio.gather(*(self._keep() for _ in range(self.options.processes)))
            if self._reports:
                await asyncio.wait(self._reports, timeout=REPORTS)
            return max(codes, default=ORDERLY)
        finally:
            for child in self.children.values():
                child.kill()
            os.close(self._lifeline)
            os.close(ours)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def stop(self) -> None:
        """Ask all agents to hand over and end; asked again, kill them."""
        now = self._clock.monotonic()
        if self._stop_by is None:
            log.info("stopping %d workers", len(self.children))
            self._stop_by = now + self.options.grace
            for child in self.children.values():
                child.terminate()
        else:
            self._stop_by = now

    async def _keep(self) -> int:
        """Keep one agent alive; return the exit code that its end stands for."""
        while True:
            code, worker = await self._until_final()
            # Counted out first: whoever asks for workers from here on does not count on this one.
            self._change_slots(-1)
            if code != ORDERLY or worker is None or not await self._missed_news(worker):
                return code
            self._change_slots(1)

    async def _until_final(self) -> tuple[int, WorkerId | None]:
        """Run agents, one after another, until one ends for good; return its exit code and which that was."""
        deaths = 0
        while self._stop_by is None:
            started = self._clock.monotonic()
            code, worker = await self._run_one()
            if code in _FINAL:
                return code, worker
            if code == REPLACE:  # no crash: it has worked until then
                deaths = 0
                continue
            deaths = deaths + 1 if self._clock.monotonic() - started < self.options.quick else 1
            delay = restart_delay(deaths, self.options.give_up_after)
            if delay is None:
                log.error("giving up: %d workers in a row died within %g s", deaths, self.options.quick)
                return FAILED, None
            await self._pause(delay)
        return ORDERLY, None

    def _change_slots(self, by: int) -> None:
        self.slots += by
        self._changed(self)

    async def _missed_news(self, worker: WorkerId) -> bool:
        """Tell whether a worker that has ended is missed: whoever saw it running may have counted on it."""
        try:
            missed = self._stop_by is None and await self._records().missed_news(worker)
        except (BurstError, OSError) as error:  # without the store, another worker could not work either
            log.warning("whether anybody has asked for workers meanwhile could not be read: %s", error)
            return False
        if missed and self._stop_by is None:
            log.info("somebody has asked for workers while %s ended: another one is started", worker)
            return True
        return False

    async def _run_one(self) -> tuple[int, WorkerId | None]:
        """Run one agent; return its exit code and which it was."""
        try:
            child = self._start()
        except OSError as error:  # no memory, no processes, no disk: it may pass
            log.warning("a worker could not be started: %s", error)
            return FAILED, None
        code = await self._watch(child)
        if code in _FINAL:
            log.info("worker %s %s", child.worker, _FINAL[code])
        elif code == REPLACE:
            log.info("worker %s is replaced: its threads run tasks that were given up", child.worker)
        else:
            self._tell(child, code)
        return code, child.worker

    def _start(self) -> Child:
        worker = WorkerId(self._entropy.token())
        spill = Path(self.options.spill_directory or tempfile.gettempdir()) / f"burst-spill-{worker}"
        spill.mkdir(parents=True)
        stderr = Stderr()
        try:
            process = subprocess.Popen(  # noqa: S603 - our own command line
                agent_command(self.options, worker, spill, self._lifeline),
                stdin=subprocess.DEVNULL,
                stderr=stderr.writing,
                pass_fds=(self._lifeline,),
                process_group=0,
                env=AGENT_ENVIRONMENT | os.environ,
            )
        except OSError:
            stderr.close()
            spill.rmdir()
            raise
        finally:
            os.close(stderr.writing)
        log.info("worker %s started, pid %d", worker, process.pid)
        child = self.children[worker] = Child(worker, spill, process, stderr)
        self._changed(self)
        return child

    async def _watch(self, child: Child) -> int:
        """Return the exit code of `child` once it has ended, by itself or because it had to."""
        limit = self.options.memory_limit
        while (code := child.process.poll()) is None:
            self._heed_parent()
            if self._stop_by is not None and self._clock.monotonic() >= self._stop_by:
                child.verdict = f"had not ended {self.options.grace:g} s after SIGTERM, killed"
                child.kill()
            else:
                child.memory = resident(child.process.pid) or child.memory
                if limit and child.memory >= TERMINATE_AT * limit:
                    child.verdict = (
                        f"exceeded {TERMINATE_AT:.0%} of its memory limit of {format_bytes(limit)}"
                        f" ({format_bytes(child.memory)} resident)"
                    )
                    child.kill()
            await self._clock.sleep(self.options.poll if self._stop_by is None else self.options.poll / 4)
        child.close()
        del self.children[child.worker]
        return code

    def _heed_parent(self) -> None:
        if self.options.parent and self._stop_by is None and os.getppid() != self.options.parent:
            log.info("the process that has started this one is gone")
            self.stop()

    def _tell(self, child: Child, code: int) -> None:
        """Report a death, in the background: a slow store must not delay the restart."""
        message = child.verdict or describe_exit(code, child.stderr.last_line, child.memory)
        stopped = self._stop_by is not None and code == -signal.SIGTERM  # before it could handle it
        log.warning("worker %s died: %s", child.worker, message)
        reason = "stopped" if stopped else "died"
        ended = Ended(worker=child.worker, reason=reason, message=message, wrote=self._clock.wall())
        task = asyncio.ensure_future(self._records().tell(ended))
        self._reports.add(task)
        task.add_done_callback(self._reported)

    def _records(self) -> Ends:
        from burst_dask.worker.ends import Ends  # noqa: PLC0415 - only an end needs the store

        self._ends = self._ends or Ends(self.options.store, self.options.session, self.options.key)
        return self._ends

    def _reported(self, task: asyncio.Task[None]) -> None:
        self._reports.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            # Not fatal: without the record, others take over when the lease has run out.
            log.warning("the end of a worker could not be recorded: %s", error)

    async def _pause(self, seconds: float) -> None:
        """Wait, but no longer than until the supervisor is told to stop."""
        until = self._clock.monotonic() + seconds
        while self._stop_by is None and self._clock.monotonic() < until:
            await self._clock.sleep(self.options.poll)


def supervise(options: Options, *, changed: Callable[[Supervisor], None] = lambda supervisor: None) -> int:
    """Run a supervisor in this process until it ends, and return its exit code."""
    logging.basicConfig(format="%(asctime)s %(name)s %(levelname)s %(message)s", level=logging.INFO)
    log.info("%s: %d processes of %d threads", opening_line(options.session), options.processes, options.threads)
    try:
        return asyncio.run(Supervisor(options, changed=changed).run())
    except BurstError as error:
        log.error("%s", error)
        return FAILED
