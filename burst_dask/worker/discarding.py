"""Deleting, in the background, segments with results that nobody needs any more (PROTOCOL.md, "Discarding").

::

    a commit ──▶ stir ──▶ look: its shard, and those it reads from ──▶ nobody needs a segment's results
                                                                          │
                  held by this worker: its next COMMIT says so ◀──────────┤
                  complete: a DISCARD says so                  ◀──────────┘
                        └──▶ the segments are deleted

Whoever commits last finds all the others' commits: so nothing is left, unless a worker dies. What is left then is
found once more by workers that have nothing else to do in a run that is complete.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from burst_dask.errors import BurstError, ProtocolError, StoreError, UntrustedObject
from burst_dask.journal import log, packs
from burst_dask.journal.needs import Needs, Shape, discardable
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Discard, ShardRecord
from burst_dask.protocol.shard import Phase, Shard, is_segment, may_be_discarded, segments_of
from burst_dask.worker.waiting import logger, wait_for

if TYPE_CHECKING:
    from burst_dask.worker.context import Context
    from burst_dask.worker.tender import Tender

#: Requests of one round that only serve to find out more; what is left has its turn in the next one.
BUDGET = 32
#: Shapes kept, of a few ten KB each.
SHAPES = 256
#: A shard that goes on is looked at again after so many times `Settings.discard_interval` at most, if nothing happens.
SELDOM = 8
#: About how many of all idle workers look once more at a run that is complete.
SWEEPERS = 4.0
#: Entries that such a worker reads at once.
SURVEY_PARALLEL = 16
#: Stands for all plan shards of a run.
EVERYTHING = -1


class Discarder:
    """Finds and deletes what nobody needs, for one worker."""

    def __init__(self, context: Context) -> None:
        self._context = context
        #: what this worker holds; the agent's
        self.tenders: Mapping[tuple[RunId, ShardId], Tender] = {}
        #: returns the runs that workers work on, as far as it knows; the agent's
        self.live_runs: Callable[[], list[RunId]] = list
        self._shapes: OrderedDict[tuple[RunId, int], Shape] = OrderedDict()
        self._views: dict[RunId, RunView] = {}
        #: plan shards to look at -> when
        self._due: dict[tuple[RunId, int], float] = {}
        #: … and when they were last looked at, and how often since a commit there
        self._looked: dict[tuple[RunId, int], float] = {}
        self._attempts: Counter[tuple[RunId, int]] = Counter()
        self._doomed: list[str] = []
        self._news = asyncio.Event()

    # ------------------------------------------------------------------ what others tell

    def remember(self, run: RunId, record: ShardRecord) -> None:
        """Take in task records that were read anyway."""
        if not self._context.settings.keep_intermediates:
            self._keep(run, record.shard, Shape.of(record))

    def stir(self, view: RunView, number: int, *, over: bool = False) -> None:
        """Note that there were commits in plan shard `number`; `over` when one of its shards has ended."""
        plan_shards = view.plan.shards
        if self._context.settings.keep_intermediates:
            return
        if not any(discardable(view, each) for each in (number, *plan_shards[number].upstream)):
            return
        now = self._context.clock.monotonic()
        del self._attempts[view.run, number]
        looked = self._looked.get((view.run, number), float("-inf"))
        self._plan(view, number, now if over else max(now, looked + self._context.settings.discard_interval))

    def sweep(self, view: RunView, workers: int) -> None:
        """Look once more at a run that is complete, some time from now: who was to delete what is left may have died.

        Parameters
        ----------
        workers
            About how many there are: a few of them will do.
        """
        context = self._context
        if context.settings.keep_intermediates or context.entropy.uniform(0, workers) > SWEEPERS:
            return
        if any(discardable(view, number) for number in range(len(view.plan.shards))):
            pause = context.settings.discard_interval * context.entropy.uniform(1, 2)
            self._plan(view, EVERYTHING, context.clock.monotonic() + pause)

    def delete(self, run: RunId, shard: ShardId, names: Iterable[str]) -> None:
        """Delete segments of which an entry says that nobody needs them."""
        self._doomed += [keys.segment(run, shard, name) for name in names]
        self._news.set()

    def _plan(self, view: RunView, number: int, due: float) -> None:
        self._views[view.run] = view
        self._due[view.run, number] = min(due, self._due.get((view.run, number), float("inf")))
        self._news.set()

    def _keep(self, run: RunId, number: int, shape: Shape) -> None:
        self._shapes[run, number] = shape
        self._shapes.move_to_end((run, number))
        while len(self._shapes) > SHAPES:
            self._shapes.popitem(last=False)

    # ------------------------------------------------------------------ at work

    async def run(self) -> None:
        """Go on until cancelled. What fails here costs storage, never a result."""
        clock, interval = self._context.clock, self._context.settings.discard_interval
        while True:
            now = clock.monotonic()
            pause = max(0.0, min(self._due.values()) - now) if self._due else None
            if not self._doomed and (pause is None or pause > 0):
                await wait_for(self._news, pause)
                continue
            due = [place for place, at in self._due.items() if at <= now]
            for place in due:
                del self._due[place]  # what is told from here on is looked at anew
            try:
                await self._delete()
                for run in dict.fromkeys(run for run, _ in due):
                    await self._look(self._views[run], {number for of, number in due if of == run})
                await self._delete()
            except ProtocolError:
                raise
            except UntrustedObject as error:  # it stays so, and so does what it keeps from an answer
                self._context.distrust(str(error), error)
            except BurstError as error:
                logger.warning("intermediate results that nobody needs are not deleted yet: %s", error)
                for run, number in due:
                    self._plan(self._views[run], number, now + interval)
                await clock.sleep(interval)
            self._forget_views()

    async def end(self) -> None:
        """Delete what an entry already says is gone, before the worker ends."""
        try:
            await self._delete()
        except StoreError as error:
            logger.warning("intermediate results that nobody needs are not deleted: %s", error)

    async def _delete(self) -> None:
        doomed = list(self._doomed)
        if doomed:
            await self._context.store.delete(doomed)
            del self._doomed[: len(doomed)]

    def _forget_views(self) -> None:
        """Let go of the views of runs in which there is nothing left to look at."""
        busy = {run for run, _ in self._due}
        for run in [run for run in self._views if run not in busy]:
            if not self._views.pop(run).totals().pending:
                self._looked = {place: at for place, at in self._looked.items() if place[0] != run}

    async def _look(self, view: RunView, numbers: set[int]) -> None:
        """Look at plan shards in which there were commits, and at those that they read from, or at `EVERYTHING`."""
        context, run = self._context, view.run
        now = context.clock.monotonic()
        look = _Look(context, view, {n: shape for (of, n), shape in self._shapes.items() if of == run})
        shards = view.plan.shards
        if EVERYTHING in numbers:
            await view.survey(parallel=SURVEY_PARALLEL, discarded=True)
            chosen = {number for number in range(len(shards)) if discardable(view, number)}
        else:
            chosen = numbers.union(up for number in numbers for up in shards[number].upstream)
        for number in sorted(chosen):
            kept = [await self._examine(look, shard.id) for shard in view.family(number)]
            if any(kept):
                self._look_again(view, number)
        for number in look.learned:
            self._keep(run, number, look.shapes[number])
        for number in numbers:
            self._looked[run, number] = now
            if look.budget <= 0:
                self._plan(view, number, now + context.settings.discard_interval)

    def _look_again(self, view: RunView, number: int) -> None:
        """Look again later at a shard held here, of which others need results yet: only its holder can discard them."""
        self._attempts[view.run, number] += 1
        interval = self._context.settings.discard_interval
        pause = policy.backoff(self._attempts[view.run, number] - 1, interval, SELDOM * interval)
        self._plan(view, number, self._context.clock.monotonic() + pause)

    async def _examine(self, look: _Look, id: ShardId) -> bool:
        """Discard those segments of a shard of which nobody needs anything; tell whether it is held here, with others.

        Those of other holders are theirs to discard: two writers would take each other's slots.
        """
        view, tender = look.view, self.tenders.get((look.view.run, id))
        shard = view.shard(id)
        unread = shard.next == 0 and "-" in id  # it was split off, and may be over by now
        if not unread and not any(map(may_be_discarded, shard.index.objects)):
            return False
        if tender is None or not tender.may_discard:
            if shard.phase is not Phase.COMPLETE:
                await look.read_on(id)  # who held it may have ended it since
                shard = view.shard(id)
            if shard.phase is Phase.COMPLETE:
                await self._append(view, id, await self._free(look, shard))
            return False
        found = await self._free(look, shard)
        if found:
            tender.discard(found)
        return len(found) < sum(map(may_be_discarded, shard.index.objects))

    async def _free(self, look: _Look, shard: Shard) -> list[int]:
        """Return the places of segments that no task of this run needs, and none of another run that goes on names."""
        found = await look.free(shard)
        if not found:
            return []
        run, first = look.view.run, look.view.plan.shards[keys.root_number(shard.id)].first
        named: set[int] = set()
        for other in self.live_runs():
            view = await self._context.view(other) if other != run else None
            if view is not None:
                named.update(number for of, number in view.plan.externals if of == run)
        inside = segments_of(shard.index)
        return [place for place in found if not any(first + position in named for position in inside[place])]

    async def _append(self, view: RunView, id: ShardId, places: list[int]) -> None:
        context = self._context
        while shard_places := [place for place in places if is_segment(view.shard(id).index.objects[place])]:
            shard = view.shard(id)
            if shard.phase is not Phase.COMPLETE:
                return
            attempt = log.prepare(shard, context.author, Discard(tuple(shard_places)))
            after = await log.append(context.store, view.run, attempt)
            if after is not None:
                view.learn(after)
                self.delete(view.run, id, [shard.index.objects[place] for place in shard_places])
                return
            if not await view.poll(id, once=True):
                return


class _Look:
    """One look at what is needed in a run, which reads what it must know, within its budget."""

    def __init__(self, context: Context, view: RunView, shapes: dict[int, Shape]) -> None:
        self.view = view
        self.shapes = shapes
        self.learned: list[int] = []
        self.budget = BUDGET
        self._context = context
        self._needs = Needs(view, shapes)
        self._read: set[ShardId] = set()

    async def free(self, shard: Shard) -> list[int]:
        """Return the places in `ShardIndex.objects` of segments of which nobody needs a result."""
        first = self.view.plan.shards[keys.root_number(shard.id)].first
        found = []
        for place, positions in segments_of(shard.index).items():
            if not may_be_discarded(shard.index.objects[place]) or shard.index.outcomes.failed & Bitmap.of(positions):
                continue
            if await self._nobody_needs([first + position for position in positions]):
                found.append(place)
        return found

    async def _nobody_needs(self, tasks: list[int]) -> bool:
        while (why := self._needs.why(tasks)) is not None:
            if why.unknown is not None:
                if not await self._learn(why.unknown):
                    return False
            elif why.pending is None or not await self.read_on(why.pending):
                return False
        return True

    async def read_on(self, shard: ShardId) -> bool:
        """Read on in a shard's log, once in this look; tell whether there was news."""
        if shard in self._read or self.budget <= 0:
            return False
        self._read.add(shard)
        self.budget -= 1
        return await self.view.poll(shard)

    async def _learn(self, number: int) -> bool:
        if self.budget <= 0:
            return False
        self.budget -= 1
        place = self.view.plan.shards[number].place
        record = await packs.read_record(self._context.store.get_ranges, self.view.run, place)
        self.shapes[number] = Shape.of(record)
        self.learned.append(number)
        return True
