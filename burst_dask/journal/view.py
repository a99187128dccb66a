"""What one process knows of a run, and how it learns more with few requests.

Both the client and the workers look at a run through a `RunView`. Its knowledge only moves
forward: entries are never changed, so nothing that was once read has to be read again.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, defaultdict
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import cached_property
from typing import Self, TypeVar

from burst_dask.errors import CorruptObject, ProtocolError, ResultDiscarded
from burst_dask.journal import log
from burst_dask.journal.listing import Newest, key_order, newest_entries, newest_of
from burst_dask.journal.outcomes import Source, TaskOutcome, Totals
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import unseal
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Plan, decode
from burst_dask.protocol.shard import Phase, Shard, may_be_discarded, object_key_name
from burst_dask.store.base import Span, Store, first_page
from burst_dask.store.requests import PAGE

#: Requests under way at once when many objects are read: enough to hide 30 ms each, and far
#: below what one prefix of S3 takes (5,500 GET a second).
PARALLEL = 32
#: The same for a survey of a whole run, which somebody waits for: 100 a second and 30 ms each make 3,300 a second.
SURVEY_PARALLEL = 100
#: Entries of one log read one after another before a listing leads to its newest: as much time as that takes,
#: and a third of its price.
READ_ON = 4
#: Date of an entry that somebody has told of, and no listing.
UNDATED = 0.0
#: Bytes of inline results kept from entries that were read anyway.
INLINE_CACHE = 64 << 20

T = TypeVar("T")
U = TypeVar("U")


async def in_parallel(function: Callable[[T], Awaitable[U]], items: Iterable[T], limit: int = PARALLEL) -> list[U]:
    """Return `function` of each item, at most `limit` under way at once."""
    gate = asyncio.Semaphore(limit)

    async def one(item: T) -> U:
        async with gate:
            return await function(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first that failed; the others were cancelled
    return [task.result() for task in tasks]


class RunView:
    """The shards of a run as folded so far.

    Parameters
    ----------
    store, plan
        Where the run lies, and its plan.
    """

    def __init__(self, store: Store, plan: Plan) -> None:
        self.store = store
        self.plan = plan
        self.run: RunId = plan.run
        #: folded states; a plan shard that is not here is untouched as far as known
        self.shards: dict[ShardId, Shard] = {}
        #: the same of plan shards that are not there
        self._untouched: dict[ShardId, Shard] = {}
        self._sources: defaultdict[int, Source] = defaultdict(Source)
        #: newest entry that a listing showed
        self._listed: dict[ShardId, Newest] = {}
        #: shards that a listing showed to have entries
        self._touched: set[ShardId] = set()
        #: whether a page of a listing once was too small for its entries
        self.is_large = False
        self._inline: OrderedDict[tuple[ShardId, int], memoryview] = OrderedDict()
        self._inline_size = 0
        #: views of the runs that externals lie in, see `burst_dask.journal.across`
        self.others: dict[RunId, RunView] = {}

    @classmethod
    async def open(cls, store: Store, run: RunId) -> Self | None:
        """Return the view of `run`, or None when the store holds no such run."""
        key = keys.plan(run)
        data = await store.get(key)
        return None if data is None else cls(store, decode(Plan, key, data))

    # ------------------------------------------------------------------ what is known

    def shard(self, shard: ShardId) -> Shard:
        """Return the state of a shard; that of a child is found through its parent."""
        known = self.shards.get(shard) or self._untouched.get(shard)
        if known is not None:
            return known
        parent, dash, _ = shard.rpartition("-")
        if dash:
            return Shard.untouched(shard, self.shard(ShardId(parent)).index.children[shard])
        untouched = Shard.untouched(shard, Bitmap.full(self.plan.shards[int(shard)].count))
        return self._untouched.setdefault(shard, untouched)

    def family(self, number: int) -> list[Shard]:
        """Return plan shard `number` and all that was split off it, parents first."""
        found = [self.shard(keys.root_shard(number))]
        for shard in found:
            found.extend(self.shard(child) for child in shard.index.children)
        return found

    @cached_property
    def consumers(self) -> dict[int, list[int]]:
        """Plan numbers of shards -> of those that depend on them, ascending."""
        found: dict[int, list[int]] = {}
        for number, info in enumerate(self.plan.shards):
            for upstream in info.upstream:
                found.setdefault(upstream, []).append(number)
        return found

    def complete(self, number: int) -> bool:
        """Tell whether every task of plan shard `number` is known to have its outcome."""
        return all(shard.phase is Phase.COMPLETE for shard in self.family(number))

    def owner(self, task: int) -> tuple[Shard, int]:
        """Return the shard that the task with that global number belongs to, and its position."""
        number, position = self.plan.locate(task)
        shard = self.shard(keys.root_shard(number))
        while position not in shard.index.tasks:
            for child, tasks in shard.index.children.items():
                if position in tasks:
                    shard = self.shard(child)
                    break
            else:
                raise ProtocolError(f"task {task} of run {self.run} is in no shard")
        return shard, position

    def outcome(self, task: int) -> TaskOutcome | None:
        """Return the outcome of the task or external with that global number, or None while there is none."""
        if task >= self.plan.tasks:
            view, number = self.home(task)
            found = view.outcome(number)
            if found is None or found.done:
                return found
            # A number of this run, which `across.culprit` follows.
            return TaskOutcome(False, task, found.shard, None, found.cancelled)
        shard, position = self.owner(task)
        outcomes = shard.index.outcomes
        if position in outcomes.done:
            return TaskOutcome(True, None, shard, outcomes.stored.get(position))
        if position not in outcomes.failed:
            return None
        cancelled = position in outcomes.cancelled
        for cause, tasks in outcomes.upstream.items():
            if position in tasks:
                return TaskOutcome(False, cause, shard, None, cancelled)
        return TaskOutcome(False, task, shard, outcomes.stored.get(position), cancelled)

    def home(self, task: int) -> tuple[RunView, int]:
        """Return the view of the run that a task or external lies in, and its global number there."""
        if task < self.plan.tasks:
            return self, task
        run, number = self.plan.externals[task - self.plan.tasks]
        return self.others[run], number

    def source(self, task: int) -> Source:
        """Return what shows whether anything was learned that the outcome of a task or external may be among."""
        view, number = self.home(task)
        return view._sources[view.plan.locate(number)[0]]

    def totals(self) -> Totals:
        """Count over what is known; call `survey` before to know the newest."""
        done = failed = cancelled = reserved = 0
        seconds = 0.0
        for shard in self.shards.values():
            outcomes = shard.index.outcomes
            done += len(outcomes.done)
            failed += len(outcomes.failed) - len(outcomes.cancelled)
            cancelled += len(outcomes.cancelled)
            reserved += len(shard.index.reserved - outcomes.all)
            seconds += outcomes.seconds
        return Totals(self.plan.tasks, done, failed, cancelled, reserved, seconds)

    def touched(self, number: int) -> bool:
        """Tell whether plan shard `number` is known to have been claimed once."""
        return self.seen(keys.root_shard(number))

    def seen(self, shard: ShardId) -> bool:
        """Tell whether the log of a shard is known to have an entry."""
        return shard in self.shards or shard in self._touched

    # ------------------------------------------------------------------ learning more

    def learn(self, shard: Shard) -> None:
        """Take in a state, unless a newer one is known."""
        known = self.shards.get(shard.id)
        if known is None or known.next < shard.next:
            self.shards[shard.id] = shard
            self._sources[keys.root_number(shard.id)].changes += 1

    async def poll(self, shard: ShardId, *, once: bool = False) -> bool:
        """Read on from the newest known entry of a shard; tell whether there was news.

        One GET when there is none. Of a log that has grown long meanwhile only the newest entry is
        read, which a listing of that log leads to.

        Parameters
        ----------
        once
            Read one entry, which is known to be there, and do not look for more.
        """
        first = number = max(self._next(shard), self._newest(shard))
        while (found := await log.read(self.store, self.run, shard, number)) is not None:
            entry, blobs = found
            self.learn(Shard.at(shard, entry))
            self.keep_inline(shard, number, blobs)
            number += 1
            if once:
                break
            if number - first == READ_ON:
                await self._jump_ahead(shard, number)
                break
        return number > first

    async def leap(self, shard: ShardId) -> None:
        """Learn the newest entry of a shard that has probably gone on: a listing of its log, and one GET at most."""
        await self._jump_ahead(shard, max(self._next(shard), self._newest(shard)))

    async def _jump_ahead(self, shard: ShardId, number: int) -> None:
        """Learn the newest entry of a shard, if there is any from `number` on."""
        shard_log = keys.shard_log(self.run, shard)
        async for page in self.store.list(shard_log, after=self._before(shard, number)):
            self._take(newest_of(page))
        if self._newest(shard) >= number:
            await self._jump(shard)

    async def list_shards(self) -> None:
        """Learn which shards were touched, at one request per 1,000 of them; read nothing."""
        self._touched.update(map(ShardId, await self.store.folders(keys.run_logs(self.run))))

    async def survey(self, *, parallel: int = SURVEY_PARALLEL, discarded: bool = False) -> None:
        """Bring the view up to date: listings, then the newest entry of each shard that changed.

        One listing when the entries that may matter fit in a page; more of them are listed in
        parallel. Nothing is sent when every shard is known to be complete.

        Parameters
        ----------
        parallel
            Entries read at once.
        discarded
            Also learn which results of complete shards were discarded: these are listed again while they may be.
        """
        await self._list_entries(discarded)
        await in_parallel(self._jump, self._behind(), parallel)

    async def glance(self, choose: Callable[[list[ShardId]], list[ShardId]]) -> set[ShardId] | None:
        """Learn the newest of some shards by one listing; None, once and for all, if the run is too large for that.

        Parameters
        ----------
        choose
            Picks the shards to read, of those that have changed.

        Returns
        -------
        set of ShardId
            The shards that are up to date now.
        """
        if self.is_large or await self._list_a_page() is not None:
            self.is_large = True
            return None
        behind = self._behind()
        chosen = [shard for shard in choose(behind) if self._parent_known(shard)]
        await in_parallel(self._jump, chosen)
        return set(self._listed) - set(behind) | set(chosen)

    def open_shards(self) -> list[ShardId]:
        """Return the touched shards that are not known to be complete."""
        # Of a child shard that was read before it was listed no listing of folders need tell again.
        known = self._touched | self.shards.keys()
        return sorted(shard for shard in known if not self._is_complete(shard) and self._parent_known(shard))

    def hear(self, shard: ShardId, next: int) -> None:
        """Take in that a shard has `next` entries at least: reading on begins with the last of them."""
        if next > self._last(shard) + 1:
            self._take({shard: Newest(next - 1, UNDATED)})

    async def last_change(self) -> float:
        """Return when the newest known entry was written, in seconds since 1970 by the store's clock.

        When no listing showed the newest entries, they are listed; 0.0 without any entry.
        """
        known = self.shards.keys() | self._listed.keys()
        behind = {shard: self._before(shard, self._last(shard)) for shard in known if not self._is_dated(shard)}
        self._take(await newest_entries(self.store, self.run, behind))
        return max((newest.modified for newest in self._listed.values()), default=0.0)

    async def _list_entries(self, discarded: bool) -> None:
        """Learn the newest entry number of every shard that may have a new one."""
        reached = await self._list_a_page(discarded)
        if reached is None:
            return
        await self.list_shards()
        behind = {
            shard: self._before(shard, self._last(shard) + 1)
            for shard in self._touched
            if key_order(shard) >= reached and not self._is_over(shard, discarded)
        }
        self._take(await newest_entries(self.store, self.run, behind))

    async def _list_a_page(self, discarded: bool = False) -> str | None:
        """List the entries that may be new if they may fit in a page; return how far that reached, None for all."""

        def is_over(number: int) -> bool:
            return all(self._is_over(shard.id, discarded) for shard in self.family(number))

        open = next((number for number in range(len(self.plan.shards)) if not is_over(number)), None)
        if open is None:
            return None
        entries = sum(self._last(shard) + 1 for shard in self._touched if keys.root_number(shard) >= open)
        if entries >= PAGE:
            return ""
        # Of all keys, those of this shard and its children are the first behind this.
        logs = keys.run_logs(self.run)
        page = await first_page(self.store, logs, logs + keys.root_shard(open))
        self._take(newest_of(page))
        return None if len(page) < PAGE else key_order(keys.shard_of_entry(page[-1].key))

    def _take(self, listed: dict[ShardId, Newest]) -> None:
        """Take in what a listing showed."""
        for shard, newest in listed.items():
            if self._newest(shard) <= newest.number:
                self._listed[shard] = newest
        self._touched.update(listed)

    def _behind(self) -> list[ShardId]:
        """Return the shards that have a newer entry than the one that was read."""
        return [shard for shard in self._listed if self._next(shard) <= self._newest(shard)]

    def _is_dated(self, shard: ShardId) -> bool:
        """Tell whether a listing showed when the newest known entry was written."""
        newest = self._listed.get(shard)
        return newest is not None and newest.number == self._last(shard) and newest.modified != UNDATED

    def _parent_known(self, shard: ShardId) -> bool:
        parent, dash, _ = shard.rpartition("-")
        known = self.shards.get(ShardId(parent))
        return not dash or (known is not None and shard in known.index.children)

    def _is_complete(self, shard: ShardId) -> bool:
        known = self.shards.get(shard)
        return known is not None and known.phase is Phase.COMPLETE

    def _is_over(self, shard: ShardId, discarded: bool) -> bool:
        """Tell whether no entry is to come, other than such as say what was discarded, unless these count, too."""
        known = self.shards.get(shard)
        if known is None or known.phase is not Phase.COMPLETE:
            return False
        return not (discarded and any(map(may_be_discarded, known.index.objects)))

    def _next(self, shard: ShardId) -> int:
        known = self.shards.get(shard)
        return 0 if known is None else known.next

    def _newest(self, shard: ShardId) -> int:
        """Return the number of the newest entry that a listing showed, -1 without one."""
        return self._listed[shard].number if shard in self._listed else -1

    def _last(self, shard: ShardId) -> int:
        """Return the number of the newest entry that is known to exist, -1 without one."""
        return max(self._newest(shard), self._next(shard) - 1)

    def _before(self, shard: ShardId, number: int) -> str:
        """Return a key behind which a listing of the log begins with that entry."""
        shard_log = keys.shard_log(self.run, shard)
        return keys.entry(shard_log, number - 1) if number else keys.entry(shard_log, 0)[:-1]

    async def _jump(self, shard: ShardId) -> None:
        newest = self._listed[shard].number
        found = await log.read(self.store, self.run, shard, newest)
        if found is None:
            raise CorruptObject(f"entry {newest} of shard {shard} of run {self.run} was listed and is gone")
        self.learn(Shard.at(shard, found[0]))
        self.keep_inline(shard, newest, found[1])

    # ------------------------------------------------------------------ results

    def keep_inline(self, shard: ShardId, number: int, blobs: memoryview) -> None:
        """Keep the small results that came with an entry, up to `INLINE_CACHE` bytes in all."""
        if not len(blobs) or (shard, number) in self._inline:
            return
        self._inline[shard, number] = blobs
        self._inline_size += len(blobs)
        while self._inline_size > INLINE_CACHE:
            _, dropped = self._inline.popitem(last=False)
            self._inline_size -= len(dropped)

    async def fetch(self, tasks: Iterable[int]) -> dict[int, memoryview]:
        """Return the stored bodies of tasks and externals that have a stored outcome, by global number.

        One request brings a whole entry or a run of near ranges of a segment.
        """
        own: list[int] = []
        elsewhere: dict[RunId, dict[int, list[int]]] = {}
        for task in tasks:
            view, number = self.home(task)
            if view is self:
                own.append(task)
            else:
                elsewhere.setdefault(view.run, {}).setdefault(number, []).append(task)
        found = await self._fetch(own)
        for run, numbers in elsewhere.items():
            bodies = await self.others[run].fetch(numbers)
            found.update((task, bodies[number]) for number, tasks in numbers.items() for task in tasks)
        return found

    async def _fetch(self, tasks: Iterable[int]) -> dict[int, memoryview]:
        wanted: dict[tuple[ShardId, int | None, str], list[tuple[int, Span]]] = {}
        for task in tasks:
            outcome = self.outcome(task)
            if outcome is None or outcome.location is None:
                raise self._missing(task)
            number, name = object_key_name(outcome.location, outcome.shard.index)
            span = Span(outcome.location.start, outcome.location.end)
            wanted.setdefault((outcome.shard.id, number, name), []).append((task, span))
        found: dict[int, memoryview] = {}
        for bodies in await in_parallel(self._fetch_object, wanted.items()):
            found.update(bodies)
        return found

    def _missing(self, task: int) -> Exception:
        """Return why no result of a task is stored."""
        if not self._is_discarded(task):
            return ProtocolError(f"task {task} of run {self.run} has no stored outcome")
        return ResultDiscarded(
            f"the result of task {task} of run {self.run} was an intermediate one, and was deleted when nothing needed "
            "it any more. Session(keep_intermediates=True) keeps them"
        )

    async def _fetch_object(
        self, item: tuple[tuple[ShardId, int | None, str], list[tuple[int, Span]]]
    ) -> dict[int, memoryview]:
        (shard, number, name), places = item
        spans = [span for _, span in places]
        if number is None:
            key = keys.segment(self.run, shard, name)
            blobs = await self.store.get_ranges(key, spans)
        else:
            key = keys.entry(keys.shard_log(self.run, shard), number)
            blobs = await self._inline_blobs(shard, number, spans)
        if blobs is None:
            if number is None and await self.poll(shard) and any(self._is_discarded(task) for task, _ in places):
                return await self._fetch(task for task, _ in places)  # which says so
            raise CorruptObject(f"{key}: a committed result lies there, and it is gone")
        return {task: unseal(key, blob) for (task, _), blob in zip(places, blobs, strict=True)}

    def _is_discarded(self, task: int) -> bool:
        shard, position = self.owner(task)
        return position in shard.index.discarded

    async def _inline_blobs(self, shard: ShardId, number: int, spans: Sequence[Span]) -> list[memoryview] | None:
        body = self._inline.get((shard, number))
        if body is None:
            found = await log.read(self.store, self.run, shard, number)
            if found is None:
                return None
            body = found[1]
            self.keep_inline(shard, number, body)
        return [body[span.start : span.end] for span in spans]
