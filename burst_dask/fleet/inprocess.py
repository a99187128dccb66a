"""Workers as threads of this process, for stores that only this process sees (``memory://``)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from burst_dask.clock import Entropy
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.store.base import Store
from burst_dask.worker.ends import Ends


class InProcessFleet:
    """Agents in background threads, each with an event loop of its own.

    They end with this process, and share its memory and its interpreter lock: for tests and
    for trying things out. A task that never returns keeps its thread, and this process from
    exiting, also when its time limit is over.

    Parameters
    ----------
    store
        The store that the client uses: another one of the same URL would be another memory.
    threads
        Threads of each worker.
    """

    #: seconds until a worker that is started works
    boot = 0.1

    def __init__(self, session: SessionId, store: Store, *, threads: int = 1) -> None:
        self._session = session
        self._store = store
        self._threads = threads
        self._workers: list[_Thread] = []
        self._entropy = Entropy()

    def start(self, count: int, number: int = -1) -> None:
        for _ in range(count):
            worker = _Thread(self._store, self._session, self._entropy, self._threads, number)
            worker.start()
            self._workers.append(worker)

    def ensure(self, workers: int) -> int:
        missing = max(0, workers - self.alive())
        self.start(missing)
        return missing

    def alive(self) -> int:
        self._workers = [worker for worker in self._workers if worker.is_alive()]
        return sum(worker.counts for worker in self._workers)

    def reduce(self, workers: int) -> None:
        if self.alive() > workers:
            self.stop()

    async def counted(self) -> dict[int, int]:
        self.alive()
        return dict(Counter(worker.number for worker in self._workers if worker.counts))

    async def begin(self, number: int, workers: int, still: Callable[[], bool] = lambda: True) -> None:
        self.start(workers, number)

    async def resting(self) -> int:
        return 0

    async def shrink(self, workers: int) -> None:
        """Do nothing: threads that are idle end by themselves."""

    def stop(self, grace: float = 5.0) -> None:
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.join(grace)
        self.alive()

    def kill(self) -> list[WorkerId]:
        """End all workers as SIGKILL would: they write nothing more; return their names. For tests.

        Tasks that run go on in their threads until they end, and nobody has what they give.
        """
        killed = [worker.kill() for worker in self._workers if worker.is_alive()]
        self.alive()
        return [worker for worker in killed if worker is not None]

    def remove(self) -> None:
        self.stop()

    def describe(self) -> str:
        return f"{self.alive()} workers in threads of this process"


class _Thread(threading.Thread):
    def __init__(self, store: Store, session: SessionId, entropy: Entropy, threads: int, number: int) -> None:
        super().__init__(name=f"burst-worker-{session}", daemon=True)
        self._store = store
        self._session = session
        self._entropy = entropy
        self._threads = threads
        #: of its start, -1 if it has none
        self.number = number
        self._loop = asyncio.new_event_loop()
        self._stopping = asyncio.Event()
        #: whether it works, or will
        self.counts = True
        #: the agent that runs, or ran last
        self.worker: WorkerId | None = None

    def run(self) -> None:
        from burst_dask.worker.agent import REPLACED  # noqa: PLC0415 - imports Dask
        from burst_dask.worker.process import run_agent  # noqa: PLC0415 - imports Dask

        ends = Ends(self._store, self._session)
        options: dict[str, Any] = {"threads": self._threads, "memory_limit": None, "stop": self._stopping}
        killed = contextlib.suppress(asyncio.CancelledError)
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner, killed:
            while self.counts:
                worker = self.worker = WorkerId(self._entropy.token())
                if runner.run(run_agent(self._store, self._session, worker, **options)) in REPLACED:
                    continue  # its threads are lost to this process
                self.counts = False  # before the look, as the supervisor of processes does
                self.counts = runner.run(ends.missed_news(worker))

    def kill(self) -> WorkerId | None:
        """End it at once, from any thread; return the name of its agent, if there was one."""
        self.counts = False
        while self.is_alive():  # it may just have begun
            with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
                self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in asyncio.all_tasks(self._loop)])
            self.join(0.01)
        return self.worker

    def stop(self) -> None:
        """Ask the agent to hand over and end; from any thread, also when it has ended."""
        try:
            self._loop.call_soon_threadsafe(self._stopping.set)
        except RuntimeError:  # the loop is closed: it has ended
            return
