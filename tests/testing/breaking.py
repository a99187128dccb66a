"""A healthy run, made by agents, and what it takes to break it by hand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
from stage import Stage, Task

from burst_dask.clock import Entropy
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId, ShardId, WorkerId
from burst_dask.protocol.records import Action, Commit, Ended, Entry, Outcomes, decode_with_end, encode
from burst_dask.protocol.shard import Shard
from burst_dask.store import Store, open_store
from burst_dask.testing.invariants import Violation, check_run

ROOT = keys.root_shard(0)
#: a result of this size gets a segment
LARGE = 40_000


async def play() -> tuple[RunId, dict[str, bytes]]:
    """Let agents run a graph, one of them a thief and heir; return the run and all objects."""
    stage = await Stage(split_from=0.01, reserve_ahead=0.3).open()
    entered, gate = threading.Event(), threading.Event()
    first_time = iter([True])

    def hangs_once() -> int:
        if next(first_time, False):
            entered.set()
            gate.wait(60)
        return 0

    def fails(_: int) -> int:
        raise ValueError("no")

    tasks: list[Task] = [(hangs_once, []), *[(lambda: 1, []) for _ in range(19)]]
    tasks += [(lambda x: x + 1, [number - 10]) for number in range(20, 30)]
    tasks += [(lambda x, y: x + y, [0, 29]), (fails, [5]), (lambda: b"x" * LARGE, []), (lambda x: x, [31])]
    tasks += [(lambda x: x, [33]), (len, [32]), (lambda x: x, [30])]
    view = await stage.submit(tasks, cuts=[30, 34], outputs=[3, 30, 32, 34, 36])
    stage.start("dies")
    await asyncio.to_thread(entered.wait)
    stage.start("thief")
    while view.totals().done < 5:
        await view.survey()
        await asyncio.sleep(0.01)
    await stage.kill("dies")
    await stage.store.create(
        keys.ended(stage.session, WorkerId("dies")), encode(Ended(worker=WorkerId("dies"), reason="died"))
    )
    await stage.complete(view)
    gate.set()
    await stage.stop()
    names = [meta.key async for page in stage.store.list("") for meta in page]
    return view.run, {name: await stage.store.get(name) or b"" for name in names}


class Case:
    """A run in a store of its own, to be broken."""

    def __init__(self, store: Store, run: RunId) -> None:
        self.store, self.run = store, run
        self.author = log.Author(WorkerId("forger"), Stage().clock, Entropy())

    @classmethod
    async def copy_of(cls, run: RunId, objects: Mapping[str, bytes]) -> Case:
        store = open_store(f"memory://{Entropy().token()}")
        for name, data in objects.items():
            await store.put(name, data)
        return cls(store, run)

    async def rules(self, *, complete: bool = True) -> set[str]:
        return {violation.rule for violation in await check_run(self.store, self.run, complete=complete)}

    async def violation(self, *, complete: bool = True) -> Violation:
        (only,) = await check_run(self.store, self.run, complete=complete)
        return only

    async def names(self, part: str) -> list[str]:
        return [
            meta.key async for page in self.store.list(keys.run_prefix(self.run)) for meta in page if part in meta.key
        ]

    async def flip(self, key: str, at: int = -1) -> None:
        data = bytearray(await self.store.get(key) or b"")
        data[at] ^= 1
        await self.store.put(key, bytes(data))

    def slot(self, shard: ShardId, number: int) -> str:
        return keys.entry(keys.shard_log(self.run, shard), number)

    async def entry(self, shard: ShardId, number: int) -> tuple[Entry, bytes]:
        key = self.slot(shard, number)
        data = await self.store.get(key) or b""
        entry, end = decode_with_end(Entry, key, data)
        return entry, data[end:]

    async def entries(self, shard: ShardId) -> list[Entry]:
        names = await self.names(f"/log/{shard}/")
        return [(await self.entry(shard, keys.entry_number(name)))[0] for name in names]

    async def find(self, kind: type) -> Entry:
        """Return the first entry of a kind in the log of the first shard."""
        return next(entry for entry in await self.entries(ROOT) if isinstance(entry.action, kind))

    async def rewrite(self, shard: ShardId, slot: int, /, **changes: Any) -> None:
        entry, blobs = await self.entry(shard, slot)
        changed = msgspec.structs.replace(entry, **changes)
        await self.store.put(self.slot(shard, slot), encode(changed) + blobs)

    async def rewrite_outcomes(self, shard: ShardId, change: Callable[[Outcomes], Outcomes]) -> None:
        """Change outcomes in all entries of a log, so that it still folds."""
        for entry in await self.entries(shard):
            action = entry.action
            if isinstance(action, Commit):
                action = msgspec.structs.replace(action, outcomes=change(action.outcomes))
            index = msgspec.structs.replace(entry.index, outcomes=change(entry.index.outcomes))
            await self.rewrite(shard, entry.number, action=action, index=index)

    async def forge(self, shard: ShardId, action: Action, **index: Any) -> None:
        """Append an entry by the holder whose index is as given, whether it is legal or not."""
        last = (await self.entries(shard))[-1]
        forged = Entry(
            number=last.number + 1,
            writer=last.writer,
            nonce=self.author.entropy.token(),
            wrote=0.0,
            action=action,
            index=msgspec.structs.replace(last.index, **index),
        )
        await self.store.put(self.slot(shard, forged.number), encode(forged))

    async def append(self, shard: Shard, writer: str, action: Action, blobs: Sequence[bytes] = ()) -> Shard:
        """Append what the shard's state allows."""
        author = log.Author(WorkerId(writer), self.author.clock, self.author.entropy)
        after = await log.append(self.store, self.run, log.prepare(shard, author, action, blobs))
        assert after is not None
        return after


async def made(tasks: Sequence[Task], cuts: Sequence[int] = (), outputs: Sequence[int] = ()) -> tuple[Case, Shard]:
    """Return a run that nobody works on, and its first shard, to append to by hand."""
    stage = await Stage().open()
    view = await stage.submit(tasks, cuts=cuts, outputs=outputs)
    return Case(stage.store, view.run), view.shard(ROOT)


def pair() -> list[Task]:
    return [(lambda: 1, []), (lambda x: x, [0])]


def done(*positions: int) -> Outcomes:
    return Outcomes(done=Bitmap.of(positions))
