"""Seeing to it that somebody works for a session while a client waits, or saying why nobody does."""

from __future__ import annotations

import asyncio
import warnings
from typing import TYPE_CHECKING

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
    UntrustedObject,
    VersionMismatch,
)
from burst_dask.fleet.base import Fleet, Remote
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Differences, Ended, decode
from burst_dask.scaling.healer import EACH_EVERY
from burst_dask.store.base import listed

if TYPE_CHECKING:
    from burst_dask.client.link import Link, WorkersSeen

#: Seconds between looks at the processes of a fleet on this machine, which cost no request.
CHECK_FLEET_EVERY = 3.0
#: Seconds without news after which heartbeats are listed, when workers are started elsewhere.
CHECK_BEATS_EVERY = 15.0
#: Seconds after which a client that waits for workers looks, once, whether their packages differ from its own.
COMPARE_AFTER = 3.0
#: How workers end that cannot work for the session, whenever they are started.
REFUSALS = {"refused": VersionMismatch, "unprepared": EnvironmentFailed, "untrusted": UntrustedObject}
#: Records of ended workers that are read to tell why none is alive.
RECORDS_READ = 20
#: Times that ended workers are started again, without any news, before the wait is given up. A
#: supervisor, too, has started each several times by then.
RESTARTS = 2


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
        if self._link.fleet is None:
            return CHECK_BEATS_EVERY
        return EACH_EVERY if self._link.heals else CHECK_FLEET_EVERY

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
        VersionMismatch, EnvironmentFailed, UntrustedObject
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
        elif link.workers and await self._start_missing():
            await self._check_restart(link.fleet)
        await link.stay()
        self._due = link.clock.monotonic() + self._every

    async def _start_missing(self) -> int:
        """Start the workers that are missing; return how many that were.

        A cloud that does not start them now may do so later, and somebody else may have the right that is missing
        here: that is a warning. Where neither helps, it is an error, unless others work.
        """
        link = self._link
        try:
            return await link.start_workers()
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
        if condition == "halted":
            raise SessionEnded(f"session {self._link.session} {self._link.spent_up()}")
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
    what = "could not be prepared for it" if last.reason == "unprepared" else "refused it"
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
