"""What client code knows of a session, and how it sees to it that somebody works for it."""

from __future__ import annotations

import asyncio
import functools
import warnings
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from burst_dask.clock import Clock
from burst_dask.config import Settings
from burst_dask.environment.versions import table
from burst_dask.errors import ConfigError, EnvironmentFailed, FleetError, VersionMismatch
from burst_dask.fleet.base import Fleet
from burst_dask.journal import log
from burst_dask.journal.heartbeats import heartbeats
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import (
    Close,
    Differences,
    Ended,
    Manifest,
    Open,
    Scale,
    SessionAction,
    SessionEntry,
    decode,
    encode,
)
from burst_dask.protocol.session import SessionState, fold
from burst_dask.report import WorkersStatus
from burst_dask.store import Meta, Store, probe

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
#: Seconds between looks at workers that have been told to end.
ENDING_POLL = 0.5
#: Times that ended workers are started again, without any news, before the wait is given up. A
#: supervisor, too, has started each several times by then.
RESTARTS = 2


class WorkersSeen(NamedTuple):
    """What one listing of heartbeats tells."""

    status: WorkersStatus
    ended: tuple[WorkerId, ...]


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

    async def seen(self) -> WorkersSeen:
        """List the heartbeats, at one request per 500 workers."""
        beats, ended = await heartbeats(self.store, self.session)
        # When all have died at once, the newest heartbeat is a dead one's. Then this machine's clock
        # tells; it may differ from the store's, so it is believed only beyond a lease.
        now = max([*beats.values(), self.clock.wall() - self.settings.lease])
        alive = [date for worker, date in beats.items() if now - date <= self.settings.lease]
        for worker in ended:
            if beats.get(worker) in alive:
                alive.remove(beats[worker])
        oldest = now - min(alive) if alive else None
        return WorkersSeen(WorkersStatus(len(alive), oldest), ended)

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

    def renew(self) -> None:
        """Somebody has started workers, and takes it that they will do better than those before."""
        self._restarts, self._refused, self._warned = 0, False, False
        self._due = self._link.clock.monotonic() + self._every

    async def check(self) -> None:
        """Look, if it is time to.

        Raises
        ------
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
        if link.fleet is None or self._refused:
            await self._check_beats()
        elif link.workers and await asyncio.to_thread(link.fleet.ensure, link.workers):
            await self._check_restart(link.fleet)
        self._due = link.clock.monotonic() + self._every

    async def _check_restart(self, fleet: Fleet) -> None:
        """Some had ended, and were started again: once more may help, if they did not refuse."""
        last = await self._look()
        if self._alive:
            await self._check_refusals()
            return  # the others had nothing to do, or died of what the one alive may get done
        self._restarts += 1
        if self._restarts > RESTARTS:
            why = f" The last one: {last.message}" if last is not None and last.message else ""
            raise FleetError(
                f"the workers of session {self._link.session} keep ending before they finish a task.{why} "
                f"What is done is kept, and others may go on: {self._link.worker_line()} ({fleet.describe()})"
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
    if seen.ended and not seen.status.alive and not link.state.closed:
        last = await link.newest(seen.ended[-RECORDS_READ:])
        if last is not None and last.reason in REFUSALS:
            found.insert(0, _refusal(link, last))
    return tuple(found)


# ---------------------------------------------------------------------------- the beginning


async def create(link: Link, workers: int | None, code: bytes = b"") -> None:
    """Write the session down, and the code that it brings, on a store that keeps the protocol's promises."""
    await probe(link.store, link.author.entropy)
    await link.append(Open())
    if workers is not None:
        await link.append(Scale(workers))
    if code:
        await link.store.put(keys.code(link.session, link.manifest.environment.code), code)
    # Last: sessions are listed by their manifests, so none is listed that is not there whole.
    if not await link.store.create(keys.manifest(link.session), encode(link.manifest)):
        raise ConfigError(f"there is a session {link.session} already; try again")


async def attach(store: Store, session: SessionId, author: log.Author) -> Link | None:
    """Return the link to a session that is there, or None."""
    key = keys.manifest(session)
    data = await store.get(key)
    if data is None:
        return None
    manifest = decode(Manifest, key, data)
    return Link(store, manifest, Settings.of(**manifest.settings), author, await _read_state(store, session))


async def _read_state(store: Store, session: SessionId) -> SessionState:
    """Return the state of a session, reading its log in parallel."""
    names = [meta.key async for meta in listed(store, keys.session_log(session))]
    bodies = await in_parallel(store.get, names)
    entries = [decode(SessionEntry, name, body) for name, body in zip(names, bodies, strict=True) if body is not None]
    if not entries:  # somebody's cleanup was interrupted: it can only be repeated
        return SessionState(closed=True)
    return fold(entries)


# ---------------------------------------------------------------------------- the end


async def incomplete(link: Link) -> list[RunId]:
    """Return the runs that workers may still work on."""
    await link.follow()

    async def pending(run: RunId) -> RunId | None:
        view = await RunView.open(link.store, run)
        if view is None:
            return None
        await view.survey()
        return run if view.totals().pending else None

    return [run for run in await in_parallel(pending, link.state.live_runs) if run is not None]


async def close(link: Link) -> None:
    await link.follow()
    if not link.state.closed and await link.store.get(keys.manifest(link.session)) is not None:
        await link.append(Close())


async def delete(link: Link, everything: bool) -> None:
    """Delete the session's objects when its workers, wherever they run, have ended."""
    # By then a worker has looked into the session log and let go; who has not is dead, or stopped.
    until = link.clock.monotonic() + link.settings.session_poll + link.settings.release_grace + link.settings.heartbeat
    while (await link.seen()).status.alive and link.clock.monotonic() < until:
        await link.clock.sleep(ENDING_POLL)
    kept = () if everything else ("/log/", "/logs/", "/segments/", "/plan", "/names")
    log = keys.session_log(link.session)
    async for page in link.store.list(keys.session_prefix(link.session)):
        doomed = [meta.key for meta in page if not any(part in meta.key for part in kept)]
        await link.store.delete(key for key in doomed if not key.startswith(log))
    if everything:
        await link.store.delete([meta.key async for meta in listed(link.store, log)])
        await link.store.delete([keys.manifest(link.session)])


async def listed(store: Store, prefix: str) -> AsyncIterator[Meta]:
    async for page in store.list(prefix):
        for meta in page:
            yield meta
