"""What client code knows of a session, and how it sees to it that somebody works for it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from burst_dask.client.guard import Guard
from burst_dask.clock import Clock
from burst_dask.config import Settings
from burst_dask.environment.preparing import bring_code
from burst_dask.errors import (
    CloudError,
    ConfigError,
    StoreAccessDenied,
)
from burst_dask.fleet.base import Ensuring, Fleet, Remote
from burst_dask.journal import log
from burst_dask.journal.heartbeats import heartbeats
from burst_dask.journal.spending import Spending
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Ended, Manifest, decode
from burst_dask.protocol.session import CLOCKS_AGREE, SessionState
from burst_dask.protocol.session_records import Attach, SessionAction
from burst_dask.report.tables import WorkersStatus
from burst_dask.scaling.healer import Elastic, Healer
from burst_dask.store import Store

if TYPE_CHECKING:
    from burst_dask.client.resuming import Earlier

#: Views of runs kept, each with small results that came with it.
VIEWS = 32


class WorkersSeen(NamedTuple):
    """What one listing of heartbeats tells."""

    status: WorkersStatus
    ended: tuple[WorkerId, ...]
    #: those that are alive
    alive: tuple[WorkerId, ...]
    #: date of the newest heartbeat of each worker that ever had one, by the store's clock
    beats: dict[WorkerId, float]


@dataclass
class Link:
    """What a client knows of a session; shared by a `Session` and its runs."""

    store: Store
    manifest: Manifest
    settings: Settings
    author: log.Author
    state: SessionState
    #: None when workers are started elsewhere
    fleet: Fleet | None = None
    #: where the futures of this client are: Dask key -> run and global number there
    futures: dict[Any, tuple[RunId, int]] = field(default_factory=dict)
    #: what was computed before, in a session that was resumed
    earlier: Earlier | None = None
    #: whether the session's own code is to be put on the path before results are unpickled
    lacks_code: bool = False
    #: what is known of runs, so that a second look at one reads only what is new
    views: dict[RunId, RunView] = field(default_factory=dict)
    #: run and plan shard -> what each task there depends on, of shards with tasks that need something cancelled
    needs: dict[tuple[RunId, int], tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    #: number of the newest sign of a client, and the store's dates of entry 0 and of that one
    _dates: tuple[int, float, float] = (-1, 0.0, 0.0)
    #: by how much the store's clock is ahead of this machine's; None while it was not read
    _ahead: float | None = None
    _healer: Healer | None = None
    #: of what was warned
    _warned: set[str] = field(default_factory=set)

    @property
    def boot(self) -> float:
        """Seconds until a worker that is started now works; 0 where others start them."""
        return self.fleet.boot if isinstance(self.fleet, Elastic) else 0.0

    @property
    def cost_note(self) -> str:
        """What is to be said of the price of a worker; empty when it is what it says."""
        return str(self.manifest.fleet.options.get("price_note", ""))

    @functools.cached_property
    def guard(self) -> Guard:
        """What sees to it that somebody works; one for all waits, however short each of them is."""
        return Guard(self)

    @property
    def healer(self) -> Healer:
        """What sees to the fleet, and to what it costs; another one when there is another fleet."""
        fleet = self.fleet if isinstance(self.fleet, Elastic) else None
        if self._healer is None or self._healer.fleet is not fleet:
            self._healer = Healer(self.store, self.session, self.settings, self.author, fleet, self.now)
        return self._healer

    @functools.cached_property
    def spending(self) -> Spending:
        """What workers have spent, as far as it was read."""
        return Spending(self.store, self.session)

    @property
    def session(self) -> SessionId:
        return self.manifest.session

    @property
    def clock(self) -> Clock:
        return self.author.clock

    @property
    def workers(self) -> int | None:
        """How many workers there should be; None when they are started elsewhere."""
        return self.state.workers

    def learn(self, state: SessionState) -> None:
        """Take in a state, unless a newer one is known."""
        if state.next > self.state.next:
            self.state = state

    async def append(self, action: SessionAction) -> None:
        """Append to the session log."""
        self.learn(await log.append_session(self.store, self.session, self.state, self.author, action))

    async def follow(self) -> None:
        """Read what is new in the session log."""
        self.learn(await log.follow(self.store, self.session, self.state))

    async def view(self, run: RunId) -> RunView | None:
        """Return the view of a run, which need not be up to date, or None when there is no such run."""
        view = self.views.get(run)
        if view is None and (view := await RunView.open(self.store, run)) is not None:
            self.views[run] = view
            while len(self.views) > VIEWS:
                del self.views[next(iter(self.views))]
        return view

    async def bring_code(self) -> None:
        """Put the code that the session brings on this process's path, once: results may be of its classes."""
        if self.lacks_code:
            await bring_code(self.store, self.session, self.manifest.environment.code)
            self.lacks_code = False

    # ------------------------------------------------------------------ the deadline

    async def deadline(self) -> float | None:
        """Return when the session ends, in seconds since 1970 by the store's clock; None without a limit.

        One or two listings after a sign of a client, else no request.
        """
        settings = self.settings
        if settings.session_timeout is None and settings.absolute_timeout is None:
            return None
        if self._dates[0] != self.state.sign:
            dates = await log.session_dates(self.store, self.session, self.state.sign)
            if dates is None:  # a cleanup has deleted the log
                return None
            self._dates = (self.state.sign, *dates)
        return self.state.deadline(*self._dates[1:], settings.session_timeout, settings.absolute_timeout)

    def last_possible(self) -> float | None:
        """Return the latest deadline that an extension may set, once `deadline` was asked for; None without a limit."""
        limit = self.settings.absolute_timeout
        return None if limit is None else self._dates[1] + limit

    def wall(self) -> float:
        """Return the store's time as far as it is known without a request."""
        return self.clock.wall() + (self._ahead or 0.0)

    async def now(self) -> float:
        """Return the store's time in seconds since 1970; this machine's, for who may only read."""
        if self._ahead is None:
            with contextlib.suppress(StoreAccessDenied):
                self._ahead = await self.store.time(keys.clock(self.session)) - self.clock.wall()
        return self.wall()

    def may_be_over(self) -> bool:
        """Tell whether the deadline is near or has passed, by the clocks of clients."""
        state, settings = self.state, self.settings
        wrote = (state.opened_wrote, state.sign_wrote)
        hint = state.deadline(*wrote, settings.session_timeout, settings.absolute_timeout)
        return hint is not None and self.clock.wall() >= hint - CLOCKS_AGREE

    async def expired(self) -> bool:
        """Tell whether the deadline has passed; without a request while it is far."""
        if not self.may_be_over():
            return False
        deadline = await self.deadline()
        if deadline is None or self.clock.wall() < deadline - CLOCKS_AGREE:
            return False
        return await self.now() >= deadline

    async def condition(self) -> str:
        """Return ``"open"``, ``"closed"``, ``"halted"`` (its money is spent) or ``"expired"``."""
        if not self.state.closed and (self.state.halted is not None or await self.expired()):
            await self.follow()  # another client may have extended it
        if self.state.closed:
            return "closed"
        if self.state.halted is not None:
            return "halted"
        return "expired" if await self.expired() else "open"

    async def check_open(self) -> None:
        """Raise `ConfigError`, with what helps, unless workers work for this session."""
        condition = await self.condition()
        if condition == "closed":
            raise ConfigError(f"session {self.session} is closed; open a new one with Session(…)")
        if condition == "halted":
            raise ConfigError(f"session {self.session} {self.spent_up()}")
        if condition == "expired":
            raise ConfigError(f"session {self.session} is past its deadline; {await self.way_on()}")

    def spent_up(self) -> str:
        """Say that the session's money is spent, and what lets it go on."""
        limit = self.settings.max_cost if self.state.max_cost is None else self.state.max_cost
        return (
            f"has spent {self.state.halted:.2f} USD of its max_cost of {limit:.2f} USD, and its workers have ended. "
            f'What was committed is kept. To go on: attach("{self.session}", store="{self.store.url}")'
            f".extend(max_cost={2 * (limit or 0):g}), or burst extend {self.session} --max-cost {2 * (limit or 0):g}"
        )

    async def way_on(self) -> str:
        """Say what lets an expired session go on."""
        last = self.last_possible()
        if last is not None and await self.now() >= last:
            return (
                f"nothing moves its absolute_timeout of {self.settings.absolute_timeout:g} s. What was committed is "
                "kept and can be collected; for new work open a new session with Session(…)"
            )
        return (
            "what was committed is kept and can be collected. To go on: "
            f'attach("{self.session}", store="{self.store.url}").extend(seconds=3600), or burst extend {self.session}'
        )

    async def announce(self) -> None:
        """Tell the workers that a client waits, unless they have gone for good or the store is read-only."""
        if await self.condition() != "open":
            self.guard.hurry()
            return
        with contextlib.suppress(StoreAccessDenied):
            await self.append(Attach(self.author.name))

    async def stay(self) -> None:
        """Give a sign of this client, which waits, before the session's deadline comes near."""
        limit = self.settings.session_timeout
        if limit is not None and self.clock.wall() - self.state.sign_wrote > limit / 2:
            await self.announce()

    # ------------------------------------------------------------------ workers

    async def seen(self) -> WorkersSeen:
        """List the heartbeats, at one request per 500 workers."""
        beats, ended = await heartbeats(self.store, self.session)
        # When all have died at once, the newest heartbeat is a dead one's. Then this machine's clock
        # tells; it may differ from the store's, so it is believed only beyond a lease.
        now = max([*beats.values(), self.clock.wall() - self.settings.lease])
        gone = set(ended)
        alive = {w: date for w, date in beats.items() if w not in gone and now - date <= self.settings.lease}
        oldest = now - min(alive.values()) if alive else None
        return WorkersSeen(WorkersStatus(len(alive), oldest), ended, tuple(alive), beats)

    async def last_words(self, seen: WorkersSeen) -> Ended | None:
        """Return how the newest of the ended workers ended; None while one is alive."""
        if seen.status.alive:
            return None
        return await self.newest(seen.ended)

    async def newest(self, ended: Sequence[WorkerId]) -> Ended | None:
        """Return how that of `ended` ended which did so last."""

        async def read(worker: WorkerId) -> Ended | None:
            key = keys.ended(self.session, worker)
            data = await self.store.get(key)
            return None if data is None else decode(Ended, key, data)

        records = [record for record in await in_parallel(read, ended) if record is not None]
        return max(records, key=lambda record: record.wrote, default=None)

    @property
    def heals(self) -> bool:
        """Whether the session log says who starts workers: of a fleet elsewhere, and of one that adapts to the work."""
        adapts = self.state.minimum != self.state.workers
        return isinstance(self.fleet, Elastic) and (isinstance(self.fleet, Remote) or adapts)

    async def start_workers(self, eager: bool = False) -> int:
        """Start the workers that are missing, if they are started from here; return how many that were.

        Parameters
        ----------
        eager
            Whether they are wanted for work that is yet to come.

        Raises
        ------
        FleetError
            They could not be started.
        """
        if self.fleet is None or not self.workers:
            return 0
        if not self.heals:
            assert isinstance(self.fleet, Ensuring), "others are started by numbered starts"
            return await asyncio.to_thread(self.fleet.ensure, self.workers)
        before = self.state.next
        self.learn(await self.healer.heal(self.state, eager))
        return sum(workers for number, (workers, _) in self.state.starts.items() if number >= before)

    async def have_workers(self) -> int:
        """Start the workers that are missing. What a cloud refuses is a warning: the work is written down."""
        try:
            return await self.start_workers()
        except (CloudError, ConfigError) as error:
            self.warn(str(error))
            return 0

    def warn(self, message: str) -> None:
        """Warn, but not of the same twice: who waits looks again and again."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=3)

    def worker_line(self) -> str:
        """Return the command that starts workers anywhere."""
        key = f" --key {self.manifest.key}" if self.manifest.key else ""
        return f"burst worker --session {self.session} --store '{self.store.url}'{key}"
