"""Coroutines called from ordinary code: one event loop in one thread for the whole process.

Blocking code may call `run` from any thread, also from one whose own event loop is running, as
in Jupyter: the loop here is another one.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from burst_dask.errors import ConfigError

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
#: whether a parent of this process had the loop before the fork
_inherited = False


def loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process; the first call starts it in a daemon thread.

    Raises
    ------
    ConfigError
        This process was forked from one that had the loop.
    """
    global _loop  # noqa: PLW0603 - one for the process
    if _inherited:
        raise ConfigError(
            "this process was forked from one that uses burst_dask, and neither its event loop nor the threads of its "
            "stores survive that: start processes by 'spawn' or 'forkserver' (multiprocessing.set_start_method)"
        )
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="burst-client", daemon=True).start()
        return _loop


def start(coroutine: Coroutine[Any, Any, T], future: Future[T] | None = None) -> Future[T]:
    """Run `coroutine` in the background; cancelling the future cancels it.

    Parameters
    ----------
    future
        Where the result goes; by default a new one.

    Examples
    --------
    >>> async def add(a, b):
    ...     return a + b
    >>> start(add(1, 2)).result()
    3
    """
    try:
        ours = loop()
    except ConfigError:
        coroutine.close()
        raise
    answer: Future[T] = Future() if future is None else future

    def begin() -> None:
        task = ours.create_task(coroutine)
        task.add_done_callback(lambda done: _answer(done, answer))
        answer.add_done_callback(lambda done: done.cancelled() and ours.call_soon_threadsafe(task.cancel))

    ours.call_soon_threadsafe(begin)
    return answer


def _answer(task: asyncio.Task[T], future: Future[T]) -> None:
    if task.cancelled():
        future.cancel()
    elif not future.set_running_or_notify_cancel():
        task.exception()  # nobody waits for it: looked at, so that asyncio does not complain
    elif (error := task.exception()) is not None:
        future.set_exception(error)
    else:
        future.set_result(task.result())


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` and return its result; whatever interrupts the wait also cancels it.

    Raises
    ------
    RuntimeError
        Called from a coroutine on this loop, which would wait for itself.

    Examples
    --------
    >>> async def add(a, b):
    ...     return a + b
    >>> run(add(1, 2))
    3
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not None and running is _loop:
        coroutine.close()
        raise RuntimeError("a coroutine of burst_dask called its own blocking interface: this is a bug in burst_dask")
    future: Future[T] = Future()
    try:
        # Ctrl-C may come at any line from here on: the future must be at hand before the start.
        return start(coroutine, future).result()
    finally:
        future.cancel()  # without effect unless a KeyboardInterrupt or the like ended the wait


def _forget() -> None:
    """After a fork the parent's threads are gone; a call would wait for them for ever."""
    global _lock, _loop, _inherited
    _lock, _loop, _inherited = threading.Lock(), None, _inherited or _loop is not None


os.register_at_fork(after_in_child=_forget)
