"""One simulated world: a bucket, a client and workers that run the production code, and what befalls them.

::

    Scenario.of(seed) ──▶ World ──▶ VirtualLoop   time, and processes that die and pause
                            │  └──▶ Bucket        the store, watched by a Referee
                            ├─────▶ Agent         the production agent, in each worker
                            └─────▶ client        the production code that submits, waits and collects
"""

from __future__ import annotations

import asyncio
import contextlib
import warnings
from collections.abc import Coroutine
from typing import Any

from burst_dask import link as links
from burst_dask import serialize
from burst_dask.clock import Entropy
from burst_dask.errors import BurstError, StoreError
from burst_dask.journal.log import Author
from burst_dask.journal.view import RunView
from burst_dask.link import Link
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Ended, Manifest, encode
from burst_dask.protocol.session import SessionState
from burst_dask.run import Watch
from burst_dask.store import Counting, Retrying
from burst_dask.submission import store_run
from burst_dask.testing.bucket import EPOCH, Bucket, Connection, Network
from burst_dask.testing.invariants import check_run
from burst_dask.testing.loop import Deadlock, Process, VirtualLoop
from burst_dask.testing.referee import Referee
from burst_dask.testing.scenario import Fault, Kind, Scenario
from burst_dask.testing.work import SimulatedExecutor
from burst_dask.worker.agent import Agent
from burst_dask.worker.context import Context
from burst_dask.worker.memory import Memory
from burst_dask.worker.process import own_versions

#: Seconds after which a run that has not ended counts as stuck: hours beyond all work and all leases.
PATIENCE = 6 * 3600.0
#: Seconds between looks of whoever keeps one worker alive once nothing goes wrong any more.
LOOK_EVERY = 30.0


