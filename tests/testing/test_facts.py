"""Reading a run: whatever is damaged in it, and whatever happens meanwhile."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from breaking import ROOT, Case, done, made, pair
from stage import Stage, Task

from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Claim, Commit, Discard, Location, Outcomes, Takeover
from burst_dask.protocol.shard import Shard
from burst_dask.store import Meta, Store
from burst_dask.testing.facts import garbage, gather
from burst_dask.testing.invariants import check_run
from burst_dask.testing.needed import leftover


async def test_nothing_is_written(case: Case, healthy: tuple[RunId, dict[str, bytes]]) -> None:
    await check_run(case.store, case.run)
    names = [meta.key async for page in case.store.list("") for meta in page]
    assert {name: await case.store.get(name) for name in names} == healthy[1]


async def test_damage_is_told_in_the_story(case: Case) -> None:
    number = (await case.find(Takeover)).number
    await case.flip(case.slot(ROOT, number))
    facts = await gather(case.store, case.run)
    assert f"  {number}: cannot be read" in facts.story(ROOT)[1 + number]


# ---------------------------------------------------------------------------- objects


async def test_a_damaged_entry(case: Case) -> None:
    await case.flip(case.slot(ROOT, (await case.find(Takeover)).number))
    assert await case.rules() == {"objects"}


async def test_a_damaged_newest_entry_leaves_the_outcomes_of_its_shard_unknown(case: Case) -> None:
    newest = (await case.entries(ROOT))[-1].number
    await case.flip(case.slot(ROOT, newest), 20)
    assert await case.rules() == {"objects"}


async def test_a_damaged_plan(case: Case) -> None:
    await case.flip(keys.plan(case.run))
    assert await case.rules() == {"objects"}


async def test_damaged_task_records(case: Case) -> None:
    await case.flip(keys.pack(case.run, 0), 40)
    assert await case.rules() == {"objects"}


async def test_a_damaged_manifest(case: Case) -> None:
    await case.flip(keys.manifest(keys.session_of(case.run)))
    assert await case.rules() == {"objects"}


async def test_a_gap_in_the_session_log(case: Case) -> None:
    await case.store.delete([keys.entry(keys.session_log(keys.session_of(case.run)), 0)])
    violation = await case.violation()
    assert violation.rule == "session log" and "entry 1 where 0 comes next" in violation.what


async def test_a_damaged_session_log(case: Case) -> None:
    await case.flip(keys.entry(keys.session_log(keys.session_of(case.run)), 1))
    assert await case.rules() == {"objects"}


async def test_garbage_is_no_violation(case: Case) -> None:
    await case.store.put(keys.segment(case.run, ROOT, "00009-lost"), b"unnamed")
    await case.store.put(keys.shard_log(case.run, ROOT) + "note", b"by somebody")
    await case.store.put(keys.pack(case.run, 9), b"no shard's")
    assert await case.rules() == set()
    found = garbage(await gather(case.store, case.run))
    assert [line.partition(" (")[0].rpartition("/")[2] for line in found] == ["note", "00009", "00009-lost"]


async def test_a_submission_that_died_is_garbage() -> None:
    case, _ = await made(pair())
    stage = await Stage(case.store).open()
    run = RunId(f"{stage.session}.dead")
    await case.store.put(keys.pack(run, 0), b"half")
    (line,) = garbage(await gather(case.store, run))
    assert "1 objects" in line and "before its plan was written" in line


class Interrupted:
    """A store in which somebody commits while the logs are listed."""

    def __init__(self, store: Store, key: str, meanwhile: Callable[[], Any]) -> None:
        self._store, self._key, self._meanwhile = store, key, meanwhile

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        if "/log/" in prefix and "/runs/" in prefix and self._key:
            yield [meta async for page in self._store.list(prefix) for meta in page if meta.key < self._key]
            after, self._key = self._key, ""
            await self._meanwhile()
        async for page in self._store.list(prefix, after=after):
            yield page


async def test_what_is_new_while_the_run_is_read_is_not_wrong() -> None:
    """Shard 1 is listed with an outcome that came after that of shard 0, which was listed without."""
    case, first = await made(pair(), cuts=[1])
    second = Shard.untouched(keys.root_shard(1), Bitmap.full(1))
    first = await case.append(first, "w", Claim(Bitmap.of([0])))
    second = await case.append(second, "w", Claim(Bitmap.of([0])))

    async def meanwhile() -> None:
        blob = b"".join(seal([b"x"]))
        stored = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, len(blob))})
        await case.append(first, "w", Commit(stored, EMPTY, segments=("@1",)), [blob])
        await case.append(second, "w", Commit(done(0), EMPTY))

    case.store = Interrupted(case.store, keys.shard_log(case.run, keys.root_shard(1))[:-1], meanwhile)  # type: ignore[assignment]
    assert await case.rules() == set()
    assert len(await case.entries(ROOT)) == 2


async def discardable() -> tuple[Case, Shard, str]:
    """Return a complete run, its first shard, and the key of the segment there that nobody needs any more."""
    case, first = await made(pair(), cuts=[1])
    second = Shard.untouched(keys.root_shard(1), Bitmap.full(1))
    blob = b"".join(seal([b"x"]))
    key = keys.segment(case.run, ROOT, "00001-a")
    await case.store.put(key, blob)
    first = await case.append(first, "w", Claim(Bitmap.of([0])))
    stored = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, len(blob))})
    first = await case.append(first, "w", Commit(stored, EMPTY, ("00001-a",)))
    second = await case.append(second, "w", Claim(Bitmap.of([0])))
    await case.append(second, "w", Commit(done(0), EMPTY))
    return case, first, key


class Discarding:
    """A store in which somebody discards a segment just before one of its calls."""

    def __init__(self, store: Store, when: Callable[[str, str], bool], discard: Callable[[], Any]) -> None:
        self._store, self._when, self._discard = store, when, discard
        self._discarded = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def _meanwhile(self, verb: str, key: str) -> None:
        if not self._discarded and self._when(verb, key):
            self._discarded = True
            await self._discard()

    async def get_ranges(self, key: str, spans: Any) -> Any:
        await self._meanwhile("get_ranges", key)
        return await self._store.get_ranges(key, spans)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        pages = [page async for page in self._store.list(prefix, after=after)]
        if prefix.endswith("/log/") or "/segments/" not in pages[0][-1].key:
            for page in pages:
                yield page
            return
        metas = [meta for page in pages for meta in page]
        yield [meta for meta in metas if "/segments/" not in meta.key]
        await self._meanwhile("list", prefix)
        yield [meta async for page in self._store.list(prefix, after=metas[-2].key) for meta in page]


@pytest.mark.parametrize("when", ["get_ranges", "list"])
async def test_what_is_discarded_while_the_run_is_read_is_not_lost(when: str) -> None:
    case, first, key = await discardable()
    whole = case.store

    async def discard() -> None:
        author = log.Author(WorkerId("d"), case.author.clock, case.author.entropy)
        assert await log.append(whole, case.run, log.prepare(first, author, Discard((0,))))
        await whole.delete([key])

    case.store = Discarding(whole, lambda verb, name: verb == when, discard)  # type: ignore[assignment]
    assert await case.rules() == set()
    assert await whole.get(key) is None
    case.store = whole
    assert await case.rules() == set()


async def test_what_nobody_needs_and_is_left_is_told_and_breaks_no_rule() -> None:
    case, first, key = await discardable()
    assert await case.rules() == set()
    assert list(leftover(await gather(case.store, case.run))) == [key]
    await case.append(first, "d", Discard((0,)))
    facts = await gather(case.store, case.run)
    assert list(leftover(facts)) == []
    assert [line.partition(" (")[0] for line in garbage(facts)] == [key]  # its deleter died before it could


async def test_whatever_is_missing_is_noticed(case: Case) -> None:
    for name in await case.names(""):
        data = await case.store.get(name) or b""
        await case.store.delete([name])
        assert await check_run(case.store, case.run, complete=True), name
        await case.store.put(name, data)
    assert await check_run(case.store, case.run, complete=True) == []


async def test_whatever_is_altered_or_cut_short_is_noticed(case: Case) -> None:
    session = keys.session_of(case.run)
    logs = [meta.key async for page in case.store.list(keys.session_log(session)) for meta in page]
    for name in [*await case.names(""), *logs, keys.manifest(session)]:
        data = await case.store.get(name) or b""
        # Behind the header of an entry may lie results that a newer entry has, too.
        end = len(data) if "/log/" not in name else min(len(data), 40)
        for position in range(0, end, 1 + end // 16):
            await case.flip(name, position)
            assert await check_run(case.store, case.run, complete=True), (name, position)
            await case.flip(name, position)
        await case.store.put(name, data[:position])
        assert await check_run(case.store, case.run, complete=True), name
        await case.store.put(name, data)
    assert await check_run(case.store, case.run, complete=True) == []


async def test_a_run_can_be_checked_while_agents_are_busy() -> None:
    stage = await Stage(split_from=0.001, reserve_ahead=0.05, commit_interval=0.02, commit_interval_wanted=0.01).open()

    def task(number: int) -> Task:
        needs = sorted({number - 1, number // 2, max(0, number - 40)} - {number}) if number % 7 else []
        return (lambda *_: time.sleep(0.002)), needs

    view = await stage.submit([task(number) for number in range(300)], cuts=range(30, 300, 30), outputs=[299])
    for name in "abc":
        stage.start(name)
    looks = 0
    while view.totals().pending:
        assert await check_run(stage.store, view.run) == []
        looks += 1
        await view.survey()
    assert looks > 1
    assert await check_run(stage.store, view.run, complete=True) == []
    await stage.stop()
