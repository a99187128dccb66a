"""Starts the workers that are missing, and ends a session whose money is spent.

Clients do this while they wait, and workers take turns at it when no client is there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, runtime_checkable

from burst_dask.config import Settings
from burst_dask.journal import log
from burst_dask.journal.heartbeats import Heartbeats, heartbeats
from burst_dask.journal.log import Author
from burst_dask.journal.spending import Spending
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import policy
from burst_dask.protocol.keys import RunId, SessionId
from burst_dask.protocol.session import CLOCKS_AGREE, SessionState
from burst_dask.protocol.session_records import Halt, Start
from burst_dask.scaling import sizing
from burst_dask.scaling.sizing import Bound, Budget, Demand, Goal, Time
from burst_dask.store.base import Store

logger = logging.getLogger("burst_dask.scaling")

#: Seconds between looks at the fleet by all together, when all are there: a look at a whole fleet is a request to
#: the store and some to the service that runs it. With a tenth of the workers left it is a tenth as often.
TOGETHER_EVERY = 5.0
#: … and by one of them, at least
EACH_EVERY = 10.0
#: Seconds for which a start counts in full, whatever the fleet says of it: its writer sends it within half of
#: them or never, and after the other half it shows in any listing.
SETTLED_AFTER = 60.0
#: Seconds within which a start is carried out, or the rest of it never is.
SENT_WITHIN = SETTLED_AFTER / 2


@runtime_checkable
class Elastic(Protocol):
    """A fleet whose workers can be started by numbered starts, from anywhere."""

    @property
    def boot(self) -> float:
        """Seconds until a worker that is started now works."""

    async def counted(self) -> dict[int, int]:
        """Return how many workers run or are about to, by the number of their start; others under -1."""

    async def shrink(self, workers: int) -> None:
        """End what is more than that, if it costs: a start may have come when fewer were wanted already."""

    async def resting(self) -> int:
        """Return how many workers have lately ended by themselves, since they had nothing to do."""

    async def begin(self, number: int, workers: int, still: Callable[[], bool]) -> None:
        """Start workers as start `number`; asked twice for the same one, it starts none the second time.

        Parameters
        ----------
        still
            Tells whether the start is yet to be carried out. When it is not, nothing more is sent: others take it that
            what has not come by now never will, and start others.

        Raises
        ------
        FleetError
            Some or all could not be started.
        """


@runtime_checkable
class Bounded(Protocol):
    """A fleet that cannot have any number of workers."""

    async def bound(self) -> Bound | None:
        """Return how many it can have at a time, and why; None while that is not known. It asks seldom."""


class Healer:
    """Compares the fleet with what is wanted, and sees to it that both agree.

    Parameters
    ----------
    fleet
        None when its workers are started elsewhere: then only the money is watched.
    now
        Returns the store's time in seconds since 1970; this machine's where nobody says how to ask the store.
    """

    def __init__(
        self,
        store: Store,
        session: SessionId,
        settings: Settings,
        author: Author,
        fleet: Elastic | None,
        now: Callable[[], Awaitable[float]] | None = None,
    ) -> None:
        self._store = store
        self._session = session
        self._settings = settings
        self._author = author
        self.fleet = fleet
        self.now = now or self._own_time
        #: number of a sign of a client, and the store's dates of entry 0 and of that one
        self._dates: tuple[int, float, float] = (-1, 0.0, 0.0)
        self._spending = Spending(store, session)
        self._views: dict[RunId, RunView] = {}
        self._complete: set[RunId] = set()
        #: number of a start -> when it was first seen here
        self._seen: dict[int, float] = {}
        #: how many there are to take turns with
        self.workers = 1

    def watches(self, state: SessionState) -> bool:
        """Tell whether there is anything to look after: a fleet, or money."""
        return self.fleet is not None or self._limit(state) is not None

    def _limit(self, state: SessionState) -> float | None:
        return self._settings.max_cost if state.max_cost is None else state.max_cost

    def pause(self) -> float:
        """Return the seconds until the next turn of one of `workers`, who do not know of each other."""
        each = max(EACH_EVERY, TOGETHER_EVERY * self.workers)
        return each * self._author.entropy.uniform(0.1, 1.9)

    async def heal(self, state: SessionState, eager: bool = False) -> SessionState:
        """Do what is to be done; return the session's state after it.

        Parameters
        ----------
        eager
            Whether workers are wanted for work that is yet to come.

        Raises
        ------
        FleetError
            Workers are missing and could not be started.
        """
        state = await log.follow(self._store, self._session, state)
        while self.watches(state) and not state.closed and state.halted is None:
            beats = None
            if self.fleet is None or self._limit(state) is not None:
                beats = await heartbeats(self._store, self._session)
            running, there = await self._there(state, beats)
            budget = await self._budget(state, beats)
            # Where nobody is left and the money does not pay for anybody, nobody would come, and nobody would say why.
            if sizing.is_spent(budget, max(there, 1 if self.fleet is not None and state.workers else 0)):
                return await self._halt(state, budget)
            if self.fleet is None or state.workers is None:
                return state
            if running > state.workers:
                await self.fleet.shrink(state.workers)
                return state
            if (missing := await self._missing(state, there, budget, eager)) <= 0:
                return state
            still = self._window()
            after = await log.try_append_session(self._store, self._session, state, self._author, Start(missing))
            if after is not None:
                if still():
                    logger.info("starting %d workers", missing)
                    await self.fleet.begin(after.next - 1, missing, still)
                return after
            state = await log.follow(self._store, self._session, state)  # somebody was first: count anew
        return state

    def _window(self) -> Callable[[], bool]:
        """Return what tells for how long a start may be carried out that is decided now: others count it as long.

        This process may sleep at any moment. A machine that does stops its monotonic clock, and not its wall clock.
        """
        clock = self._author.clock
        begin, date = clock.monotonic(), clock.wall()

        def still() -> bool:
            return max(clock.monotonic() - begin, clock.wall() - date) < SENT_WITHIN

        return still

    async def _there(self, state: SessionState, beats: Heartbeats | None) -> tuple[int, int]:
        """Return how many workers run, and how many run, may run, or are about to."""
        counted = {-1: self._alive(beats)} if self.fleet is None else await self.fleet.counted()
        running = sum(counted.values())
        now = self._author.clock.monotonic()
        for number, (workers, wrote) in state.starts.items():
            if self.fleet is not None and not self._is_settled(number, wrote, now):
                counted[number] = max(workers, counted.get(number, 0))
        there = sum(counted.values())
        self.workers = max(1, there)
        return running, there

    def _alive(self, beats: Heartbeats | None) -> int:
        if beats is None or not beats.beats:
            return 0
        newest, gone, lease = max(beats.beats.values()), set(beats.ended), self._settings.lease
        return sum(not policy.lease_is_dead(newest, date, who in gone, lease) for who, date in beats.beats.items())

    async def _budget(self, state: SessionState, beats: Heartbeats | None) -> Budget:
        settings, spent = self._settings, 0.0
        if beats is not None:
            found = await self._spending.look(*beats, fresh=False)
            spent = sum(each.cost(settings.worker_price) for each in found.values())
            if self.fleet is not None:
                starting = max(len(found), sum(workers for workers, _ in state.starts.values())) * sizing.PAID_BEFORE
                spent += starting / 3600 * settings.worker_price
        return Budget(settings.worker_price, self._limit(state), spent, settings.max_hourly_cost)

    def _is_settled(self, number: int, wrote: float, now: float) -> bool:
        """Tell whether the fleet's own count shows all of a start that there ever will be.

        By the time since the start was first seen here; by wall clocks only when they leave no doubt.
        """
        seen = self._seen.setdefault(number, now)
        return now - seen >= SETTLED_AFTER or self._author.clock.wall() - wrote >= CLOCKS_AGREE + SETTLED_AFTER

    async def _missing(self, state: SessionState, there: int, budget: Budget, eager: bool) -> int:
        """Return how many workers are to be started now."""
        assert self.fleet is not None
        most = state.workers or 0
        if (can := sizing.affordable(budget)) is not None:
            most = min(most, can)
        if there >= most:  # whatever there is to do
            return 0
        demand = Demand(0, None) if eager else await self._demand(state)
        if not eager and not demand.pending:
            return 0
        time = await self._time(state, demand)
        if not sizing.has_time(demand, time):
            return 0
        if eager:
            want = most if state.minimum == state.workers else min(most, max(state.minimum, 1))
        else:
            want = min(most, await self._wanted(state, there, budget, demand, time))
        want = min(want, there + sizing.MOST_AT_ONCE)
        if want > there and isinstance(self.fleet, Bounded) and (bound := await self.fleet.bound()) is not None:
            want = min(want, bound.workers)
        return want - there

    async def _wanted(self, state: SessionState, there: int, budget: Budget, demand: Demand, time: Time) -> int:
        """Return how many workers there should be for what waits."""
        assert self.fleet is not None
        threads = self._settings.threads
        want = sizing.wanted(Goal(state.minimum, state.workers or 0), demand, threads, there, time)
        if (can := sizing.payable(budget, demand, threads, there, time.boot)) is not None:
            want = min(want, max(can, 1))  # the last one works until all is spent, so that somebody says so
        if there and want > there:
            # They waited in vain for what is pending, which waits for what others do.
            want -= await self.fleet.resting()
        return want

    async def _time(self, state: SessionState, demand: Demand) -> Time:
        """Return how much time there is, without a request while any end is too far to make a difference."""
        assert self.fleet is not None
        boot = self.fleet.boot
        ends = self._ends(state, state.opened_wrote, state.sign_wrote)
        nearest = min(filter(None, (ends, state.done_by)), default=None)
        near = sizing.horizon(demand, boot) + CLOCKS_AGREE
        if nearest is None or nearest - self._author.clock.wall() > near:
            return Time(boot)
        if ends is not None and self._dates[0] != state.sign:
            dates = await log.session_dates(self._store, self._session, state.sign)
            if dates is None:  # a cleanup has deleted the log
                return Time(boot)
            self._dates = (state.sign, *dates)
        now = await self.now()
        ends = None if ends is None else self._ends(state, *self._dates[1:])
        return Time(boot, None if ends is None else ends - now, state.done_by - now if state.done_by else None)

    def _ends(self, state: SessionState, opened: float, sign: float) -> float | None:
        return state.deadline(opened, sign, self._settings.session_timeout, self._settings.absolute_timeout)

    async def _own_time(self) -> float:
        return self._author.clock.wall()

    async def _demand(self, state: SessionState) -> Demand:
        """Return what is left to do in all runs."""

        async def look(run: RunId) -> RunView | None:
            view = self._views.get(run) or await RunView.open(self._store, run)
            if view is not None:
                await view.survey()
            return view

        live = [run for run in state.live_runs if run not in self._complete]
        for run, view in zip(live, await in_parallel(look, live), strict=True):
            if view is None:
                continue
            if not view.totals().pending:
                self._complete.add(run)
                self._views.pop(run, None)
                continue
            self._views[run] = view
        return demand_of([self._views[run] for run in live if run in self._views])

    async def _halt(self, state: SessionState, budget: Budget) -> SessionState:
        assert budget.total is not None
        logger.warning("%.2f of %.2f USD are spent: the work stops", budget.spent, budget.total)
        return await log.append_session(
            self._store, self._session, state, self._author, Halt(budget.spent, budget.total)
        )


def demand_of(views: Iterable[RunView]) -> Demand:
    """Return what is left to do in runs, as far as they were surveyed."""
    pending, ran, seconds = 0, 0, 0.0
    for view in views:
        totals = view.totals()
        if totals.pending:
            pending += totals.pending
            ran += sum(shard.index.outcomes.ran for shard in view.shards.values())
            seconds += totals.seconds
    return Demand(pending, pending * seconds / ran if ran else None)


async def heal_quietly(healer: Healer, state: SessionState) -> SessionState:
    """Heal, if it can be done: a worker has better to do than to fail because others could not be started."""
    try:
        return await healer.heal(state)
    except Exception as error:  # whatever a service may answer
        logger.warning("the fleet could not be looked after: %s", str(error) or repr(error))
        return state
