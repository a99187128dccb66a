"""Where to cut an ordered graph into shards: pure functions of its shape and of what is known of sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Most tasks of a shard: its index rides in every entry of its log and must stay a few KB.
MOST_TASKS = 1024
#: Bytes of payload and constants of a shard, which its holder reads whole.
MOST_BYTES = 16 << 20
#: Shards per thread: so many that the last ones to be claimed even out what tasks really cost.
SHARDS_PER_THREAD = 4
#: How far from its ideal place a cut may be moved to cross fewer results, as a fraction of a shard.
TOLERANCE = 0.4


def width(dependencies: Sequence[Sequence[int]]) -> int:
    """Return how many tasks could run at once, at most: the largest number at one depth.

    >>> width([(), (0,), (1,)]), width([(), (), (0, 1)])
    (1, 2)
    """
    depths: list[int] = []
    counts: dict[int, int] = {}
    for needs in dependencies:
        depth = 1 + max([depths[need] for need in needs]) if needs else 0
        depths.append(depth)
        counts[depth] = counts.get(depth, 0) + 1
    return max(counts.values(), default=0)


def shard_size(tasks: int, parallelism: int, wide: int) -> int:
    """Return how many tasks a shard should have.

    More shards than the graph is wide would only wait for each other. A graph that does not
    fill its threads `SHARDS_PER_THREAD` times gets a shard for each thread: splitting evens
    out the rest, if its tasks turn out to be long.

    >>> shard_size(100_000, 16, 100_000), shard_size(5, 4, 4), shard_size(100, 8, 1)
    (1024, 2, 100)
    """
    shards = parallelism * SHARDS_PER_THREAD
    if tasks < shards:
        shards = parallelism
    return min(MOST_TASKS, -(-tasks // max(1, min(shards, wide))))


def last_uses(dependencies: Sequence[Sequence[int]]) -> list[int]:
    """Return for each task the last one that depends on it, or itself.

    >>> last_uses([(), (0,), (), (1, 2)])
    [1, 3, 3, 3]
    """
    last = list(range(len(dependencies)))
    for number, needs in enumerate(dependencies):
        for need in needs:
            last[need] = number
    return last


def cut(
    dependencies: Sequence[Sequence[int]],
    *,
    parallelism: int,
    sizes: Mapping[int, Mapping[int, int]] | None = None,
) -> list[int]:
    """Return where shards begin, and after the last of them the number of tasks.

    Parameters
    ----------
    dependencies
        For each task, in order, the numbers of those that it depends on.
    parallelism
        Threads that are expected to work on it.
    sizes
        Task -> id of a large object in it -> bytes; an object counts once in a shard.

    Examples
    --------
    Two trees of three are cut where no result crosses:

    >>> cut([(), (), (0, 1), (), (), (3, 4)], parallelism=2)
    [0, 3, 6]
    """
    tasks = len(dependencies)
    ideal = shard_size(tasks, parallelism, width(dependencies))
    last = last_uses(dependencies)
    bounds = [0]
    while bounds[-1] < tasks:
        start = bounds[-1]
        end = _best_end(start, ideal, dependencies, last)
        bounds.append(_within_bytes(start, end, sizes) if sizes else end)
    return bounds


def _best_end(start: int, ideal: int, dependencies: Sequence[Sequence[int]], last: Sequence[int]) -> int:
    """Return where around the ideal place the fewest of the shard's results would be needed later.

    Per task of the shard, and then as near as possible: in front of a task that needs all others,
    each result is needed later wherever the cut is, and a smaller shard gains nothing.
    """
    middle, slack = start + ideal, round(ideal * TOLERANCE)
    latest = min(middle + slack, start + MOST_TASKS)
    if len(dependencies) <= latest:
        return len(dependencies)
    best, best_cost = middle, (2.0, 0)
    crossing = 0
    for place in range(start + 1, latest + 1):
        task = place - 1
        crossing += last[task] > task
        for need in dependencies[task]:
            crossing -= need >= start and last[need] == task
        if place >= middle - slack:
            cost = crossing / (place - start), abs(place - middle)
            if cost < best_cost:
                best, best_cost = place, cost
    return best


def _within_bytes(start: int, end: int, sizes: Mapping[int, Mapping[int, int]]) -> int:
    """Return the last place up to `end` at which the shard is not too large."""
    seen: set[int] = set()
    total = 0
    for number in range(start, end):
        new = {item: size for item, size in sizes.get(number, {}).items() if item not in seen}
        seen.update(new)
        total += sum(new.values())
        if new and total > MOST_BYTES and number > start:
            return number
    return end
