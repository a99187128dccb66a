"""The store's part for a held shard: the order of writes, conflicts, damaged inputs, giving up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from stage import Stage, Task

from burst_dask import serialize
from burst_dask.client.tasklogs import Reader
from burst_dask.errors import CorruptObject, StoreUnavailable, WorkerLost
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Claim, Commit, Ended, Logs, Takeover, decode, encode


class Recording:
    """A store that notes the keys it writes, in order, and may fail or stall some."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.url = inner, inner.url
        self.written: list[str] = []
        self.fail: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def _check(self, key: str) -> None:
        for part, left in self.fail.items():
            if part in key and left > 0:
                self.fail[part] = left - 1
                raise StoreUnavailable(f"{key}: test")

    async def put(self, key: str, body: Any) -> None:
        self._check(key)
        await self.inner.put(key, body)
        self.written.append(key)

    async def create(self, key: str, body: Any) -> bool:
        self._check(key)
        created: bool = await self.inner.create(key, body)
        self.written.append(key)
        return created


async def test_the_segment_is_written_before_the_entry() -> None:
    """Rule 2."""
    stage = await Stage().open()
    store = stage.store = Recording(stage.store)  # type: ignore[assignment]
    view = await stage.submit([(lambda: np.arange(100_000), [])])
    stage.start()
    await stage.complete(view)
    (segment,) = [key for key in store.written if "/segments/" in key]
    last_entry = max(key for key in store.written if "/log/00000/" in key)
    assert store.written.index(segment) < store.written.index(last_entry)
    (result,) = await stage.results(view, [0])
    assert (result == np.arange(100_000)).all()
    await stage.stop()


async def test_the_newest_entry_has_all_small_results() -> None:
    stage = await Stage(commit_interval=0.01, reserve_ahead=0.1).open()
    view = await stage.submit([((lambda n=n: n), []) for n in range(40)])
    stage.start()
    await stage.complete(view)
    (entries,) = (await stage.story(view)).values()
    index = entries[-1].index
    assert {index.objects[place.object] for place in index.outcomes.stored.values()} == {f"@{entries[-1].number}"}
    assert await stage.results(view, list(range(40))) == list(range(40))
    await stage.stop()


@pytest.mark.parametrize("where", ["/log/00000/", "/segments/", "/workers/"])
async def test_the_work_survives_a_store_that_is_away(where: str) -> None:
    stage = await Stage().open()
    store = stage.store = Recording(stage.store)  # type: ignore[assignment]
    ran = []

    def once() -> np.ndarray:
        ran.append(1)
        return np.zeros(100_000)

    view = await stage.submit([(once, [])])
    stage.start()
    while not ran:
        await asyncio.sleep(0.01)
    store.fail[where] = 3
    await stage.complete(view)
    assert len(ran) == 1
    await stage.stop()


async def test_a_damaged_input_fails_the_tasks_that_need_it_and_no_others() -> None:
    stage = await Stage().open()
    gate = threading.Event()

    def after_the_damage() -> np.ndarray:
        assert gate.wait(60)
        return np.ones(50_000)

    tasks: list[Task] = [
        (lambda: np.zeros(50_000), []),
        (after_the_damage, []),
        (lambda a: float(a.sum()), [0]),
        (lambda a: float(a.sum()), [1]),
    ]
    # The last shard begins when the other two are complete, so nobody has read the result by then.
    view = await stage.submit(tasks, cuts=[1, 2])
    stage.start("a")
    while (outcome := view.outcome(0)) is None:
        await view.survey()
        await asyncio.sleep(0.01)
    assert outcome.location is not None
    key = keys.segment(view.run, outcome.shard.id, outcome.shard.index.objects[outcome.location.object])
    data = bytearray(await stage.store.get(key) or b"")
    data[outcome.location.start + 100] ^= 1
    await stage.store.put(key, bytes(data))
    gate.set()
    await stage.complete(view)
    assert [view.outcome(task).done for task in range(4)] == [True, True, False, True]  # type: ignore[union-attr]
    failure = serialize.load_failure((await view.fetch([2]))[2])
    assert isinstance(failure.exception, CorruptObject)
    assert key in str(failure.exception)
    await stage.stop()


