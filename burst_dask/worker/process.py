"""The entry of one agent process: ``python -m burst_dask.worker.process``.

Usually started by the supervisor (`burst_dask.worker.supervisor`), which restarts it when it dies.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import psutil

from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.environment.preparing import NOTHING, Prepared, prepare, tell_differences, use
from burst_dask.environment.versions import check_versions, own_versions
from burst_dask.errors import (
    BurstError,
    ConfigError,
    EnvironmentFailed,
    KeyMissing,
    StoreMissing,
    UnknownId,
    UntrustedObject,
    VersionMismatch,
)
from burst_dask.graph import stored
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Ended, Manifest
from burst_dask.scaling.healer import Elastic, Healer
from burst_dask.store import Signed, Store, open_store
from burst_dask.store.signing import key_in
from burst_dask.trust.keyring import FILE, Keyring
from burst_dask.trust.trusting import Trusted, opened_for, trusted
from burst_dask.worker.agent import REPLACED, UNTRUSTED, Agent
from burst_dask.worker.context import Context
from burst_dask.worker.ends import Ends
from burst_dask.worker.execution import ThreadExecutor
from burst_dask.worker.memory import Memory

T = TypeVar("T")

# Results of other sessions are read within tasks, below the layer that knows keys.
stored.open_with(opened_for)

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_REPLACE = 0, 1, 3, 4


async def _admitted(store: Store, session: SessionId, worker: WorkerId, key: str) -> Trusted:
    """Return the session, and the store by which what it has stored is verified.

    Raises
    ------
    UnknownId
        There is no such session.
    KeyMissing, UntrustedObject
        It is signed, and its key is not here; or it is not what its key vouches for.
    """
    try:
        found = await trusted(store, session, reference=key)
    except UntrustedObject as error:
        await _accuse(store, session, key, Ended(worker=worker, reason=UNTRUSTED, message=str(error)))
        raise
    if found is None or found.swept:
        raise UnknownId(f"{store.url} holds no session {session!r}; it was cleaned up, or the store is another one")
    return found


async def _accuse(store: Store, session: SessionId, key: str, ended: Ended) -> None:
    """Record that a session is not believed, where a client that knows it sees that."""
    with contextlib.suppress(BurstError):
        ring = Keyring()
        where = key or ring.known(session) or FILE
        signing = key_in(store, session)
        if signing is None:
            signing = await asyncio.to_thread(ring.read, session, where)
        ended = msgspec.structs.replace(ended, wrote=SystemClock().wall())
        await Ends(Signed(store, {session: signing}), session).tell(ended)


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
    key: str = "",
) -> str:
    """Run one agent until it ends; return why, as in `Ended.reason`.

    Raises
    ------
    UnknownId, KeyMissing, UntrustedObject, VersionMismatch, EnvironmentFailed
        It cannot work for this session; for the last three, that is recorded for the client to see.
    """
    store, manifest, _ = await _admitted(store, session, worker, key)
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
    healer = _healer(context, manifest)
    agent = Agent(context, host=platform.node(), pid=os.getpid(), memory=memory, healer=healer)
    try:
        if not await _prepared(agent, manifest, stop):
            return "stopped"
        watch = asyncio.create_task(_stop_when(stop, agent)) if stop is not None else None
        try:
            return await agent.run()
        finally:
            if watch is not None:
                watch.cancel()
    finally:
        context.executor.close()
        context.memory.close()


def _healer(context: Context, manifest: Manifest) -> Healer:
    """Return that by which the worker sees to its fleet, if it can start others, and to the session's money."""
    fleet: Elastic | None = None
    if manifest.fleet.kind == "ecs":
        from burst_dask.fleet.ecs import EcsFleet, EcsPlan  # noqa: PLC0415 - of the extra, and heavy

        plan = EcsPlan.of(manifest.fleet)
        fleet = EcsFleet(context.session, context.store.url, plan, opened=manifest.created, key=manifest.key)
    return Healer(context.store, context.session, context.settings, context.author, fleet)


async def _prepared(agent: Agent, manifest: Manifest, stop: asyncio.Event | None) -> bool:
    """See to what tasks need around them; False when told to stop before that is done. Such ends are recorded."""
    context, asked = agent.context, manifest.environment
    prepared: Prepared | None = NOTHING
    try:
        check_versions(manifest.versions, own_versions())
        if asked.code or asked.requirements:
            async with agent.beating():  # an installation may take longer than the lease
                prepared = await _unless(stop, prepare(context.store, context.session, asked, context.clock))
    except VersionMismatch as error:
        await agent.end("refused", str(error))
        raise
    except EnvironmentFailed as error:
        await agent.end("unprepared", str(error))
        raise
    if prepared is None:
        await agent.end("stopped", "asked to stop before it had begun")
        return False
    use(prepared)
    await tell_differences(context.store, context.session, asked, prepared, context.worker, platform.node())
    return True


async def _unless(stop: asyncio.Event | None, job: Coroutine[Any, Any, T]) -> T | None:
    """Return what `job` returns, or None when `stop` comes first; the job has ended then, too."""
    tasks = asyncio.ensure_future(job), asyncio.ensure_future((stop or asyncio.Event()).wait())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


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
    parser.add_argument("--key", default="", help="where the key of a signed session is")
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
            key=arguments.key,
        )
    except (VersionMismatch, EnvironmentFailed, ConfigError, StoreMissing, UntrustedObject, KeyMissing) as error:
        # Starting it again would not help: the supervisor does not.
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_REFUSED
    except BurstError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        if arguments.supervisor_fd is not None:
            stop_reading.cancel()
    return EXIT_REPLACE if reason in REPLACED else EXIT_REFUSED if reason == UNTRUSTED else EXIT_OK


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
