"""How much memory and how many processors there are, and how much memory a process uses.

The supervisor lives by this module, so it imports neither Dask nor anything heavy. What a
container may use is less than what its machine has: control groups are asked first.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import psutil

from burst_dask.errors import ConfigError

#: fraction of its limit at which a worker is replaced, as `distributed.worker.memory.terminate`
TERMINATE_AT = 0.95

CGROUP = Path("/sys/fs/cgroup")
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Return the bytes that `text` names, read as Dask reads them.

    Examples
    --------
    >>> parse_bytes("8GB"), parse_bytes("1.5 GiB"), parse_bytes("1000")
    (8000000000, 1610612736, 1000)
    """
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ConfigError(f"{text!r} is not an amount of memory; write it as 8GB or 512MiB")
    number, unit = found.groups()
    return int(float(number) * (_DECIMAL | _BINARY)[(unit or "").lower()])


def format_bytes(count: float) -> str:
    """Return `count` as people read it.

    >>> format_bytes(2 * 2**30), format_bytes(1536), format_bytes(12)
    ('2.0 GiB', '1.5 KiB', '12 B')
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def resident(pid: int) -> int:
    """Return the bytes of memory that process `pid` holds; 0 when it is gone."""
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def system_memory(cgroup: Path = CGROUP) -> int:
    """Return the bytes that this machine, or the container around this process, may use."""
    limits = [int(psutil.virtual_memory().total)]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        text = _read(cgroup / name)
        if text.isdigit():
            limits.append(int(text))
    return min(limits)


def processors(cgroup: Path = CGROUP) -> int:
    """Return how many processors this process may use, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota.isdigit():
        quota, period = _read(cgroup / "cpu/cpu.cfs_quota_us"), _read(cgroup / "cpu/cpu.cfs_period_us")
    if quota.isdigit() and period.isdigit():
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def processes_and_threads(cpus: int) -> tuple[int, int]:
    """Return how many processes of how many threads suit `cpus` processors, as distributed does.

    Examples
    --------
    >>> processes_and_threads(2), processes_and_threads(4), processes_and_threads(36)
    ((2, 1), (4, 1), (6, 6))
    """
    if cpus <= 4:
        return cpus, 1
    processes = next(count for count in range(math.ceil(math.sqrt(cpus)), cpus + 1) if cpus % count == 0)
    return processes, cpus // processes


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