async def test_a_task_that_lost_too_many_workers_is_given_up() -> None:
    """Rule 10: as its error says; the others run."""
    stage = await Stage(lost_workers=2).open()
    view = await stage.submit([(lambda: 1, []), (lambda: 2, [])])
    shard = view.shard(keys.root_shard(0))

    async def append(name: str, action: Any) -> None:
        nonlocal shard
        author = log.Author(WorkerId(name), stage.clock, stage.entropy)
        after = await log.append(stage.store, view.run, log.prepare(shard, author, action))
        assert after is not None
        shard = after

    await append("w0", Claim(Bitmap.of([0])))
    for n in range(2):
        dead = WorkerId(f"w{n}")
        record = Ended(worker=dead, reason="died", message="killed by SIGSEGV")
        await stage.store.create(keys.ended(stage.session, dead), encode(record))
        if n < 1:
            action = Takeover(lost=dead, cause="worker w0: killed by SIGSEGV", reserved=Bitmap.of([0]))
            await append(f"w{n + 1}", action)
    stage.start("heir")
    await stage.complete(view)
    outcome = view.outcome(0)
    assert outcome is not None
    assert not outcome.done
    failure = serialize.load_failure((await view.fetch([0]))[0])
    assert isinstance(failure.exception, WorkerLost)
    assert "SIGSEGV" in str(failure.exception)
    assert await stage.results(view, [1]) == [2]
    await stage.stop()


async def test_commits_go_on_after_a_split() -> None:
    """A lost slot is read, folded, and the commit goes into the next one."""
    stage = await Stage(split_from=0.001, reserve_ahead=0.05).open()
    view = await stage.submit([((lambda n=n: n), []) for n in range(200)])
    for name in "abcd":
        stage.start(name)
    await stage.complete(view)
    story = await stage.story(view)
    for entries in story.values():
        assert [entry.number for entry in entries] == list(range(len(entries)))
    done = [
        p for entries in story.values() for e in entries if isinstance(e.action, Commit) for p in e.action.outcomes.done
    ]
    assert sorted(done) == list(range(200))
    await stage.stop()


async def test_what_tasks_print_is_written_before_the_entry_that_names_it() -> None:
    """Rule 2."""
    stage = await Stage().open()
    store = stage.store = Recording(stage.store)  # type: ignore[assignment]
    view = await stage.submit([(lambda: print("hello"), []), (lambda: 1, [])])
    stage.start()
    await stage.complete(view)
    await stage.stop()
    (key,) = [key for key in store.written if "/logs/" in key]
    index = view.shard(keys.root_shard(0)).index
    assert index.outcomes.logs == {key.rpartition("/")[2]: Bitmap.of([0])}
    naming = [key for key in store.written if "/log/00000/" in key]
    assert store.written.index(key) < store.written.index(naming[1])
    data = await store.get(key)
    assert data is not None
    logs = decode(Logs, key, data)
    assert logs.worker == "w" and [output.position for output in logs.tasks] == [0]


async def test_nothing_is_written_for_tasks_that_print_nothing() -> None:
    stage = await Stage().open()
    store = stage.store = Recording(stage.store)  # type: ignore[assignment]
    view = await stage.submit([((lambda n=n: n), []) for n in range(20)])
    stage.start()
    await stage.complete(view)
    await stage.stop()
    assert not [key for key in store.written if "/logs/" in key]
    assert view.shard(keys.root_shard(0)).index.outcomes.logs == {}


async def test_a_release_hands_over_how_often_a_task_was_tried_and_what_it_printed() -> None:
    stage = await Stage(retry_delay=60.0).open()
    failed = threading.Event()
    tries = []

    def fail() -> None:
        tries.append(1)
        print(f"try {len(tries)}")
        failed.set()
        raise OSError("not yet")

    view = await stage.submit([(fail, [])], annotations={0: {"retries": 1}})
    stage.start("first")
    await asyncio.to_thread(failed.wait, 60)
    while not view.shard(keys.root_shard(0)).index.outcomes.tries:
        if "first" in stage.agents:
            await stage.stop("first")  # while the task rests
        await view.survey()
    assert view.shard(keys.root_shard(0)).index.outcomes.tries == {0: 1}
    stage.start("second")
    await stage.complete(view)
    await stage.stop()
    assert len(tries) == 2
    body = (await view.fetch([0]))[0]
    assert serialize.load_failure(body).attempts == 2
    logs = await Reader(view).news()
    assert [(record.attempt, record.worker, record.text) for record in logs[0].records] == [
        (1, "first", "try 1\n"),
        (2, "second", "try 2\n"),
    ]
