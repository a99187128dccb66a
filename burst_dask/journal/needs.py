"""Which results of a run somebody may yet read (PROTOCOL.md, "Discarding").

A result is needed when it was asked for, or when a task that depends on it

* has no outcome yet,
* failed by itself: it may be replayed, or
* is done, its own result is not stored, and is needed itself: it would be computed again (rule 9).

All that this rests on is committed and final. So once a result is not needed it never will be, and old news of
other shards only make one seem needed that is not: whoever finds that nobody needs a result may say so.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from burst_dask.journal.view import RunView
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import ShardRecord
from burst_dask.protocol.shard import may_be_discarded


class Shape(NamedTuple):
    """What the task records of a plan shard say of who needs whose results."""

    #: positions whose results were asked for
    outputs: Bitmap
    #: position -> plan numbers of the other shards in which tasks depend on it
    elsewhere: Mapping[int, tuple[int, ...]]
    #: global number of a task or external -> positions here that depend on it
    users: Mapping[int, list[int]]

    @classmethod
    def of(cls, record: ShardRecord) -> Shape:
        users: dict[int, list[int]] = defaultdict(list)
        for position, needs in enumerate(record.dependencies):
            for number in needs:
                users[number].append(position)
        return cls(record.outputs, record.dependents, dict(users))


class Why(NamedTuple):
    """Why a result is needed, as far as known."""

    #: a shard that has a task without an outcome: reading on there may tell more
    pending: ShardId | None = None
    #: plan number of a shard whose shape is not known
    unknown: int | None = None


#: It was asked for, or a task that failed needs it: it stays.
FOR_EVER = Why()
#: Of a shard whose results more shards than this need (a shuffle), nothing is read until all of these have ended:
#: to read the task records of all of them would cost each of many workers as many requests.
FEW = 16


class Needs:
    """Tells of results of one run whether anybody needs them, by what its view knows.

    Parameters
    ----------
    shapes
        Those that are known, by plan number; others may be added.
    """

    def __init__(self, view: RunView, shapes: Mapping[int, Shape]) -> None:
        self._view = view
        self._shapes = shapes
        self._settled: set[int] = set()
        self._consumers = view.consumers

    def why(self, tasks: Iterable[int]) -> Why | None:
        """Return why one of these results is needed; None when nobody needs any of them."""
        stack = list(tasks)
        seen = set(stack)
        while stack:
            for found in self._users(stack.pop()):
                if isinstance(found, Why):
                    return found
                if found not in seen:
                    seen.add(found)
                    stack.append(found)
        return None

    def _users(self, task: int) -> Iterator[Why | int]:
        """Yield why a result is needed, or the tasks that would need it if their own results were needed."""
        home, position = self._view.plan.locate(task)
        shape = self._shapes.get(home)
        if shape is None:
            yield from self._without_shape(home)
            return
        if position in shape.outputs:
            yield FOR_EVER
        # Later shards are more likely to be at work yet.
        for number in (*reversed(shape.elsewhere.get(position, ())), home):
            if not self._is_settled(number):
                yield from self._users_in(number, task)

    def _without_shape(self, home: int) -> Iterator[Why]:
        """Yield why any result of a plan shard is needed, of which only the plan is known."""
        others = self._consumers.get(home, [])
        busy = next((number for number in (*reversed(others), home) if not self._is_settled(number)), None)
        if busy is None:
            if self._view.plan.shards[home].outputs:
                yield Why(unknown=home)
            return
        going_on = next((shard.id for shard in self._view.family(busy) if not shard.index.complete), None)
        if len(others) > FEW and going_on is not None:
            yield Why(pending=going_on)
        else:
            yield Why(unknown=home)

    def _users_in(self, number: int, task: int) -> Iterator[Why | int]:
        family = self._view.family(number)
        shape = self._shapes.get(number)
        if shape is None:
            if any(shard.index.outcomes.all for shard in family):
                yield Why(unknown=number)
            else:  # whichever of its tasks it is that needs this, it is yet to run
                yield Why(pending=family[0].id)
            return
        first = self._view.plan.shards[number].first
        for position in shape.users.get(task, ()):
            outcome = self._view.outcome(first + position)
            if outcome is None:
                yield Why(pending=self._view.owner(first + position)[0].id)
            elif not outcome.done:
                if outcome.cause == first + position:
                    yield FOR_EVER
            elif outcome.location is None:
                yield first + position

    def _is_settled(self, number: int) -> bool:
        """Tell whether no task of a plan shard needs anything: all have outcomes, and none failed by itself.

        What is done there and not stored is needed by tasks of the same shard only, or by none.
        """
        if number not in self._settled:
            for shard in self._view.family(number):
                outcomes = shard.index.outcomes
                failed = outcomes.failed
                for positions in outcomes.upstream.values():
                    failed -= positions
                if not shard.index.complete or failed:
                    return False
            self._settled.add(number)
        return True


def discardable(view: RunView, number: int) -> bool:
    """Tell whether segments are known in a plan shard that may have intermediate results."""
    return any(may_be_discarded(name) for shard in view.family(number) for name in shard.index.objects)
