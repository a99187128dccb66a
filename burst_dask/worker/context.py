"""What the parts of an agent share: the injected world, and patience with the store."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from burst_dask.clock import Clock, Entropy
from burst_dask.config import Settings
from burst_dask.errors import CorruptObject, StoreAccessDenied, StoreFull, StoreUnavailable, UntrustedObject
from burst_dask.journal import across, packs
from burst_dask.journal.log import Author
from burst_dask.protocol import policy
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.store.base import Span, Store
from burst_dask.worker.discarding import Discarder
from burst_dask.worker.durations import Durations
from burst_dask.worker.execution import Executor, broken_table
from burst_dask.worker.load import Load
from burst_dask.worker.memory import Memory
from burst_dask.worker.table import TaskTable
from burst_dask.worker.waiting import logger
from burst_dask.worker.wary import WaryView

T = TypeVar("T")
#: Decoded shards kept, so that what was read to split it is not read again to run it.
TABLES = 4


@dataclass
class Context:
    """Shared by the agent, its finder and its tenders."""

    store: Store
    session: SessionId
    worker: WorkerId
    settings: Settings
    clock: Clock
    entropy: Entropy
    executor: Executor
    memory: Memory
    durations: Durations = field(init=False)
    load: Load = field(init=False)
    author: Author = field(init=False)
    discarder: Discarder = field(init=False)
    #: set when there may be something for the agent to do
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    #: why the agent ends; None while it goes on
    stopping: str | None = None
    views: dict[RunId, WaryView] = field(default_factory=dict)
    #: what of other things was not signed with the session's key, such as plans -> what was said of it
    untrusted: dict[str, str] = field(default_factory=dict)
    _tables: OrderedDict[tuple[RunId, int], TaskTable] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.durations = Durations(self.clock)
        self.load = Load(self.clock, self.executor.threads, dict(self.settings.resources))
        self.author = Author(self.worker, self.clock, self.entropy)
        self.discarder = Discarder(self)

    async def insist(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat `call` while the store is away, full, or refuses expired credentials.

        The work in memory is worth the wait: it is given up only after `idle_timeout`, or when
        the worker is told to stop.
        """
        started = self.clock.monotonic()
        attempt = 0
        while True:
            try:
                return await call()
            except (StoreUnavailable, StoreAccessDenied, StoreFull) as error:
                waited = self.clock.monotonic() - started
                if self.stopping or waited > self.settings.idle_timeout:
                    raise
                logger.warning("%s; trying again, %.0f s so far", error, waited)
                low, high = self.settings.idle_poll_min, self.settings.idle_poll_max
                await self.clock.sleep(policy.backoff(attempt, low, high))
                attempt += 1

    def distrust(self, what: str, error: UntrustedObject) -> None:
        """Go on without what is not signed with the session's key, and say so once."""
        if what not in self.untrusted:
            logger.error("%s", error)
            self.untrusted[what] = str(error)

    def doubts(self) -> list[str]:
        """Return what was said of all that this worker goes on without."""
        return [*self.untrusted.values(), *(said for view in self.views.values() for said in view.untrusted.values())]

    async def view(self, run: RunId) -> WaryView | None:
        """Return the worker's view of a run, reading its plan the first time; None if there is none to be believed."""
        view = self.views.get(run)
        if view is None and run not in self.untrusted:
            try:
                view = await self.insist(lambda: WaryView.open(self.store, run))
                if view is not None:
                    await self.insist(partial(across.open_others, view, known=self.views))
            except UntrustedObject as error:
                self.distrust(run, error)
                return None
            if view is not None:
                view.is_large = len(view.plan.shards) >= self.settings.large_run
                self.views[run] = view
        return view

    async def table(self, view: WaryView, number: int) -> TaskTable:
        """Return the tasks of plan shard `number`; if they are damaged, ones that fail saying so."""
        cached = self._tables.get((view.run, number))
        if cached is not None:
            return cached
        info = view.plan.shards[number]
        try:
            record = await packs.read_record(self._ranges, view.run, info.place)
            self.discarder.remember(view.run, record)
            buffers = await packs.read_buffers(self._ranges, view.run, record.buffers)
            table = await self.executor.open(record, buffers)
        except CorruptObject as error:
            table = broken_table(info.first, info.count, error)
        self._tables[view.run, number] = table
        while len(self._tables) > TABLES:
            self._tables.popitem(last=False)
        return table

    async def _ranges(self, key: str, spans: Sequence[Span]) -> list[memoryview] | None:
        return await self.insist(lambda: self.store.get_ranges(key, spans))
