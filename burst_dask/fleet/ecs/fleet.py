"""Workers as tasks of Amazon ECS: on Fargate, or on instances of the stack's capacity providers."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from burst_dask.aws import isolation
from burst_dask.aws.clients import Clients
from burst_dask.clock import Entropy, PausingClock, SystemClock
from burst_dask.errors import BurstError, CloudError
from burst_dask.fleet.base import ProcessLog
from burst_dask.fleet.ecs import bounding, words
from burst_dask.fleet.ecs.definition import STOP_TIMEOUT, number_of, stream_name
from burst_dask.fleet.ecs.launching import Launch, Launcher
from burst_dask.fleet.ecs.logs import Logs
from burst_dask.fleet.ecs.plan import EC2, FARGATE, WITH_FALLBACK, EcsPlan
from burst_dask.fleet.ecs.tasks import OVER, Task, Tasks
from burst_dask.protocol.keys import SessionId
from burst_dask.scaling.sizing import Bound

#: Seconds between looks at what became of tasks: who watches asks more often than that.
LOOK_EVERY = 15.0
#: Seconds between looks at the account's quotas, which change seldom.
QUOTA_EVERY = 3600.0
#: Seconds from RunTask until a worker works. Fargate takes 30 to 60; an instance has to be started before as a rule.
BOOT = {FARGATE: 60.0, EC2: 180.0}
#: Seconds within which a listing shows what was started.
SHOWN_WITHIN = 120.0
#: Seconds that a task waits for a machine of Spot before another one is taken, if the plan allows for it …
SPOT_PATIENCE = 180.0
#: … and for how long Spot is not asked again then.
SPOT_REST = 600.0
#: Seconds for which workers that had nothing to do are not missed while others work: thrice what they wait for work.
IDLE_REST = 900.0
#: Seconds after which a worker that does not come up is told of.
SLOW = 180.0
#: Seconds between looks at tasks that are to end, and how long ECS may take besides the container's own time.
_STOP_POLL, _STOP_MORE = 2.0, 90.0


class _Place(NamedTuple):
    """Where the tasks run, and those who talk to it."""

    tasks: Tasks
    launcher: Launcher
    logs: Logs


class EcsFleet:
    """Workers of one session as tasks of ECS.

    All that it knows is in ECS and in the plan, so any client of the session is as good as any other. Nothing is
    asked before it is needed: who only reads results needs no right on ECS.

    Parameters
    ----------
    session, store_url
        What the workers work for.
    plan
        What each worker is.
    opened
        When the session was opened, in seconds since 1970: logs are searched from there.
    key
        Where the key of a signed session is (`burst_dask.trust.keyring`); empty for one that is not.
    clients, clock, entropy
        Those of this machine, unless a test brings others.
    """

    def __init__(
        self,
        session: SessionId,
        store_url: str,
        plan: EcsPlan,
        *,
        opened: float = 0.0,
        key: str = "",
        clients: Clients | None = None,
        clock: PausingClock | None = None,
        entropy: Entropy | None = None,
    ) -> None:
        self.plan = plan
        self._session, self._store_url, self._opened = session, store_url, opened
        self._key = key
        self._clients = clients
        self._clock: PausingClock = clock or SystemClock()
        self._entropy = entropy or Entropy()
        self._lock = threading.RLock()
        self._there: _Place | None = None
        #: tasks that were started here and are not listed yet -> when
        self._unlisted: dict[str, float] = {}
        #: task -> number of its start, of those that were seen
        self._numbers: dict[str, int] = {}
        self._spot_rests_until = float("-inf")
        #: what bounds it, and until when that is good enough
        self._bounded: tuple[Bound | None, float] = (None, float("-inf"))
        #: notes, and until when they are good enough
        self._noted: tuple[list[str], float] = ([], float("-inf"))

    # ------------------------------------------------------------------ Fleet

    @property
    def boot(self) -> float:
        """Seconds until a worker that is started now works."""
        return BOOT[self.plan.launch_type]

    async def counted(self) -> dict[int, int]:
        """Return how many workers run or come up, by the number of their start; others under -1."""
        return await asyncio.to_thread(self._counted)

    async def shrink(self, workers: int) -> None:
        """Stop what is more than `workers`."""
        await asyncio.to_thread(self.reduce, workers)

    async def resting(self) -> int:
        """Return how many workers have ended within the last `IDLE_REST` seconds since they had nothing to do."""
        past = await asyncio.to_thread(self._past)
        return sum(task.ended_in_order and self._clock.wall() - task.stopped_at < IDLE_REST for task in past)

    async def begin(self, number: int, workers: int, still: Callable[[], bool] = lambda: True) -> None:
        """Start workers as start `number`, which nobody else carries out; see `burst_dask.scaling.healer.Elastic`."""
        await asyncio.to_thread(self._begin, number, workers, still)

    async def bound(self) -> Bound | None:
        """Return how many workers the account's quotas allow for; None when they are not known.

        AWS is asked once in `QUOTA_EVERY` at most.
        """
        return await asyncio.to_thread(self._bound)

    def reduce(self, workers: int) -> None:
        """Stop what is more than `workers`: first those that do not run yet, then the newest."""
        with self._lock:
            alive = self._alive()
            if len(alive) <= workers:
                return
            order = {task.arn: (task.status == "RUNNING", -task.created) for task in self._place.tasks.described(alive)}
            surplus = sorted(alive, key=lambda arn: order.get(arn, (False, 0.0)))[: len(alive) - workers]
            self._end(surplus, f"{words.OURS} scaled to {workers} workers")

    def alive(self) -> int:
        """Return how many workers run or come up."""
        with self._lock:
            return len(self._alive())

    def stop(self, grace: float = 5.0) -> None:
        """Let the workers hand over, then end them; returns when their containers do not run any more.

        ECS gives them half a minute, whatever `grace` is; they take a few seconds of it.
        """
        with self._lock:
            self._end(self._alive(), f"{words.OURS} stopped by a client", grace)

    def remove(self) -> None:
        """Stop the workers. Their logs stay as long as the log group keeps them, the task definition for others."""
        self.stop()

    def release(self) -> None:
        """Delete the role that the session has of its own, if it has one; workers that still run cannot go on.

        Raises
        ------
        CloudError
            AWS refuses; the message says what is left.
        """
        if self.plan.isolated:
            clients = self._clients or Clients.of(region=self.plan.stack.region)
            isolation.delete_role(clients, self.plan.stack, self._session)

    def describe(self) -> str:
        """Say in one line what runs, where its logs are, and what became of those that do not run."""
        where = f"on ECS, {self.plan}"
        try:
            with self._lock:
                alive = self._alive()
            said = f"{len(alive)} workers {where}; logs in the group {self.plan.stack.log_group} of CloudWatch"
            return "; ".join([said, *self.notes()])
        except BurstError as error:
            return f"workers {where}, which cannot be asked now: {error}"

    # ------------------------------------------------------------------ what else is known

    def notes(self) -> list[str]:
        """Return what a person should know of workers: why some have stopped, and that some do not come up.

        It asks at most every `LOOK_EVERY` seconds: who watches asks more often.
        """
        with self._lock:
            noted, until = self._noted
            if self._clock.monotonic() < until:
                return noted
            place, alive = self._place, self._alive()
            found = self._find_notes(place, alive)
            self._noted = found, self._clock.monotonic() + LOOK_EVERY
            return found

    def _find_notes(self, place: _Place, alive: list[str]) -> list[str]:
        found = []
        now = self._clock.wall()
        late = [task for task in place.tasks.described(alive) if task.status in ("PROVISIONING", "PENDING")]
        late = [task for task in late if now - task.created > SLOW]
        if late:
            longest = max(now - task.created for task in late)
            waited = f"for up to {longest / 60:.0f} min"
            found.append(f"{len(late)} workers have been waiting for a machine or for their image {waited}")
        by_reason: dict[str, list[Task]] = {}
        for task in place.tasks.stopped():
            if why := words.why_stopped(task.stopped):
                by_reason.setdefault(why, []).append(task)
        for why, tasks in by_reason.items():
            count = str(len(tasks)) if len(tasks) > 1 else "one"
            found.append(f"{count} stopped: {self._with_last_words(place, why, tasks[-1])}")
        return found

    def process_logs(self, worker: str | None = None) -> list[ProcessLog]:
        """Return what worker processes have written themselves; see `Session.worker_logs`."""
        found = self._place.logs.of_session(self._session, self._opened)
        return [log for log in found if worker is None or log.tells_of(worker)]

    def _with_last_words(self, place: _Place, why: str, task: Task) -> str:
        """Return why tasks have stopped, with the last line that one of them wrote if it failed by itself."""
        if task.stopped.exit_code in (None, 0) or task.stopped.code != "EssentialContainerExited":
            return why
        lines = place.logs.stream(stream_name(task.arn)).text.strip().splitlines()
        if not lines:
            return why
        if "exec format error" in lines[-1]:  # the only word of it
            return words.why_stopped(task.stopped._replace(container_reason=lines[-1])) or why
        return f"{why}: {lines[-1]}"

    # ------------------------------------------------------------------ how

    @property
    def _own_clients(self) -> Clients:
        if self._clients is None:
            self._clients = Clients.of(region=self.plan.stack.region)
        return self._clients

    @property
    def _place(self) -> _Place:
        with self._lock:
            if self._there is None:
                clients, stack = self._own_clients, self.plan.stack
                launcher = Launcher(
                    clients,
                    self.plan,
                    self._session,
                    self._store_url,
                    self._clock,
                    self._entropy,
                    opened=self._opened,
                    key=self._key,
                )
                self._there = _Place(Tasks(clients, stack, self._session), launcher, Logs(clients, stack))
            return self._there

    def _counted(self) -> dict[int, int]:
        with self._lock:
            alive = self._without_stuck(self._alive())
            self._described([arn for arn in alive if arn not in self._numbers])
            return dict(Counter(self._numbers.get(arn, -1) for arn in alive))

    def _described(self, arns: list[str]) -> list[Task]:
        """Return what is known of tasks, and note which start each belongs to: none is asked for that again."""
        found = self._place.tasks.described(arns)
        self._numbers.update((task.arn, number_of(task.group, self._session)) for task in found)
        return found

    def _past(self) -> list[Task]:
        with self._lock:
            return self._place.tasks.stopped()

    def _begin(self, number: int, workers: int, still: Callable[[], bool]) -> None:
        with self._lock:
            self._launch(workers, number, still)

    def _bound(self) -> Bound | None:
        with self._lock:
            bound, until = self._bounded
            if self._clock.monotonic() >= until:
                bound = bounding.bound_of(self._own_clients, self.plan)
                self._bounded = bound, self._clock.monotonic() + QUOTA_EVERY
            return bound

    def _forget_notes(self) -> None:
        self._noted = [], float("-inf")

    def _alive(self) -> list[str]:
        """Return the ARNs of tasks that run or come up, and are not to end; the lock must be held."""
        listed = self._place.tasks.running()
        now = self._clock.monotonic()
        self._unlisted = {
            arn: since for arn, since in self._unlisted.items() if arn not in set(listed) and now - since < SHOWN_WITHIN
        }
        if self._unlisted:  # not shown yet, or ended already
            gone = {task.arn for task in self._place.tasks.described(list(self._unlisted)) if task.desired == "STOPPED"}
            for arn in gone:
                del self._unlisted[arn]
        return [*listed, *self._unlisted]

    def _launch(self, count: int, number: int, still: Callable[[], bool]) -> None:
        """Start workers. The lock must be held."""
        self._forget_notes()
        there, now = len(self._alive()), self._clock.monotonic()
        launch = self._place.launcher.launch(count, number, still, avoid_spot=now < self._spot_rests_until)
        if launch.spot_short:
            self._spot_rests_until = self._clock.monotonic() + SPOT_REST
        self._unlisted.update(dict.fromkeys(launch.tasks, self._clock.monotonic()))
        self._numbers.update(dict.fromkeys(launch.tasks, number))
        if launch.shortfall is not None:
            self._tell(count, launch, there)

    def _tell(self, count: int, launch: Launch, there: int) -> None:
        """Say that there are fewer workers than wanted; raise if there are none."""
        failure = launch.shortfall
        assert failure is not None
        few = f"{len(launch.tasks)} of {count} workers of session {self._session} were started: {failure.text}"
        if not launch.tasks and not there:
            what = f"no worker of session {self._session} could be started: {failure.text}"
            raise failure.kind(f"{what}. What was submitted is kept")
        again = "the others are tried again while a client waits" if failure.may_pass else "the work goes on with fewer"
        warnings.warn(f"{few}; {again}", stacklevel=4)

    def _without_stuck(self, alive: list[str]) -> list[str]:
        """Give up tasks that wait for a machine of Spot in vain, if others may be had; return the others."""
        if self.plan.spot != WITH_FALLBACK or not alive:
            return alive
        place, now = self._place, self._clock.wall()
        spot = self.plan.stack.capacity_providers.get(self.plan.providers()[0], self.plan.providers()[0])
        stuck = {
            task.arn
            for task in self._described(alive)
            if task.status == "PROVISIONING" and task.provider == spot and now - task.created > SPOT_PATIENCE
        }
        if stuck:
            place.tasks.stop(stuck, f"{words.OURS} no machine of Spot was free")
            self._spot_rests_until = self._clock.monotonic() + SPOT_REST
        return [arn for arn in alive if arn not in stuck]

    def _end(self, arns: Iterable[str], reason: str, grace: float = 5.0) -> None:
        """Stop tasks, and wait until their containers do not run any more. The lock must be held."""
        left = list(arns)
        self._forget_notes()
        if not left:
            return
        tasks = self._place.tasks
        untold = tasks.stop(left, reason)
        for arn in left:
            self._unlisted.pop(arn, None)
        until = self._clock.monotonic() + max(grace, STOP_TIMEOUT) + _STOP_MORE
        while left := [task.arn for task in tasks.described(left) if task.status not in OVER]:
            if self._clock.monotonic() >= until:
                raise CloudError(
                    f"{len(left)} tasks of session {self._session} were told to stop and still run, such as {left[0]}; "
                    "stop them in the console of ECS if they stay"
                )
            self._clock.pause(self._entropy.uniform(0.5, 1.0) * _STOP_POLL)
            untold = tasks.stop(untold, reason) if untold else []
