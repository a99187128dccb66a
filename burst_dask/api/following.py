"""One background watcher for all pending futures of a session."""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import threading
import warnings
from collections.abc import Iterable, Mapping

from burst_dask import sync
from burst_dask.api.futures import Future
from burst_dask.client.cancelling import undone
from burst_dask.client.link import Link
from burst_dask.client.watching import Watch
from burst_dask.errors import BurstError, StoreUnavailable
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.session_records import Cancel

#: Seconds between looks into the session log, for what others have cancelled: at first, and at most.
FOLLOW = (5.0, 30.0)
#: Runs looked at in one round: the oldest ones, the newest, and one of the others in turn.
OLDEST = 4


class _Followed:
    """A run with pending futures."""

    def __init__(self, link: Link, view: RunView, futures: dict[int, Future], own: bool) -> None:
        self.view = view
        #: whether all that the run computes are futures of this process
        self.own = own
        #: global number -> future, of those without an outcome
        self.futures = futures
        self.since = link.clock.monotonic()
        self.watch = Watch(link, view, list(futures), self._settled)

    def _settled(self, number: int) -> None:
        future = self.futures.pop(number, None)
        if future is not None:
            future.settle()


class Follower:
    """Looks for the outcomes of pending futures, with requests that grow with the logarithm of the time waited.

    Parameters
    ----------
    link
        The session.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._runs: dict[RunId, _Followed] = {}
        self._under_way = False
        self._stopping = False
        self._task: cf.Future[None] | None = None
        #: entries under way that cancel runs
        self._cancelling: set[cf.Future[None]] = set()
        #: run, and whether by force -> tasks that are to be cancelled, and whether with them the whole run
        self._dropped: dict[tuple[RunId, bool], tuple[Bitmap, bool]] = {}
        self._telling = False
        #: number of the session entry up to which cancellations were heeded
        self._heeded = 0
        self._added = asyncio.Event()
        self._turn = 0

    def follow(self, view: RunView, futures: Mapping[int, Future], own: bool = True) -> None:
        """Follow a run until each of these has ended; futures by global number. Called on the loop.

        Parameters
        ----------
        own
            Whether the run was submitted for these futures alone: it is cancelled when all of them are.
        """
        with self._lock:
            known = self._runs[view.run].futures if view.run in self._runs else {}
            self._runs[view.run] = _Followed(self._link, view, {**known, **futures}, own)
            start, self._under_way = not self._under_way, True
        self._added.set()
        if start:
            self._task = sync.start(self._follow())

    def drop(self, run: RunId, numbers: Iterable[int], force: bool = False) -> None:
        """Follow some futures no longer, and let nobody start their tasks; cancel the run if none is left of that."""
        with self._lock:
            followed = self._runs.get(run)
            if followed is None:
                return
            gone = [number for number in numbers if followed.futures.pop(number, None) is not None]
            if not gone:
                return
            if not followed.futures:
                del self._runs[run]
            if not followed.own:
                return
            tasks, _ = self._dropped.get((run, force), (EMPTY, False))
            self._dropped[run, force] = tasks | Bitmap.of(gone), not followed.futures
            start, self._telling = not self._telling, True
        if start:
            under_way = sync.start(self._tell())
            self._cancelling.add(under_way)
            under_way.add_done_callback(self._cancelling.discard)

    async def _tell(self) -> None:
        """Tell workers of cancelled tasks: those that are cancelled while an entry is on its way share the next."""
        while True:
            with self._lock:
                dropped, self._dropped = self._dropped, {}
                self._telling = bool(dropped)
            if not dropped:
                return
            for (run, force), (tasks, whole) in dropped.items():
                try:
                    await self._link.append(Cancel(run, force, EMPTY if whole else tasks))
                except BurstError as error:
                    warnings.warn(f"tasks of run {run} may run though they were cancelled: {error}", stacklevel=1)

    def close(self) -> None:
        """Cancel all pending futures, and return when nothing is looked at any more, the workers neither."""
        with self._lock:
            runs, self._runs = self._runs, {}
        for followed in runs.values():
            for future in list(followed.futures.values()):
                future.end(cancel=True)
        self.stop()

    def stop(self, timeout: float | None = None) -> None:
        """Return when the round under way is over and what is cancelled is so, or after that many seconds.

        There is no other round: futures that are pending then, or come later, end with an error.
        """
        self._stopping = True
        under_way = set(self._cancelling)
        if self._task is not None:
            sync.loop().call_soon_threadsafe(self._added.set)
            under_way.add(self._task)
        cf.wait(under_way, timeout)

    async def _follow(self) -> None:
        try:
            await self._rounds()
            if not self._stopping:
                return
            # Threads that wait may keep the interpreter from ending.
            error: BaseException = BurstError(
                "nobody looks for the outcome any more, because the interpreter ends. The call goes on: "
                f'attach("{self._link.session}", store="{self._link.store.url}").collect() returns what is done'
            )
        except BaseException as failed:
            error = failed
        with self._lock:
            runs, self._runs, self._under_way = self._runs, {}, False
        for followed in runs.values():
            for future in list(followed.futures.values()):
                future.end(error)

    async def _rounds(self) -> None:
        link, clock = self._link, self._link.clock
        since = away_since = followed_at = clock.monotonic()
        fresh = False
        while True:
            waited = clock.monotonic() - since
            pause = policy.patience(waited, link.settings.wait_poll_min, link.settings.wait_poll_max)
            if fresh and len(self._runs) > OLDEST + 2:
                pause = 0.0  # there was news, and others have not been looked at
            if await self._wait(pause):
                since = clock.monotonic()
            if self._stopping:
                return
            try:
                fresh = await self._look()
                if fresh:
                    link.guard.news()
                    since = clock.monotonic()
                if self._over():
                    return
                await link.guard.check()
                if clock.monotonic() - followed_at >= policy.patience(waited, *FOLLOW):
                    followed_at = clock.monotonic()
                    await link.follow()
                    self._heeded = -1  # what ran when it was cancelled may have ended
                if self._heeded != link.state.next:
                    self._heeded = link.state.next
                    await self._drop_cancelled()
                away_since = clock.monotonic()
            except StoreUnavailable:
                # A laptop that slept, a network that is gone for a while: the runs go on.
                if clock.monotonic() - away_since > link.settings.idle_timeout:
                    raise

    async def _wait(self, seconds: float) -> bool:
        """Wait, and tell whether a run was added meanwhile: then the wait is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._added.wait()
        except TimeoutError:
            return False
        self._added.clear()
        return True

    async def _look(self) -> bool:
        now = self._link.clock.monotonic()

        async def one(followed: _Followed) -> bool:
            found = await followed.watch.look(now - followed.since)
            await followed.watch.survey_if_due(now - followed.since)
            return found

        return any(await in_parallel(one, self._chosen()))

    def _chosen(self) -> list[_Followed]:
        with self._lock:
            runs = list(self._runs.values())
        if len(runs) <= OLDEST + 2:
            return runs
        self._turn += 1
        others = runs[OLDEST:-1]
        return [*runs[:OLDEST], others[self._turn % len(others)], runs[-1]]

    def _over(self) -> bool:
        """Forget runs without pending futures; tell whether none is left."""
        with self._lock:
            self._runs = {run: one for run, one in self._runs.items() if one.futures}
            self._under_way = bool(self._runs)
            return not self._under_way

    async def _drop_cancelled(self) -> None:
        """End the futures of tasks that nobody will run any more, because they, or what they need, were cancelled."""
        with self._lock:
            runs = dict(self._runs)
        gone = await undone(self._link, [followed.view for followed in runs.values()])
        for run, lost in gone.items():
            followed = runs[run]
            for number in [number for number in list(followed.futures) if number in lost]:
                if (future := followed.futures.pop(number, None)) is not None:
                    future.end(cancel=True)
