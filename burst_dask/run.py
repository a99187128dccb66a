"""Runs: waiting for one, seeing how far it is, and collecting what it gave.

::

    Session, attach ──▶ Run ──▶ Watch     looks for outcomes of what was asked for
                         │        └─ Guard   sees to it that somebody works
                         └────▶ Link       what client code knows of the session

A waiting client looks into one shard log at a time, so its requests grow with the logarithm of
the time it waits. All of it works alike in the process that submitted the run and in one that
attached to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from burst_dask import report, sync, tasklogs
from burst_dask.errors import (
    ConfigError,
    ProtocolError,
    RunCancelled,
    StoreAccessDenied,
    StoreError,
    StoreUnavailable,
    WaitTimeout,
)
from burst_dask.journal.view import RunView, TaskOutcome
from burst_dask.link import Link
from burst_dask.protocol import policy
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Attach, Cancel, Plan
from burst_dask.protocol.shard import Phase
from burst_dask.report import RunStatus, WorkersStatus
from burst_dask.serialize import load_failure, loads
from burst_dask.submission import numbers, unpack
from burst_dask.tasklogs import TaskLog

#: Seconds between surveys for a progress bar; each costs as much as a dozen looks or more.
SURVEY_EVERY = 2.5
#: Shards looked at without a pause, each of them because the one before was complete.
LOOKS_AT_ONCE = 8
#: Seconds between surveys while all shards looked at turn out complete.
SURVEY_AGAIN = 5.0
#: A failed output is noticed within so many seconds, or in three times the time it took to fail.
FAILED_WITHIN = 10.0
#: Bytes of results that are fetched together and decoded before the next are.
COLLECT_BYTES = 64 << 20


# ---------------------------------------------------------------------------- waiting


class Watch:
    """Looks for the outcomes of what was asked for, until all of them are known.

    Attributes
    ----------
    pending : dict of int to list of int
        Plan shard -> outputs in it without a known outcome.
    failed : TaskOutcome or None
        The first output that is known to have failed.
    """

    def __init__(self, link: Link, view: RunView, outputs: Iterable[int]) -> None:
        self._link = link
        self._view = view
        self.pending: dict[int, list[int]] = {}
        for output in sorted(set(outputs)):
            self.pending.setdefault(view.plan.locate(output)[0], []).append(output)
        self.failed: TaskOutcome | None = None
        self._surveyed = 0.0
        self._followed = 0.0
        if view.shards:  # what is known already is not looked for again
            self._advance(list(self.pending))

    async def wait(self, *, to_first_failure: bool, update: report.Update | None, known: bool) -> None:
        """Return when every output has an outcome, or, if asked, when one has failed.

        Parameters
        ----------
        known
            Whether something may have happened already, so that a survey pays first.
        """
        link, clock = self._link, self._link.clock
        guard = link.guard
        started = away_since = clock.monotonic()
        if known:
            await self._survey()
        while self.pending and not (to_first_failure and self.failed):
            waited = clock.monotonic() - started
            await clock.sleep(policy.patience(waited, link.settings.wait_poll_min, link.settings.wait_poll_max))
            try:
                if await self._look(waited):
                    guard.news()
                await guard.check()
                if self._survey_due(waited, shown=update is not None):
                    self._surveyed = waited
                    await self._survey()
                if update is not None:
                    totals = self._view.totals()
                    update(totals.done, totals.failed, totals.total)
                await self._follow(waited)
                away_since = clock.monotonic()
            except StoreUnavailable:
                # A laptop that slept, a network that is gone for a while: the run goes on.
                if clock.monotonic() - away_since > link.settings.idle_timeout:
                    raise

    async def _look(self, waited: float) -> bool:
        """Look into the log of one shard that holds pending outputs, and the next if that is complete; tell of news."""
        view = self._view
        news = False
        for _ in range(LOOKS_AT_ONCE):
            if not self.pending:
                break
            # The last one: shards are claimed in order, so when it is complete most are, and few looks found
            # something that did not end the wait.
            number = max(self.pending)
            shard = view.owner(self.pending[number][-1])[0].id
            if not await view.poll(shard):
                break
            news = True
            self._advance([number])
            if view.shard(shard).phase is not Phase.COMPLETE:
                break
            # Where one shard is complete, others often are: one listing is less than a look at each.
            if self.pending and waited - self._surveyed >= waited / 10:
                self._surveyed = waited
                await self._survey()
        else:
            if self.pending and waited - self._surveyed >= SURVEY_AGAIN:  # so many at once: the end is near
                self._surveyed = waited
                await self._survey()
        return news

    def _survey_due(self, waited: float, *, shown: bool) -> bool:
        """Tell whether to look at all shards: for a progress bar, and for outputs that failed elsewhere."""
        if shown:
            return waited - self._surveyed >= SURVEY_EVERY
        return len(self.pending) > 1 and waited >= max(FAILED_WITHIN, 3 * self._surveyed)

    async def _survey(self) -> None:
        await self._view.survey()
        self._advance(list(self.pending))

    def _advance(self, numbers: Iterable[int]) -> None:
        """Strike off the outputs of these plan shards that have an outcome."""
        for number in numbers:
            left = []
            for output in self.pending[number]:
                outcome = self._view.outcome(output)
                if outcome is None:
                    left.append(output)
                elif not outcome.done and self.failed is None:
                    self.failed = outcome
            if left:
                self.pending[number] = left
            else:
                del self.pending[number]

    async def _follow(self, waited: float) -> None:
        """Look into the session log now and then: somebody may have cancelled the run."""
        if waited - self._followed >= policy.patience(waited, 5.0, 30.0):
            self._followed = waited
            await self._link.follow()
        if self.pending and self._view.run in self._link.state.cancelled:
            raise _cancelled(self._view)


def _cancelled(view: RunView) -> RunCancelled:
    totals = view.totals()
    return RunCancelled(
        f"run {view.run} was cancelled with at least {totals.done} of its {totals.total} tasks done. "
        "What was committed is kept until the session is cleaned up"
    )


# ---------------------------------------------------------------------------- the answer


def _portions(view: RunView, tasks: Iterable[int]) -> Iterator[list[int]]:
    """Yield tasks whose results lie together, so that each object is read once and memory is bounded."""
    places = []
    for task in set(tasks):
        outcome = view.outcome(task)
        if outcome is None or outcome.location is None:
            raise ProtocolError(f"output {task} of run {view.run} has no stored result")
        places.append((outcome.shard.id, outcome.location, task))
    portion: list[int] = []
    size = 0
    for _, location, task in sorted(places):
        portion.append(task)
        size += location.end - location.start
        if size >= COLLECT_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


class Run:
    """One submitted graph. Its `id` is all that is needed to come back to it: `attach(id, store=…)`.

    Made by `Session.compute` and `attach`. The words are those of `concurrent.futures.Future`
    and `distributed`: what waits takes a ``timeout`` and raises `WaitTimeout`, a `TimeoutError`,
    while the run goes on.

    Attributes
    ----------
    id : str
        ``<session>.<own part>``.
    """

    def __init__(self, link: Link, plan: Plan | RunView, *, attached: bool, progress: bool | None) -> None:
        self._link = link
        self._view = plan if isinstance(plan, RunView) else RunView(link.store, plan)
        self._attached = attached
        self._progress = progress
        #: whether this client has told the workers that it waits: who submits has
        self._announced = not attached
        self.id: RunId = self._view.run

    def __repr__(self) -> str:
        return f"Run({self.id!r}, store={self._link.store.url!r})"

    def wait(self, timeout: float | None = None) -> None:
        """Return when everything that was asked for has an outcome, results and errors alike.

        As `distributed.wait`: errors of tasks are raised by `result`, not here.

        Parameters
        ----------
        timeout
            Seconds; None waits for as long as it takes.

        Raises
        ------
        WaitTimeout
            The time is over. The run goes on.
        RunCancelled
            Somebody cancelled the run.
        FleetError
            There are no workers, and none can be started.
        """
        self._wait(timeout, to_first_failure=False)

    def result(self, timeout: float | None = None) -> Any:
        """Wait, and return what `dask.compute` would have returned.

        Raises
        ------
        Exception
            A task's own, with the traceback of the worker, as soon as an output is known to
            have failed; the other tasks go on.
        WaitTimeout, RunCancelled, FleetError
            As from `wait`.
        """
        watch = self._wait(timeout, to_first_failure=True)
        if watch.failed is not None:
            failure = load_failure(sync.run(self._cause(watch.failed)))
            failure.reraise()
        return self._collect()

    def done(self) -> bool:
        """Tell whether everything that was asked for has an outcome, without waiting."""
        sync.run(self._view.survey())
        return not Watch(self._link, self._view, self._outputs()).pending

    def cancel(self) -> bool:
        """Let workers take no new work of this run; return False when there was nothing left to cancel.

        Tasks that run are let finish. What was committed is kept.
        """

        async def cancel() -> bool:
            await self._view.survey()
            if not self._view.totals().pending:
                return False
            await self._link.append(Cancel(self.id))
            return True

        return sync.run(cancel())

    def logs(self, key: Any) -> TaskLog:
        """Return what a task has printed, and its `logging` records: `str` of it is the text.

        Of each try of the task the last 64 KB are kept, and are there when its worker is not. They come
        with the outcome, or when another try follows. What a worker printed that died before, and what
        subprocesses and native code write, is only in the worker's own log.

        Parameters
        ----------
        key
            The task's Dask key, or its text.

        Raises
        ------
        UnknownId
            The run has no such task; the message lists what is spelled alike.
        """
        return sync.run(tasklogs.of_task(self._view, key))

    def status(self) -> RunStatus:
        """Return how far the run is, at a few requests whatever its size."""

        async def look() -> RunStatus:
            seen = await self._link.seen()
            await self._link.follow()
            return await run_status(self._link, self._view, seen.status)

        return sync.run(look())

    # ------------------------------------------------------------------ inside

    def _outputs(self) -> list[int]:
        return numbers(self._view.plan.outputs)

    def _wait(self, timeout: float | None, *, to_first_failure: bool) -> Watch:
        check_timeout(timeout)
        watch = Watch(self._link, self._view, self._outputs())
        with self._detaching(), report.progress(self._progress, self.id) as update:
            sync.run(self._watch(watch, timeout, to_first_failure, update))
        return watch

    async def _watch(
        self, watch: Watch, timeout: float | None, to_first_failure: bool, update: report.Update | None
    ) -> None:
        try:
            async with asyncio.timeout(timeout) as limit:
                if not self._announced:
                    self._announced = True
                    with contextlib.suppress(StoreAccessDenied):  # whoever may only read may still wait
                        await self._link.append(Attach(self._link.author.name))
                await watch.wait(to_first_failure=to_first_failure, update=update, known=self._attached)
        except TimeoutError as error:
            if not limit.expired():
                raise
            totals = self._view.totals()
            raise WaitTimeout(
                f"run {self.id} is not complete after {timeout:g} s: {totals.done + totals.failed} of its "
                f"{totals.total} tasks are known to have an outcome. It goes on; wait again, or attach later"
            ) from error

    @contextlib.contextmanager
    def _detaching(self) -> Iterator[None]:
        try:
            yield
        except KeyboardInterrupt:
            print(
                f"\nDetached from run {self.id}, which goes on. To come back to it:\n"
                f"    from burst_dask import attach\n"
                f'    attach("{self.id}", store="{self._link.store.url}").result()',
                file=sys.stderr,
            )
            raise

    async def _cause(self, outcome: TaskOutcome) -> memoryview:
        """Return the body of the failure that `outcome` comes from."""
        view, cause = self._view, outcome.cause
        if cause is None:
            raise ProtocolError(f"a failed task of run {self.id} names no cause")
        while (found := view.outcome(cause)) is None:
            # Its entry was written before the one that names it.
            if not await view.poll(view.owner(cause)[0].id):
                raise ProtocolError(f"task {cause} of run {self.id} is named as a cause and has no outcome")
        if found.location is None:
            raise ProtocolError(f"the error of task {cause} of run {self.id} was not stored")
        return (await view.fetch([cause]))[cause]

    def _collect(self) -> Any:
        """Fetch and decode, portion by portion; the next is on its way while one is decoded."""
        view = self._view
        values: dict[int, Any] = {}
        with self._detaching():
            coming = None
            for portion in _portions(view, self._outputs()):
                now, coming = coming, sync.start(view.fetch(portion))
                if now is not None:
                    values.update((task, loads(body)) for task, body in now.result().items())
            if coming is not None:
                values.update((task, loads(body)) for task, body in coming.result().items())
        return unpack(view.plan.outputs, values.__getitem__)

    def _abandon(self) -> None:
        """Cancel, as far as the store allows: nobody waits for the run any more."""
        with contextlib.suppress(StoreError):
            sync.run(self._link.append(Cancel(self.id)))


async def run_status(link: Link, view: RunView, workers: WorkersStatus) -> RunStatus:
    """Return how far the run of `view` is."""
    await view.survey()
    totals = view.totals()
    ended = link.clock.wall()
    if not totals.pending:
        ended = await view.last_change() or view.plan.created
        state = "failed" if totals.failed else "done"
    elif view.run in link.state.cancelled:
        state = "cancelled"
    else:
        state = "running" if totals.done or totals.failed or totals.reserved else "pending"
    return RunStatus(
        id=view.run,
        state=state,
        total=totals.total,
        done=totals.done,
        failed=totals.failed,
        running=totals.reserved if totals.pending else 0,
        elapsed=max(0.0, ended - view.plan.created),
        workers=workers,
    )


def check_timeout(timeout: float | None) -> None:
    """Raise unless `timeout` is a time.

    >>> check_timeout(0)
    Traceback (most recent call last):
        ...
    burst_dask.errors.ConfigError: timeout=0: must be more than 0; None waits for as long as it takes
    """
    if timeout is not None and not timeout > 0:
        raise ConfigError(f"timeout={timeout!r}: must be more than 0; None waits for as long as it takes")
