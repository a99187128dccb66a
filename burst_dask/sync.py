"""Coroutines called from ordinary code: one event loop in one thread for the whole process.

Blocking code may call `run` from any thread, also from one whose own event loop is running, as
in Jupyter: the loop here is another one.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def loop() -> asyncio.AbstractEventLoop:
    """Return the loop of this process; the first call starts it in a daemon thread."""
    global _loop  # noqa: PLW0603
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="burst-client", daemon=True).start()
        return _loop


def start(coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
    """Run `coroutine` in the background.

    Examples
    --------
    >>> async def add(a, b):
    ...     return a + b
    >>> start(add(1, 2)).result()
    3
    """
    return asyncio.run_coroutine_threadsafe(coroutine, loop())


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
    future = start(coroutine)
    try:
        return future.result()
    finally:
        future.cancel()  # without effect unless a KeyboardInterrupt or the like ended the wait


def _forget() -> None:
    """After a fork there is neither the thread nor any use for the parent's loop."""
    global _lock, _loop
    _lock, _loop = threading.Lock(), None


os.register_at_fork(after_in_child=_forget)
