"""What to do when there is a choice: pure functions of facts.

No decision here can lose data, whatever it answers: safety is the shard log's alone. These
decide how soon, how much and who, and so what a run costs and how long it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.shard import SUSPECT_IN_COMPANY

#: Tasks that died in company once are tried this many together; log4 steps isolate one of 1,024.
SUSPECTS_TOGETHER = 8
#: Bytes a second that one connection to S3 carries (AWS: 85 to 90 MB/s).
STORE_SPEED = 85e6
#: Seconds that storing costs however small the result is: about one PUT.
STORE_LATENCY = 0.04
#: A holder commits, to reserve more, when less than this many seconds of reserved work is left:
#: several PUTs, so that threads seldom wait for one.
RESERVE_LOW_WATER = 0.25
#: A task is a straggler when it takes so many times as long as others of its kind.
STRAGGLER_FACTOR = 3.0
#: What is no more than this many times the usual portion is not cut in two.
NEARLY = 1.5
#: Times a second that all idle workers together look for work: with a handful of requests each that is
#: well below what one prefix takes (5,500 GET a second).
TOGETHER = 160
#: Times a second that all workers of a large fleet together look into the session log at most: one GET each.
FOLLOWED_TOGETHER = 1000
#: Longest pause between two tries of a task, in seconds.
RETRY_LONGEST = 60.0
#: Finished results of this many bytes are committed without waiting for more.
COMMIT_BYTES = 32 << 20


def backoff(attempt: int, low: float, high: float, factor: float = 2.0) -> float:
    """Return the seconds to wait before look number `attempt` (from 0).

    >>> [backoff(n, 1, 30) for n in range(6)]
    [1.0, 2.0, 4.0, 8.0, 16.0, 30]
    """
    return min(high, low * factor ** min(attempt, 64))


def retry_pause(tries: int, first: float) -> float:
    """Return the seconds between try number `tries` of a task, which failed, and the next.

    Parameters
    ----------
    first
        `Settings.retry_delay`.

    >>> [retry_pause(tries, 1.0) for tries in (1, 2, 3, 10)], retry_pause(3, 0.0)
    ([1.0, 2.0, 4.0, 60.0], 0.0)
    """
    return backoff(tries - 1, first, RETRY_LONGEST)


def may_retry(raised: Iterable[str], retry_on: Iterable[str] | None) -> bool:
    """Tell whether an exception is one of those after which a task may be tried again.

    Parameters
    ----------
    raised
        ``module.name`` of the exception's class and of its bases.
    retry_on
        Names of classes, with or without their module; None names all.

    >>> may_retry(["builtins.ConnectionError", "builtins.OSError"], ["OSError", "mylib.Busy"])
    True
    >>> may_retry(["builtins.ValueError"], ["OSError"]), may_retry(["builtins.ValueError"], None)
    (False, True)
    """
    if retry_on is None:
        return True
    wanted = set(retry_on)
    return any(name in wanted or name.rpartition(".")[2] in wanted for name in raised)


def patience(waited: float, low: float, high: float) -> float:
    """Return the seconds to wait before the next look for something already waited for so long.

    An eighth of the time waited: the look comes at most that much late, and the number of looks
    grows with the logarithm of the time, not with the time.

    >>> patience(0.1, 0.05, 2), patience(8, 0.05, 2), patience(100, 0.05, 2)
    (0.05, 1.0, 2)
    """
    return min(high, max(low, waited / 8))


def attached_poll(low: float, high: float, workers: int) -> float:
    """Return the seconds between looks of one idle worker into the session log, of `workers` in all.

    Whoever looks first begins the work, so together they look every `low` seconds, however many
    they are; each looks at least every `high`, unless they are so many that it would be more than
    `FOLLOWED_TOGETHER` a second: every 2 s, ten thousand would send nearly all that one prefix takes.

    >>> attached_poll(0.05, 2.0, 4), attached_poll(0.05, 2.0, 1000), attached_poll(0.05, 2.0, 10_000)
    (0.2, 2.0, 10.0)
    """
    return max(min(high, low * max(1, workers)), workers / FOLLOWED_TOGETHER)


def after_work(idle: float, quick: float, seldom: float) -> float:
    """Return the seconds between looks into the session log of a worker without work, while a run seems to go on.

    That may have ended when the worker's own work did, or soon after: so the first looks come quickly, and are few.

    Parameters
    ----------
    idle
        Seconds since it had work.
    quick, seldom
        The shortest and the longest pause.

    >>> [after_work(idle, 0.4, 1.0) for idle in (0.0, 1.2, 3.0)], after_work(0.0, 2.0, 1.0)
    ([0.4, 0.6, 1.0], 1.0)
    """
    return min(seldom, max(quick, idle / 2))


def in_turn(low: float, workers: float) -> float:
    """Return the seconds between what each of many idle workers does, at least `low`.

    Together they do it `TOGETHER` times a second, however many they are: whoever finds something
    finds it for all, and one prefix of the store takes no more than a few thousand requests a second.

    >>> in_turn(1.0, 8), in_turn(1.0, 10_000)
    (1.0, 62.5)
    """
    return max(low, workers / TOGETHER)


def between_judgements(heartbeat: float, workers: int, looked: int = 0, idle: int = 0) -> float:
    """Return the seconds between two listings of all heartbeats by one worker.

    Nothing dies faster than heartbeats come. A listing of many takes many requests, at 1,000 each: so
    those who are idle take turns. How many they are is told by a few workers drawn at random, and the
    one who asks: the fewer, the more often it is its turn, so that what the dead held does not wait for
    turns that nobody takes. On the average all together list no more often than if all were idle.

    Parameters
    ----------
    looked, idle
        How many heartbeats of others were read lately, and how many of these held nothing.

    >>> between_judgements(10.0, 100), between_judgements(10.0, 10_000)
    (10.0, 625.0)
    >>> between_judgements(10.0, 10_000, looked=4, idle=4), between_judgements(10.0, 10_000, looked=4, idle=0)
    (625.0, 125.0)
    """
    idle_workers = workers * (1 + idle) / (1 + looked)
    return max(heartbeat, in_turn(0.0, idle_workers) * -(-workers // 1000))


def lease_is_dead(judge: float, holder: float | None, ended: bool, lease: float) -> bool:
    """Tell whether a holder may be taken over (PROTOCOL.md rule 6).

    Parameters
    ----------
    judge
        Newest date among all heartbeats, the judge's own, just written, being one of them.
    holder
        Date of the holder's heartbeat in the same listing; None when it has none.
    ended
        Whether the holder is recorded as ended.
    """
    return ended or holder is None or judge - holder > lease


def worth_storing(seconds: float, size: int) -> bool:
    """Tell whether recomputing a result costs more than storing it (PROTOCOL.md rule 9).

    A worker's death costs a recomputation; with fewer than one death in ten tasks, a result is
    worth storing when it took ten times what storing takes.
    """
    return seconds > 10 * (STORE_LATENCY + size / STORE_SPEED)


def straggles(age: float, usual: float | None, interval: float) -> bool:
    """Tell whether a reserved task takes so long that a second try may well end first.

    As cubed's ``should_launch_backup`` (there: three times the median).

    Parameters
    ----------
    age
        Seconds since the shard's newest entry was first seen: a task that runs has run for that long at least.
    usual
        Seconds that tasks of its kind took on this worker; None when it never ran one.
    interval
        `Settings.commit_interval`: an entry may be that old while all is well.

    >>> straggles(41, 10, 5), straggles(39, 10, 5), straggles(1000, None, 5)
    (True, False, False)
    """
    return usual is not None and age > STRAGGLER_FACTOR * usual + 2 * interval


class CommitFacts(NamedTuple):
    """What a holder knows when it asks whether to commit now."""

    #: outcomes not yet committed
    finished: int
    #: … and whether other shards depend on any of them
    wanted: bool
    #: bytes of them
    size: int
    #: seconds since the last entry
    since: float
    #: estimated seconds of reserved work that has not begun
    ahead: float
    #: estimated seconds until nothing more can run without news
    left: float
    #: whether there is work that could be reserved
    reservable: bool
    #: whether more is reserved than it should be, tasks being longer than they seemed
    excess: bool
    #: whether any task of the shard runs or may start
    active: bool


def commit_in(facts: CommitFacts, interval: float, interval_wanted: float, ahead: float) -> float | None:
    """Return in how many seconds to commit: 0 now, None when there is nothing to commit.

    Parameters
    ----------
    interval, interval_wanted, ahead
        `Settings.commit_interval`, `Settings.commit_interval_wanted` and `Settings.reserve_ahead`.
    """
    starving = facts.reservable and facts.ahead < RESERVE_LOW_WATER
    hoarding = facts.excess and facts.since >= ahead
    if starving or hoarding:
        return 0.0
    if not facts.finished:
        return None
    if not facts.active or facts.size >= COMMIT_BYTES:
        return 0.0
    if facts.wanted:
        return max(0.0, interval_wanted - facts.since)
    if facts.since + facts.left <= NEARLY * interval:
        return facts.left or None  # the end is near, and commits anyway
    return max(0.0, interval - facts.since)


def reserve(
    candidates: Iterable[int],
    seconds: Callable[[int], float],
    strikes: dict[int, int],
    running: Bitmap,
    threads: int,
    room: float,
) -> Bitmap:
    """Return the tasks that a holder reserves: those that run, and `room` thread-seconds of work.

    Parameters
    ----------
    candidates
        Tasks that can run now or after others of them, in order.
    seconds
        How long a task probably takes. A task that runs counts in full.
    strikes
        How often workers died under a task: suspects run after all others, and the strongly
        suspected alone, so that the next death names the culprit (rule 10).
    """
    spare = (NEARLY - 1) * room
    room -= sum(map(seconds, running))
    chosen: list[int] = []
    extra: list[int] = []
    suspects: list[int] = []
    for task in candidates:
        if task in running:
            continue
        if strikes.get(task):
            suspects.append(task)
            continue
        full = room <= 0 and len(chosen) + len(running) >= threads
        if full and room + spare <= 0:
            extra.clear()
            break
        room -= seconds(task)
        (extra if full else chosen).append(task)
    chosen += extra  # what little would be left is not worth another entry
    if not chosen and not running and suspects:
        suspects.sort(key=lambda task: strikes[task])
        alone = strikes[suspects[0]] >= SUSPECT_IN_COMPANY
        chosen = suspects[:1] if alone else [t for t in suspects if strikes[t] < SUSPECT_IN_COMPANY][:SUSPECTS_TOGETHER]
    return running | Bitmap.of(chosen)


def lost_for_good(strikes: int, allowed: int) -> bool:
    """Tell whether a task has lost so many workers that its outcome is WorkerLost.

    `strikes` starts to count single deaths beyond `SUSPECT_IN_COMPANY` - 1.

    >>> [lost_for_good(n, allowed=3) for n in (2, 3, 4)]
    [False, False, True]
    """
    return strikes - (SUSPECT_IN_COMPANY - 1) >= allowed


def steal(splittable: int, mean: float | None, minimum: float) -> int:
    """Return how many of the `splittable` tasks of a busy shard an idle worker takes: half, if that pays.

    Parameters
    ----------
    mean
        Seconds a task of the shard takes; None while none has ended, so that they are long, or new.
    minimum
        Seconds of work that are worth two PUTs.
    """
    count = (splittable + 1) // 2
    if mean is not None and count * mean < minimum:
        return 0
    return count
