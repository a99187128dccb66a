"""Keeping what tasks print with them: standard output, standard error and `logging` records.

Streams that stand in for `sys.stdout` and `sys.stderr`, and a handler at the root logger, pass on what
they get and hand a copy to the `Capture` of the batch that runs in this context, if there is one. So
a task that prints nothing pays nothing. What threads of a task print is kept if they run in a
copy of its context, as `asyncio.to_thread` does; what subprocesses and native code write to the
file descriptors is not. All of that is in the worker's own log, as before.
"""

from __future__ import annotations

import logging
import pickle
import sys
import threading
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any, TextIO

from burst_dask.clock import wall_time
from burst_dask.protocol.records import Printed, TaskOutput

#: Characters that are kept of each try of a task: the last ones.
LIMIT = 65_536
#: Seconds within which what is printed to one stream is kept as one piece.
TOGETHER = 0.1


class Capture:
    """What the running task of a batch prints. Threads of the task may print at once."""

    __slots__ = ("_dropped", "_lock", "_size", "printed", "thread")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: when it began, its stream, its parts
        self.printed: list[tuple[float, str, list[str]]] = []
        self._size = self._dropped = 0
        #: identifies the thread that runs the batch; 0 before one does
        self.thread = 0

    def add(self, stream: str, text: str) -> None:
        """Keep what was printed."""
        if not text:
            return
        now = wall_time()
        with self._lock:
            last = self.printed[-1] if self.printed else None
            unfinished = last is not None and (now - last[0] < TOGETHER or not last[2][-1].endswith("\n"))
            if last is not None and last[1] == stream and unfinished:
                last[2].append(text[-LIMIT:])
            else:
                self.printed.append((now, stream, [text[-LIMIT:]]))
            self._size += len(text)
            self._dropped += max(0, len(text) - LIMIT)
            if self._size - self._dropped > 2 * LIMIT:  # not at each: that would copy all of it each time
                self._trim()

    def _trim(self) -> None:
        """Drop all but the last `LIMIT` characters."""
        left = LIMIT
        kept: list[tuple[float, str, list[str]]] = []
        while left > 0 and self.printed:
            began, stream, parts = self.printed.pop()
            text = "".join(parts)[-left:]
            left -= len(text)
            kept.append((began, stream, [text]))
        self.printed = kept[::-1]
        self._dropped = self._size - (LIMIT - left)

    def take(self, position: int, key: Any, attempt: int) -> TaskOutput:
        """Return what was printed since the last call, as that of the named task, and forget it."""
        with self._lock:
            self._trim()
            printed = tuple(Printed(began, stream, _clean("".join(parts))) for began, stream, parts in self.printed)
            output = TaskOutput(position, _pickled(key), attempt, self._dropped, printed)
            self.printed = []
            self._size = self._dropped = 0
        return output


def size_of(output: TaskOutput) -> int:
    """Return about how many bytes it takes."""
    return sum(len(printed.text) for printed in output.printed)


def _clean(text: str) -> str:
    """Replace what UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _pickled(key: Any) -> bytes:
    try:
        return pickle.dumps(key, 5)
    except Exception:  # whatever a key's class raises
        return pickle.dumps(str(key), 5)


#: The capture of what runs in this context.
current: ContextVar[Capture | None] = ContextVar("burst_dask_output", default=None)


class _Stream:
    """Stands in for a standard stream."""

    def __init__(self, name: str, wrapped: TextIO) -> None:
        self.name_kept = name
        self.wrapped = wrapped

    def write(self, text: str) -> int:
        capture = current.get()
        if capture is None:
            return self.wrapped.write(text)
        token = current.set(None)  # what is wrapped may lead to another of these
        try:
            return self.wrapped.write(text)
        finally:
            current.reset(token)
            capture.add(self.name_kept, text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)


class _Handler(logging.Handler):
    """Keeps the records of tasks. Where it is the only handler, logging must still do as if there were none."""

    def emit(self, record: logging.LogRecord) -> None:
        capture = current.get()
        if capture is not None:
            try:
                capture.add(record.levelname, self.format(record) + "\n")
            except Exception:  # as every handler does: a bad format string must not end the task
                self.handleError(record)
        last = logging.lastResort
        if last is not None and record.levelno >= last.level and self._alone(record.name):
            token = current.set(None)  # it has been kept
            try:
                last.handle(record)
            finally:
                current.reset(token)

    def _alone(self, name: str) -> bool:
        logger: logging.Logger | None = logging.getLogger(name)
        while logger is not None:
            if any(handler is not self for handler in logger.handlers):
                return False
            logger = logger.parent if logger.propagate else None
        return True


_handler = _Handler()
_handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
_lock = threading.Lock()
_users = 0


def installed() -> bool:
    """Tell whether what is printed now would be kept: others may have put streams of theirs in place."""
    streams = type(sys.stdout) is _Stream and type(sys.stderr) is _Stream
    return streams and _handler in logging.root.handlers


def install() -> None:
    """Put the streams and the handler in place where they are not."""
    with _lock:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is not None and type(stream) is not _Stream:
                setattr(sys, name, _Stream(name, stream))
        if _handler not in logging.root.handlers:
            logging.root.addHandler(_handler)


def add_user() -> None:
    """Count one more that needs what `install` puts in place."""
    global _users  # noqa: PLW0603 - the streams are the process', so is their count
    with _lock:
        _users += 1


def remove_user() -> None:
    """Count one less; the last one restores what was there."""
    global _users  # noqa: PLW0603 - one for the process
    with _lock:
        _users -= 1
        if _users:
            return
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if type(stream) is _Stream:
                setattr(sys, name, stream.wrapped)
        logging.root.removeHandler(_handler)
