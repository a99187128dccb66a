"""What cancelling leaves undone: tasks without an outcome that nobody will start any more.

::

    cancelled run ──▶ all of it that is pending and does not run
    cancelled task ──▶ itself, unless it runs; its worker, once there is one, writes that down as its outcome
           └─────────▶ whatever depends on these, in the same run and in others of the session

It is found out by who counts or waits, and written nowhere: so it is the same without any worker. No request
while nothing of a session is cancelled; else a few for each run concerned, and one for each shard with tasks that
depend on what was cancelled.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

from burst_dask.client.link import Link
from burst_dask.errors import CorruptObject
from burst_dask.journal import packs
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, WorkerId

#: Plan shard -> positions.
_Places = dict[int, Bitmap]


class Undone:
    """The tasks of one run that have no outcome and will have none, as far as its view knows.

    Parameters
    ----------
    cause
        The run in which something was cancelled that the others need; perhaps the run itself.
    places
        Plan shard -> positions; None of a run that was cancelled as a whole: all that does not run.
    """

    def __init__(self, view: RunView, cause: RunId, places: _Places | None, alive: Collection[WorkerId]) -> None:
        self.cause = cause
        self._view = view
        self._places = places
        self._alive = alive

    def __contains__(self, task: object) -> bool:
        assert isinstance(task, int)
        if self._view.outcome(task) is not None:
            return False
        if self._places is None:
            shard, position = self._view.owner(task)
            return not (shard.index.holder in self._alive and position in shard.index.reserved)
        number, position = self._view.plan.locate(task)
        return position in self._places.get(number, EMPTY)

    @property
    def count(self) -> int:
        if self._places is None:
            return self._view.totals().pending - sum(map(len, _running(self._view, self._alive)))
        return sum(len(pending) for pending in self._pending())

    def running(self) -> int:
        """Return how many tasks of the run are reserved by workers that live, and will have outcomes."""
        places = self._places or {}
        reserved = 0
        for id, shard in self._view.shards.items():
            if shard.index.holder in self._alive:
                left = shard.index.reserved & shard.index.pending
                reserved += len(left - places.get(keys.root_number(id), EMPTY))
        return reserved

    def _pending(self) -> Iterator[Bitmap]:
        for number, positions in (self._places or {}).items():
            done = EMPTY
            for shard in self._view.family(number):
                done |= shard.index.outcomes.all
            yield positions - done


def _running(view: RunView, alive: Collection[WorkerId]) -> Iterator[Bitmap]:
    """Yield what workers that live have reserved, and what has no outcome yet."""
    for shard in view.shards.values():
        if shard.index.holder in alive:
            yield shard.index.reserved & shard.index.pending


def running(view: RunView, alive: Collection[WorkerId]) -> int:
    """Return how many tasks are reserved by workers that live; what others had reserved waits to be taken over."""
    return sum(map(len, _running(view, alive)))


async def undone(
    link: Link, views: Iterable[RunView], alive: Collection[WorkerId] | None = None
) -> Mapping[RunId, Undone]:
    """Return what cancelling leaves undone, of those runs of which it leaves something.

    Parameters
    ----------
    views
        Of the runs that are looked at. Where something was cancelled they are brought up to date.
    alive
        The workers that live; None looks.
    """
    state = link.state
    if not state.cancelled and not state.cancelled_tasks:
        return {}
    known = {view.run: view for view in views}
    asked = set(known)
    await _with_those_needed(link, known)
    order = {run: place for place, run in enumerate(state.runs)}
    found: dict[RunId, Undone] = {}
    # A run needs results of runs before it only.
    for run in sorted(known, key=lambda run: order.get(run, len(order))):
        view = known[run]
        singly, foreign = state.cancelled_tasks.get(run, EMPTY), _foreign(view, known, found)
        if run not in state.cancelled and not singly and not foreign:
            continue
        await view.survey()
        if alive is None:
            alive = frozenset((await link.seen()).alive)
        if run in state.cancelled:
            found[run] = Undone(view, run, None, alive)
        elif places := await _spread(link, view, singly, set(foreign), alive):
            cause = next(iter(foreign.values()), run)
            found[run] = Undone(view, run if singly else cause, places, alive)
    return {run: one for run, one in found.items() if run in asked}


async def _with_those_needed(link: Link, known: dict[RunId, RunView]) -> None:
    """Add the runs whose results those that are known need, and so on."""
    fresh = list(known.values())
    while fresh:
        wanted = dict.fromkeys(run for view in fresh for run, _ in view.plan.externals if run not in known)
        fresh = [view for view in await in_parallel(link.view, wanted) if view is not None]
        known.update((view.run, view) for view in fresh)


def _foreign(view: RunView, known: Mapping[RunId, RunView], found: Mapping[RunId, Undone]) -> dict[int, RunId]:
    """Return the externals of a run that are undone or have the outcome cancelled, and the run that this comes from."""
    lost: dict[int, RunId] = {}
    for number, (run, task) in enumerate(view.plan.externals, view.plan.tasks):
        if run in found and task in found[run]:
            lost[number] = found[run].cause
        elif run in known and (outcome := known[run].outcome(task)) is not None and outcome.cancelled:
            lost[number] = run
    return lost


async def _spread(link: Link, view: RunView, singly: Bitmap, lost: set[int], alive: Collection[WorkerId]) -> _Places:
    """Return the pending tasks of a run that were cancelled, or depend on such or on the externals in `lost`."""
    plan = view.plan
    roots = set(singly)
    for shard in view.shards.values():
        first = plan.shards[keys.root_number(shard.id)].first
        lost.update(first + position for position in shard.index.outcomes.cancelled)
    concerned: set[int] = set()
    begins = {plan.locate(number)[0] for number in roots} | {plan.locate(n)[0] for n in lost if n < plan.tasks}
    for number, info in enumerate(plan.shards):
        outside = any(plan.tasks + external in lost for external in info.externals)
        if number in begins or outside or not concerned.isdisjoint(info.upstream):
            concerned.add(number)
    open_ones = [number for number in sorted(concerned) if not view.complete(number)]
    places: _Places = {}
    for number, needs in zip(open_ones, await in_parallel(lambda n: _needs(link, view, n), open_ones), strict=True):
        first, gone = plan.shards[number].first, set()
        for position in range(plan.shards[number].count):
            task = first + position
            if view.outcome(task) is not None:
                continue
            shard, _ = view.owner(task)
            runs = shard.index.holder in alive and position in shard.index.reserved
            if (task in roots and not runs) or needs is None or not lost.isdisjoint(needs[position]):
                gone.add(position)
                lost.add(task)
        if gone:
            places[number] = Bitmap.of(gone)
    return places


async def _needs(link: Link, view: RunView, number: int) -> tuple[tuple[int, ...], ...] | None:
    """Return what each task of a plan shard depends on, by global number; None after a cleanup, which deletes that."""
    known = link.needs.get((view.run, number))
    if known is None:
        try:
            record = await packs.read_record(link.store.get_ranges, view.run, view.plan.shards[number].place)
        except CorruptObject:
            if link.state.closed:
                return None
            raise
        known = link.needs[view.run, number] = record.dependencies
    return known
