"""The store's part for one held shard: read inputs, commit outcomes, look for awaited results."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial

from burst_dask import serialize
from burst_dask.errors import CorruptObject, TaskCancelled, WorkerLost
from burst_dask.journal import log
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import Action, Commit, Logs, Release, encode
from burst_dask.protocol.shard import Phase, Shard, is_segment
from burst_dask.worker.context import Context
from burst_dask.worker.finder import BLOCKED
from burst_dask.worker.holding import Holding
from burst_dask.worker.outgoing import Outgoing
from burst_dask.worker.ran import Ran
from burst_dask.worker.waiting import logger, wait_for
from burst_dask.worker.wary import WaryView

#: Bytes of inputs read ahead of the tasks that need them, a shard.
LOAD_BYTES = 64 << 20
#: Bytes of results only in memory that a worker in a hurry stores with a RELEASE: less than a second's worth.
KEEP_BYTES = 64 << 20
#: Shards looked at in one round of waiting; more would not bring any task nearer.
POLL_SHARDS = 8
#: Why a shard is released whose run was cancelled: running tasks are let finish …
CANCELLED = "cancelled"
#: … or are not, because their worker ends at once.
FORCED = "cancelled by force"
#: Why a shard is released whose tasks need a resource that the worker lacks.
UNFIT = "needs a resource that the worker lacks"


class Tender:
    """Keeps one holding going until its shard is complete, released or somebody else's.

    Parameters
    ----------
    announce
        Called when this process has learned something of the run that other holdings may await.
    """

    #: whether its entries may say that results are discarded
    may_discard = True

    def __init__(self, context: Context, view: WaryView, holding: Holding, announce: Callable[[RunView], None]) -> None:
        self.context = context
        self.view = view
        self.holding = holding
        self.announce = announce
        #: set when something has happened that may make a commit due …
        self.changed = asyncio.Event()
        #: … or inputs wanted, or an outcome awaited
        self.load_changed = asyncio.Event()
        self.poll_changed = asyncio.Event()
        #: why to let the shard go; None while there is no reason to
        self.letting_go: str | None = None
        self._last_entry = self._last_look = context.clock.monotonic()
        #: small results of this holder's last entry, carried on into the next
        self._carried: dict[int, bytes] = {}
        #: places in `ShardIndex.objects` of segments that nobody needs, for the next entry to say so
        self._discarded: set[int] = set()

    def stir(self) -> None:
        """Look again at what is due."""
        self.changed.set()
        self.load_changed.set()
        self.poll_changed.set()

    def let_go(self, reason: str) -> None:
        """Release the shard as soon as running tasks have ended, or the grace is over.

        Those of a cancelled run are waited for until there is another reason to let go.
        """
        if self.letting_go in (None, CANCELLED) and reason != self.letting_go:
            self.letting_go = reason
            self.changed.set()

    def discard(self, places: Iterable[int]) -> None:
        """Have the next entry say that nobody needs these segments, places in `ShardIndex.objects`, any more."""
        self._discarded.update(places)
        self.changed.set()

    async def run(self) -> None:
        """Tend the shard; return when it is no longer held."""
        self._give_up_killers()
        async with asyncio.TaskGroup() as group:
            helpers = [group.create_task(self._load_loop()), group.create_task(self._poll_loop())]
            await self._commit_loop()
            for helper in helpers:
                helper.cancel()

    def _give_up_killers(self) -> None:
        """Give tasks that lost too many workers their outcome (rule 10)."""
        holding, index = self.holding, self.holding.shard.index
        for position, strikes in index.strikes.items():
            if position in holding.todo and policy.lost_for_good(strikes, self.context.settings.lost_workers):
                key = holding.table.keys[position]
                error = WorkerLost(
                    f"task {key!r}: the workers that ran it died, {strikes - 1} times with nothing else running; "
                    f"the last time: {index.cause}. Other tasks go on. Does it need more memory than a worker has, "
                    "or crash in native code?"
                )
                body = serialize.dump_failure(error, key=key, worker=self.context.worker, attempts=strikes)
                holding.give_up(Ran(position, body=body, failed=True))

    def cancel(self, numbers: Bitmap) -> None:
        """Give tasks that do not run yet the outcome cancelled; those that run are let finish."""
        holding = self.holding
        for position in holding.unstarted(numbers):
            key = holding.table.keys[position]
            error, tries = TaskCancelled(f"task {key!r} was cancelled"), holding.attempts[position]
            body = serialize.dump_failure(error, key=key, worker=self.context.worker, attempts=tries)
            holding.give_up(Ran(position, body=body, failed=True, cancelled=True))
            self.stir()

    # ------------------------------------------------------------------ commit

    async def _commit_loop(self) -> None:
        while True:
            if self.letting_go is not None:
                await self._finish_running()
                await self._commit(release=self.letting_go)
                return
            if self.holding.unfit and not len(self.holding.finished):
                self.let_go(UNFIT)
                continue
            due = self._commit_in()
            if due is None or due > 0:
                if not await wait_for(self.changed, due) and not await self._look_at_own_log():
                    return
                continue
            if not await self._commit():
                return
            if self.holding.shard.phase is Phase.COMPLETE:
                return

    async def _finish_running(self) -> None:
        while self.holding.running and self.letting_go == CANCELLED:
            await wait_for(self.changed, None)
        if self.letting_go == FORCED:
            return
        clock = self.context.clock
        deadline = clock.monotonic() + self.context.settings.release_grace
        while self.holding.running and (left := deadline - clock.monotonic()) > 0:
            await wait_for(self.changed, left)

    def _commit_in(self) -> float | None:
        holding, settings = self.holding, self.context.settings
        since = self.context.clock.monotonic() - self._last_entry
        ahead = holding.ahead()
        reservable = excess = False
        if ahead < policy.RESERVE_LOW_WATER or since >= settings.reserve_ahead:
            should, does = self._should_reserve(), holding.shard.index.reserved & holding.shard.index.pending
            reservable = bool(should - does)
            # Finished tasks are pending until they are committed, and need no reservation.
            excess = bool(does - should - holding.finished_positions)
        facts = policy.CommitFacts(
            finished=len(holding.finished),
            wanted=holding.finished_consumed,
            size=holding.finished_size,
            since=since,
            ahead=ahead,
            left=holding.left() / self.context.executor.threads,
            reservable=reservable,
            excess=excess,
            active=holding.active,
        )
        due = policy.commit_in(facts, settings.commit_interval, settings.commit_interval_wanted, settings.reserve_ahead)
        if self._discarded:
            soon = max(0.0, settings.discard_interval - since)
            due = soon if due is None else min(due, soon)
        if due is None and holding.shard.index.reserved:
            # Nothing to commit yet; look again when running tasks may have proved longer than they seemed.
            return settings.reserve_ahead
        return due

    @property
    def reserves(self) -> bool:
        """Whether an entry is on its way, or about to be, that lets more tasks start."""
        index = self.holding.shard.index
        if self.holding.sent is not None:
            return bool(self.holding.sent - index.reserved)
        return bool(self._should_reserve() - index.reserved)

    def _should_reserve(self) -> Bitmap:
        room = self.context.load.room_for(self.holding, self.context.settings.reserve_ahead)
        return self.holding.reserve(*room)

    async def _commit(self, release: str | None = None) -> bool:
        """Append what has finished; tell whether the shard is still held."""
        holding, context = self.holding, self.context
        kept = None
        if release is not None and len(holding.todo):
            # In a hurry, what would take long to store is left to be computed again.
            kept = await context.executor.dump(holding.only_here(), KEEP_BYTES if context.stopping else None)
        outgoing = Outgoing.of(holding.collect(), self._carried, context.settings, kept, holding.table.outputs)
        await self._put_beside(outgoing)

        def action(shard: Shard) -> Action:
            outcomes, names = outgoing.outcomes(shard)
            if release is not None:
                return Release(outcomes=outcomes, reason=release, segments=names)
            # What finished since stays reserved until the next entry, or somebody might split it off.
            reserved = (self._should_reserve() | holding.finished_positions) & shard.index.pending
            named = enumerate(shard.index.objects)
            discarded = tuple(place for place, name in named if place in self._discarded and is_segment(name))
            return Commit(outcomes, reserved - outcomes.all, names, discarded)

        return await self._append(action, outgoing)

    async def _put_beside(self, outgoing: Outgoing) -> None:
        """Make durable what the entry will name, before it is written (rule 2)."""
        context, run, shard = self.context, self.view.run, self.holding.shard
        name = f"{shard.next:05d}-{context.entropy.token()}"
        objects: dict[str, list[Buffer]] = {}
        if outgoing.segment:
            outgoing.segment_name = name
            objects[keys.segment(run, shard.id, name)] = outgoing.segment
        if outgoing.lasting:
            outgoing.lasting_name = name + keys.LASTING
            objects[keys.segment(run, shard.id, outgoing.lasting_name)] = outgoing.lasting
        if outgoing.finished.outputs:
            outgoing.logs_name = name
            logs = Logs(worker=context.worker, tasks=tuple(outgoing.finished.outputs))
            objects[keys.task_logs(run, shard.id, name)] = [encode(logs)]
        await in_parallel(lambda key: context.insist(lambda: context.store.put(key, objects[key])), objects)

    async def _append(self, action: Callable[[Shard], Action], outgoing: Outgoing) -> bool:
        holding, context = self.holding, self.context
        while True:
            attempt = log.prepare(holding.shard, context.author, action(holding.shard), outgoing.blobs)
            holding.sending(attempt.shard)
            after = await context.insist(partial(log.append, context.store, self.view.run, attempt))
            if after is not None:
                self._last_entry = context.clock.monotonic()
                self._delete_discarded(after)
                self.view.learn(after)
                self._carried = outgoing.inline
                self.view.keep_inline(after.id, attempt.entry.number, memoryview(b"".join(outgoing.blobs)))
                holding.committed(after)
                self._tell()
                if after.phase is not Phase.COMPLETE:  # else when it has let go of it
                    context.discarder.stir(self.view, keys.root_number(after.id))
                return True
            await context.insist(partial(self.view.poll, holding.shard.id, once=True))
            if not self._take_in_news():
                return False

    def _delete_discarded(self, after: Shard) -> None:
        """Delete what the entry that has just landed says is not needed."""
        said = {place for place in self._discarded if not is_segment(after.index.objects[place])}
        if said:
            self._discarded -= said
            names = self.holding.shard.index.objects  # of the state before
            self.context.discarder.delete(self.view.run, after.id, [names[place] for place in said])

    async def _look_at_own_log(self) -> bool:
        """While running tasks take long, look whether a copy was first; tell whether the shard is still held."""
        context = self.context
        since = context.clock.monotonic() - self._last_look
        quiet = context.clock.monotonic() - self._last_entry
        if not context.settings.backups or since < max(2 * context.settings.commit_interval, quiet / 8):
            return True
        self._last_look = context.clock.monotonic()
        shard = self.holding.shard
        await context.insist(partial(self.view.poll, shard.id))
        if self.view.shard(shard.id).next == shard.next:
            return True
        held = self._take_in_news()
        self._tell()
        return held

    def _take_in_news(self) -> bool:
        """Take in what others have appended; tell whether the shard is still held."""
        newest = self.view.shard(self.holding.shard.id)
        if newest.index.holder != self.context.worker or newest.phase is Phase.COMPLETE:
            logger.info("shard %s of %s is no longer held", newest.id, self.view.run)
            return False  # what was not committed is somebody else's to do
        self.holding.refold(newest)
        return True

    def _tell(self) -> None:
        self.stir()
        self.announce(self.view)
        self.context.wake.set()

    # ------------------------------------------------------------------ load

    async def _load_loop(self) -> None:
        holding, context = self.holding, self.context
        while True:
            positions, numbers = holding.to_load(LOAD_BYTES, self._stored_size)
            if not positions:
                await wait_for(self.load_changed, None)
                continue
            loaded, errors = await self._load(numbers)
            for position in list(positions):
                bad = next((n for n in holding.table.dependencies[position] if n in errors), None)
                if bad is not None:
                    positions.remove(position)
                    key = holding.table.keys[position]
                    body = serialize.dump_failure(errors[bad], key=key, worker=context.worker, attempts=1)
                    holding.give_up(Ran(position, body=body, failed=True))
            holding.loaded(positions, loaded)
            self.changed.set()
            context.wake.set()

    async def _load(self, numbers: set[int]) -> tuple[dict[int, tuple[object, int]], dict[int, Exception]]:
        """Read stored results; return their values, and why others cannot be read."""
        try:
            bodies = await self.context.insist(lambda: self.view.fetch(numbers))
        except CorruptObject as error:
            if len(numbers) == 1:
                return {}, dict.fromkeys(numbers, error)
            # Find the damaged ones; the others are as good as before.
            values: dict[int, tuple[object, int]] = {}
            damaged: dict[int, Exception] = {}
            for number in numbers:
                good, bad = await self._load({number})
                values.update(good)
                damaged.update(bad)
            return values, damaged
        results = await self.context.executor.load(bodies)
        errors = {number: result for number, result in results.items() if isinstance(result, Exception)}
        return {n: r for n, r in results.items() if not isinstance(r, Exception)}, errors

    def _stored_size(self, number: int) -> int:
        outcome = self.view.outcome(number)
        if outcome is None or outcome.location is None:
            return 0
        return outcome.location.end - outcome.location.start

    # ------------------------------------------------------------------ poll

    async def _poll_loop(self) -> None:
        context, settings = self.context, self.context.settings
        since = context.clock.monotonic()
        while True:
            targets = self._awaited_shards()
            if not targets:
                await wait_for(self.poll_changed, None)
                since = context.clock.monotonic()
                continue
            news = await self._look_at(targets)
            if self.holding.blocked and all(_is_left_alone(view, shard) for view, shard in targets):
                self.let_go(BLOCKED)  # what it waits for will not come
            if self.holding.news() or news:
                since = context.clock.monotonic()
                self._tell()
                continue
            self.poll_changed.clear()
            pause = policy.patience(context.clock.monotonic() - since, settings.wait_poll_min, settings.wait_poll_max)
            await wait_for(self.poll_changed, pause)

    async def _look_at(self, targets: list[tuple[RunView, ShardId]]) -> bool:
        """Read on in the logs of `targets`; tell whether there was news."""
        news = [await self.context.insist(partial(view.poll, shard)) for view, shard in targets]
        return any(news)

    def _awaited_shards(self) -> list[tuple[RunView, ShardId]]:
        """Return the shards to look at: those of the outcomes that tasks here wait for."""
        shards: list[tuple[RunView, ShardId]] = []
        for number in self.holding.awaited():
            view, its_number = self.view.home(number)
            shard = view, view.owner(its_number)[0].id
            if shard not in shards:
                shards.append(shard)
            if len(shards) == POLL_SHARDS:
                break
        return shards


def _is_left_alone(view: RunView, shard: ShardId) -> bool:
    """Tell whether nobody here reads on in a shard, since an entry of it is not signed."""
    return isinstance(view, WaryView) and shard in view.untrusted
