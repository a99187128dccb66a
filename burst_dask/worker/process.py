"""The entry of one agent process: ``python -m burst_dask.worker.process``.

Usually started by the supervisor (`burst_dask.worker.supervisor`), which restarts it when it dies.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable

import dask
import msgspec
import psutil

import burst_dask
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.errors import BurstError, ConfigError, StoreMissing, UnknownId, VersionMismatch
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest, Versions, decode
from burst_dask.store import Store, open_store
from burst_dask.worker.agent import STUCK, Agent
from burst_dask.worker.context import Context
from burst_dask.worker.execution import ThreadExecutor
from burst_dask.worker.memory import Memory

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_REPLACE = 0, 1, 3, 4


def own_versions() -> Versions:
    """Return what this process runs."""
    major, minor = sys.version_info[:2]
    return Versions(python=f"{major}.{minor}", dask=dask.__version__, burst_dask=burst_dask.__version__)


def check_versions(theirs: Versions, ours: Versions) -> None:
    """Raise `VersionMismatch` when pickles of the client would not be understood here."""
    different = [
        f"{name} {getattr(ours, field)} here, {getattr(theirs, field)} in the client"
        for field, name in (("python", "Python"), ("dask", "Dask"))
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if different:
        raise VersionMismatch(
            f"this worker refuses the session: {'; '.join(different)}. Nothing was claimed. "
            "Start workers from the environment that the session was opened in, or open a session from this one."
        )


async def read_manifest(store: Store, session: SessionId) -> Manifest:
    """Return the manifest of a session.

    Raises
    ------
    UnknownId
        There is no such session.
    """
    key = keys.manifest(session)
    data = await store.get(key)
    if data is None:
        raise UnknownId(f"{store.url} holds no session {session!r}; it was cleaned up, or the store is another one")
    return decode(Manifest, key, data)


async def run_agent(
    store: Store,
    session: SessionId,
    worker: WorkerId,
    *,
    threads: int | None = None,
    memory_limit: int | None = None,
    stop: asyncio.Event | None = None,
    spill_directory: str | None = None,
    memory: Callable[[], int] | None = None,
    resources: dict[str, float] | None = None,
) -> str:
    """Run one agent until it ends; return why, as in `Ended.reason`.

    Raises
    ------
    UnknownId, VersionMismatch
        It cannot work for this session; for the second, that is recorded for the client to see.
    """
    manifest = await read_manifest(store, session)
    settings = Settings.of(**manifest.settings)
    if threads is not None:
        settings = msgspec.structs.replace(settings, threads=threads)
    if resources is not None:
        settings = msgspec.structs.replace(settings, resources=resources)
    limit = memory_limit or settings.memory_limit
    context = Context(
        store=store,
        session=session,
        worker=worker,
        settings=settings,
        clock=SystemClock(),
        entropy=Entropy(),
        executor=ThreadExecutor(settings.threads, worker),
        memory=Memory(None if limit is None else int(limit * settings.spill_at), spill_directory),
    )
    agent = Agent(context, host=platform.node(), pid=os.getpid(), memory=memory)
    try:
        check_versions(manifest.versions, own_versions())
    except VersionMismatch as error:
        await agent.end("refused", str(error))
        raise
    watch = asyncio.create_task(_stop_when(stop, agent)) if stop is not None else None
    try:
        return await agent.run()
    finally:
        if watch is not None:
            watch.cancel()
        context.executor.close()
        context.memory.close()


async def _stop_when(stop: asyncio.Event, agent: Agent) -> None:
    await stop.wait()
    agent.stop("stopped", "asked to stop; its work was handed over")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m burst_dask.worker.process", description=__doc__)
    parser.add_argument("--session", required=True)
    parser.add_argument("--store", required=True, help="URL of the store")
    parser.add_argument("--worker", help="id of this worker; default: a new one")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--memory-limit", type=int, help="bytes")
    parser.add_argument("--spill-directory")
    parser.add_argument("--supervisor-fd", type=int, help="stop when the other end of this pipe closes")
    return parser.parse_args(argv)


async def _main(arguments: argparse.Namespace) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if arguments.supervisor_fd is not None:
        # Nothing is ever sent: readable means that the supervisor is gone.
        loop.add_reader(arguments.supervisor_fd, stop.set)
        stop_reading = asyncio.create_task(_forget_reader(loop, arguments.supervisor_fd, stop))
    process = psutil.Process()
    try:
        reason = await run_agent(
            open_store(arguments.store),
            SessionId(arguments.session),
            WorkerId(arguments.worker or Entropy().token()),
            threads=arguments.threads,
            memory_limit=arguments.memory_limit,
            stop=stop,
            spill_directory=arguments.spill_directory,
            memory=lambda: int(process.memory_info().rss),
        )
    except (VersionMismatch, ConfigError, StoreMissing) as error:
        # Starting it again would not help: the supervisor does not.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except BurstError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        if arguments.supervisor_fd is not None:
            stop_reading.cancel()
    return EXIT_REPLACE if reason == STUCK else EXIT_OK


async def _forget_reader(loop: asyncio.AbstractEventLoop, fd: int, stop: asyncio.Event) -> None:
    """A closed pipe stays readable: look once."""
    await stop.wait()
    loop.remove_reader(fd)


def main(argv: list[str] | None = None) -> None:
    """Run one agent in this process."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    code = asyncio.run(_main(_arguments(argv)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads may still run tasks whose work was handed over: do not wait for them.
    os._exit(code)


if __name__ == "__main__":
    main()
