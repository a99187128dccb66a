"""How a session ends, as its clients see it: deadlines, signs of life, and what a cleanup keeps."""

from __future__ import annotations

import dask
import numpy as np
import pytest
from acting import ReadOnly

from burst_dask import Session, attach, sync
from burst_dask.client import guard
from burst_dask.client.link import Link
from burst_dask.clock import Entropy
from burst_dask.errors import ConfigError, SessionEnded, StoreUnavailable
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.protocol import keys
from burst_dask.protocol.session_records import Close
from burst_dask.store import open_store, probe, requests_of
from burst_dask.store.wrappers import Fault, Faulty

WEEK = 7 * 86400


class Ahead:
    """A machine's clock that runs ahead."""

    def __init__(self, clock, seconds):
        self._clock, self._seconds = clock, seconds

    def monotonic(self):
        return self._clock.monotonic()

    def wall(self):
        return self._clock.wall() + self._seconds

    async def sleep(self, seconds):
        await self._clock.sleep(seconds)


def opened(**settings) -> Session:
    return Session(f"memory://{Entropy().token()}", fleet=None, progress=False, **settings)


def elsewhere(session: Session, ahead: float) -> Link:
    """Return the link of a client whose clock is ahead of the store's."""
    there = attach(session.id, store=session._link.store)._link
    there.author = type(there.author)(there.author.name, Ahead(there.author.clock, ahead), there.author.entropy)
    return there


def sent(session: Session, call) -> int:
    before = sum(requests_of(session._link.store).values())
    call()
    return sum(requests_of(session._link.store).values()) - before


# ---------------------------------------------------------------------------- the deadline


def test_the_default_is_a_week_after_the_last_sign_and_no_other_limit():
    status = opened().status()
    assert WEEK - 60 < status.time_left <= WEEK
    assert status.settings["absolute_timeout"] is None


def test_without_limits_nothing_is_asked():
    session = opened(session_timeout=None)
    assert sent(session, lambda: sync.run(session._link.expired())) == 0
    assert session.status().time_left is None and "no limit" in str(session.status())


def test_while_the_deadline_is_far_nothing_is_asked():
    session = opened()
    assert sent(session, lambda: sync.run(session._link.expired())) == 0


@pytest.mark.parametrize("ahead", [-2 * WEEK, 2 * WEEK])
def test_the_clock_of_a_client_ends_nothing(ahead):
    session = opened()
    assert sync.run(elsewhere(session, ahead).expired()) is False


def test_a_client_whose_clock_is_right_sees_the_end():
    session = opened(session_timeout=0.001)
    while not sync.run(session._link.expired()):
        pass
    assert session.status().state == "expired"
    assert attach(session.id, store=ReadOnly(session._link.store)).status().state == "expired"


def test_extending_reaches_the_workers_by_the_log():
    session = opened(session_timeout=60)
    other = attach(session.id, store=session._link.store)
    deadline = other.extend(7200)
    sync.run(session._link.follow())
    assert session._link.state.until == pytest.approx(deadline.timestamp())
    assert 7100 < session.status().time_left <= 7200


def test_past_the_absolute_timeout_nothing_helps():
    session = opened(absolute_timeout=0.001)
    while not sync.run(session._link.expired()):
        pass
    with pytest.raises(ConfigError, match=r"nothing moves. Nothing was changed. For new work open a new session"):
        session.extend(60)
    with pytest.raises(ConfigError, match=r"nothing moves its absolute_timeout of 0.001 s"):
        session.scale(2)
    sync.run(session._link.follow())
    assert session._link.state.until == 0


def test_who_waits_gives_signs_of_life(monkeypatch):
    session = opened(session_timeout=1000)
    signs = []

    async def append(self, action):
        signs.append(type(action).__name__)

    monkeypatch.setattr(Link, "append", append)
    sync.run(session._link.stay())
    assert signs == []
    sync.run(elsewhere(session, 499).stay())
    assert signs == []
    sync.run(elsewhere(session, 501).stay())
    assert signs == ["Attach"]


def test_who_may_only_read_gives_no_sign_and_waits_all_the_same():
    session = opened()
    reader = attach(session.id, store=ReadOnly(session._link.store))._link
    sync.run(reader.announce())
    sync.run(session._link.follow())
    assert session._link.state.sign == 0


