"""What a local fleet remembers of its supervisors: one small JSON file for each.

A record is there *before* its supervisor is started, and a supervisor without a record ends at
once (`launch`). So at every moment each supervisor of a session is on record or about to end,
and whoever stops the session finds it, even if the client died between two lines of code.

Records are read and written under one lock, which the system releases when its owner dies. The
lock is held from before the record is there until it holds a pid: whoever has the lock and
sees a record without one knows that its writer is dead.

A process is known by its pid and a unique word of its command line, so a pid that was given to
another process since is not taken for ours. (Its start time would not do: it is derived from
the wall clock, which may be set.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil

SUFFIX = ".json"


class SupervisorRecord(msgspec.Struct, frozen=True):
    """One supervisor."""

    #: agents that it keeps alive
    slots: int
    #: its pid; 0 until it is started
    pid: int = 0
    #: worker id -> pid
    agents: dict[str, int] = {}


def name_of(token: str, number: int) -> str:
    """Return the name of a new record's file; it tells the number of the start, if that has one.

    >>> name_of("w7kq2m", 12), name_of("w7kq2m", -1)
    ('w7kq2m-12.json', 'w7kq2m.json')
    """
    return f"{token}{SUFFIX}" if number < 0 else f"{token}-{number}{SUFFIX}"


def number_of(path: Path) -> int:
    """Return the number of the start that a record belongs to, -1 if it has none.

    >>> number_of(Path("w7kq2m-12.json")), number_of(Path("w7kq2m.json"))
    (12, -1)
    """
    number = path.stem.rpartition("-")[2]
    return int(number) if "-" in path.stem else -1


def find(pid: int, word: str) -> psutil.Process | None:
    """Return the process `pid` if it runs and `word` is part of its command line."""
    try:
        process = psutil.Process(pid)
        return process if any(word in part for part in process.cmdline()) else None
    except psutil.Error:  # gone, a zombie, or somebody else's
        return None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory's lock."""
    handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def write(path: Path, record: SupervisorRecord) -> None:
    """Write the record so that a reader sees the old one or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(record))
    temporary.replace(path)


def read_all(directory: Path) -> dict[Path, SupervisorRecord]:
    """Return the records in `directory`, without those that are removed meanwhile."""
    found = {}
    for path in sorted(directory.glob(f"*{SUFFIX}")):
        with contextlib.suppress(FileNotFoundError):
            found[path] = msgspec.json.decode(path.read_bytes(), type=SupervisorRecord)
    return found


def update(path: Path, record: SupervisorRecord) -> bool:
    """Replace the record unless somebody has removed it; return False in that case."""
    try:
        with locked(path.parent):
            if not path.exists():
                return False
            write(path, record)
            return True
    except FileNotFoundError:  # the whole directory is gone
        return False
