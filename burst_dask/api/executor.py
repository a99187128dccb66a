"""A session as a `concurrent.futures.Executor`."""

from __future__ import annotations

import concurrent.futures as cf
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from burst_dask.api.futures import Future
from burst_dask.api.futures import wait as wait_for
from burst_dask.api.grouping import Futures


class SessionExecutor(cf.Executor):
    """Runs calls on the workers of a session; made by `Session.get_executor`.

    Parameters
    ----------
    futures
        The calls of the session.
    pure, notes
        For each call, as of `Session.submit`.
    """

    def __init__(self, futures: Futures, *, pure: bool = False, notes: Mapping[str, Any] | None = None) -> None:
        self._owner = futures
        self._pure = pure
        self._notes = dict(notes or {})
        self._futures: weakref.WeakSet[Future] = weakref.WeakSet()
        self._shutdown = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Have ``fn(*args, **kwargs)`` called by a worker."""
        if self._shutdown:
            raise RuntimeError("cannot schedule new futures after shutdown")
        future = self._owner.submit(fn, args, kwargs, pure=self._pure, notes=self._notes)
        self._futures.add(future)
        return future

    def map(
        self,
        fn: Callable[..., Any],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
    ) -> Iterator[Any]:
        """Return the results of ``fn`` for each set of arguments, in order, as they come.

        What is left is cancelled when the iterator is closed, or one of the calls fails.

        Parameters
        ----------
        timeout
            Seconds from now for all results together.
        chunksize, buffersize
            Without effect: calls are grouped anyway, and their arguments go to the store at once.
        """
        clock = self._owner.link.clock
        deadline = None if timeout is None else clock.monotonic() + timeout
        futures = [self.submit(fn, *args) for args in zip(*iterables, strict=False)]

        def results() -> Iterator[Any]:
            left = list(reversed(futures))
            try:
                while left:
                    yield left[-1].result(None if deadline is None else max(0.0, deadline - clock.monotonic()))
                    left.pop()
            finally:
                for future in left:
                    future.cancel()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls; the session and its workers go on.

        Parameters
        ----------
        wait
            Whether to wait for those that are pending; if not, they are still made.
        cancel_futures
            Whether to cancel them.
        """
        self._shutdown = True
        futures = list(self._futures)
        if cancel_futures:
            for future in futures:
                future.cancel()
        if wait:
            wait_for(futures)
        else:
            self._owner.hurry()
