"""Which results of a run are needed yet, found in the plainest way: for all tasks, from the last to the first.

`burst_dask.journal.needs` finds the same for a few tasks, by what one worker knows. What it says must be true here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from enum import Enum

from burst_dask.protocol import keys
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import Outcomes
from burst_dask.protocol.shard import segments_of
from burst_dask.testing.facts import Facts


class Fate(Enum):
    """What became of a task."""

    PENDING = "it has no outcome"
    #: by itself
    FAILED = "it failed, and may be replayed"
    UPSTREAM = "it failed because another did"
    STORED = "its result is stored"
    UNSTORED = "its result was only in memory, or was deleted"


def fate_of(outcomes: Outcomes, position: int) -> Fate:
    """Return what became of the task at a position of a shard."""
    if position in outcomes.done:
        return Fate.STORED if position in outcomes.stored else Fate.UNSTORED
    if position not in outcomes.failed:
        return Fate.PENDING
    return Fate.UPSTREAM if any(position in tasks for tasks in outcomes.upstream.values()) else Fate.FAILED


def needed(inputs: Iterable[Iterable[int]], asked: Iterable[int], fate: Callable[[int], Fate]) -> dict[int, str]:
    """Return why results are needed, of those that are.

    Parameters
    ----------
    inputs
        For each task, in an order in which they can run, those that it needs.
    asked
        The tasks whose results were asked for.

    Examples
    --------
    A chain, of which the last was asked for and is yet to run:

    >>> fates = [Fate.STORED, Fate.STORED, Fate.UNSTORED, Fate.PENDING]
    >>> sorted(needed([[], [0], [1], [2]], [3], fates.__getitem__))
    [1, 2, 3]
    """
    needs = [list(some) for some in inputs]
    users: dict[int, list[int]] = defaultdict(list)
    for task, some in enumerate(needs):
        for need in some:
            users[need].append(task)
    why = {task: "it was asked for" for task in asked}
    for task in range(len(needs) - 1, -1, -1):
        for user in users[task]:
            found = fate(user)
            if found in (Fate.PENDING, Fate.FAILED) or (found is Fate.UNSTORED and user in why):
                why.setdefault(task, f"task {user} needs it: {found.value}")
    return why


def needed_of(facts: Facts) -> dict[int, str] | None:
    """Return the same of a run that was read; None when not all of it could be."""
    if facts.plan is None or facts.uncertain or len(facts.records) < len(facts.plan.shards):
        return None
    owner: dict[int, ShardId] = {}
    for family in facts.families:
        for shard in family:
            owner.update((facts.first(shard) + position, shard) for position in facts.index(shard).tasks)

    def fate(task: int) -> Fate:
        if task not in owner:
            return Fate.PENDING
        shard = owner[task]
        return fate_of(facts.index(shard).outcomes, task - facts.first(shard))

    records = [facts.records[number] for number in range(len(facts.plan.shards))]
    inputs = [[need for need in needs if need < facts.tasks] for record in records for needs in record.dependencies]
    asked = [record.first + position for record in records for position in record.outputs]
    return needed(inputs, asked, fate)


def leftover(facts: Facts) -> Iterator[str]:
    """Yield the keys of segments with nothing that is needed, which are not discarded yet."""
    why = None if facts.session.settings.keep_intermediates else needed_of(facts)
    if why is None or facts.is_swept:
        return
    for shard in facts.known_shards:
        index, first = facts.index(shard), facts.first(shard)
        for place, positions in segments_of(index).items():
            name = index.objects[place]
            if not positions and name.endswith(keys.LASTING):
                continue  # a backup copy was first while its entry was on the way; no worker may delete such a name
            if not any(position in index.outcomes.failed or first + position in why for position in positions):
                yield keys.segment(facts.run, shard, name)
