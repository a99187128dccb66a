"""Fleets with real agents on a real store: they come up, are replaced when killed, and leave word."""

import asyncio
import os
import signal

import pytest

from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.fleet.local import LocalFleet
from burst_dask.journal.log import Author, append_session
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Ended, Manifest, decode, encode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import Open
from burst_dask.store import open_store
from burst_dask.worker.process import own_versions

SESSION = SessionId("sess1")


async def open_session(store):
    manifest = Manifest(
        session=SESSION, name=None, created=0.0, host="", versions=own_versions(), settings=Settings.of().to_dict()
    )
    await store.put(keys.manifest(SESSION), encode(manifest))
    await append_session(store, SESSION, SessionState(), Author(WorkerId("c"), SystemClock(), Entropy()), Open())


async def workers(store, kind):
    """Return the workers that have left a ``beat`` or an ``ended``."""
    pages = [page async for page in store.list(keys.workers(SESSION))]
    found = [keys.split_worker_key(meta.key) for page in pages for meta in page]
    return {worker for worker, which in found if which == kind}


async def wait_workers(store, kind, count):
    while len(found := await workers(store, kind)) < count:
        await asyncio.sleep(0.02)
    return found


async def ended(store, worker):
    key = keys.ended(SESSION, worker)
    return decode(Ended, key, await store.get(key))


def test_local_workers(tmp_path):
    async def main():
        store = open_store(tmp_path / "store")
        await open_session(store)
        fleet = LocalFleet(SESSION, store.url, directory=tmp_path / "fleet")
        try:
            fleet.start(2)
            before = await wait_workers(store, "beat", 2)
            victim = fleet.processes()[0]
            os.kill(victim.pid, signal.SIGKILL)
            await wait_workers(store, "ended", 1)
            after = await wait_workers(store, "beat", 3)
            assert {worker.worker for worker in fleet.processes()} == after - {victim.worker}
            told = await ended(store, victim.worker)
            assert told.reason == "died" and told.message.startswith("killed by SIGKILL")
        finally:
            fleet.stop()
        assert fleet.alive() == 0
        reasons = {(await ended(store, worker)).reason for worker in await workers(store, "ended") - {victim.worker}}
        assert reasons == {"stopped"} and len(before) == 2
        fleet.remove()
        assert not (tmp_path / "fleet").exists()

    asyncio.run(main())


@pytest.mark.parametrize("url", ["memory://fleet"])
def test_workers_in_this_process(url):
    async def main():
        store = open_store(url)
        await open_session(store)
        fleet = InProcessFleet(SESSION, store)
        assert fleet.ensure(2) == 2
        await wait_workers(store, "beat", 2)
        assert fleet.alive() == 2 and fleet.ensure(1) == 0
        await asyncio.to_thread(fleet.stop)
        assert fleet.alive() == 0
        assert {(await ended(store, worker)).reason for worker in await wait_workers(store, "ended", 2)} == {"stopped"}

    asyncio.run(main())
