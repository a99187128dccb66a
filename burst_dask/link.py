"""What client code knows of a session, and how it sees to it that somebody works for it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from burst_dask.clock import Clock
from burst_dask.config import Settings
from burst_dask.environment.preparing import bring_code
from burst_dask.environment.versions import table
from burst_dask.errors import (
    AccessDenied,
    CloudError,
    CloudLimit,
    CloudUnavailable,
    ConfigError,
    CredentialsMissing,
    EnvironmentFailed,
    FleetError,
    SessionEnded,
    StoreAccessDenied,
    VersionMismatch,
)
from burst_dask.fleet.base import Fleet, Remote
from burst_dask.journal import log
from burst_dask.journal.heartbeats import heartbeats
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import (
    Attach,
    Differences,
    Ended,
    Manifest,
    SessionAction,
    decode,
)
from burst_dask.protocol.session import CLOCKS_AGREE, SessionState
from burst_dask.report import WorkersStatus
from burst_dask.store import Meta, Store

if TYPE_CHECKING:
    from burst_dask.resuming import Earlier

#: Seconds between looks at the processes of a fleet on this machine, which cost no request.
CHECK_FLEET_EVERY = 3.0
#: Seconds without news after which heartbeats are listed, when workers are started elsewhere.
CHECK_BEATS_EVERY = 15.0
#: Seconds after which a client that waits for workers looks, once, whether their packages differ from its own.
COMPARE_AFTER = 3.0
#: How workers end that cannot work for the session, whenever they are started.
REFUSALS = {"refused": VersionMismatch, "unprepared": EnvironmentFailed}
#: Records of ended workers that are read to tell why none is alive.
RECORDS_READ = 20
#: Views of runs kept, each with small results that came with it.
VIEWS = 32
#: Times that ended workers are started again, without any news, before the wait is given up. A
#: supervisor, too, has started each several times by then.
RESTARTS = 2


class WorkersSeen(NamedTuple):
    """What one listing of heartbeats tells."""

    status: WorkersStatus
    ended: tuple[WorkerId, ...]
    #: those that are alive
    alive: tuple[WorkerId, ...]
    #: date of the newest heartbeat of each worker that ever had one, by the store's clock
    beats: dict[WorkerId, float]


class Spent(NamedTuple):
    """What one worker has spent so far."""

    #: by verb
    requests: dict[str, int]
    #: since its start
    seconds: float
    threads: int


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
    #: what workers have spent in their lives, of those whose life is over
    spent: dict[WorkerId, Spent] = field(default_factory=dict)
    #: number of the newest sign of a client, and the store's dates of entry 0 and of that one
    _dates: tuple[int, float, float] = (-1, 0.0, 0.0)
    #: by how much the store's clock is ahead of this machine's; None while it was not read
    _ahead: float | None = None
    #: of what was warned
    _warned: set[str] = field(default_factory=set)

    @functools.cached_property
    def guard(self) -> Guard:
        """What sees to it that somebody works; one for all waits, however short each of them is."""
        return Guard(self)

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
        state = self.state
        async for entry in log.read_session(self.store, self.session, state.next):
            state = state.apply(entry)
        self.learn(state)

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
        """Return ``"open"``, ``"closed"`` or ``"expired"``."""
        if not self.state.closed and await self.expired():
            await self.follow()  # another client may have extended it
        if self.state.closed:
            return "closed"
        return "expired" if await self.expired() else "open"

    async def check_open(self) -> None:
        """Raise `ConfigError`, with what helps, unless workers work for this session."""
        condition = await self.condition()
        if condition == "closed":
            raise ConfigError(f"session {self.session} is closed; open a new one with Session(…)")
        if condition == "expired":
            raise ConfigError(f"session {self.session} is past its deadline; {await self.way_on()}")

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

    def have_workers(self) -> int:
        """Start the workers that are missing, if they are started from here; return how many that were.

        It blocks. What a cloud refuses is a warning here: the work is written down, and others may do it.
        """
        if self.fleet is None or not self.workers:
            return 0
        try:
            return self.fleet.ensure(self.workers)
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
        return f"burst worker --session {self.session} --store '{self.store.url}'"


class Guard:
    """Sees to it that somebody works while a client waits, or says that nobody does."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._due = link.clock.monotonic() + self._every
        self._restarts = 0
        self._warned = False
        self._alive = 0
        self._compare_from = link.clock.monotonic() + COMPARE_AFTER
        self._worked = self._compared = False
        #: ended workers whose records were read
        self._read: set[WorkerId] = set()
        #: whether a worker cannot work for the session: then others started here could not either
        self._refused = False

    @property
    def _every(self) -> float:
        return CHECK_BEATS_EVERY if self._link.fleet is None else CHECK_FLEET_EVERY

    def news(self) -> None:
        """Somebody works."""
        self._restarts, self._worked = 0, True
        if self._link.fleet is None:
            self._due = self._link.clock.monotonic() + self._every

    def hurry(self) -> None:
        """Look at the next check: the session is over, and whoever waits for what is left waits for nobody."""
        self._due = self._link.clock.monotonic()

    def renew(self) -> None:
        """Somebody has started workers, and takes it that they will do better than those before."""
        self._restarts, self._refused, self._warned = 0, False, False
        self._due = self._link.clock.monotonic() + self._every

    async def check(self) -> None:
        """Look, if it is time to.

        Raises
        ------
        SessionEnded
            The session is closed or past its deadline, and no worker is left.
        VersionMismatch, EnvironmentFailed
            Every worker refused the session, or could not be prepared for it.
        FleetError
            Workers die as soon as they are started.
        """
        link = self._link
        # Who works has told before how it differs. A short wait is not made longer.
        if self._worked and not self._compared and link.clock.monotonic() >= self._compare_from:
            await self._compare()
        if link.clock.monotonic() < self._due:
            return
        if (condition := await link.condition()) != "open":
            await self._check_end(condition)
        elif link.fleet is None or self._refused:
            await self._check_beats()
        elif link.workers and await self._start_missing(link.fleet, link.workers):
            await self._check_restart(link.fleet)
        await link.stay()
        self._due = link.clock.monotonic() + self._every

    async def _start_missing(self, fleet: Fleet, workers: int) -> int:
        """Start the workers that are missing; return how many that were.

        A cloud may start them later, or somebody else who has the right: then it is a warning. Otherwise it is an
        error, unless others work.
        """
        start, link = fleet.replace_lost if isinstance(fleet, Remote) else fleet.ensure, self._link
        try:
            return await asyncio.to_thread(start, workers)
        except (CloudError, ConfigError) as error:  # the latter where boto3 is not installed
            hopeful = isinstance(error, CloudUnavailable | CloudLimit | AccessDenied | CredentialsMissing | ConfigError)
            if not hopeful and not (await link.seen()).status.alive:
                raise
            link.warn(f"workers of session {link.session} are not started now: {error}")
            return 0

    async def _check_end(self, condition: str) -> None:
        """The session is over: workers that are yet alive commit what they have."""
        if (await self._link.seen()).status.alive:
            return
        if condition == "closed":
            raise SessionEnded(
                f"session {self._link.session} is closed, and its workers have gone. "
                "What was committed is kept until the session is cleaned up by force"
            )
        raise SessionEnded(
            f"session {self._link.session} is past its deadline, and its workers have gone; {await self._link.way_on()}"
        )

    async def _check_restart(self, fleet: Fleet) -> None:
        """Some had ended, and were started again: once more may help, if they did not refuse."""
        last = await self._look()
        if self._alive:
            await self._check_refusals()
            return  # the others had nothing to do, or died of what the one alive may get done
        self._restarts += 1
        if self._restarts > RESTARTS:
            why = f" The last one: {last.message}" if last is not None and last.message else ""
            said = await asyncio.to_thread(fleet.describe)
            raise FleetError(
                f"the workers of session {self._link.session} keep ending before they finish a task.{why} "
                f"What is done is kept, and others may go on: {self._link.worker_line()} ({said})"
            )

    async def _check_refusals(self) -> None:
        """Start no more workers when one of those that have ended cannot work for the session."""
        seen = await self._link.seen()
        new = [worker for worker in seen.ended if worker not in self._read]
        self._read.update(new)
        last = await self._link.newest(new)
        self._refused = self._refused or (last is not None and last.reason in REFUSALS)

    async def _compare(self) -> None:
        """Warn, once, of packages that differ; those who start later are shown by the session's status."""
        self._compared = True
        for difference in await differences(self._link):
            warnings.warn(difference, stacklevel=2)

    async def _check_beats(self) -> None:
        await self._look()
        if not self._alive and self._refused:
            self._refused = False  # the last of them ended otherwise: others may do better
        elif not self._alive and not self._warned:
            self._warned = True
            warnings.warn(
                f"session {self._link.session} has work and no worker; start some, anywhere that reaches the store: "
                f"{self._link.worker_line()}",
                stacklevel=2,
            )

    async def _look(self) -> Ended | None:
        """List the heartbeats; return how the last worker ended if none is left."""
        seen = await self._link.seen()
        self._alive = seen.status.alive
        last = await self._link.last_words(seen)
        if last is not None and last.reason in REFUSALS:
            self._refused = True
            raise REFUSALS[last.reason](_refusal(self._link, last))
        return last


