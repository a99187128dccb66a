"""How many workers are wanted, how many end the work in time, and how many can be paid for. Pure.

A fleet of a range begins with `FIRST` workers. What they do tells how long tasks take, and then it has as many as

* have `WORTH` seconds of work each,
* or end what waits before the session does, or before somebody wants it done, if that takes more (`in_time`),

and never more than have a task each, than the range and the fleet allow, and than the money left can usefully run
(`affordable`, `payable`). No worker is started that would have no time to do anything (`has_time`).
"""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

#: Seconds of work that a new worker should have at least: its start takes about a minute, which is paid for, too.
WORTH = 120.0
#: Workers with which a run of unknown length begins: by what they do it is known what more are worth.
FIRST = 8
#: Workers that one start asks for at most: RunTask takes 20 tasks a second, and a start must be sent soon.
MOST_AT_ONCE = 500
#: Seconds until work has spread over new workers, and until the news of the last of it has come: as seen in the
#: simulator, where a hundred and more find theirs by splitting what others hold.
SPREAD = 30.0
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

    @property
    def mean(self) -> float:
        """Seconds that a task takes; 0 while that is not known."""
        return 0.0 if self.seconds is None or not self.pending else self.seconds / self.pending


class Time(NamedTuple):
    """How much time there is, in seconds from now; None means no limit."""

    #: until a worker that is started now works: the fleet tells it
    boot: float = 0.0
    #: until the session ends
    session: float | None = None
    #: until what waits should be done, if somebody has said so
    work: float | None = None


ENDLESS = Time()


class Bound(NamedTuple):
    """What bounds a fleet, whatever is asked for: such as a quota of an account."""

    #: how many workers there can be at a time
    workers: int
    #: why, and what to do about it, in words
    why: str


class Budget(NamedTuple):
    """What may be spent, in USD; None means no limit."""

    #: of one worker an hour
    price: float
    #: in all, and what of it is spent
    total: float | None
    spent: float
    hourly: float | None


def wanted(goal: Goal, demand: Demand, threads: int, there: int = 0, time: Time = ENDLESS) -> int:
    """Return how many workers there should be.

    None without work, and never more than have a task each. Of a range as many as have `WORTH` seconds of work
    each, so that a fleet grows with the work and not with the number of tasks; more if that ends it in time.

    Parameters
    ----------
    there
        How many there are, or are about to be.

    Examples
    --------
    >>> wanted(Goal(50, 50), Demand(1000, None), 4), wanted(Goal(50, 50), Demand(9, None), 4)
    (50, 3)
    >>> [wanted(Goal(2, 50), Demand(1000, seconds), 4) for seconds in (None, 100.0, 4800.0, 1e6)]
    [8, 2, 10, 50]
    >>> wanted(Goal(2, 50), Demand(0, 0.0), 4)
    0
    >>> [wanted(Goal(2, 50), Demand(1000, 4800.0), 4, 0, Time(60.0, left, 1e6)) for left in (3600.0, 160.0)]
    [10, 19]
    """
    if not demand.pending:
        return 0
    useful = ceil(demand.pending / threads)
    worth = FIRST if demand.seconds is None else ceil(demand.seconds / (threads * WORTH))
    soon = max(in_time(demand, threads, there, left, time.boot) for left in (time.session, time.work))
    return min(useful, goal.maximum, max(goal.minimum, worth, soon, 1))


def in_time(demand: Demand, threads: int, there: int, left: float | None, boot: float) -> int:
    """Return how many workers end the work within `left` seconds; 0 if nobody can tell, or new ones do not help.

    Those that are there work until then. A new one counts for what is left after its start, `SPREAD` and one more
    task: the last task of a thread must begin a task's length before the end. Whatever the tasks' order, that is
    enough if all take as long. And who was counted so counts for more later on: time that passes asks for no others.
    Each must have as long to work as it takes to start: what can hardly be reached is not worth any number of starts.

    A limit that is farther than `horizon` asks for nobody whom `WORTH` does not.

    Examples
    --------
    >>> work = Demand(pending=100, seconds=1000.0)
    >>> [in_time(work, 1, 0, left, boot=60.0) for left in (None, 60.0, 155.0, 180.0, 200.0, 1100.0)]
    [0, 0, 0, 13, 10, 1]
    >>> in_time(work, 1, 4, 180.0, boot=60.0), in_time(work, 1, 8, 180.0, boot=60.0)
    (8, 8)
    """
    if left is None or demand.seconds is None:
        return 0
    each = left - boot - SPREAD - demand.mean
    if each <= 0 or each < boot:
        return 0
    undone = demand.seconds - there * threads * left
    # Less a hair: what was reckoned so before must not round up to one more.
    return there + max(0, ceil(undone / (threads * each) - 1e-6))


def horizon(demand: Demand, boot: float) -> float:
    """Return the seconds within which an end makes a difference.

    >>> horizon(Demand(10, 300.0), boot=60.0)
    240.0
    """
    return boot + SPREAD + demand.mean + WORTH


def has_time(demand: Demand, time: Time) -> bool:
    """Tell whether a worker that is started now can do anything before the session ends: one task, as they are.

    >>> [has_time(Demand(100, 1000.0), Time(60.0, left)) for left in (None, 65.0, 75.0)]
    [True, False, True]
    """
    return time.session is None or time.session > time.boot + demand.mean


def is_late(demand: Demand, threads: int, there: int, most: int, left: float, boot: float) -> bool:
    """Tell whether the work cannot end within `left` seconds, were there `most` workers from now on.

    >>> [is_late(Demand(100, 1000.0), 1, 2, 10, left, boot=60.0) for left in (120.0, 150.0)]
    [True, False]
    """
    if demand.seconds is None:
        return False
    new = max(0, most - there) * max(0.0, left - boot)
    return demand.seconds > threads * (there * max(0.0, left) + new)


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


def payable(budget: Budget, demand: Demand, threads: int, there: int, boot: float) -> int | None:
    """Return how many workers the money left can usefully run; None means any number.

    It pays for the end of all, for the start of those that are new, and then for `WORTH` seconds of each, or for the
    work if that is less. So what is left is not spent on starts.

    Examples
    --------
    >>> work, much = Demand(100, 1000.0), Demand(100, 1e6)
    >>> budget = Budget(price=3.6, total=10.0, spent=7.0, hourly=None)  # 3,000 s of a worker are left
    >>> [payable(budget, work, 1, there, boot=60.0) for there in (0, 10)]
    [13, 17]
    >>> [payable(budget, much, 1, there, boot=60.0) for there in (0, 10)]
    [11, 13]
    """
    if budget.total is None or budget.price <= 0 or demand.seconds is None:
        return None
    spare = max(0.0, budget.total - budget.spent) / budget.price * 3600 + there * boot
    for_each = spare / (RUNS_ON + boot + WORTH)
    for_the_work = (spare - demand.seconds / threads) / (RUNS_ON + boot)
    return int(max(0.0, for_each, for_the_work))


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
