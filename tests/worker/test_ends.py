"""Whether a worker that has ended is missed."""

from __future__ import annotations

import pytest
from stage import Stage

from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Ended, decode
from burst_dask.protocol.session_records import AddRun, Attach, Cancel, Close, Extend, Scale, SessionAction
from burst_dask.worker.agent import Agent
from burst_dask.worker.ends import Ends

ME = WorkerId("me")


async def missed(reason: str, *meanwhile: SessionAction) -> bool:
    """Tell whether a worker is missed that had read all but `meanwhile`."""
    stage = await Stage().open()
    ends = Ends(stage.store, stage.session)
    await ends.tell(Ended(worker=ME, reason=reason, next=stage.state.next))
    for action in meanwhile:
        await stage.append(action)
    return await ends.missed_news(ME)


@pytest.mark.parametrize("action", [AddRun(RunId("r1"), 0), Attach("me"), Extend(9e9), Scale(2)])
async def test_who_asks_for_workers_while_one_ends_gets_one(action: SessionAction) -> None:
    assert await missed("idle", action)
    assert await missed("expired", Cancel(None), action)
    assert not await missed("idle", action, Close())
    assert not await missed("stopped", action)  # somebody wanted that


async def test_other_news_need_no_worker() -> None:
    assert not await missed("idle")
    assert not await missed("idle", Cancel(None), Scale(0))


async def test_of_one_that_could_not_record_its_end_nothing_is_known() -> None:
    stage = await Stage().open()
    assert not await Ends(stage.store, stage.session).missed_news(ME)


async def test_an_agent_records_how_far_it_has_read() -> None:
    stage = await Stage(idle_timeout=0.01).open()
    agent = Agent(stage.context("me"))
    assert await agent.run() == "idle"
    key = keys.ended(stage.session, ME)
    data = await stage.store.get(key)
    assert data is not None and decode(Ended, key, data).next == stage.state.next > 0
