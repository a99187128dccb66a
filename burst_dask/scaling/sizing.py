"""How many workers are wanted, and how many can be paid for."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

#: Seconds of work that a new worker should have at least: its start takes about a minute, which is paid for, too.
WORTH = 120.0
#: Workers with which a run of unknown length begins: by what they do it is known what more are worth.
FIRST = 8
#: Workers that one start asks for at most: RunTask takes 20 tasks a second, and a start must be sent soon.
MOST_AT_ONCE = 500
#: Seconds for which a fleet runs on once its money is said to be spent, about: until somebody looks, until workers
#: read it, and until they have handed over.
RUNS_ON = 90.0
#: Seconds for which a worker is paid for before it says that it has started: Fargate counts from the pull of the image.
PAID_BEFORE = 60.0


class Goal(NamedTuple):
    """What somebody has asked for: a size, for which both are the same, or a range."""

    minimum: int
    maximum: int


class Demand(NamedTuple):
    """What is left to do."""

    #: tasks without an outcome
    pending: int
    #: what they take one thread; None while nothing has run that could tell
    seconds: float | None


class Budget(NamedTuple):
    """What may be spent, in USD; None means no limit."""

    #: of one worker an hour
    price: float
    #: in all, and what of it is spent
    total: float | None
    spent: float
    hourly: float | None


def wanted(goal: Goal, demand: Demand, threads: int) -> int:
    """Return how many workers there should be.

    None without work, and never more than have a task each. Of a range as many as have `WORTH` seconds of work
    each, so that a fleet grows with the work and not with the number of tasks.

    Examples
    --------
    >>> wanted(Goal(50, 50), Demand(1000, None), 4), wanted(Goal(50, 50), Demand(9, None), 4)
    (50, 3)
    >>> [wanted(Goal(2, 50), Demand(1000, seconds), 4) for seconds in (None, 100.0, 4800.0, 1e6)]
    [8, 2, 10, 50]
    >>> wanted(Goal(2, 50), Demand(0, 0.0), 4)
    0
    """
    if not demand.pending:
        return 0
    useful = ceil(demand.pending / threads)
    worth = FIRST if demand.seconds is None else ceil(demand.seconds / (threads * WORTH))
    return min(useful, goal.maximum, max(goal.minimum, worth, 1))


def affordable(budget: Budget) -> int | None:
    """Return how many workers may run at once; None means any number.

    Of the total, what the fleet costs until it has ended is set aside.

    Examples
    --------
    >>> affordable(Budget(price=0.2, total=None, spent=3.0, hourly=1.0))
    5
    >>> affordable(Budget(price=0.2, total=3.012, spent=3.0, hourly=None))
    2
    """
    if budget.price <= 0:
        return None
    limits = []
    if budget.hourly is not None:
        limits.append(int(budget.hourly / budget.price + 1e-9))
    if budget.total is not None:
        limits.append(int(max(0.0, budget.total - budget.spent) / (budget.price * RUNS_ON / 3600)))
    return min(limits, default=None)


def is_spent(budget: Budget, workers: int) -> bool:
    """Tell whether `workers` have to end now, so that what they cost until they have ended stays within the total.

    Examples
    --------
    >>> budget = Budget(price=0.4, total=10.0, spent=9.95, hourly=None)
    >>> is_spent(budget, 4), is_spent(budget, 6)
    (False, True)
    """
    if budget.total is None:
        return False
    return budget.spent + workers * budget.price * RUNS_ON / 3600 >= budget.total
