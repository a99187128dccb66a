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
import itertools
import warnings
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from burst_dask import serialize
from burst_dask.clock import Entropy
from burst_dask.errors import StoreError
from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Ended, encode
from burst_dask.protocol.session_records import AddRun, Cancel
from burst_dask.testing.bucket import Bucket, Connection, Network
from burst_dask.testing.facts import gather
from burst_dask.testing.invariants import violations_of
from burst_dask.testing.loop import Deadlock, VirtualLoop
from burst_dask.testing.machines import Client, Job, Machine, SimulatedClock, Worker
from burst_dask.testing.needed import leftover
from burst_dask.testing.referee import Referee
from burst_dask.testing.scenario import Cancellation, Death, Fault, Kind, Scenario

#: Seconds after which a run that has not ended counts as stuck: hours beyond all work and all leases.
PATIENCE = 3 * 3600.0
#: Callbacks that no scenario needs: who is busy for longer goes round in circles.
STEPS = 150_000
#: Seconds between looks of whoever keeps one worker alive once nothing goes wrong any more.
LOOK_EVERY = 30.0


#: Seconds after which what nobody needs is deleted, if nobody has died: two rounds of `Discarder.sweep`.
SWEPT_AFTER = 45.0


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


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
        #: what happened, in words -> how often: faults, what the network did, and at which requests clients died
        self.happened: Counter[str] = Counter()
        #: how the world itself looks into the bucket
        self._store = Connection(self.bucket, Network(), Entropy(0))
        #: runs in which every task has its outcome
        self._over: set[RunId] = set()
        #: tasks that were cancelled, and those that depend on them: they may have no result
        self._cancelled: set[int] = set()
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
            except Exception as error:  # whatever it is, it must be told with the seed that led to it
                self.referee.complain(f"it ended with {type(error).__name__}: {error}")
            finally:
                self.ended, self.steps = self.loop.time(), self.loop.steps
                self.bucket.closed = True
                self.loop.finish()
        self.happened.update(self.referee.actions)
        self.happened.update({f"{fate.value} (network)": count for fate, count in self.bucket.fates.items()})
        self.happened["printed"] = self.referee.printed
        self.happened["deleted"] = self.referee.deleted

    async def _play(self) -> None:
        run = await self._submit()
        if run is None:
            if not self.broken:
                self.referee.complain("nobody could submit")
            return
        self._main.start(self._told(self._arrive()))
        self._main.start(self._told(self._misfortunes()))
        for cancellation in self.scenario.cancellations:
            self._main.start(self._told(self._cancel(run, cancellation)))
        try:
            async with asyncio.timeout(PATIENCE + self.scenario.horizon + self._work()):
                await self._collect(run)
                await self._complete()
        except TimeoutError:
            await self._tell_stuck(run)
        await self._judge(run)

    async def _told(self, happening: Coroutine[Any, Any, None]) -> None:
        """Let something happen beside the rest; if it fails, that is told."""
        try:
            await happening
        except Exception as error:
            self.referee.complain(f"the simulator failed: {error!r}")

    def _work(self) -> float:
        """Return the seconds that all of the work would take one thread, with all its retries."""
        return 10 * sum(work.seconds for work in self.scenario.graph.work)

    # ------------------------------------------------------------------ the client

    def _client(self, role: str, death: Death | None) -> Client:
        """Return a new client, which dies as told."""
        self._clients += 1
        network = Network(dict(self.scenario.network))
        client = Client(self.bucket, f"client-{self._clients}", self.scenario.seed, network)
        if death is not None:
            left = itertools.count(death.count - 1, -1)

            def admit(key: str) -> bool:
                if death.part in key and next(left) == 0:
                    client.process.kill()
                    self.happened[f"{role} died at {death.part or 'any'}"] += 1
                    self.happened[f"{role} died, and its request {'was sent' if death.sent else 'was not'}"] += 1
                return client.process.alive or death.sent

            network.admit = admit
        return client

    async def _submit(self) -> RunId | None:
        for death in (*self.scenario.submitter_dies, None):
            client = self._client("submitter", death)
            client.start(self._open_and_submit(client))
            run = await self._outcome(client)
            if run is not None:
                return RunId(run)
        return None

    async def _open_and_submit(self, client: Client) -> RunId:
        while True:
            try:
                if self.session is None:
                    link = await client.open(self.scenario.settings, len(self.scenario.arrivals))
                    self.session = link.session
                else:
                    link = await client.attach(self.session)
                return (await client.submit(link, self.scenario.graph)).run
            except StoreError:
                continue  # the user tries again

    async def _cancel(self, run: RunId, cancellation: Cancellation) -> None:
        """Let a client cancel tasks."""
        await self.clock.sleep(cancellation.at)
        self._cancelled |= self.scenario.graph.downstream(cancellation.tasks)
        client = self._client("canceller", None)
        assert self.session is not None
        while True:
            try:
                link = await client.attach(self.session)
                await link.append(Cancel(run, cancellation.force, Bitmap.of(cancellation.tasks)))
                break
            except StoreError:
                continue
        self.happened["cancelled by force" if cancellation.force else "cancelled"] += 1

    async def _outcome(self, machine: Machine) -> Any:
        """Return what the machine's main coroutine returns; None when it died before, or all is lost already."""
        assert machine.task is not None
        while machine.process.alive and not machine.task.done() and not self.broken:
            await asyncio.wait([machine.task], timeout=1.0)
            if self.loop.steps > STEPS:
                self.referee.complain(f"{self.loop.steps} steps: workers are busy with nothing")
        return machine.task.result() if machine.task.done() else None

    async def _collect(self, run: RunId) -> None:
        """Attach, wait and collect, with clients that die on the way; then compare."""
        values: dict[int, str | None] | None = None
        for death in (*self.scenario.collector_dies, None):
            client = self._client("collector", death)
            client.start(self._wait_and_fetch(client, run))
            values = await self._outcome(client)
            if values is not None:
                break
        if values is None:
            return
        self._compare(run, values)

    def _compare(self, run: RunId, values: dict[int, str | None]) -> None:
        """See that tasks gave what they should; None stands for a failure."""
        expected = self.scenario.graph.expected()
        # An unexpected failure may be WorkerLost, if so many workers did die.
        innocent = self.deaths >= self.scenario.settings.lost_workers
        for number, value in values.items():
            excused = innocent or number in self._cancelled
            if value != expected[number] and not (value is None and excused):
                what = f"task {number} of run {run} gave {value!r}, and should give {expected[number]!r}"
                self.referee.complain(what)

    async def _wait_and_fetch(self, client: Client, run: RunId) -> dict[int, str | None]:
        outputs = self.scenario.graph.outputs
        while True:
            try:
                view = await client.wait(run, outputs)
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
        scenario = self.scenario
        name = f"worker-{len(self.workers)}"
        job = Job(self.session, scenario.settings, scenario.threads, self.referee.started)
        slowness = 1.0 if self.workers else scenario.slowness
        network = Network(dict(scenario.network))
        worker = Worker(self.bucket, name, scenario.seed, network, job, self.crash, slowness)
        worker.start(self._employ(worker))
        self.workers.append(worker)

    async def _employ(self, worker: Worker) -> None:
        try:
            await worker.agent.run()
        except* StoreError:  # the store was away for too long: the process ends, and its supervisor starts another
            self.crash(worker)
        except* Exception as errors:
            self.referee.complain(f"{worker.name} failed: {_first(errors)!r}")

    def crash(self, worker: Worker) -> None:
        """Kill a worker; its supervisor records that, and starts another."""
        self.deaths += 1
        worker.process.kill()
        self._main.start(self._told(self._bury(worker)))

    async def _bury(self, worker: Worker) -> None:
        supervisor = Machine(self.bucket, f"supervisor-of-{worker.name}", self.scenario.seed, Network())
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
            self._main.start(self._told(self._befall(fault)))

    async def _befall(self, fault: Fault) -> None:
        working = [worker for worker in self.workers if worker.works]
        if not working:
            return
        worker = working[fault.worker % len(working)]
        self.happened[fault.kind.value] += 1
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
        await self.clock.sleep(SWEPT_AFTER)
        for each in sorted({*await self._named(), run}):
            over = each in self._over
            facts = await gather(self._store, each)
            for violation in (*facts.session.violations, *violations_of(facts, complete=over)):
                self.referee.complain(str(violation))
            if over and not self.scenario.processes_fail:
                for key in leftover(facts):
                    self.referee.complain(f"{key}: nobody needs it, nobody has died, and it is left (discarding)")
            if over and not self.broken:
                await self._judge_outcomes(each)
        if self.scenario.processes_fail:
            return
        for (_, number), starts in self.referee.starts.items():
            work = self.scenario.graph.work[number]
            allowed = self.scenario.graph.retries.get(number, 0)
            tries = 1 + (allowed if work.fails < 0 else min(work.fails, allowed))
            if starts > tries:
                self.referee.complain(f"task {number} ran {starts} times, and nothing had failed")

    async def _judge_outcomes(self, run: RunId) -> None:
        """See that every task has the outcome that it should have, also those that nobody asked for."""
        view, expected = await self._view(run), self.scenario.graph.expected()
        found = {number: outcome for number in expected if (outcome := view.outcome(number)) and outcome.done}
        bodies = await view.fetch(number for number, outcome in found.items() if outcome.location is not None)
        stored = {number: serialize.loads(body) for number, body in bodies.items()}
        # What was only in memory is gone, and was right if what came of it is.
        unseen = {number: expected[number] or "a result" for number in found}
        self._compare(run, dict.fromkeys(expected) | unseen | stored)

    async def _complete(self) -> None:
        """Wait for the tasks that nobody asked for, too, and for the runs of clients that have died."""
        while not self.broken:
            named = await self._named()
            if not any([(await self._view(run)).totals().pending for run in named]):
                self._over = set(named)
                return
            await self.clock.sleep(5.0)
            if self.loop.steps > STEPS:
                self.referee.complain(f"{self.loop.steps} steps: workers are busy with nothing")

    async def _named(self) -> list[RunId]:
        """Return the runs that the workers were told of."""
        assert self.session is not None
        return [
            entry.action.run
            async for entry in log.read_session(self._store, self.session, 0)
            if isinstance(entry.action, AddRun)
        ]

    async def _tell_stuck(self, run: RunId) -> None:
        view = await self._view(run)
        self.referee.complain(f"run {run} is stuck with {view.totals().pending} tasks pending")
        for shard in [shard for shard in view.shards.values() if not shard.index.complete]:
            self.referee.complain("it has not ended", run, shard.id)

    async def _view(self, run: RunId) -> RunView:
        view = await RunView.open(self._store, run)
        assert view is not None
        await view.survey()
        return view


def play(seed: int) -> World:
    """Run the world of a seed."""
    world = World(Scenario.of(seed))
    world.run()
    return world
