"""The worker's side: put in place what the manifest asks for, before anything is unpickled."""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import shutil
import sys
import tempfile
import threading
import warnings
from pathlib import Path
from typing import NamedTuple

import msgspec
import platformdirs

from burst_dask.clock import Clock
from burst_dask.environment import archive
from burst_dask.environment.installing import install
from burst_dask.environment.versions import compare, installed, installed_in, table
from burst_dask.errors import CorruptObject, EnvironmentFailed, StoreError
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Differences, Environment, encode
from burst_dask.store.base import Store

logger = logging.getLogger("burst_dask.worker")


class Prepared(NamedTuple):
    """Directories that go on the path of a worker."""

    code: Path | None
    packages: Path | None

    @property
    def path(self) -> list[str]:
        """The session's own code first: it may have the name of a package."""
        return [str(folder) for folder in self if folder is not None]


#: What a session asks for that brings neither code nor packages.
NOTHING = Prepared(None, None)


def cache_directory() -> Path:
    """Return where code and packages are kept for the workers of this user on this machine.

    That is where platformdirs puts caches; ``XDG_CACHE_HOME`` moves it. What lies in it may be
    deleted whenever no worker runs.
    """
    return platformdirs.user_cache_path("burst_dask")


async def prepare(
    store: Store, session: SessionId, asked: Environment, clock: Clock, cache: Path | None = None
) -> Prepared:
    """Put the session's code and packages into the cache, unless they are there.

    Raises
    ------
    EnvironmentFailed
        It did not work, and trying again would not help.
    StoreUnavailable
        The code could not be read; that may work later.
    """
    try:
        cache = cache or cache_directory()
        code = await fetch_code(store, session, asked.code, cache / "code") if asked.code else None
        packages = await install(asked.requirements, cache / "packages", clock) if asked.requirements else None
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise EnvironmentFailed(
            f"this worker could not keep the session's code or packages below {cache}: {error}. Nothing was claimed. "
            "Set XDG_CACHE_HOME, in the environment of workers, to a directory that can be written and has space"
        ) from error
    return Prepared(code, packages)


async def fetch_code(store: Store, session: SessionId, digest: str, folder: Path | None = None) -> Path:
    """Return the directory that holds the session's code; read it from the store if it is not there."""
    folder = folder or cache_directory() / "code"
    ready = folder / digest
    if ready.is_dir():
        return ready
    key = keys.code(session, digest)
    try:
        data = await store.get(key)
        if data is None:
            raise CorruptObject(f"{key}: there is no such object; the session was cleaned up")
        folder.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f"{digest}.new-", dir=folder))
        try:
            archive.unpack(key, data, digest, fresh)
            fresh.rename(ready)
        except OSError as error:
            # Not empty: another worker of this machine was first, with the same files.
            if isinstance(error, StoreError) or not ready.is_dir():
                raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    except CorruptObject as error:
        raise EnvironmentFailed(
            f"the session's code could not be taken: {error}. Nothing was claimed. Open a new session"
        ) from error
    return ready


async def bring_code(store: Store, session: SessionId, digest: str) -> None:
    """Let a client import a session's code, unless it can import something of that name already; else warn.

    Raises
    ------
    StoreError
        The store could not be asked.
    """
    try:
        folder = str(await fetch_code(store, session, digest))
    except (EnvironmentFailed, OSError) as error:
        if isinstance(error, StoreError):
            raise
        warnings.warn(
            f"the code that session {session} brings is not on the path here, and results of its classes "
            f"cannot be loaded unless this process can import it: {error}",
            stacklevel=2,
        )
        return
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def use(prepared: Prepared) -> None:
    """Put directories on this process's path, and on that of the processes that tasks start.

    A worker in a thread shares the process with its client: there the client's own modules go first.
    """
    added = [folder for folder in prepared.path if folder not in sys.path]
    if threading.current_thread() is threading.main_thread():
        sys.path[:0] = added
        there = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
        os.environ["PYTHONPATH"] = os.pathsep.join([*prepared.path, *there])
    else:
        sys.path.extend(added)
    importlib.invalidate_caches()


async def tell_differences(
    store: Store, session: SessionId, asked: Environment, prepared: Prepared, worker: WorkerId, host: str
) -> None:
    """Tell, in this worker's log and in the store, how its packages differ from the client's.

    All workers with the same differences write one object, so that a client sees them once.
    """
    if not asked.packages:
        return
    ours = {**installed(), **(installed_in([prepared.packages]) if prepared.packages else {})}
    found = compare(asked, ours)
    if not found:
        return
    logger.warning("packages of this worker that differ from the client's:\n%s", table(found))
    name = hashlib.sha256(msgspec.json.encode(found)).hexdigest()[:16]
    record = Differences(worker=worker, host=host, packages=found)
    try:
        await store.create(keys.difference(session, name), encode(record))
    except StoreError as error:
        logger.warning("they could not be recorded: %s", error)
