"""Packages that a session asks for, installed with pip into a directory that the machine's workers share.

::

    packages/<digest>/          complete, as it appears by a rename; never changed
    packages/<digest>.lock      held by the process that installs; the others wait
    packages/<digest>.failed    why the last try failed: those who waited for it do not try again
    packages/<digest>.new-…     being filled
    packages/<digest>.used      held, with others, by each process that uses it, for as long as it lives; its date is
                                that of the last such process

Whoever has installed something then deletes what nobody uses (`evict`).

The lock is `fcntl.flock`, as for the records of a local fleet: the system releases it when its
owner dies, however that happens, so that it needs no time after which it counts as abandoned.

pip is asked twice: first what it would install, given what is there already, then just for that,
without dependencies, into the directory. ``pip install --target`` alone would fetch everything
again, such as another NumPy than the one that the worker has loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from burst_dask.clock import Clock
from burst_dask.environment.versions import installed
from burst_dask.errors import EnvironmentFailed

#: Seconds between looks at a lock that another process holds.
LOCK_POLL = 0.1
#: Seconds after which pip is given up: building from source takes minutes, a hung server for ever.
PIP_TIMEOUT = 1800.0
#: What no process has used for so long is deleted when something else is installed …
KEEP_SECONDS = 30 * 86_400.0
#: … and the least recently used of the rest, until what is left takes no more bytes than that.
KEEP_BYTES = 10 << 30
#: Last lines of pip's output that are told.
TOLD_LINES = 6
_PIP = ("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check", "--no-color")


def install_digest(requirements: Iterable[str], there: Mapping[str, str], platform: str) -> str:
    """Return what names the directory for `requirements`: what goes into it depends on what is there already.

    Examples
    --------
    >>> one = install_digest(["affine"], {"numpy": "2.0"}, "linux-x86_64")
    >>> one == install_digest(["affine"], {"numpy": "2.0"}, "linux-x86_64")
    True
    >>> one == install_digest(["affine"], {"numpy": "1.26"}, "linux-x86_64")
    False
    """
    text = json.dumps([sorted(requirements), sorted(there.items()), platform])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def missing(report: Mapping[str, Any]) -> list[str]:
    """Return, as requirements, what pip would install, from its ``--report``.

    Examples
    --------
    >>> archive = {"url": "file:///w/mine-1.0-py3-none-any.whl", "archive_info": {}}
    >>> vcs = {"url": "https://host/it.git", "vcs_info": {"vcs": "git", "commit_id": "c0ffee"}}
    >>> missing({"install": [
    ...     {"metadata": {"name": "affine", "version": "2.4.0"}, "is_direct": False, "download_info": {"url": "https://…"}},
    ...     {"metadata": {"name": "mine", "version": "1.0"}, "is_direct": True, "download_info": archive},
    ...     {"metadata": {"name": "it", "version": "0.1"}, "is_direct": True, "download_info": vcs},
    ... ]})
    ['affine==2.4.0', 'mine @ file:///w/mine-1.0-py3-none-any.whl', 'it @ git+https://host/it.git@c0ffee']
    """
    found = []
    for item in report["install"]:
        name, source = item["metadata"]["name"], item["download_info"]
        if not item["is_direct"]:
            found.append(f"{name}=={item['metadata']['version']}")
            continue
        url = source["url"]
        if vcs := source.get("vcs_info"):
            url = f"{vcs['vcs']}+{url}@{vcs['commit_id']}"
        if folder := source.get("subdirectory"):
            url += f"#subdirectory={folder}"
        found.append(f"{name} @ {url}")
    return found


def last_lines(output: str, count: int = TOLD_LINES) -> str:
    """Return the last lines of pip's output that say something.

    Examples
    --------
    >>> last_lines("Collecting x\\n\\nERROR: No matching distribution found for x\\n", 1)
    'ERROR: No matching distribution found for x'
    """
    lines = [line.rstrip() for line in output.splitlines() if line.strip() and not line.startswith("[notice]")]
    return "\n".join(lines[-count:])


async def install(requirements: Sequence[str], folder: Path, clock: Clock) -> Path:
    """Return the directory with what `requirements` need and this process does not have; install it if need be.

    Parameters
    ----------
    folder
        Where the directories of all such sets lie.

    Raises
    ------
    EnvironmentFailed
        pip failed; the message ends with its last lines.
    """
    name = install_digest(requirements, installed(), f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}")
    ready, failed = folder / name, folder / f"{name}.failed"
    folder.mkdir(parents=True, exist_ok=True)
    await _hold(folder / f"{name}.used", clock)
    if ready.is_dir():
        return ready
    known = _stamp(failed)
    async with _locked(folder / f"{name}.lock", clock):
        if ready.is_dir():
            return ready
        if _stamp(failed) != known:  # it failed while this process waited, for the same reason
            raise EnvironmentFailed(failed.read_text())
        for left in folder.glob(f"{name}.new-*"):  # by one that was killed: who has the lock is alone here
            shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{name}.new-", dir=folder))
        try:
            await _fill(fresh, requirements)
            fresh.rename(ready)
        except EnvironmentFailed as error:
            failed.write_text(str(error))
            raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        failed.unlink(missing_ok=True)
    await asyncio.to_thread(evict, folder, clock.wall())
    return ready


# ---------------------------------------------------------------------------- what nobody uses

#: What this process uses -> the file that it holds; never closed, so that the system does when the process ends.
_held: dict[Path, int] = {}


async def _hold(path: Path, clock: Clock) -> None:
    """Keep others from deleting a directory that this process is about to use, as long as it lives."""
    if path not in _held:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # being deleted
                await clock.sleep(LOCK_POLL)
        _held[path] = handle
    os.utime(path)


def evict(folder: Path, now: float) -> list[Path]:
    """Delete what no process uses and none has used for long, and then the least recently used while it is too much.

    Parameters
    ----------
    now
        Seconds since 1970 by this machine's clock, as are the dates of files.

    Returns
    -------
    list of Path
        The directories that were deleted.
    """
    there = []
    for used in folder.glob("*.used"):
        ready = used.with_suffix("")
        if ready.is_dir():
            there.append((used.stat().st_mtime, _size(ready), used, ready))
    total = sum(size for _, size, _, _ in there)
    gone = []
    for last, size, used, ready in sorted(there):
        if (now - last > KEEP_SECONDS or total > KEEP_BYTES) and _delete_unused(used, ready):
            gone.append(ready)
            total -= size
    return gone


def _delete_unused(used: Path, ready: Path) -> bool:
    """Delete a directory unless a process uses it; who comes to use it meanwhile waits, and installs it again."""
    handle = os.open(used, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doomed = ready.with_name(f"{ready.name}.new-evicted")  # who installs it again clears away what is left
        shutil.rmtree(doomed, ignore_errors=True)
        ready.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    except OSError:  # in use, or another process deletes it
        return False
    finally:
        os.close(handle)
    return True


def _size(folder: Path) -> int:
    """Return the bytes of all files in a directory, as far as they can be looked at."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                size += (Path(root) / name).lstat().st_size
    return size


async def _fill(folder: Path, requirements: Sequence[str]) -> None:
    report = folder / "report.json"
    await _pip(requirements, "--dry-run", "--report", str(report), "--", *requirements)
    needed = missing(json.loads(report.read_text()))
    report.unlink()
    if needed:
        await _pip(requirements, "--no-deps", "--target", str(folder), "--", *needed)


async def _pip(requirements: Sequence[str], *arguments: str) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", *_PIP, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(PIP_TIMEOUT):
            output, _ = await process.communicate()
        said = last_lines(output.decode(errors="replace"))
    except TimeoutError:
        said = f"pip had not ended after {PIP_TIMEOUT:g} s, and was killed"
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        raise EnvironmentFailed(
            f"this worker could not install {', '.join(requirements)}, which packages=[…] asks for. Nothing was "
            "claimed, and it is not tried again until more workers are started. Open a session that asks for what "
            f"pip can install here, or start workers that have it already. pip said:\n{said}"
        )


@contextlib.asynccontextmanager
async def _locked(path: Path, clock: Clock) -> AsyncIterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await clock.sleep(LOCK_POLL)
        yield
    finally:
        os.close(handle)


def _stamp(path: Path) -> int | None:
    """Return what tells one writing of a file from another; None without the file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None
