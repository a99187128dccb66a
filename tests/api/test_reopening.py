"""Which session a name leads to when a script runs again."""

from __future__ import annotations

import dask
import pytest
from test_resuming import RAN, double, ran, said

from burst_dask import Session, attach, list_sessions, sync
from burst_dask.api import reopening
from burst_dask.errors import ConfigError
from burst_dask.protocol.records import Versions


def part(key="part"):
    return dask.delayed(double)(3, dask_key_name=key)


def token():
    return dask.delayed(double, pure=True)(4)


@pytest.mark.parametrize("resume", [1, "yes", None])
def test_resume_is_a_choice(tmp_path, resume):
    with pytest.raises(ConfigError, match="must be True or False"):
        Session(tmp_path / "store", name="nightly", resume=resume)
    assert not (tmp_path / "store").exists()


def test_without_a_name_nothing_can_be_resumed(tmp_path):
    with pytest.raises(ConfigError, match="resume=True needs name='…'"):
        Session(tmp_path / "store", resume=True)


def test_the_newest_of_a_name_goes_on(again, tmp_path):
    store = f"memory://{tmp_path.name}"
    names = ("nightly", "weekly", "nightly", "weekly")
    others = [Session(store, name=name, workers=2, wait_poll_min=0.005) for name in names]
    assert again().id == others[2].id
    for other in others:
        other.cleanup(force=True)
    assert again().id not in [other.id for other in others]  # there is none left


def test_settings_and_workers_are_those_it_was_opened_with(again):
    session = again(workers=2, lease=60)
    session.scale(3)
    opened = []
    (message,) = said(lambda: opened.append(again(workers=2, lease=50, heartbeat=10)))
    assert "lease=60.0, not 50.0" in message and "workers=3, not 2" in message and "heartbeat" not in message
    assert opened[0]._link.workers == 3 and opened[0].status().settings["lease"] == 60
    assert said(lambda: again(workers=3, lease=60)) == []


def test_workers_that_were_stopped_are_started_again(again):
    session = again()
    session.scale(0)
    assert again(workers=2).compute(part()).result(timeout=60) == (6,)


def test_workers_of_ones_own(again):
    again(workers=None, fleet=None)
    assert again(workers=None, fleet=None)._link.workers is None
    assert again(workers=1).compute(part()).result(timeout=60) == (6,)  # now they are started here


def test_an_expired_session_is_extended(again, monkeypatch):
    session = again(session_timeout=600, workers=1)
    session.compute(part()).wait()
    ahead(monkeypatch, session, 700)
    found = sync.run(reopened(session))
    assert found.link is not None and found.link.session == session.id and found.before is None
    assert sync.run(found.link.condition()) == "open"


def test_past_its_absolute_timeout_another_one_uses_its_results(again, monkeypatch):
    session = again(session_timeout=600, absolute_timeout=1000, workers=1)
    ahead(monkeypatch, session, 1100)
    found = sync.run(reopened(session))
    assert found.link is None and found.before.session == session.id


def test_near_its_absolute_timeout_it_is_extended_up_to_that(again, monkeypatch):
    session = again(session_timeout=600, absolute_timeout=1000, workers=1)
    ahead(monkeypatch, session, 700)
    found = sync.run(reopened(session))
    assert sync.run(found.link.deadline()) <= session._link.state.opened_wrote + 1000 + 1


def ahead(monkeypatch, session, seconds):
    """Let the clocks of the store and of this machine go on."""
    clock, store = type(session._link.clock), type(session._link.store)
    wall, time = clock.wall, store.time

    async def later(self, key):
        return await time(self, key) + seconds

    monkeypatch.setattr(clock, "wall", lambda self: wall(self) + seconds)
    monkeypatch.setattr(store, "time", later)


async def reopened(session):
    link = session._link
    return await reopening.reopen(link.store, "nightly", link.author, link.manifest.environment)


def test_a_closed_session_is_replaced_by_one_that_uses_its_results(again):
    RAN.clear()
    first = again()
    assert first.compute(token(), part()).result() == (8, 6)
    first.cleanup()  # what was asked for stays
    ran()
    second = again()
    assert second.id != first.id
    assert second.compute(token(), part()).result() == (8, 6)
    assert ran() == [3]  # what was known of `part` beside its key went with the graph
    assert second.submit(double, 4, pure=True).result() == 8
    third = again()
    assert third.id == second.id and third.compute(token(), part()).result() == (8, 6) and ran() == [4]
    assert len(list_sessions(first.store)) == 2


def test_other_versions_code_and_packages_begin_anew(again, monkeypatch, tmp_path):
    first = again()
    first.compute(token()).wait()
    (tmp_path / "mine.py").write_text("x = 1")
    opened = []

    def open_with(**settings):
        return lambda: opened.append(again(**settings))

    (message,) = said(open_with(workers=1, code=[tmp_path / "mine.py"]))
    assert f"session {first.id} of the name 'nightly' has other code" in message and "nothing of it is used" in message
    assert opened[0].id != first.id
    assert said(open_with(workers=1, code=[tmp_path / "mine.py"])) == [] and opened[1].id == opened[0].id
    monkeypatch.setattr(reopening, "own_versions", lambda: Versions("3.7", "2020.1", "0"))
    (message,) = said(open_with(workers=1, code=[tmp_path / "mine.py"]))
    assert "and here are 3.7 and 2020.1" in message


def test_a_session_that_is_attached_to_is_as_ever(again):
    session = again()
    assert attach("nightly", store=session.store)._link.earlier is None


def test_a_session_that_adapts_begins_small_again(again):
    session = again()
    session.adapt(1, 5)
    session._link.fleet.stop()
    assert again(workers=5)._link.fleet.alive() == 1, "and not as many as it may have"
