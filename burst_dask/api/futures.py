"""Futures of calls, and what can be done with many of them."""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol

from dask._task_spec import TaskRef

from burst_dask import sync
from burst_dask.client import collecting, replaying
from burst_dask.client.collecting import TaskError
from burst_dask.client.link import Link
from burst_dask.errors import ConfigError, TaskFailed, WaitTimeout
from burst_dask.graph import Captured
from burst_dask.journal.view import RunView

#: Stands for the error of a task until it is fetched.
_FAILED = TaskFailed("the task failed")
#: Where callbacks of futures are called.
_callbacks = cf.ThreadPoolExecutor(1, thread_name_prefix="burst-callbacks")


class Owner(Protocol):
    """What a future needs of who follows it."""

    link: Link

    def hurry(self) -> None:
        """Write what is waiting to be written, without waiting for it."""

    def cancel(self, future: Future, force: bool = False) -> bool:
        """Cancel a future and those that depend on it."""


class Future(TaskRef, cf.Future):  # type: ignore[misc, type-arg]
    """A call that some worker makes, or has made; made by `Session.submit` and `Session.map`.

    It has the methods of `concurrent.futures.Future`, and works in `concurrent.futures.wait` and
    `concurrent.futures.as_completed`. As an argument of another call, also inside of lists, dicts and
    so on, and as part of a Dask graph, it stands for its result, which then goes from worker to worker
    through the store and never through this process. It does not where a function has captured it.

    Attributes
    ----------
    key : str
        The Dask key of the task.
    """

    __dask_future__ = True

    def __init__(self, key: Any, owner: Owner) -> None:
        TaskRef.__init__(self, key)
        cf.Future.__init__(self)
        self.owner = owner
        #: where the task is, once it is submitted
        self.view: RunView | None = None
        self.number = -1
        self._ended = False

    def result(self, timeout: float | None = None) -> Any:
        """Wait, and return the result, which is fetched now.

        Raises
        ------
        Exception
            The task's own, with the traceback of the worker.
        WaitTimeout
            The time is over; the task goes on.
        concurrent.futures.CancelledError
            It was cancelled.
        """
        value = self.outcome(timeout)
        if isinstance(value, TaskError):
            value.reraise()
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the exception of the task, or None; the result is not fetched."""
        error = self._wait(timeout)
        if error is not _FAILED:
            return error
        value = self.outcome()
        assert isinstance(value, TaskError)
        return value.exception

    def traceback(self, timeout: float | None = None) -> TracebackType | None:
        """Wait, and return the traceback of the task's exception, or None."""
        error = self.exception(timeout)
        return None if error is None else error.__traceback__

    def outcome(self, timeout: float | None = None) -> Any:
        """Wait, and return the result, or a `TaskError`."""
        error = self._wait(timeout)
        if error is not None and error is not _FAILED:
            raise error
        assert self.view is not None  # a future without a run ends with another error
        ((_, value),) = collecting.decoded(self.view, [self.number], {self.number: self.key})
        return value

    def _wait(self, timeout: float | None) -> BaseException | None:
        """Wait for the end; return why there is neither result nor error of the task, or `_FAILED`, or None."""
        if not self.done():
            self.owner.hurry()
        try:
            return cf.Future.exception(self, timeout)
        except TimeoutError:
            raise WaitTimeout(
                f"task {self.key!r} has no outcome after {timeout:g} s. It goes on; wait again, or look later"
            ) from None

    @property
    def lost(self) -> bool:
        """Whether it ended without being submitted, or was cancelled."""
        return self.done() and (self.view is None or self.cancelled())

    @property
    def status(self) -> str:
        """``"pending"``, ``"finished"``, ``"error"`` or ``"cancelled"``, as far as known."""
        if not self.done():
            return "pending"
        if self.cancelled():
            return "cancelled"
        return "error" if cf.Future.exception(self) is not None else "finished"

    def replay(self) -> Any:
        """Run the task here, with its real inputs; see `burst_dask.api.run.Run.replay`."""
        self._wait(None)
        if self.view is None:
            raise ConfigError(f"task {self.key!r} was not submitted, so there is nothing to replay")
        return sync.run(replaying.prepare(self.view, self.key))()

    def cancel(self, force: bool = False) -> bool:
        """Give the task up, and what depends on it; tell whether it is cancelled.

        It is not started any more. If it runs already, it is let finish, and its result is kept in the store though
        this future does not have it.

        Parameters
        ----------
        force
            End the task if it runs; as of `Run.cancel`.
        """
        return self.owner.cancel(self, force)

    def end(self, error: BaseException | None = None, *, cancel: bool = False) -> None:
        """Let those know who wait, unless it has ended already."""
        with self._condition:
            if self._ended:
                return
            self._ended = True
        if cancel:
            cf.Future.cancel(self)
            self.set_running_or_notify_cancel()
        elif error is not None:
            self.set_exception(error)
        else:
            self.set_result(None)

    def settle(self) -> None:
        """Take in that the task has an outcome; its result or error is fetched when it is asked for."""
        outcome = None if self.view is None else self.view.outcome(self.number)
        if outcome is not None and outcome.cancelled:
            self.end(cancel=True)
            return
        self.end(None if outcome is not None and outcome.done else _FAILED)

    def _invoke_callbacks(self) -> None:
        """Callbacks may ask for results, which the event loop that brings the news cannot wait for."""
        if self._done_callbacks:
            with contextlib.suppress(RuntimeError):  # the interpreter ends
                _callbacks.submit(super()._invoke_callbacks)

    def __reduce__(self) -> tuple[Any, ...]:
        return Captured, (self.key,)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return "burst-future", self.owner.link.session, self.key

    def __repr__(self) -> str:
        return f"<Future: {self.status}, key: {self.key}>"


