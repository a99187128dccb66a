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
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from burst_dask import sync
from burst_dask.client import collecting, replaying, tasklogs
from burst_dask.client.cancelling import Undone, undone
from burst_dask.client.collecting import Collected, Results
from burst_dask.client.link import Link
from burst_dask.client.shapes import numbers, unpack
from burst_dask.client.statuses import run_status, survey_workers
from burst_dask.client.stories import tell_run, tell_task
from burst_dask.client.tasklogs import TaskLog
from burst_dask.client.watching import Watch
from burst_dask.errors import (
    ConfigError,
    StoreError,
    WaitTimeout,
)
from burst_dask.journal.view import RunView
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan
from burst_dask.protocol.session_records import Cancel
from burst_dask.report import tables
from burst_dask.report.lists import Story
from burst_dask.report.tables import RunStatus


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

    def __init__(
        self,
        link: Link,
        plan: Plan | RunView,
        *,
        attached: bool,
        progress: bool | None,
        outputs: bytes | None = None,
    ) -> None:
        self._link = link
        self._view = plan if isinstance(plan, RunView) else RunView(link.store, plan)
        #: the shape of what was asked for here, which may be less than when the run was submitted
        self._shape = self._view.plan.outputs if outputs is None else outputs
        self._attached = attached
        self._progress = progress
        #: whether this client has told the workers that it waits: who submits has
        self._announced = not attached
        self._asked: collecting.Asked | None = None
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

    def result(self, timeout: float | None = None, on_error: collecting.OnError = "raise") -> Any:
        """Wait, and return what `dask.compute` would have returned.

        Parameters
        ----------
        timeout
            Seconds; None waits for as long as it takes.
        on_error
            ``"return"`` leaves a `TaskError` in the place of what failed.

        Raises
        ------
        Exception
            A task's own, with the traceback of the worker, as soon as an output is known to
            have failed; the other tasks go on. If the output itself did not run, a note on the
            exception says so.
        WaitTimeout, RunCancelled, FleetError
            As from `wait`.
        """
        collecting.check_on_error(on_error)
        watch = self._wait(timeout, to_first_failure=on_error == "raise")
        with self._detaching():
            if on_error == "raise" and watch.failed is not None:
                self._raise(watch.failed)
            names = {} if watch.failed is None else sync.run(self._look()).keys
            outputs = self._outputs()
            collecting.warn_if_large([(self._view, outputs)])
            values = dict(collecting.decoded(self._view, outputs, names))
        return unpack(self._shape, values.__getitem__)

    def collect(
        self,
        wait: bool = False,
        timeout: float | None = None,
        *,
        since: str | Collected | None = None,
        on_error: collecting.OnError = "return",
    ) -> Collected:
        """Return what is done so far, by Dask key and in the order in which it was asked for.

        Parameters
        ----------
        wait
            Whether to wait until all is done first.
        timeout
            Seconds to wait at most.
        since
            What an earlier `collect` returned, or its `token`, also in another process: only what is new
            since then is returned.
        on_error
            ``"return"`` leaves a `TaskError` in the place of what failed; ``"raise"`` raises the first of them.

        Raises
        ------
        WaitTimeout
            The time is over. The error's `results` are what is done so far. The run goes on.

        Examples
        --------
        >>> import dask
        >>> from burst_dask import Session
        >>> burst = Session("memory://collect-doctest", workers=1)
        >>> run = burst.compute([dask.delayed(n, name=f"n-{n}") + 0 for n in range(2)])
        >>> done = run.collect(wait=True)
        >>> list(done.values()), done.pending
        ([0, 1], 0)
        >>> run.collect(since=done.token)
        <Collected: 0 results, 0 of them errors; 0 pending>
        >>> burst.cleanup(force=True)
        """
        collecting.check_on_error(on_error)
        if wait:
            try:
                self._wait(timeout, to_first_failure=on_error == "raise")
            except WaitTimeout as error:
                error.results = self.collect(since=since)
                raise
        wanted, gone = sync.run(self._look()), sync.run(self._undone())
        with self._detaching():
            return collecting.collected([(self._view, wanted)], since, on_error, gone)

    def results(self) -> Results:
        """Return what is done so far as a mapping that fetches each result when it is looked at."""
        return Results(self._view, sync.run(self._look()))

    def as_completed(self, timeout: float | None = None) -> Iterator[tuple[Any, Any]]:
        """Yield keys and results as they come, a `TaskError` for what failed.

        Raises
        ------
        WaitTimeout
            The time is over before all came.
        """
        check_timeout(timeout)
        wanted = sync.run(self._look())
        come: list[int] = []
        watch = Watch(self._link, self._view, wanted.keys, come.append)
        clock = self._link.clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        while watch.pending or come:
            if not come:
                left = None if deadline is None else max(1e-3, deadline - clock.monotonic())
                with self._detaching():
                    sync.run(self._watch(watch, left, to_first_failure=False, update=None, to_news=True))
            ready, come[:] = list(come), []
            for task, value in collecting.decoded(self._view, ready, wanted.keys):
                yield wanted.keys[task], value

    def replay(self, key: Any) -> Any:
        """Run a task of this run here, with its real inputs, as a plain call: a debugger sees all of it.

        Of a task that did not run because another one failed, that other one is run. Inputs come from
        the store; those that only a worker had in its memory are computed here again.

        Parameters
        ----------
        key
            Dask key of the task, such as `TaskError.key`.

        Returns
        -------
        Any
            What the task returns, if it does not fail here.

        Raises
        ------
        UnknownId
            There is no such task in the run.
        Exception
            The task's own: ``import pdb; pdb.post_mortem()`` stands where it was raised.
        """
        sync.run(self._link.bring_code())
        return sync.run(replaying.prepare(self._view, key))()

    def done(self) -> bool:
        """Tell whether everything that was asked for has an outcome, without waiting."""
        sync.run(self._view.survey())
        return not Watch(self._link, self._view, self._outputs()).pending

    def cancel(self, force: bool = False) -> bool:
        """Let workers take no new work of this run; return False when there was nothing left to cancel.

        Tasks that run are let finish, and what was committed is kept. All others count as cancelled.

        Parameters
        ----------
        force
            End the tasks that run, too. A thread cannot be ended, so a worker that runs one commits
            what it has of other runs, ends, and is replaced; tasks of others that it runs begin anew elsewhere.
        """

        async def cancel() -> bool:
            await self._view.survey()
            if not self._view.totals().pending:
                return False
            await self._link.append(Cancel(self.id, force))
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
            await self._link.follow()
            workers = await survey_workers(self._link)
            gone = await undone(self._link, [self._view], workers.seen.alive)
            return await run_status(self._link, self._view, workers, undone=gone.get(self.id))

        return sync.run(look())

    def story(self, key: Any = None) -> Story:
        """Return what happened to the run, or to one task of it, in plain words, oldest first.

        Parameters
        ----------
        key
            The Dask key of a task, or its text; None tells of the whole run.

        Returns
        -------
        Story
            A list of `StoryLine` that prints as a table. Times are those of whoever did it.

        Raises
        ------
        UnknownId
            The run has no such task.

        Examples
        --------
        >>> import dask
        >>> from burst_dask import Session
        >>> burst = Session("memory://story-doctest", workers=1)
        >>> run = burst.compute(dask.delayed(sum)([1, 2], dask_key_name="three"))
        >>> run.wait()
        >>> [line.log for line in run.story("three")]
        ['session', 'session', 'session', 'shard 00000', 'shard 00000']
        >>> burst.cleanup(force=True)
        """
        told = tell_run(self._link, self._view) if key is None else tell_task(self._link, self._view, key)
        return sync.run(told)

    # ------------------------------------------------------------------ inside

    def _outputs(self) -> list[int]:
        sync.run(self._link.bring_code())
        return numbers(self._shape)

    def _wait(self, timeout: float | None, *, to_first_failure: bool, leave: bool = False) -> Watch:
        check_timeout(timeout)
        watch = Watch(self._link, self._view, self._outputs(), leave=leave)
        with self._detaching(), tables.progress(self._progress, self.id) as update:
            sync.run(self._watch(watch, timeout, to_first_failure, update))
        return watch

    def _raise(self, task: int) -> NoReturn:
        (found,) = collecting.decoded(self._view, [task], {} if self._is_cause(task) else sync.run(self._look()).keys)
        found[1].reraise()
        raise AssertionError  # for the type checker

    def _is_cause(self, task: int) -> bool:
        outcome = self._view.outcome(task)
        return outcome is not None and outcome.cause == task

    async def _watch(
        self,
        watch: Watch,
        timeout: float | None,
        to_first_failure: bool,
        update: tables.Update | None,
        to_news: bool = False,
    ) -> None:
        try:
            async with asyncio.timeout(timeout) as limit:
                if not self._announced:
                    self._announced = True
                    await self._link.announce()
                await watch.wait(
                    to_first_failure=to_first_failure, update=update, known=self._attached, to_news=to_news
                )
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

    async def _look(self) -> collecting.Asked:
        """Bring the view up to date; return what was asked for."""
        await self._link.bring_code()
        await self._view.survey()
        if self._asked is None:
            self._asked = (await collecting.asked(self._view)).only(numbers(self._shape))
        return self._asked

    async def _undone(self) -> Mapping[RunId, Undone]:
        await self._link.follow()
        return await undone(self._link, [self._view])

    def _abandon(self) -> None:
        """Cancel, as far as the store allows: nobody waits for the run any more."""
        with contextlib.suppress(StoreError):
            sync.run(self._link.append(Cancel(self.id)))


def check_timeout(timeout: float | None) -> None:
    """Raise unless `timeout` is a time.

    >>> check_timeout(0)
    Traceback (most recent call last):
        ...
    burst_dask.errors.ConfigError: timeout=0: must be more than 0; None waits for as long as it takes
    """
    if timeout is None:
        return
    if isinstance(timeout, bool) or not isinstance(timeout, int | float):
        raise ConfigError(f"timeout={timeout!r}: must be a number of seconds; None waits for as long as it takes")
    if not timeout > 0:
        raise ConfigError(f"timeout={timeout!r}: must be more than 0; None waits for as long as it takes")
