"""Lets a process end cleanly although obstore's threads call into Python.

A thread of obstore wakes the event loop and then takes the GIL once more to leave Python. If the
interpreter finalises in between, CPython before 3.14 ends that thread by unwinding it, which
Rust answers with abort(): a program that did all its work exits with status 134. So before the
interpreter finalises, no new request begins and those hand-overs are waited for.
"""

from __future__ import annotations

import asyncio
import atexit
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from burst_dask.errors import StoreUnavailable

#: Milliseconds that requests under way are given to end.
_PATIENCE = 2000
#: What a hand-over runs: it wakes the loop by writing to a socket, which lets go of the GIL.
_HAND_OVER = asyncio.BaseEventLoop.call_soon_threadsafe.__code__


class _Requests:
    """The requests of this process that obstore is carrying out."""

    def __init__(self) -> None:
        self._under_way: set[object] = set()
        self._leaving = False

    @contextmanager
    def one(self) -> Iterator[None]:
        if self._leaving:
            raise StoreUnavailable("this process is ending: no request is sent any more")
        mark = object()  # a set, because event loops of several threads may count here
        self._under_way.add(mark)
        try:
            yield
        finally:
            self._under_way.discard(mark)

    def drain(self) -> None:
        """Wait until no thread of obstore is in Python, or on its way into it."""
        self._leaving = True
        pause = threading.Event()
        for _ in range(_PATIENCE):
            pause.wait(0.001)
            if not self._under_way and not _handing_over():
                break
        pause.wait(0.005)  # for what a cancelled request still tells Python


def _handing_over() -> bool:
    """Tell whether a thread is waking an event loop."""
    return any(
        _HAND_OVER in (frame.f_code, frame.f_back and frame.f_back.f_code) for frame in sys._current_frames().values()
    )


_requests = _Requests()
request = _requests.one
atexit.register(_requests.drain)
