"""The part of a session that takes calls, keeps collections in the store, and collects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import dask
from dask.base import is_dask_collection
from dask.utils import shorten_traceback

from burst_dask import sync
from burst_dask.api.executor import SessionExecutor
from burst_dask.api.futures import Future, gather
from burst_dask.api.grouping import Futures
from burst_dask.api.run import Run, check_timeout
from burst_dask.client import collecting
from burst_dask.client.cancelling import undone
from burst_dask.client.collecting import Collected
from burst_dask.client.link import Link
from burst_dask.client.shapes import numbers
from burst_dask.client.submission import Asked, submit
from burst_dask.errors import ConfigError, WaitTimeout
from burst_dask.graph import Stored
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol.keys import RunId


class Calling:
    """Base of `Session`: what `distributed.Client` calls submit, map, gather, persist and get_executor."""

    _link: Link
    _progress: bool | None

    @functools.cached_property
    def _futures(self) -> Futures:
        return Futures(self._link)

    @functools.cached_property
    def _runs(self) -> dict[RunId, Run]:
        """Runs that were collected, with what is known of them."""
        return {}

    # ------------------------------------------------------------------ calls

    def submit(
        self,
        fn: Callable[..., Any],
        /,
        *args: Any,
        key: Any = None,
        pure: bool = False,
        retries: int | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        resources: Mapping[str, float] | None = None,
        retry_on: Any = None,
        retry_delay: float | None = None,
        **kwargs: Any,
    ) -> Future:
        """Have ``fn(*args, **kwargs)`` called by a worker; return at once.

        Calls are grouped in the background, and each group is written as one run, a moment after the last
        call. **Until then a call is only in this process**: if it is killed, what was not yet written is
        lost. `flush` returns when everything is in the store. So do `detach`, `status`, `collect`, leaving
        the ``with`` block of the session, and an orderly end of the interpreter.

        Arguments are pickled when the group is written, as with `concurrent.futures.ProcessPoolExecutor`:
        do not change an array in place before a `flush`. Lists, dicts and sets are copied at once, unless they
        have more than 1,000 items and no future among them.

        Parameters
        ----------
        fn, *args, **kwargs
            The call. A `Future` among the arguments, also in lists, dicts and so on, stands for its result; one
            that `fn` has captured, or that is an attribute of an object, does not.
        key
            The Dask key of the task, which no other task of the session has; by default a new one.
        pure
            Whether the call always gives the same: then a call with equal arguments is made once, and its
            future given again.
        retries
            How often the call is made again when it raises.
        priority
            Higher ones first.
        timeout
            Seconds that the call may take.
        resources
            What the worker must have, such as ``{"GPU": 1}``.
        retry_on
            Classes of exceptions after which the call is made again, or their names; any by default.
        retry_delay
            Seconds before it is made again; doubles with each try, up to a minute. By default the session's setting.

        Raises
        ------
        ConfigError
            An argument is wrong, or the session is closed.
        UnsupportedGraph
            An argument is a future of another session or scheduler.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://submit-doctest", workers=1)
        >>> two = burst.submit(sum, [1, 1])
        >>> burst.submit(pow, two, 10).result()
        1024
        >>> burst.cleanup(force=True)
        """
        notes = _notes(retries, priority, timeout, resources, retry_on, retry_delay)
        return self._futures.submit(fn, args, kwargs, key=key, pure=pure, notes=notes)

    def map(
        self,
        fn: Callable[..., Any],
        /,
        *iterables: Iterable[Any],
        key: Any = None,
        pure: bool = False,
        retries: int | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        resources: Mapping[str, float] | None = None,
        retry_on: Any = None,
        retry_delay: float | None = None,
        **kwargs: Any,
    ) -> list[Future]:
        """Submit a call for each set of arguments, as `map` makes them; see `submit`.

        Parameters
        ----------
        key
            A list of keys, or what they begin with: ``"load"`` becomes ``"load-0"``, ``"load-1"`` …
        **kwargs
            For each of the calls.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://map-doctest", workers=1)
        >>> burst.gather(burst.map(pow, [2, 3], [4, 2]))
        [16, 9]
        >>> burst.cleanup(force=True)
        """
        notes = _notes(retries, priority, timeout, resources, retry_on, retry_delay)
        calls = list(zip(*iterables, strict=False))
        names: list[Any] = [None] * len(calls)
        if isinstance(key, str):
            names = [f"{key}-{i}" for i in range(len(calls))]
        elif key is not None:
            names = list(key)
            if len(names) != len(calls):
                raise ConfigError(f"key: {len(names)} keys for {len(calls)} calls")
        return [
            self._futures.submit(fn, args, kwargs, key=name, pure=pure, notes=notes)
            for name, args in zip(names, calls, strict=True)
        ]

    def gather(self, futures: Iterable[Future], errors: str = "raise") -> list[Any]:
        """Wait for futures and return their results in order, fetched together.

        Parameters
        ----------
        errors
            ``"raise"`` raises the first error; ``"skip"`` leaves out what failed or was cancelled.
        """
        if errors not in ("raise", "skip"):
            raise ConfigError(f"errors={errors!r}: must be 'raise' or 'skip'")
        return gather(futures, errors)

    def flush(self) -> None:
        """Return when every call submitted so far is in the store: from then on it needs this process no more.

        Raises
        ------
        UnpicklableTask
            A call cannot be pickled. Its future, and those that depend on it, have this error; the others are
            submitted.
        StoreError
            The store failed; futures of the group that could not be written have the error.
        """
        if "_futures" in vars(self):
            self._futures.flush()

    def detach(self) -> str:
        """Make everything durable, and return the session's id, which `attach` takes; the work goes on."""
        self.flush()
        return self._link.session

    def get_executor(
        self,
        *,
        pure: bool = False,
        retries: int | None = None,
        priority: int | None = None,
        timeout: float | None = None,
        resources: Mapping[str, float] | None = None,
        retry_on: Any = None,
        retry_delay: float | None = None,
    ) -> SessionExecutor:
        """Return a `concurrent.futures.Executor` that runs calls on this session's workers.

        Parameters
        ----------
        **keywords
            For each call, as of `submit`.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://executor-doctest", workers=1)
        >>> with burst.get_executor() as executor:
        ...     list(executor.map(abs, [-1, 2]))
        [1, 2]
        >>> burst.cleanup(force=True)
        """
        return SessionExecutor(
            self._futures, pure=pure, notes=_notes(retries, priority, timeout, resources, retry_on, retry_delay)
        )

    # ------------------------------------------------------------------ collections

    def persist(self, collections: Any, optimize_graph: bool = True, **keywords: Any) -> Any:
        """Submit collections, and return ones that stand for their data in the store; return at once.

        What is built on them is computed by workers that read that data. It never goes through this process.
        If it could not be computed, what depends on it fails, and names the cause.

        Parameters
        ----------
        collections
            A Dask collection, or a list of them.
        optimize_graph
            As of `dask.persist`, which calls this with ``scheduler=session`` or in its ``with`` block.
        **keywords
            ``priority``, ``retries``, ``resources`` and so on, as of `Session.get`.

        Examples
        --------
        >>> import dask.array as da
        >>> from burst_dask import Session
        >>> burst = Session("memory://persist-doctest", workers=1)
        >>> x = burst.persist(da.arange(6, chunks=3) ** 2)
        >>> burst.compute(x.sum(), x.max()).result()
        (np.int64(55), np.int64(25))
        >>> burst.cleanup(force=True)
        """
        asked = Asked.of(keywords)
        many = isinstance(collections, list | tuple | set | frozenset)
        given = list(collections) if many else [collections]
        if not all(map(is_dask_collection, given)):
            raise ConfigError("persist takes a Dask collection, or a list of them")
        if not given:
            return []
        self.flush()

        def schedule(expression: Any, names: list[Any], **_: Any) -> list[Stored]:
            submitted = submit(self._link, expression, names, asked)
            places = zip(names, numbers(submitted.outputs), strict=True)
            return [Stored(key, submitted.run.run, number, self._link.store.url) for key, number in places]

        # Dask knows how to take collections of every kind apart, and to put them together again.
        with shorten_traceback():
            kept = list(dask.persist(*given, traverse=False, optimize_graph=optimize_graph, scheduler=schedule))
        return kept if many else kept[0]

    # ------------------------------------------------------------------ collecting

    def collect(
        self,
        wait: bool = False,
        timeout: float | None = None,
        *,
        since: str | Collected | None = None,
        on_error: collecting.OnError = "return",
    ) -> Collected:
        """Return what is done so far of all that was asked for in the session, in submission order, by Dask key.

        Parameters
        ----------
        wait, timeout, since, on_error
            As of `Run.collect`. Runs that were cancelled, and tasks that need what was, are not waited for.

        Raises
        ------
        WaitTimeout
            The time is over. The error's `results` are what is done so far.
        """
        collecting.check_on_error(on_error)
        check_timeout(timeout)
        self.flush()
        runs = sync.run(self._all_runs())
        if wait:
            self._wait_for(runs, timeout, since)
        asked = sync.run(in_parallel(Run._look, runs))
        views = [run._view for run in runs]
        gone = sync.run(undone(self._link, views))
        return collecting.collected(zip(views, asked, strict=True), since, on_error, gone)

    async def _all_runs(self) -> list[Run]:
        link = self._link
        await link.follow()
        new = [run for run in link.state.runs if run not in self._runs]
        for view in await in_parallel(lambda run: RunView.open(link.store, run), new):
            if view is not None:
                self._runs[view.run] = Run(link, view, attached=True, progress=self._progress)
        return [self._runs[run] for run in link.state.runs if run in self._runs]

    def _wait_for(self, runs: list[Run], timeout: float | None, since: str | Collected | None) -> None:
        clock = self._link.clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        for run in runs:
            if run.id in self._link.state.cancelled:
                continue
            left = None if deadline is None else max(1e-3, deadline - clock.monotonic())
            try:
                run._wait(left, to_first_failure=False, leave=True)
            except WaitTimeout as error:
                error.results = self.collect(since=since)
                raise


def _notes(
    retries: int | None,
    priority: int | None,
    timeout: float | None,
    resources: Mapping[str, float] | None,
    retry_on: Any,
    retry_delay: float | None,
) -> dict[str, Any]:
    """Return what was asked for, checked, as annotations."""
    given = {"retries": retries, "priority": priority, "resources": resources, "task_timeout": timeout}
    asked = Asked.of(given | {"retry_on": retry_on, "retry_delay": retry_delay})
    notes: dict[str, Any] = {"retries": asked.retries, "priority": asked.priority, "timeout": asked.task_timeout}
    notes = {name: value for name, value in notes.items() if value} | ({"resources": resources} if resources else {})
    tried = {"retry_on": retry_on, "retry_delay": retry_delay}
    return notes | {name: value for name, value in tried.items() if value is not None}
