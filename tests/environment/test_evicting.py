"""Installed packages that nobody uses any more are deleted, and what somebody uses never is."""

import asyncio
import os
import subprocess
import sys

from burst_dask.clock import SystemClock
from burst_dask.environment import installing


def cached(folder, name, *, size=1, used=0.0):
    """Put a set of packages into the cache that was last used at that time."""
    (folder / name).mkdir(parents=True)
    (folder / name / "module.py").write_bytes(b"#" * size)
    (folder / f"{name}.used").touch()
    os.utime(folder / f"{name}.used", (used, used))
    return folder / name


def test_what_was_not_used_for_long_is_deleted(tmp_path):
    old, new = cached(tmp_path, "old", used=100.0), cached(tmp_path, "new", used=200.0)
    assert installing.evict(tmp_path, now=150.0 + installing.KEEP_SECONDS) == [old]
    assert not old.exists() and new.exists()
    assert installing.evict(tmp_path, now=150.0 + installing.KEEP_SECONDS) == []


def test_the_least_recently_used_is_deleted_while_it_is_too_much(tmp_path, monkeypatch):
    monkeypatch.setattr(installing, "KEEP_BYTES", 250)
    sets = [cached(tmp_path, f"set-{n}", size=100, used=float(n)) for n in range(4)]
    assert installing.evict(tmp_path, now=10.0) == sets[:2]
    assert [one.exists() for one in sets] == [False, False, True, True]


def test_what_a_process_uses_is_never_deleted(tmp_path):
    used, free = cached(tmp_path, "used"), cached(tmp_path, "free")
    holds = (
        "import asyncio, sys; from pathlib import Path; from burst_dask.clock import SystemClock\n"
        "from burst_dask.environment import installing\n"
        "asyncio.run(installing._hold(Path(sys.argv[1]), SystemClock())); print('holds', flush=True); input()"
    )
    command = [sys.executable, "-c", holds, str(tmp_path / "used.used")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"holds\n"
        assert installing.evict(tmp_path, now=1e12) == [free]
        process.kill()
    assert used.exists()
    assert installing.evict(tmp_path, now=1e12) == [used]


def test_what_was_deleted_is_installed_again(tmp_path, monkeypatch):
    async def fill(folder, requirements):
        (folder / "module.py").write_text(requirements[0])

    def install(name):
        return asyncio.run(installing.install([name], tmp_path, SystemClock()))

    monkeypatch.setattr(installing, "_fill", fill)
    first = install("one")
    used = first.with_name(f"{first.name}.used")
    os.close(installing._held.pop(used))  # as if this process had ended
    os.utime(used, (0, 0))
    other = install("two")  # who has installed something looks for what nobody uses
    assert not first.exists() and other.exists()
    assert install("one") == first and (first / "module.py").read_text() == "one"
