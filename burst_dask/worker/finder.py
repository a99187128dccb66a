"""Finding a shard to work on: claim a free one, take over a dead one's, or split a busy one's.

Each way ends in one conditional append, so a lost race costs a request and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from functools import partial
from typing import NamedTuple

from burst_dask.errors import UntrustedObject
from burst_dask.journal import log
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Action, Beat, Claim, Split, Takeover
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.shard import Phase, Shard
from burst_dask.worker.context import Context
from burst_dask.worker.roster import Roster
from burst_dask.worker.table import TaskTable
from burst_dask.worker.wary import WaryView

#: Lost races for untouched shards before looking at everything.
CLAIM_TRIES = 4
#: Changed shards that a search reads at least; with many workers the others have their turn later. With 4, a hundred
#: workers on 600 tasks of 20 s were idle for a third of the time, since most of what they read had nothing to spare,
#: and sent more requests, since they searched again; with 16 it is a twentieth. All that are idle together send
#: `policy.TOGETHER` times as many a second at most, which is half of what one prefix of S3 takes.
READ_AT_ONCE = 16
#: Of the shards that workers could spare work of, so many are read: the best may be gone.
SPARED = 2
#: Workers of all that look, in each round of their searches, whether a large run is complete.
SURVEYORS = 0.5
#: Entries that such a worker reads at once: nobody waits for it, and others may look, too.
SURVEY_PARALLEL = 16
#: Workers of all idle ones, in each round of their searches, that run a straggler's task as well.
BACKERS = 1.0
#: A shard released for this reason waits for others: it is claimed again when those are complete.
BLOCKED = "nothing ready"


class Found(NamedTuple):
    """A shard that this worker now holds, or some tasks of another's."""

    view: WaryView
    shard: Shard
    table: TaskTable
    #: the tasks to run a second copy of; empty when the shard is held
    backup: Bitmap = EMPTY