def _refusal(link: Link, last: Ended) -> str:
    what = "refused it" if last.reason == "refused" else "could not be prepared for it"
    return (
        f"every worker of session {link.session} {what}. The last one: {last.message}\n"
        f"What was submitted is kept. Workers that fit may be started anywhere: {link.worker_line()}"
    )


async def differences(link: Link) -> list[str]:
    """Return, in words, how packages of workers differ from those that the session was opened with.

    One listing, and a request for each kind of worker; none when the manifest names no packages.
    """
    if not link.manifest.environment.packages:
        return []
    names = [meta.key async for meta in listed(link.store, keys.differences(link.session))]
    bodies = await in_parallel(link.store.get, names)
    found = [decode(Differences, name, body) for name, body in zip(names, bodies, strict=True) if body is not None]
    return [
        f"packages of workers of session {link.session}, such as {one.worker} on {one.host}, are not those that it was "
        f"opened with; the work goes on with what they have:\n{table(one.packages)}"
        for one in found
    ]


async def notes(link: Link, seen: WorkersSeen) -> tuple[str, ...]:
    """Return what a person should know of the session's workers: that they refuse it, or have other packages."""
    found = await differences(link)
    if isinstance(link.fleet, Remote) and not link.state.closed:
        try:
            found += await asyncio.to_thread(link.fleet.notes)
        except (CloudError, ConfigError) as error:  # who only looks may have no right to ask
            found.append(f"what became of workers is not known: {error}")
    if seen.ended and not seen.status.alive and not link.state.closed:
        last = await link.newest(seen.ended[-RECORDS_READ:])
        if last is not None and last.reason in REFUSALS:
            found.insert(0, _refusal(link, last))
    return tuple(found)


async def listed(store: Store, prefix: str) -> AsyncIterator[Meta]:
    async for page in store.list(prefix):
        for meta in page:
            yield meta