# ---------------------------------------------------------------------------- many of them


def as_completed(futures: Iterable[Future], timeout: float | None = None) -> Iterator[Future]:
    """Yield futures as they end, failed and cancelled ones too; as `concurrent.futures.as_completed`.

    Raises
    ------
    WaitTimeout
        The time is over before all have ended. They go on.
    """
    futures = list(futures)
    _hurry(futures)
    try:
        yield from cf.as_completed(futures, timeout)  # type: ignore[misc]
    except TimeoutError as error:
        raise WaitTimeout(f"{error} after {timeout:g} s. They go on") from None


def wait(
    futures: Iterable[Future], timeout: float | None = None, return_when: str = cf.ALL_COMPLETED
) -> cf._base.DoneAndNotDoneFutures[Any]:
    """Wait for futures; as `concurrent.futures.wait`.

    Parameters
    ----------
    timeout
        Seconds; when they are over, what has not ended is in ``not_done``.
    return_when
        ``"ALL_COMPLETED"``, ``"FIRST_COMPLETED"`` or ``"FIRST_EXCEPTION"``.
    """
    futures = list(futures)
    _hurry(futures)
    return cf.wait(futures, timeout, return_when)


def _hurry(futures: Iterable[Future]) -> None:
    for owner in {future.owner for future in futures if not future.done()}:
        owner.hurry()


def gather(futures: Iterable[Future], errors: str = "raise") -> list[Any]:
    """Wait for futures, and return their results in order; fetches many with few requests."""
    futures = list(futures)
    wait(futures)
    runs: dict[int, tuple[RunView, dict[int, Any]]] = {}
    for future in futures:
        if future.view is None or future.cancelled():
            if errors == "raise":
                future.result()
        else:
            runs.setdefault(id(future.view), (future.view, {}))[1][future.number] = future.key
    found = {
        key: value
        for view, names in runs.values()
        for number, value in collecting.decoded(view, names, names)
        for key in [names[number]]
    }
    for value in found.values():
        if errors == "raise" and isinstance(value, TaskError):
            value.reraise()
    return [found[f.key] for f in futures if f.key in found and not isinstance(found[f.key], TaskError)]
