"""A healthy run, played once; each test breaks a copy of its own."""

from __future__ import annotations

import asyncio

import pytest
from breaking import Case, play

from burst_dask.clock import Entropy
from burst_dask.protocol.keys import RunId
from burst_dask.store import open_store


@pytest.fixture(scope="session")
def healthy() -> tuple[RunId, dict[str, bytes]]:
    return asyncio.run(play())


@pytest.fixture
async def case(healthy: tuple[RunId, dict[str, bytes]]) -> Case:
    run, objects = healthy
    store = open_store(f"memory://{Entropy().token()}")
    for name, data in objects.items():
        await store.put(name, data)
    return Case(store, run)
