"""What is yet to come, in words: work that cannot end in time, a fleet that may not grow, money that is too little."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import NamedTuple

from burst_dask.client.link import Link
from burst_dask.journal.view import RunView
from burst_dask.report.tables import duration, money
from burst_dask.scaling import sizing
from burst_dask.scaling.healer import Bounded, demand_of
from burst_dask.scaling.sizing import Bound, Budget, Demand, Goal, Time


class Facts(NamedTuple):
    """What the notes follow from."""

    session: str
    demand: Demand
    #: of a worker
    threads: int
    #: workers that are alive
    there: int
    #: … and those that there may be, as it was asked for; None when they are started elsewhere
    goal: Goal | None
    #: what else bounds them
    bound: Bound | None
    time: Time
    #: USD of a worker an hour
    price: float
    #: USD that are left of the session's; None without a limit
    money: float | None

    @property
    def most(self) -> int:
        """How many workers there may be from now on."""
        most = self.there if self.goal is None else self.goal.maximum
        return max(self.there, most if self.bound is None else min(most, self.bound.workers))


async def notes(link: Link, views: Sequence[RunView], there: int, cost: float) -> tuple[str, ...]:
    """Return what is to be said of an open session whose runs were surveyed.

    Parameters
    ----------
    there
        Workers that are alive.
    cost
        USD so far.
    """
    state, settings = link.state, link.settings
    demand = demand_of([view for view in views if view.run in state.live_runs])
    if not demand.pending:
        return ()
    deadline, now = await link.deadline(), link.wall()
    limit = settings.max_cost if state.max_cost is None else state.max_cost
    facts = Facts(
        session=link.session,
        demand=demand,
        threads=settings.threads,
        there=there,
        goal=None if state.workers is None else Goal(state.minimum, state.workers),
        bound=await _bound(link),
        time=Time(
            boot=link.boot,
            session=None if deadline is None else deadline - now,
            work=state.done_by - now if state.done_by else None,
        ),
        price=settings.worker_price,
        money=None if limit is None else limit - cost,
    )
    return tuple(told(facts))


async def _bound(link: Link) -> Bound | None:
    """Return what bounds the fleet most."""
    fleet, settings = link.fleet, link.settings
    bounds = []
    if isinstance(fleet, Bounded) and link.state.workers and (quota := await fleet.bound()) is not None:
        bounds.append(quota)
    hourly = settings.max_hourly_cost
    if (can := sizing.affordable(Budget(settings.worker_price, None, 0.0, hourly))) is not None and hourly is not None:
        why = f"max_hourly_cost is {money(hourly)}, and a worker costs {money(settings.worker_price)} an hour"
        bounds.append(Bound(can, why))
    return min(bounds, key=lambda one: one.workers, default=None)


def told(facts: Facts) -> list[str]:
    """Return what is to be said.

    Examples
    --------
    >>> work = Demand(pending=1000, seconds=36_000.0)
    >>> facts = Facts("s", work, 1, 2, Goal(0, 10), None, Time(60.0, 1800.0), price=0.5, money=1.0)
    >>> for note in told(facts):
    ...     print(note)
    what waits takes 10 workers 1 h 0 min, and the session ends in 30 min 0 s: burst extend s 1h, or burst adapt s 0 22
    what waits costs about 5.00 USD, and 1.00 USD are left: burst extend s --max-cost lets more be spent
    """
    return [*_bounded(facts), *_late(facts), *_poor(facts)]


def _bounded(facts: Facts) -> list[str]:
    bound, goal = facts.bound, facts.goal
    if bound is None or goal is None or goal.maximum <= bound.workers:
        return []
    return [f"of the {goal.maximum} workers that were asked for, {bound.workers} can run at a time: {bound.why}"]


def _late(facts: Facts) -> list[str]:
    """Say that what waits cannot end in time, and what helps."""
    demand, time, most = facts.demand, facts.time, facts.most
    extend = f"burst extend {facts.session} 1h"
    if not sizing.has_time(demand, time) and most > facts.there and time.session is not None:
        soon = duration(max(0.0, time.session))
        return [f"no worker is started any more: it would have nothing done when the session ends, in {soon}: {extend}"]

    def late(left: float | None) -> bool:
        return left is not None and sizing.is_late(demand, facts.threads, facts.there, most, left, time.boot)

    if not most or not (late(time.session) or late(time.work)):
        return []
    takes = f"what waits takes {_workers(most)} {duration((demand.seconds or 0.0) / (facts.threads * most))}"
    if time.session is not None and late(time.session):
        ways = [extend, *_enough(facts, time.session)]
        return [f"{takes}, and the session ends in {duration(time.session)}: {', or '.join(ways)}"]
    left = time.work if time.work is not None else 0.0
    if left <= 0:
        return [f"{takes}, and should have been done {duration(-left)} ago"]
    enough = _enough(facts, left) or ["no more workers would end it in time"]
    return [f"{takes}, and should be done in {duration(left)}: {enough[0]}"]


def _enough(facts: Facts, left: float) -> list[str]:
    """Say how many workers would do, if any number would."""
    enough = sizing.in_time(facts.demand, facts.threads, facts.there, left, facts.time.boot)
    if not facts.there < enough <= ceil(facts.demand.pending / facts.threads):
        return []
    if facts.goal is None or (facts.bound is not None and enough > facts.bound.workers):
        return [f"{enough} workers"]
    if facts.goal.minimum == facts.goal.maximum:
        return [f"burst scale {facts.session} {enough}"]
    return [f"burst adapt {facts.session} {facts.goal.minimum} {enough}"]


def _workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one worker"


def _poor(facts: Facts) -> list[str]:
    """Say that the money left does not pay for what waits."""
    if facts.money is None or facts.demand.seconds is None or not facts.price:
        return []
    costs = facts.demand.seconds / facts.threads / 3600 * facts.price
    if costs <= facts.money:
        return []
    return [
        f"what waits costs about {money(costs)}, and {money(max(0.0, facts.money))} are left: "
        f"burst extend {facts.session} --max-cost lets more be spent"
    ]
