"""Simulated machines: a process with its own clock and its own way to the bucket, and workers on them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from burst_dask.client import opening
from burst_dask.client.link import Link
from burst_dask.client.submission import store_run
from burst_dask.client.watching import Watch
from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.environment.versions import own_versions
from burst_dask.journal.log import Author
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Manifest, Plan
from burst_dask.protocol.session import SessionState
from burst_dask.store import Counting, Hedging, Retrying, Store
from burst_dask.testing.bucket import EPOCH, Bucket, Connection, Network
from burst_dask.testing.loop import Process, VirtualLoop
from burst_dask.testing.work import Graph, SimulatedExecutor, Work
from burst_dask.worker.agent import Agent
from burst_dask.worker.context import Context
from burst_dask.worker.memory import Memory


class SimulatedClock:
    """The clock of one machine."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        #: seconds by which it differs from the world's
        self.wrong = 0.0

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return EPOCH + self._loop.time() + self.wrong

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))  # noqa: TID251 - the clock itself


class Machine:
    """A process with its clock and its way to the store.

    Parameters
    ----------
    name
        Its own; with `seed` it decides all that is random here.
    """

    def __init__(self, bucket: Bucket, name: str, seed: int, network: Network) -> None:
        self.name = name
        self.process: Process = bucket.loop.process(name)
        self.clock = SimulatedClock(bucket.loop)
        self.entropy = Entropy(f"{seed} {name}")
        self.network = network
        self.counting = Counting(Connection(bucket, network, Entropy(f"{seed} {name} network")))
        self.store: Store = Retrying(self.counting, self.clock, self.entropy)
        #: the main coroutine
        self.task: asyncio.Task[Any] | None = None

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run the main coroutine."""
        self.task = self.process.start(coroutine)

    @property
    def works(self) -> bool:
        return self.process.alive and self.task is not None and not self.task.done()


@dataclass(frozen=True)
class Job:
    """What the workers of one simulation have in common."""

    session: SessionId
    settings: Settings
    threads: int
    #: told the name of a worker, returns what its executor calls when a task starts
    started: Callable[[str], Callable[[Work], None]]


class Worker(Machine):
    """A machine that runs the production agent.

    Parameters
    ----------
    die
        Called with the worker when a task kills it.
    slowness
        How many times as long as on other workers tasks take.
    """

    def __init__(
        self,
        bucket: Bucket,
        name: str,
        seed: int,
        network: Network,
        job: Job,
        die: Callable[[Worker], None],
        slowness: float = 1.0,
    ) -> None:
        super().__init__(bucket, name, seed, network)
        self.context = Context(
            store=self.store,
            session=job.session,
            worker=WorkerId(name),
            settings=job.settings,
            clock=self.clock,
            entropy=self.entropy,
            executor=SimulatedExecutor(job.threads, name, self.clock, job.started(name), lambda: die(self), slowness),
            memory=Memory(),
        )
        self.agent = Agent(self.context)


class Client(Machine):
    """A machine of a user, who calls the production code that `Session`, `attach` and `Run` are made of."""

    def __init__(self, bucket: Bucket, name: str, seed: int, network: Network) -> None:
        super().__init__(bucket, name, seed, network)
        self.store = Hedging(self.store)

    def _author(self) -> Author:
        return Author(WorkerId(self.name), self.clock, self.entropy)

    async def open(self, settings: Settings, workers: int | None) -> Link:
        """Create a session."""
        manifest = Manifest(
            session=SessionId(self.entropy.token(8)),
            name=None,
            created=self.clock.wall(),
            host="",
            versions=own_versions(),
            settings=settings.to_dict(),
        )
        link = Link(self.store, manifest, settings, self._author(), SessionState())
        await opening.create(link, workers)
        return link

    async def attach(self, session: SessionId) -> Link:
        """Come back to a session that is there."""
        link = await opening.attach(self.store, session, self._author())
        assert link is not None
        return link

    async def submit(self, link: Link, graph: Graph) -> Plan:
        """Store a graph and tell the workers."""
        run = RunId(f"{link.session}.{self.entropy.token(6)}")
        return await store_run(link, run, *graph.packs(run, self.clock.wall()))

    async def wait(self, run: RunId, outputs: Sequence[int]) -> RunView:
        """Attach, and wait until all of `outputs` have an outcome."""
        link = await self.attach(keys.session_of(run))
        view = await RunView.open(self.store, run)
        assert view is not None
        await Watch(link, view, outputs, leave=True).wait(to_first_failure=False, update=None, known=True)
        return view
