"""The agent: one worker process' part in the protocol.

It keeps its threads busy with the shards it holds, finds another when they run low, and tells
the store that it lives. Everything it needs of the world is injected, so that the simulator
runs this very code.

::

    session log ──▶ _follow ──┐                         ┌──▶ Finder: claim, take over, split
                              ├──▶ _work (the one loop) ┤
    tasks that end ───────────┘                         └──▶ Executor: batches of ready tasks
                                         Tender, one a shard: load, commit, poll
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from burst_dask.errors import StoreError, UntrustedObject
from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys, policy
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Beat, Ended, Held, encode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import AddRun, Attach, Open
from burst_dask.scaling.healer import Healer, heal_quietly
from burst_dask.store import requests_of
from burst_dask.worker.backup import BackupTender, stand_in
from burst_dask.worker.context import Context
from burst_dask.worker.deadline import Deadline
from burst_dask.worker.execution import Call
from burst_dask.worker.finder import BLOCKED, Finder, Found
from burst_dask.worker.holding import Holding
from burst_dask.worker.load import Batch
from burst_dask.worker.tender import CANCELLED, FORCED, UNFIT, Tender
from burst_dask.worker.waiting import logger, wait_for

#: Seconds of work for one thread hop: the hop costs 0.1 ms, and a loop turn comes 20 times a second.
BATCH_SECONDS = 0.05
#: Another shard is looked for when less than this many seconds of work are left: a few requests' time.
LOOK_AHEAD = 0.3
#: Of what is not signed with the session's key, so much is told at a worker's end.
DOUBTS = 3
#: Why a worker ends whose threads all run what was given up: who keeps it alive starts another.
STUCK = "stuck"
#: The same of one that runs a task that was cancelled by force.
KILLED = "killed"
REPLACED = {STUCK, KILLED}
#: The same of one that was told something by a session log that is not signed with the session's key.
UNTRUSTED = "untrusted"


class Agent:
    """One worker.

    Parameters
    ----------
    context
        The injected world.
    host, pid
        Where it runs, for people.
    memory
        Bytes of resident memory now, for people; called at each heartbeat.
    healer
        By which it takes its turn at seeing to the fleet, if it can start workers.
    """

    def __init__(
        self,
        context: Context,
        *,
        host: str = "",
        pid: int = 0,
        memory: Callable[[], int] | None = None,
        healer: Healer | None = None,
    ) -> None:
        self.context = context
        self._healer = healer
        self._host, self._pid, self._memory = host, pid, memory
        self._started = context.clock.wall()
        self.session = SessionState()
        self.tenders: dict[tuple[RunId, ShardId], Tender] = {}
        self.finder = Finder(context, self.beat, self.tenders)
        context.discarder.tenders = self.tenders
        context.discarder.live_runs = self._live_runs
        self._finding = False
        #: batches in threads: nobody waits for them once the work is handed over
        self._batches: set[asyncio.Task[None]] = set()
        #: finding and tending: these end in order
        self._jobs: set[asyncio.Task[None]] = set()
        self._session_news = asyncio.Event()
        self._deadline = Deadline(context, self._renew)
        self._attached_at = context.clock.monotonic()
        self._find_attempt = 0
        self._find_after = 0.0
        self._idle_since = context.clock.monotonic()
        #: when it last had a shard
        self._worked_at = float("-inf")
        self._message = ""

    # ------------------------------------------------------------------ life

    async def run(self) -> str:
        """Work until the session closes, nothing is left to do for long, or `stop` is called.

        Returns
        -------
        str
            Why it ended, as in `Ended.reason`.
        """
        context = self.context
        await self._renew()
        await self._read_session()
        async with asyncio.TaskGroup() as group:
            self._group = group
            loops = (self._heartbeat, self._follow, self._heal, context.discarder.run)
            background = {group.create_task(loop()) for loop in loops}
            await self._work()
            await self._let_go_of_all()
            for task in background | self._batches:
                task.cancel()
        await context.discarder.end()
        reason = context.stopping or "idle"
        await self.end(reason, "; ".join([self._message, *context.doubts()[:DOUBTS]]).removeprefix("; "))
        return reason

    def stop(self, reason: str, message: str = "") -> None:
        """Take no new work, hand over what is held, and end."""
        if self.context.stopping is None:
            self.context.stopping = reason
            self._message = message
            self.context.wake.set()
            self._session_news.set()

    async def end(self, reason: str, message: str = "") -> None:
        """Record that this worker is gone, so that nobody waits for its lease."""
        context = self.context
        record = Ended(
            worker=context.worker,
            reason=reason,
            message=message,
            wrote=context.clock.wall(),
            requests=requests_of(context.store),
            next=self.session.next,
        )
        try:
            await context.store.create(keys.ended(context.session, context.worker), encode(record))
        except StoreError as error:  # others learn it by the lease
            logger.warning("could not record the end: %s", error)

    def beat(self) -> Beat:
        """Return the heartbeat to write now."""
        context = self.context
        return Beat(
            worker=context.worker,
            host=self._host,
            pid=self._pid,
            threads=context.executor.threads,
            started=self._started,
            holds=tuple(
                Held(run, tender.holding.shard.id, tender.holding.shard.next, tender.holding.spare())
                for (run, _), tender in self.tenders.items()
            ),
            memory=self._memory() if self._memory else 0,
            requests=requests_of(context.store),
        )

    @contextlib.asynccontextmanager
    async def beating(self) -> AsyncIterator[None]:
        """Tell the store that this worker lives, also before it works."""
        await self._renew()
        heartbeat = asyncio.create_task(self._heartbeat())
        try:
            yield
        finally:
            heartbeat.cancel()

    async def _renew(self) -> None:
        context = self.context
        key = keys.beat(context.session, context.worker)
        await context.insist(lambda: context.store.put(key, encode(self.beat())))

    async def _heartbeat(self) -> None:
        while True:
            await self.context.clock.sleep(self.context.settings.heartbeat)
            await self._renew()

    async def _heal(self) -> None:
        """Take turns with the others at seeing to the fleet, for the time when no client does."""
        if self._healer is None:
            return
        self._healer.workers = self.session.expected
        self._healer.now = self._deadline.now
        while not self.context.stopping:
            await self.context.clock.sleep(self._healer.pause())
            # What it reads of the session log is not taken in here, but by `_follow`, which heeds it.
            if self._healer.watches(self.session):
                await heal_quietly(self._healer, self.session)

    # ------------------------------------------------------------------ the session log

    async def _follow(self) -> None:
        """Look for news in the session log: quickly when all is done and a client is there, else seldom."""
        context, settings = self.context, self.context.settings
        attempt = 0
        while not context.stopping:
            now, workers = context.clock.monotonic(), self.finder.roster.workers
            quick = policy.attached_poll(settings.wait_poll_min, settings.wait_poll_max, workers)
            if self.tenders:
                pause, attempt = settings.session_poll, 0
            elif self._runs_go_on():
                # Whoever waits, waits for these; but they may be over by now, and be followed by another.
                seldom = policy.in_turn(settings.idle_poll_min, workers)
                pause, attempt = policy.after_work(now - self._worked_at, quick, seldom), 0
            elif now - self._attached_at < settings.attached_for:
                pause, attempt = quick, 0
            else:
                pause = policy.backoff(attempt, settings.idle_poll_min, settings.idle_poll_max)
                attempt += 1
            await wait_for(self._session_news, pause * context.entropy.uniform(0.8, 1.2))
            if await self._read_session():
                attempt = 0

    def _runs_go_on(self) -> bool:
        """Tell whether a run may have work left, of which this worker has none."""
        return bool(self._live_runs())

    def _live_runs(self) -> list[RunId]:
        return [run for run in self.session.live_runs if run not in self.finder.complete]

    async def _read_session(self) -> bool:
        context = self.context
        before = self.session

        async def read() -> None:
            async for entry in log.read_session(context.store, context.session, self.session.next):
                self.session = self.session.apply(entry)
                if isinstance(entry.action, Open | AddRun | Attach):
                    self._attached_at = context.clock.monotonic()

        try:
            await context.insist(read)
        except UntrustedObject as error:
            logger.error("%s", error)
            self.stop(UNTRUSTED, str(error))
            return False
        if self.session.closed:
            self.stop("closed")
        elif self.session.halted is not None:
            self.stop("halted", "the session's max_cost is spent; its work was handed over")
        elif self.session.workers == 0 and self._healer is not None and self._healer.fleet is not None:
            self.stop("stopped", "no workers are wanted any more; its work was handed over")
        elif await self._deadline.passed(self.session):
            self.stop("expired", "the session's deadline has passed; its work was handed over")
        self._heed_cancellations()
        if self.session.runs.keys() - before.runs.keys():
            self._look_again()
        return self.session.next > before.next

    def _heed_cancellations(self) -> None:
        for (run, _), tender in self.tenders.items():
            if run in self.session.killed:
                if tender.holding.running:  # a thread cannot be ended, but its process can
                    self.stop(KILLED, f"run {run} was cancelled by force while it ran a task of it")
                tender.let_go(FORCED)
            elif run in self.session.cancelled:
                tender.let_go(CANCELLED)
            else:
                self._heed_cancelled_tasks(tender)

    def _heed_cancelled_tasks(self, tender: Tender) -> None:
        """Give tasks of a shard their outcomes that were cancelled singly, unless they run."""
        run = tender.view.run
        if (tasks := self.session.cancelled_tasks.get(run)) is None:
            return
        if (killed := self.session.killed_tasks.get(run)) is not None and tender.holding.under_way(killed):
            self.stop(KILLED, f"a task of run {run} was cancelled by force while it ran")
            tender.let_go(FORCED)
        tender.cancel(tasks)

    def _look_again(self) -> None:
        self._find_attempt, self._find_after = 0, 0.0
        self.context.wake.set()

    # ------------------------------------------------------------------ work

    async def _work(self) -> None:
        context = self.context
        while not context.stopping:
            self._dispatch()
            now = context.clock.monotonic()
            if self._work_left() <= LOOK_AHEAD and not self._finding and now >= self._find_after:
                self._finding = True
                self._spawn(self._find(), self._jobs)
            if self.tenders:
                self._idle_since = now
            elif not self._finding and now - self._idle_since >= context.settings.idle_timeout:
                self.stop("idle", f"nothing to do for {context.settings.idle_timeout:.0f} s")
                return
            await wait_for(context.wake, self._pause(now))

    def _spawn(self, job: Coroutine[Any, Any, None], kind: set[asyncio.Task[None]]) -> None:
        task = self._group.create_task(job)
        kind.add(task)
        task.add_done_callback(kind.discard)

    def _pause(self, now: float) -> float | None:
        """Return how long to sleep unless something happens."""
        if self._finding:
            return None
        spare = self._work_left() - LOOK_AHEAD
        due = [self._idle_since + self.context.settings.idle_timeout - now, max(spare, self._find_after - now)]
        return max(0.0, min(due))

    def _work_left(self) -> float:
        """Return for how many seconds the threads probably have something to do."""
        load = self.context.load
        holdings = [t.holding for t in self.tenders.values() if not t.letting_go]
        if load.free and not any(holding.startable(load.free_resources()) for holding in holdings):
            # What an entry is about to reserve is work, or the end of each long task would lead to another shard.
            reserving = any(tender.reserves for tender in self.tenders.values() if not tender.letting_go)
            return 2 * LOOK_AHEAD if reserving else 0.0
        remaining = sum(holding.remaining() for holding in holdings) + load.remaining()
        return remaining / max(1, load.threads)

    def _dispatch(self) -> None:
        """Give every free thread a batch of ready tasks, of the most urgent run first."""
        context = self.context
        order = sorted(self.tenders.values(), key=lambda t: -self.session.runs.get(t.view.run, 0))
        for tender in order:
            if tender.letting_go:
                continue
            while context.load.free:
                batch = tender.holding.take(BATCH_SECONDS, context.load.free_resources())
                if not batch:
                    break
                running = context.load.begin(tender.holding, batch)
                self._spawn(self._run_batch(tender, running), self._batches)

    async def _run_batch(self, tender: Tender, running: Batch) -> None:
        context, holding, table = self.context, tender.holding, tender.holding.table
        batch = running.positions
        for position in batch:
            context.durations.begin(table.kinds[position])
        try:
            done = await context.executor.run([_call(holding, p) for p in batch], holding.values, BATCH_SECONDS)
        finally:
            context.load.end(running)
            if self._find_after == float("inf"):
                self._find_after = 0.0
        for ran in done:
            context.durations.end(table.kinds[ran.position], ran.seconds)
            if holding.finish(ran):
                self._spawn(self._try_again(tender, ran.position), self._batches)
            if ran.stuck is not None:
                self._lose_thread(ran.stuck)
        for position in batch[len(done) :]:
            context.durations.end(table.kinds[position], None)
            holding.give_back(position)
        self._heed_cancelled_tasks(tender)  # of those that were not begun, or are to be tried again
        tender.stir()
        for other in self.tenders.values():
            other.changed.set()  # a thread is free, for which they may reserve
        context.wake.set()

    async def _try_again(self, tender: Tender, position: int) -> None:
        context, holding = self.context, tender.holding
        first = holding.table.retry_delay.get(position, context.settings.retry_delay)
        pause = policy.retry_pause(holding.attempts[position], first)
        await context.clock.sleep(pause * context.entropy.uniform(0.8, 1.2))
        holding.rested(position)
        tender.stir()
        context.wake.set()

    def _lose_thread(self, busy: asyncio.Future[Any]) -> None:
        """A thread cannot be killed: do without it until it ends; without any, end, and be replaced."""
        load = self.context.load
        load.threads -= 1
        busy.add_done_callback(self._regain_thread)
        if load.threads == 0:
            self.stop(STUCK, "all its threads run tasks that are past their time limits; its work was handed over")

    def _regain_thread(self, _: asyncio.Future[Any]) -> None:
        self.context.load.threads += 1
        self.context.wake.set()

    # ------------------------------------------------------------------ shards

    async def _find(self) -> None:
        context, settings = self.context, self.context.settings
        try:
            if len(self.tenders) >= settings.held_at_once:
                self._release_a_blocked_one()
            idle = context.load.free > 0
            found = await self.finder.find(self.session, idle)
        finally:
            self._finding = False
        for view in {id(t.view): t.view for t in self.tenders.values()}.values():
            self._announce(view)  # what the search has read
        if found is not None:
            self._find_attempt, self._find_after = 0, 0.0
            self._tend(found)
        elif idle:
            low = policy.in_turn(settings.idle_poll_min, self.finder.roster.workers)
            pause = policy.backoff(self._find_attempt, low, max(low, settings.idle_poll_max))
            self._find_after = context.clock.monotonic() + pause * context.entropy.uniform(0.8, 1.2)
            self._find_attempt += 1
            if not self._runs_go_on():
                self._session_news.set()  # nothing is left but to look for a new run, and soon
        else:
            # Search in earnest when a thread has nothing to do, unless that is so by now.
            self._find_after = 0.0 if context.load.free else float("inf")
        context.wake.set()

    def _release_a_blocked_one(self) -> None:
        blocked = [t for t in self.tenders.values() if t.holding.blocked and not t.letting_go]
        if blocked:
            min(blocked, key=lambda tender: len(tender.holding.values)).let_go(BLOCKED)

    def _tend(self, found: Found) -> None:
        context = self.context
        shard, kind = found.shard, Tender
        if found.backup:
            shard, kind = stand_in(found.shard, found.backup, context.worker), BackupTender
        holding = Holding(
            shard,
            found.table,
            context.memory.scope(),
            found.view,
            context.durations,
            context.load.resources,
        )
        tender = kind(context, found.view, holding, self._announce)
        self.tenders[found.view.run, found.shard.id] = tender
        if context.stopping:
            tender.let_go(context.stopping)
        self._heed_cancelled_tasks(tender)
        self._spawn(self._tend_until_over(tender), self._jobs)

    async def _tend_until_over(self, tender: Tender) -> None:
        key = (tender.view.run, tender.holding.shard.id)
        try:
            await tender.run()
        except* UntrustedObject as errors:  # in the way of its next entry: what it has not committed is lost
            tender.view.distrust(key[1], _first(errors))
        finally:
            del self.tenders[key]
            self._worked_at = self.context.clock.monotonic()
            if tender.letting_go == UNFIT:
                self.finder.unfit.add(key)
            tender.holding.values.clear()
        # What this shard gave may be what others waited for, and what it took nobody needs any more.
        self._announce(tender.view)
        self.context.discarder.stir(tender.view, keys.root_number(key[1]), over=True)
        self._look_again()
        if not self.tenders:
            self._session_news.set()  # idle workers look for new runs more often than busy ones

    def _announce(self, view: RunView) -> None:
        """Tell the other holdings of a run, and of runs that depend on it, that more is known of it."""
        for tender in self.tenders.values():
            concerned = tender.view is view or tender.view.others.get(view.run) is view
            if concerned and tender.holding.news():
                tender.stir()
        self.context.wake.set()

    async def _let_go_of_all(self) -> None:
        assert self.context.stopping is not None
        for tender in self.tenders.values():
            tender.let_go(self.context.stopping)
        while self._jobs:
            await asyncio.wait(self._jobs)


def _first(errors: BaseExceptionGroup[UntrustedObject]) -> UntrustedObject:
    """Return the first of errors that tasks of a group have raised."""
    found = errors.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found


def _call(holding: Holding, position: int) -> Call:
    table = holding.table
    number = table.first + position
    return Call(
        position=position,
        number=number,
        key=table.keys[position],
        node=table.nodes[position],
        inputs=tuple((table.name(needed), needed) for needed in table.dependencies[position]),
        wanted=position in holding.wanted,
        used=bool(holding.uses.get(number)),
        attempt=holding.attempts[position],
        timeout=table.timeouts.get(position),
    )
