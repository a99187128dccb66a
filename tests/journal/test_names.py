"""Finding tasks by their keys: side by side in the shards, with near misses, and without end where there are many."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from burst_dask import Session, sync
from burst_dask.client.submission import Asked
from burst_dask.clock import Entropy
from burst_dask.errors import UnknownId
from burst_dask.journal import names
from burst_dask.journal.names import find_task
from burst_dask.journal.view import PARALLEL, RunView
from burst_dask.protocol import keys
from burst_dask.store import Span, Store, open_store


class Together:
    """A store that answers a read of packs when `count` of them are under way."""

    def __init__(self, inner: Store, count: int) -> None:
        self._inner = inner
        self._barrier = asyncio.Barrier(count)
        self.reads = 0

    async def get_ranges(self, key: str, spans: Sequence[Span]) -> list[memoryview] | None:
        self.reads += 1
        await self._barrier.wait()
        return await self._inner.get_ranges(key, spans)


def submitted(tasks: int) -> RunView:
    session = Session(open_store(f"memory://{Entropy().token()}"), fleet=None, progress=False)
    graph = {("x", n): (abs, n) for n in range(tasks)}
    return session._submit(graph, list(graph), Asked())._view


@pytest.mark.parametrize("key", [("x", 77), "('x', 77)"])
def test_a_key_or_its_text(key: object) -> None:
    view = submitted(100)
    found = sync.run(find_task(view, key))
    assert found is not None and found[1] == ("x", 77)


def test_shards_are_read_side_by_side() -> None:
    view = submitted(20_000)
    shards = len(view.plan.shards)
    assert shards > PARALLEL and shards % PARALLEL == 0  # or the barrier would never open
    view.store = store = Together(view.store, PARALLEL)  # type: ignore[assignment]
    with pytest.raises(UnknownId, match=r"has no task \('y', 1\)"):
        sync.run(find_task(view, ("y", 1)))
    assert store.reads == shards


def test_near_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    view = submitted(100)
    with pytest.raises(UnknownId, match=r"did you mean .*\"\('x', 77\)\""):
        sync.run(find_task(view, "('x',77)"))
    monkeypatch.setattr(names, "_COMPARED", 0)  # so many tasks that these are not among those compared
    with pytest.raises(UnknownId, match="its keys are those of the graph as submitted"):
        sync.run(find_task(view, "('x',77)"))


def test_without_the_graph_nothing_is_found() -> None:
    view = submitted(3)
    sync.run(view.store.delete([keys.pack(view.run, 0)]))
    assert sync.run(find_task(view, ("x", 0))) is None