class Finder:
    """Finds work for one agent.

    Parameters
    ----------
    beat
        Writes the worker's own heartbeat: the judge's, by which others are judged.
    tended
        What this worker tends already. A shard that it lost and could have again is left until the
        first tender has noticed: two of them would take each other's entries for their own.
    """

    def __init__(
        self, context: Context, beat: Callable[[], Beat], tended: Container[tuple[RunId, ShardId]] = ()
    ) -> None:
        self.context = context
        self.roster = Roster(context, beat)
        self._tended = tended
        #: whether none of the workers last looked at held anything of the run
        self._quiet = False
        #: shard -> the number of entries it had when last looked at, and when it was first seen with those
        self._since: dict[tuple[RunId, ShardId], tuple[int, float]] = {}
        #: shards whose holder has not committed for long, by the last search, and for how long
        self._stragglers: list[tuple[Shard, float]] = []
        #: runs in which every task has its outcome
        self.complete: set[RunId] = set()
        #: runs in which nothing was found since this worker last found something anywhere
        self._in_vain: set[RunId] = set()
        #: shards that this worker cannot run: it lacks a resource that every task left needs
        self.unfit: set[tuple[RunId, ShardId]] = set()

    async def find(self, session: SessionState, idle: bool) -> Found | None:
        """Return a shard of the most urgent run that has one, or None.

        Unless the worker is `idle`, only untouched shards are looked for: there is time yet for
        the requests that all else takes.
        """
        self.roster.workers = max(self.roster.workers, session.expected)
        found = await self._find(session, idle)
        if found is not None:
            self._in_vain.clear()
        return found

    async def _find(self, session: SessionState, idle: bool) -> Found | None:
        # Of equally urgent runs the older first, but for those that had nothing when this worker last looked: they may
        # well be over, and somebody may wait for a new one.
        for run in sorted(session.live_runs, key=lambda run: (-session.runs[run], run in self._in_vain)):
            if run in self.complete:
                continue
            try:
                found = await self._look_at(run, idle)
            except UntrustedObject as error:  # there may be work in other runs
                self.context.distrust(f"{run}: {error}", error)
                continue
            if found is not None:
                return found
        return None

    async def _look_at(self, run: RunId, idle: bool) -> Found | None:
        """Return a shard of a run, or None."""
        view = await self.context.view(run)
        if view is None:
            return None
        shard = await self._find_in(view, idle)
        if shard is not None:
            number = keys.root_number(shard.id)
            return Found(view, shard, await self.context.table(view, number))
        if self._stragglers and (found := await self._back_up(view)) is not None:
            return found
        if view.totals().pending == 0 or await self._is_over(view, idle):
            self.complete.add(run)
            self.context.views.pop(run, None)
            self.context.discarder.sweep(view, self.roster.workers)
        else:
            self._in_vain.add(run)
        return None

    async def _find_in(self, view: WaryView, idle: bool) -> Shard | None:
        self._stragglers = []
        shard = await self._claim_untouched(view)
        if shard is not None or not idle:
            return shard
        fresh = await self.context.insist(partial(view.glance, self._some))
        if fresh is None:
            fresh = await self._look_around(view)
        if view.totals().pending == 0:
            return None
        if self.context.settings.backups:
            self._stragglers = self._find_stragglers(view, fresh)
        return (
            await self._claim_untouched(view)
            or await self._claim_freed(view)
            or await self._take_over(view)
            or await self._split(view, fresh)
        )

    async def _look_around(self, view: WaryView) -> set[ShardId]:
        """Read a few shards of a large run: those that a few workers could spare, what the dead left, and any other."""
        await self.roster.judge()
        spare = await self.roster.spare(view.run)
        self._quiet = not spare
        held = spare[:SPARED] + await self.roster.left_behind(view.run)
        for one in held:
            view.hear(one.shard, one.next)
        shards = {one.shard for one in held} | set(self.context.entropy.sample(view.open_shards(), 1))
        await self.context.insist(lambda: in_parallel(view.leap, sorted(shards)))
        return shards

    async def _is_over(self, view: WaryView, idle: bool) -> bool:
        """Tell whether somebody has seen that a large run is complete; now and then, look whether it is."""
        if not idle or not view.is_large:
            return False
        context, mark = self.context, keys.complete(view.run)
        if await context.insist(lambda: context.store.get(mark)) is not None:
            return True
        if self._quiet and context.entropy.uniform(0, self.roster.workers) < SURVEYORS:
            await context.insist(partial(view.survey, parallel=SURVEY_PARALLEL))
            if view.totals().pending == 0:
                await context.insist(lambda: context.store.create(mark, context.worker.encode()))
                return True
        return False

    def _leaves(self, view: WaryView, shard: Shard) -> bool:
        place = (view.run, shard.id)
        return place in self.unfit or place in self._tended or shard.id in view.untrusted

    def _some(self, shards: list[ShardId]) -> list[ShardId]:
        """Pick the shards to read in one search, so that a thousand idle workers do not read all of a thousand."""
        return self.context.entropy.sample(shards, max(READ_AT_ONCE, 2 * len(shards) // self.roster.workers))

    # ------------------------------------------------------------------ claim

    async def _claim_untouched(self, view: WaryView) -> Shard | None:
        """Claim a plan shard that nobody has claimed, as far as known.

        Workers choose at random among the first ones, as many as there may be other workers
        looking too: so they seldom meet, and the run still proceeds in its memory-saving order.
        """
        for attempt in range(CLAIM_TRIES):
            window = self._untouched(view, 2 * self.roster.workers - 1)
            if not window:
                return None
            id = keys.root_shard(self.context.entropy.choice(window))
            shard = await self._try(view, view.shard(id), Claim(self._first(view.shard(id).index.pending)))
            if shard is not None:
                return shard
            if attempt == 0:
                await self.context.insist(view.list_shards)
        return None

    def _untouched(self, view: WaryView, limit: int) -> list[int]:
        found: list[int] = []
        for number in range(len(view.plan.shards)):
            if not view.touched(number) and self._may_begin(view, number):
                found.append(number)
                if len(found) == limit:
                    break
        return found

    def _may_begin(self, view: WaryView, number: int) -> bool:
        """Tell whether a plan shard has, or may have, a task that can run."""
        info = view.plan.shards[number]
        return info.free > 0 or self._upstream_complete(view, number)

    def _upstream_complete(self, view: WaryView, number: int) -> bool:
        return all(view.complete(upstream) for upstream in view.plan.shards[number].upstream)

    async def _unblocked(self, view: WaryView, number: int) -> bool:
        """Tell whether all that a plan shard needs has an outcome; look for the first that it lacks of another run."""
        if not self._upstream_complete(view, number):
            return False
        for external in view.plan.shards[number].externals:
            task = view.plan.tasks + external
            if view.outcome(task) is None:
                other, its_number = view.home(task)
                await self.context.insist(partial(other.poll, other.owner(its_number)[0].id))
                if view.outcome(task) is None:
                    return False
        return True

    async def _claim_freed(self, view: WaryView) -> Shard | None:
        """Claim a shard that its holder released, or that was split off and never claimed."""
        for shard in [*view.shards.values(), *self._unclaimed(view)]:
            if shard.phase is not Phase.FREE or (shard.next == 0 and "-" not in shard.id):
                continue
            if self._leaves(view, shard):
                continue
            if shard.index.cause == BLOCKED and not await self._unblocked(view, keys.root_number(shard.id)):
                continue
            # With suspects among its tasks, what to reserve is decided when they are known (rule 10).
            reserved = EMPTY if shard.index.strikes else self._first(shard.index.pending)
            claimed = await self._try(view, shard, Claim(reserved))
            if claimed is not None:
                return claimed
        return None

    def _first(self, tasks: Bitmap) -> Bitmap:
        """Return what to reserve of a shard that is not yet read: the first seconds of work."""
        context = self.context
        threads = context.executor.threads
        count = threads * context.settings.reserve_ahead / max(context.durations.typical(), 1e-6)
        if count * policy.NEARLY >= len(tasks):
            return tasks
        return tasks.first(max(threads, int(count)))

    def _unclaimed(self, view: WaryView) -> list[Shard]:
        """Return shards that were split off and have no entry, as far as known.

        In a large run most of them are claimed by now, so one is tried, for all who look.
        """
        children = [child for shard in view.shards.values() for child in shard.index.children if not view.seen(child)]
        return [
            view.shard(child) for child in (self.context.entropy.sample(children, 1) if view.is_large else children)
        ]

    # ------------------------------------------------------------------ take over

    async def _take_over(self, view: WaryView) -> Shard | None:
        held = [s for s in view.shards.values() if s.phase is Phase.HELD and s.index.holder != self.context.worker]
        if not held:
            return None
        liveness, fresh = await self.roster.judge()
        for shard in held:
            holder = shard.index.holder
            assert holder is not None
            if holder in liveness.alive or self._leaves(view, shard):
                continue
            if holder not in liveness.dead and not fresh:
                continue  # it has come since the others were judged
            cause = await self.roster.cause(holder, liveness.dead.get(holder, "it has no heartbeat"))
            # The killers among what it had reserved are not known yet: the table's reading comes first.
            taken = await self._try(view, shard, Takeover(lost=holder, cause=cause, reserved=EMPTY))
            if taken is not None:
                return taken
        return None

    # ------------------------------------------------------------------ split

    async def _split(self, view: WaryView, fresh: set[ShardId]) -> Shard | None:
        """Take unreserved tasks of the busy shard that has the most work left, of those known as they are now."""
        best: Shard | None = None
        most = 0.0
        for shard in map(view.shard, sorted(fresh)):
            if shard.index.holder == self.context.worker or self._leaves(view, shard):
                continue
            count = policy.steal(len(shard.splittable), self._mean(shard), self._worth(shard))
            work = count * (self._mean(shard) or self.context.durations.typical())
            # Of equally loaded shards the thieves take different ones.
            work *= self.context.entropy.uniform(0.8, 1.0)
            if work > most:
                best, most = shard, work
        if best is None:
            return None
        table = await self.context.table(view, keys.root_number(best.id))
        tasks = takeable(view, best, table)
        tasks = closed_part(tasks, table, policy.steal(len(tasks), self._mean(best), self._worth(best)))
        if not tasks:
            return None
        child = keys.child_shard(best.id, best.next)
        parent = await self._try(view, best, Split(child=child, tasks=tasks))
        if parent is None:
            return None
        return await self._try(view, Shard.untouched(child, tasks), Claim(self._first(tasks)))

    def _worth(self, shard: Shard) -> float:
        """Return the seconds of work worth a split: any, if its holder is held up by a task that takes long."""
        held_up = any(straggler.id == shard.id for straggler, _ in self._stragglers)
        return 0.0 if held_up else self.context.settings.split_from

    # ------------------------------------------------------------------ back up

    def _find_stragglers(self, view: WaryView, fresh: set[ShardId]) -> list[tuple[Shard, float]]:
        """Return those shards of `fresh` whose holder has not committed for long, and for how long."""
        now = self.context.clock.monotonic()
        found = []
        for shard in map(view.shard, sorted(fresh)):
            known = self._since.get((view.run, shard.id))
            if known is None or known[0] != shard.next:
                known = self._since[view.run, shard.id] = (shard.next, now)
            others = shard.phase is Phase.HELD and shard.index.holder != self.context.worker
            if others and now - known[1] > 2 * self.context.settings.commit_interval and not self._leaves(view, shard):
                found.append((shard, now - known[1]))
        return found

    async def _back_up(self, view: WaryView) -> Found | None:
        """Choose a straggler's task to run as well: one, and not all idle workers the same."""
        context = self.context
        if context.entropy.uniform(0, self.roster.workers) > BACKERS:
            return None
        shard, age = context.entropy.choice(self._stragglers)
        table = await context.table(view, keys.root_number(shard.id))
        # What a worker has died of must not take others with it.
        running = (shard.index.reserved & shard.index.pending) - table.impure - Bitmap.of(shard.index.strikes)
        interval = context.settings.commit_interval
        tasks = [
            position
            for position in among(running, view, shard, table, closed=False)
            if policy.straggles(age, context.durations.known(table.kinds[position]), interval)
        ]
        return Found(view, shard, table, Bitmap.of([context.entropy.choice(tasks)])) if tasks else None

    @staticmethod
    def _mean(shard: Shard) -> float | None:
        outcomes = shard.index.outcomes
        return outcomes.seconds / outcomes.ran if outcomes.ran else None

    # ------------------------------------------------------------------ append

    async def _try(self, view: WaryView, shard: Shard, action: Action) -> Shard | None:
        """Append `action` if nobody was quicker; otherwise learn what they did."""
        context = self.context
        attempt = log.prepare(shard, context.author, action)
        try:
            after = await context.insist(lambda: log.append(context.store, view.run, attempt))
        except UntrustedObject as error:  # which lies where this was to lie
            view.distrust(shard.id, error)
            return None
        if after is None:
            await context.insist(partial(view.poll, shard.id, once=True))
            return None
        view.learn(after)
        return after


def takeable(view: WaryView, shard: Shard, table: TaskTable) -> Bitmap:
    """Return the tasks of a busy shard that nobody has reserved and that can run elsewhere, alone or together."""
    return among(shard.splittable, view, shard, table, closed=True)


def among(tasks: Bitmap, view: WaryView, shard: Shard, table: TaskTable, *, closed: bool) -> Bitmap:
    """Return those of `tasks` that can run elsewhere: each input is stored.

    Parameters
    ----------
    closed
        Or comes from a task that is among them, too.
    """
    chosen: set[int] = set()
    outcomes, first = shard.index.outcomes, table.first
    for position in tasks:
        for number in table.dependencies[position]:
            own = number - first
            if (closed and own in chosen) or (own in outcomes.stored and own in outcomes.done):
                continue
            if own in shard.index.tasks:
                break
            outcome = view.outcome(number)
            if outcome is None or not outcome.done:
                break
        else:
            chosen.add(position)
    return Bitmap.of(chosen)


def closed_part(tasks: Bitmap, table: TaskTable, count: int) -> Bitmap:
    """Return about `count` of `tasks`, the last ones in order, with all they need among `tasks`."""
    chosen: set[int] = set()
    for position in sorted(tasks, reverse=True):
        if len(chosen) >= count:
            break
        group: set[int] = set()
        stack = [position]
        while stack:
            one = stack.pop()
            if one in group or one in chosen or one not in tasks:
                continue
            group.add(one)
            stack.extend(number - table.first for number in table.dependencies[one] if number >= table.first)
        if len(chosen) + len(group) <= count + count // 2:
            chosen |= group
    return Bitmap.of(chosen)
