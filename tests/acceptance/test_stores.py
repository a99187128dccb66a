"""The life of a session on each kind of store: a directory, and two S3 servers, whose dates are in whole seconds."""

from __future__ import annotations

import time

import dask
import pytest
from acting import QUICK, until

from burst_dask import Session, attach, list_sessions, sync
from burst_dask.errors import ConfigError, RunCancelled, UnknownId
from burst_dask.store import open_store


def double(number):
    return 2 * number


@pytest.fixture
def sessions(any_store):
    """Opens sessions with quick workers; cleans them up."""
    opened = []

    def open_session(**settings):
        opened.append(Session(any_store, progress=False, **{**QUICK, **settings}))
        return opened[-1]

    yield open_session
    for session in opened:
        session.cleanup(force=True)


def test_a_session_is_used_from_anywhere_and_leaves_nothing(sessions, any_store):
    session = sessions(workers=2, name="nightly")
    run = session.compute(dask.delayed(double)(21, dask_key_name="answer"))
    assert run.result(timeout=60) == (42,)

    again = attach("nightly", store=any_store)
    status = again.status()
    assert (status.state, status.totals["completed"]) == ("open", status.totals["total"])
    assert any("was completed by" in line.what for line in attach(run.id, store=any_store).story("answer"))
    assert "nightly" in [row.name for row in list_sessions(any_store)]

    stuck = session.compute(dask.delayed(time.sleep)(600))
    until(lambda: stuck.status().running)
    assert attach(stuck.id, store=any_store).cancel(force=True)
    with pytest.raises(RunCancelled):
        stuck.wait(timeout=60)
    until(lambda: not stuck.status().running)

    again.cleanup(force=True)
    with pytest.raises(UnknownId):
        attach("nightly", store=any_store)

    async def left():
        return [meta.key async for page in open_store(any_store).list("") for meta in page if session.id in meta.key]

    assert sync.run(left()) == []


def test_a_session_ends_by_the_clock_of_the_store_and_goes_on_when_extended(sessions, any_store):
    session = sessions(workers=1, session_timeout=2)
    assert attach(session.id, store=any_store).status().time_left <= 2 + 1  # dates may be in whole seconds
    until(lambda: session.status().state == "expired" and not session.status().workers.alive)
    with pytest.raises(ConfigError, match="is past its deadline"):
        session.compute(dask.delayed(double)(1))
    assert session.extend(seconds=600).timestamp() > time.time() + 500
    session.scale(1)
    assert session.compute(dask.delayed(double)(4)).result(timeout=60) == (8,)