def test_waiting_for_a_session_that_was_closed_ends(monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 0.01)
    session = opened(wait_poll_min=0.005)
    run = session.compute(dask.delayed(1))
    sync.run(session._link.append(Close()))
    with pytest.raises(SessionEnded, match=f"session {session.id} is closed, and its workers have gone"):
        run.wait(timeout=30)
    assert run.status().state == "stopped"


def test_who_comes_to_wait_for_a_session_that_is_over_is_told_at_once():
    session = opened(wait_poll_min=0.005)
    run = session.compute(dask.delayed(1))
    sync.run(session._link.append(Close()))
    for store in (session._link.store, ReadOnly(session._link.store)):
        late = attach(run.id, store=store)
        with pytest.raises(SessionEnded, match="its workers have gone"):
            # Less than the time after which heartbeats are listed: that it goes on would not be true.
            late.wait(timeout=guard.CHECK_BEATS_EVERY / 2)


# ---------------------------------------------------------------------------- cleanup


def test_cleanup_deletes_intermediates_and_keeps_outputs_and_errors():
    session = opened()
    store = session._link.store
    large = dask.delayed(np.zeros)(100_000)
    outputs = [large + 1, dask.delayed(divmod)(1, 0)]
    sums = dask.delayed(sum)([part.sum() for part in [large + n for n in range(4)]])
    run = session.compute(*outputs, sums)
    fleet = InProcessFleet(session._link.session, store, threads=1)
    fleet.ensure(2)
    run.wait(timeout=60)
    fleet.stop()

    def segments():
        async def listed():
            return {m.key: m.size async for page in store.list(keys.run_prefix(run.id) + "segments/") for m in page}

        return sync.run(listed())

    session.cleanup()
    again = attach(run.id, store=store)
    with pytest.raises(ZeroDivisionError):
        again.result(timeout=10)
    assert sum(segments().values()) < 2.5 * 800_000  # of five arrays, the one that was asked for
    view = again._view
    sync.run(view.survey())
    for output in again._outputs():
        assert sync.run(view.fetch([output]))


def test_a_session_past_its_deadline_can_be_cleaned_up_with_work_left():
    session = opened(session_timeout=0.001)
    while not sync.run(session._link.expired()):
        pass
    session.extend(1)
    session.compute(dask.delayed(1))
    while not sync.run(session._link.expired()):
        pass
    session.cleanup()
    assert session.status().state == "closed"


def test_a_closed_session_can_be_cleaned_up_with_work_left():
    """As one of which somebody's forced cleanup was interrupted: nobody works on what is left."""
    session = opened()
    run = session.compute(dask.delayed(1))
    sync.run(session._link.append(Close()))
    session.cleanup()
    assert run.status().state == "stopped"


@pytest.mark.parametrize("failing", ["create", "put"])
def test_a_session_that_cannot_be_opened_leaves_nothing(failing, tmp_path):
    (tmp_path / "helper.py").write_text("")
    store = open_store(f"memory://{Entropy().token()}")
    sync.run(probe(store, Entropy()))
    before = all_keys(store)

    def fail(verb, key):
        last = key.startswith(keys.SESSIONS) or "/code/" in key
        return Fault.LOST if verb == failing and last else None

    with pytest.raises(StoreUnavailable):
        Session(Faulty(store, fail), fleet=None, code=[tmp_path / "helper.py"])
    assert all_keys(store) == before


def all_keys(store) -> list[str]:
    async def listed():
        return [meta.key async for page in store.list("") for meta in page]

    return sync.run(listed())


def test_a_forced_cleanup_waits_for_workers_elsewhere_that_seldom_look():
    """An idle worker looks into the session log more seldom than a busy one, and writes heartbeats meanwhile."""
    session = opened(
        idle_poll_min=1.0,
        idle_poll_max=1.0,
        attached_for=0.001,
        heartbeat=0.05,
        lease=30.0,
        session_poll=0.05,
        release_grace=0.05,
    )
    store = session._link.store
    elsewhere = InProcessFleet(session._link.session, store)
    elsewhere.ensure(3)
    session.compute(dask.delayed(1)).wait(timeout=30)
    while session.status().workers.alive < 3:
        pass
    session.cleanup(force=True)
    elsewhere.stop(grace=30)

    assert [key for key in all_keys(store) if session.id in key] == []
