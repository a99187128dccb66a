"""A worker that meets what is not signed with its session's key: it leaves that alone, says so, and goes on."""

from __future__ import annotations

import asyncio
import threading

from stage import Stage, constant, ended

from burst_dask.clock import Entropy
from burst_dask.environment.versions import own_versions
from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import Beat, Entry, Manifest, Release, encode
from burst_dask.protocol.session_records import Open
from burst_dask.store import Key, Signed, open_store
from burst_dask.trust.keyring import FILE
from burst_dask.trust.trusting import digest


class SignedStage(Stage):
    """A stage on which somebody else writes, too: `forge` does."""

    async def open(self) -> SignedStage:
        self.plain = open_store(f"memory://{self.entropy.token()}")
        self.store = Signed(self.plain, {self.session: Key(Entropy().secret())})
        manifest = encode(
            Manifest(
                session=self.session,
                name=None,
                created=0.0,
                host="h",
                versions=own_versions(),
                settings=self.settings.to_dict(),
                key=FILE,
            )
        )
        await self.store.create(keys.manifest(self.session), manifest)
        await self.append(Open(digest(manifest)))
        return self

    async def forge(self, key: str, body: bytes = b"whatever") -> None:
        await self.plain.put(key, body)

    async def busy(self) -> tuple[RunView, threading.Event]:
        """Have a worker in the midst of the one task of a run, which ends when the event is set."""
        entered, gate = threading.Event(), threading.Event()

        def waits() -> int:
            entered.set()
            gate.wait(60)
            return 1

        view = await self.submit([(waits, [])])
        self.start()
        await asyncio.to_thread(entered.wait)
        return view, gate

    async def entries(self, view: RunView, shard: str) -> list[Entry]:
        found = []
        while (one := await log.read(self.store, view.run, ShardId(shard), len(found))) is not None:
            found.append(one[0])
        return found


async def test_what_waits_for_a_forged_shard_is_released_and_the_rest_is_done() -> None:
    stage = await SignedStage(idle_timeout=0.4).open()
    view = await stage.submit([constant(1), constant(2), (lambda x: x, [0])], cuts=[1])
    await stage.forge(keys.entry(keys.shard_log(view.run, ShardId("00000")), 0))
    stage.start()
    assert await stage.agents.pop("w") == "idle"
    record = await ended(stage, "w")
    assert "00000/00000000 is not signed with the key" in record.message
    last = (await stage.entries(view, "00001"))[-1]
    assert isinstance(last.action, Release) and last.action.reason == "nothing ready"
    assert set(last.index.outcomes.done) == {0} and last.index.holder is None


async def test_a_holder_whose_next_slot_was_forged_lets_go_and_does_other_work() -> None:
    stage = await SignedStage(idle_timeout=0.4).open()
    view, gate = await stage.busy()
    await stage.forge(keys.entry(keys.shard_log(view.run, ShardId("00000")), 1))
    gate.set()
    other = await stage.submit([constant(7)])
    await stage.complete(other)
    assert await stage.results(other, [0]) == [7]
    assert await stage.agents.pop("w") == "idle"
    assert "00000/00000001 is not signed" in (await ended(stage, "w")).message


async def test_forged_heartbeats_and_last_words_keep_nobody_from_work() -> None:
    stage = await SignedStage(idle_timeout=0.4, large_run=1).open()
    entered, gate = threading.Event(), threading.Event()

    def hangs_once() -> int:
        if not entered.is_set():
            entered.set()
            gate.wait(60)
        return 1

    view = await stage.submit([(hangs_once, [])])
    stage.start("dies")
    await asyncio.to_thread(entered.wait)
    await stage.kill("dies")
    beat = Beat(worker=WorkerId("x"), host="h", pid=1, threads=1, started=0.0)
    for name in ("dies", "stranger"):
        await stage.forge(keys.beat(stage.session, WorkerId(name)), encode(beat))
    await stage.forge(keys.ended(stage.session, WorkerId("dies")))
    stage.start("heir")
    await stage.complete(view)
    gate.set()
    assert await stage.results(view, [0]) == [1]
    assert await stage.agents.pop("heir") == "idle"
    assert "is not signed" in (await ended(stage, "heir")).message


async def test_a_forged_plan_hides_no_other_run() -> None:
    stage = await SignedStage(idle_timeout=0.4).open()
    forged = await stage.submit([constant(1)])
    other = await stage.submit([constant(2)])
    await stage.forge(keys.plan(forged.run))
    stage.start()
    await stage.complete(other)
    assert await stage.agents.pop("w") == "idle"


async def test_a_forged_session_entry_ends_a_worker_that_hands_over_first() -> None:
    stage = await SignedStage().open()
    view, gate = await stage.busy()
    await stage.forge(keys.entry(keys.session_log(stage.session), stage.state.next))
    assert await stage.agents.pop("w") == "untrusted"
    gate.set()
    assert isinstance((await stage.entries(view, "00000"))[-1].action, Release)
    assert "is not signed" in (await ended(stage, "w")).message
