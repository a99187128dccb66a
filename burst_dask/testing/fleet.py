"""A simulated fleet that heals itself: containers that boot, die by the dozen, and start others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec

from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.errors import FleetError, StoreError
from burst_dask.protocol.keys import SessionId
from burst_dask.protocol.session_records import Adapt, SessionAction
from burst_dask.scaling.healer import TOGETHER_EVERY, Healer, heal_quietly
from burst_dask.scaling.sizing import Bound
from burst_dask.testing.bucket import Bucket, Network
from burst_dask.testing.loop import VirtualLoop
from burst_dask.testing.machines import Client, Job, SimulatedClock, Worker
from burst_dask.testing.work import Graph, Work

#: Seconds from RunTask until a container works (Fargate).
BOOT = (30.0, 60.0)
#: Seconds for which a listing of containers may not show a new one.
LISTED_AFTER = 5.0
#: Seconds for which a worker that had nothing to do is not missed.
REST = 900.0


@dataclass
class Container:
    """One worker as ECS sees it."""

    start: int
    asked: float
    #: None while it boots
    worker: Worker | None = None
    #: when it was taken away, or ended
    ended: float | None = None
    #: whether it ended since it had nothing to do
    idle: bool = False

    @property
    def runs(self) -> bool:
        return self.ended is None


class SimulatedFleet:
    """Containers, and the service that starts them.

    Parameters
    ----------
    settings
        Of the session.
    refuses
        Share of the starts of which a part is refused for want of capacity.
    quota
        How many containers the account may have at a time; None is any number.
    """

    def __init__(
        self, bucket: Bucket, seed: int, settings: Settings, refuses: float = 0.0, quota: int | None = None
    ) -> None:
        self.bucket = bucket
        self.seed = seed
        self.settings = settings
        self.refuses = refuses
        self.quota = quota
        #: how many containers were asked for beyond the quota
        self.beyond = 0
        self.entropy = Entropy(f"{seed} fleet")
        self.clock = SimulatedClock(bucket.loop)
        self.containers: list[Container] = []
        self.session: SessionId | None = None
        #: how many there were at most at one time
        self.most = 0
        #: numbers of the starts that were carried out
        self.begun: set[int] = set()
        self._process = bucket.loop.process("ecs")

    @property
    def seconds(self) -> float:
        """What has to be paid for: all containers from the moment in which they were asked for."""
        now = self.bucket.loop.time()
        return sum((now if one.ended is None else one.ended) - one.asked for one in self.containers)

    @property
    def running(self) -> int:
        """How many containers run or boot."""
        return sum(container.runs for container in self.containers)

    def start(self, number: int, count: int) -> None:
        for _ in range(count):
            container = Container(number, self.bucket.loop.time())
            self.containers.append(container)
            self._process.start(self._boot(container))
        self.most = max(self.most, self.running)

    def lose(self, share: float) -> None:
        """Take that share of the containers away, booting ones as well; one that works is left."""
        running = [container for container in self.containers if container.runs]
        spared = next((one for one in running if one.worker is not None), None)
        for container in self.entropy.sample(running, round(share * len(running))):
            if container is spared:
                continue
            container.ended = self.bucket.loop.time()
            if container.worker is not None:
                container.worker.process.kill()

    async def _boot(self, container: Container) -> None:
        await self.clock.sleep(self.entropy.uniform(*BOOT))
        if not container.runs:
            return
        assert self.session is not None
        job = Job(self.session, self.settings, self.settings.threads, lambda name: lambda work: None)
        name = f"w{len([one for one in self.containers if one.worker])}-{container.start}"
        container.worker = Worker(self.bucket, name, self.seed, Network(), job, lambda worker: None)
        context = container.worker.context
        view = Seen(self)
        container.worker.agent._healer = Healer(context.store, context.session, context.settings, context.author, view)
        container.worker.start(self._work(container))

    async def _work(self, container: Container) -> None:
        assert container.worker is not None
        with contextlib.suppress(StoreError, ExceptionGroup):
            container.idle = await container.worker.agent.run() == "idle"
        container.ended = self.bucket.loop.time()


class Seen:
    """The fleet as one machine sees it."""

    boot = BOOT[1]

    def __init__(self, fleet: SimulatedFleet) -> None:
        self._fleet = fleet

    async def counted(self) -> dict[int, int]:
        fleet = self._fleet
        await fleet.clock.sleep(0.1)
        found: dict[int, int] = {}
        for container in fleet.containers:
            if container.runs and fleet.bucket.loop.time() - container.asked >= LISTED_AFTER:
                found[container.start] = found.get(container.start, 0) + 1
        return found

    async def shrink(self, workers: int) -> None:
        raise AssertionError(f"there are more than {workers} workers")

    async def resting(self) -> int:
        fleet = self._fleet
        now = fleet.bucket.loop.time()
        return sum(one.idle and one.ended is not None and now - one.ended < REST for one in fleet.containers)

    async def bound(self) -> Bound | None:
        quota = self._fleet.quota
        return None if quota is None else Bound(quota, "the account's quota")

    async def begin(self, number: int, workers: int, still: Callable[[], bool]) -> None:
        fleet = self._fleet
        await fleet.clock.sleep(0.1)
        if number in fleet.begun or not still():
            return
        if fleet.quota is not None and (over := fleet.running + workers - fleet.quota) > 0:
            fleet.beyond += over
            workers -= over
        fleet.begun.add(number)
        refused = fleet.entropy.integer(1, workers) if fleet.entropy.uniform(0, 1) < fleet.refuses else 0
        fleet.start(number, workers - refused)
        if refused:
            raise FleetError(f"{refused} of {workers} containers were refused: capacity is unavailable")


@dataclass
class Recovery:
    """A session whose client goes, whose fleet is hit, and which is seen to the end by nobody but its workers.

    Parameters
    ----------
    goal
        What the client asks for.
    lost
        When shares of the fleet are lost, in seconds after the submission -> which share.
    """

    seed: int
    work: Sequence[float]
    goal: SessionAction
    settings: Settings
    lost: dict[float, float]
    refuses: float = 0.0
    #: whether all other tasks need the first one
    behind_the_first: bool = False
    #: seconds from the submission within which somebody wants it done
    within: float | None = None
    quota: int | None = None
    #: containers that ran, every ten seconds
    sizes: list[int] = field(default_factory=list)
    #: tasks that had outcomes when it was looked last
    completed: int = 0
    #: seconds after which all had outcomes; None while it is not so
    done: float | None = None

    def run(self, patience: float) -> SimulatedFleet:
        """Let it happen, for that many seconds at most; return the fleet."""
        loop = VirtualLoop()  # type: ignore[abstract]
        bucket = Bucket(loop, Entropy(f"{self.seed} bucket"))
        self.fleet = SimulatedFleet(bucket, self.seed, self.settings, self.refuses, self.quota)
        try:
            loop.run_until_complete(loop.process("world").start(self._play(bucket, patience)))
        finally:
            bucket.closed = True
            loop.finish()
        return self.fleet

    async def _play(self, bucket: Bucket, patience: float) -> None:
        client, fleet = Client(bucket, "client", self.seed, Network()), self.fleet
        link = await client.open(self.settings, None)
        goal = self.goal
        if self.within is not None:
            assert isinstance(goal, Adapt)
            goal = msgspec.structs.replace(goal, done_by=await link.now() + self.within)
        await link.append(goal)
        fleet.session = link.session
        count = len(self.work)
        inputs = (0,) if self.behind_the_first else ()
        tasks = [Work(number, inputs if number else (), seconds) for number, seconds in enumerate(self.work)]
        plan = await client.submit(link, Graph(tasks, [*range(0, count, 50), count], range(count)))
        healer = Healer(client.store, link.session, self.settings, link.author, Seen(fleet), link.now)
        while not fleet.running:
            link.learn(await heal_quietly(healer, link.state))
            await fleet.clock.sleep(TOGETHER_EVERY)
        # The client is gone.
        view = await link.view(plan.run)
        assert view is not None
        begin, lost = bucket.loop.time(), sorted(self.lost.items())
        while bucket.loop.time() - begin < patience:
            await fleet.clock.sleep(10.0)
            while lost and bucket.loop.time() - begin >= lost[0][0]:
                fleet.lose(lost.pop(0)[1])
            self.sizes.append(fleet.running)
            await view.survey()
            self.completed = view.totals().done
            if not view.totals().pending:
                self.done = bucket.loop.time() - begin
                return