class SimulatedClock:
    """The clock of one machine: wrong by as much as the scenario says."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.wrong = 0.0

    def monotonic(self) -> float:
        return self._loop.time()

    def wall(self) -> float:
        return EPOCH + self._loop.time() + self.wrong

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, seconds))  # noqa: TID251 - the clock itself


class Machine:
    """A process with its clock and its way to the store."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.process: Process = world.loop.process(name)
        self.clock = SimulatedClock(world.loop)
        self.entropy = Entropy(f"{world.scenario.seed} {name}")
        self.network = Network(dict(world.scenario.network))
        self._connection = Connection(world.bucket, self.network, Entropy(f"{world.scenario.seed} {name} network"))
        self.counting = Counting(self._connection)
        self.store = Retrying(self.counting, self.clock, self.entropy)
        #: the main coroutine
        self.task: asyncio.Task[Any] | None = None

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run the main coroutine."""
        self.task = self.process.start(coroutine)

    @property
    def works(self) -> bool:
        return self.process.alive and self.task is not None and not self.task.done()


class Worker(Machine):
    """A machine that runs the production agent."""

    def __init__(self, world: World, name: str, session: SessionId) -> None:
        super().__init__(world, name)
        scenario = world.scenario
        self._world = world
        self.context = Context(
            store=self.store,
            session=session,
            worker=WorkerId(name),
            settings=scenario.settings,
            clock=self.clock,
            entropy=self.entropy,
            executor=SimulatedExecutor(
                scenario.threads, name, self.clock, world.referee.started(name), lambda: world.crash(self)
            ),
            memory=Memory(),
        )
        self.agent = Agent(self.context)
        self.start(self._main())

    async def _main(self) -> None:
        try:
            await self.agent.run()
        except* StoreError:  # the store was away for too long: the process ends, and its supervisor starts another
            self._world.crash(self)


class World:
    """Runs one scenario.

    Attributes
    ----------
    broken : list of str
        What went against the rules; empty when all is well.
    """

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.loop = VirtualLoop()  # type: ignore[abstract]
        self.clock = SimulatedClock(self.loop)
        self.bucket = Bucket(self.loop, Entropy(f"{scenario.seed} bucket"), skew=scenario.skew)
        self.referee = Referee(self.bucket, scenario)
        self.workers: list[Worker] = []
        self.session: SessionId | None = None
        #: virtual seconds it took, and callbacks that ran: the same seed gives the same
        self.ended, self.steps = 0.0, 0
        #: workers that died, or may have been taken for dead
        self.deaths = 0
        self._clients = 0
        self._main = self.loop.process("world")

    @property
    def broken(self) -> list[str]:
        return self.referee.broken

    def run(self) -> None:
        """Let it all happen, and judge the end."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that nobody works, which is often so here
            try:
                self.loop.run_until_complete(self._main.start(self._play()))
            except Deadlock as error:
                self.referee.complain(str(error))
        for context in self.loop.unhandled:
            if isinstance(context.get("task"), asyncio.Task):
                self.referee.complain(f"unhandled: {context.get('message')}: {context.get('exception')!r}")
        self.ended, self.steps = self.loop.time(), self.loop.steps
        self.bucket.closed = True
        self.loop.finish()

    async def _play(self) -> None:
        run = await self._submit()
        self._main.start(self._arrive())
        self._main.start(self._misfortunes())
        try:
            async with asyncio.timeout(PATIENCE + self.scenario.horizon + self._work()):
                await self._collect(run)
        except TimeoutError:
            await self._tell_stuck(run)
        await self._judge(run)

    def _work(self) -> float:
        """Return the seconds that all of the work would take one thread, with all its retries."""
        return 10 * sum(work.seconds for work in self.scenario.graph.work)

    # ------------------------------------------------------------------ the client

    def _client(self, dies_after: int | None) -> Machine:
        """Return a new client; it dies when it sends request number `dies_after`."""
        self._clients += 1
        machine = Machine(self, f"client-{self._clients}")
        if dies_after is not None:
            machine.network.sent = lambda count: machine.process.kill() if count == dies_after else None
        return machine

    async def _submit(self) -> RunId:
        for dies_after in (*self.scenario.submitter_dies, None):
            machine = self._client(dies_after)
            machine.start(self._open_and_submit(machine))
            run = await self._outcome(machine)
            if run is not None:
                return RunId(run)
        raise AssertionError("the last submitter does not die")

    async def _open_and_submit(self, machine: Machine) -> RunId:
        while True:
            try:
                link = await self._opened(machine)
                run = RunId(f"{link.session}.{machine.entropy.token(6)}")
                plan = await store_run(link, run, *self.scenario.graph.packs(run, machine.clock.wall()))
            except StoreError:
                continue  # the user tries again
            return plan.run

    async def _opened(self, machine: Machine) -> Link:
        author = Author(WorkerId(machine.name), machine.clock, machine.entropy)
        if self.session is not None:
            link = await links.attach(machine.store, self.session, author)
            assert link is not None
            return link
        session = SessionId(machine.entropy.token(8))
        manifest = Manifest(
            session=session,
            name=None,
            created=machine.clock.wall(),
            host="",
            versions=own_versions(),
            settings=self.scenario.settings.to_dict(),
        )
        link = Link(machine.store, manifest, self.scenario.settings, author, SessionState())
        await links.create(link, len(self.scenario.arrivals))
        self.session = session
        return link

    async def _outcome(self, machine: Machine) -> Any:
        """Return what the machine's main coroutine returns; None when the machine died before."""
        assert machine.task is not None
        while machine.process.alive and not machine.task.done():
            await asyncio.wait([machine.task], timeout=1.0)
        return machine.task.result() if machine.task.done() else None

    async def _collect(self, run: RunId) -> None:
        """Attach, wait and collect, with clients that die on the way; then compare."""
        values: dict[int, str | None] | None = None
        for dies_after in (*self.scenario.collector_dies, None):
            machine = self._client(dies_after)
            machine.start(self._wait_and_fetch(machine, run))
            values = await self._outcome(machine)
            if values is not None:
                break
        assert values is not None
        expected = self.scenario.graph.expected()
        for number, value in values.items():
            if value != expected[number] and not self._lost_innocently(value):
                self.referee.complain(f"task {number} gave {value!r}, and should give {expected[number]!r}")

    def _lost_innocently(self, value: str | None) -> bool:
        """Tell whether an unexpected failure may be WorkerLost: so many workers did die."""
        return value is None and self.deaths >= self.scenario.settings.lost_workers

    async def _wait_and_fetch(self, machine: Machine, run: RunId) -> dict[int, str | None]:
        while True:
            try:
                author = Author(WorkerId(machine.name), machine.clock, machine.entropy)
                link = await links.attach(machine.store, keys.session_of(run), author)
                assert link is not None
                view = await RunView.open(machine.store, run)
                assert view is not None
                outputs = self.scenario.graph.outputs
                await Watch(link, view, outputs).wait(to_first_failure=False, update=None, known=True)
                done = [number for number in outputs if (found := view.outcome(number)) and found.done]
                bodies = await view.fetch(done)
                return dict.fromkeys(outputs) | {number: serialize.loads(body) for number, body in bodies.items()}
            except StoreError:
                continue

    # ------------------------------------------------------------------ the workers

    async def _arrive(self) -> None:
        """Start each worker at its time; when nothing goes wrong any more, see that there is one."""
        for arrival in sorted(self.scenario.arrivals):
            await self.clock.sleep(arrival - self.loop.time())
            self.hire()
        await self.clock.sleep(self._calm_from() - self.loop.time())
        while True:
            if not any(worker.works and not worker.process.paused for worker in self.workers):
                self.hire()
            await self.clock.sleep(LOOK_EVERY)

    def _calm_from(self) -> float:
        return max(
            [
                self.scenario.horizon,
                *(fault.at + max(0.0, fault.seconds) for fault in self.scenario.faults if fault.kind is not Kind.JUMP),
            ]
        )

    def hire(self) -> None:
        """Start a worker."""
        assert self.session is not None
        self.workers.append(Worker(self, f"worker-{len(self.workers)}", self.session))

    def crash(self, worker: Worker) -> None:
        """Kill a worker; its supervisor records that, and starts another."""
        self.deaths += 1
        worker.process.kill()
        self._main.start(self._bury(worker))

    async def _bury(self, worker: Worker) -> None:
        supervisor = Machine(self, f"supervisor-of-{worker.name}")
        await self.clock.sleep(0.5)
        record = Ended(worker=WorkerId(worker.name), reason="died", message="killed by the simulator")
        assert self.session is not None
        key = keys.ended(self.session, record.worker)
        with contextlib.suppress(StoreError):  # others learn it by the lease
            await supervisor.store.create(key, encode(record))
        self.hire()

    # ------------------------------------------------------------------ what goes wrong

    async def _misfortunes(self) -> None:
        for fault in self.scenario.faults:
            await self.clock.sleep(fault.at - self.loop.time())
            self._main.start(self._befall(fault))

    async def _befall(self, fault: Fault) -> None:
        working = [worker for worker in self.workers if worker.works]
        if not working:
            return
        worker = working[fault.worker % len(working)]
        self.deaths += fault.kind in (Kind.VANISH, Kind.BLACKOUT, Kind.PAUSE, Kind.PARTITION)
        if fault.kind is Kind.CRASH:
            self.crash(worker)
        elif fault.kind is Kind.VANISH:
            worker.process.kill()
        elif fault.kind is Kind.BLACKOUT:
            for each in working:
                each.process.kill()
        elif fault.kind is Kind.TERMINATE:
            worker.process.call(lambda: worker.agent.stop("stopped", "asked to stop"))
        elif fault.kind is Kind.JUMP:
            worker.clock.wrong += fault.seconds
        elif fault.kind is Kind.PAUSE:
            worker.process.pause()
            await self.clock.sleep(fault.seconds)
            worker.process.resume()
        else:
            worker.network.cut = True
            await self.clock.sleep(fault.seconds)
            worker.network.cut = False

    # ------------------------------------------------------------------ the end

    async def _judge(self, run: RunId) -> None:
        store = Connection(self.bucket, Network(), Entropy(0))
        runs = {RunId(f"{key.split('/')[1]}.{key.split('/')[3]}") for key in self.bucket.objects if "/runs/" in key}
        for each in sorted(runs):
            if keys.plan(each) not in self.bucket.objects:
                continue
            for violation in await check_run(store, each, complete=each == run and not self.broken):
                self.referee.complain("\n    ".join([f"{violation.what} (rule {violation.rule})", *violation.story]))
        if self.scenario.processes_fail:
            return
        for (_, number), starts in self.referee.starts.items():
            work = self.scenario.graph.work[number]
            allowed = self.scenario.graph.retries.get(number, 0)
            tries = 1 + (allowed if work.fails < 0 else min(work.fails, allowed))
            if starts > tries:
                self.referee.complain(f"task {number} ran {starts} times, and nothing had failed")

    async def _tell_stuck(self, run: RunId) -> None:
        store = Connection(self.bucket, Network(), Entropy(0))
        view = await RunView.open(store, run)
        assert view is not None
        await view.survey()
        self.referee.complain(f"run {run} is stuck with {view.totals().pending} tasks pending")
        for shard in [shard for shard in view.shards.values() if not shard.index.complete]:
            self.referee.complain("it has not ended", run, shard.id)


def play(seed: int) -> World:
    """Run the world of a seed."""
    world = World(Scenario.of(seed))
    try:
        world.run()
    except (BurstError, AssertionError) as error:
        world.referee.complain(f"{type(error).__name__}: {error}")
    return world
