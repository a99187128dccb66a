"""Listing sessions: thousands, with few requests each, and the truth about each."""

from __future__ import annotations

import asyncio

import dask
import msgspec
import pytest
from acting import ReadOnly

from burst_dask import Session, attach, list_sessions, sync
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.errors import ConfigError, UnknownId
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest, decode, encode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import Close, Extend, Open, SessionAction
from burst_dask.store import Store, open_store, requests_of
from burst_dask.worker.process import own_versions


@pytest.fixture
def store() -> Store:
    return open_store(f"memory://{Entropy().token()}")


async def write(store: Store, name: str, *actions: SessionAction, **settings: object) -> None:
    """Write a session down as `Session` does."""
    author = log.Author(WorkerId("c"), SystemClock(), Entropy())
    state = SessionState()
    for action in (Open(), *actions):
        state = await log.append_session(store, SessionId(name), state, author, action)
    manifest = Manifest(
        session=SessionId(name),
        name=f"name-{name}",
        created=author.clock.wall(),
        host="h",
        versions=own_versions(),
        settings=Settings.of(**settings).to_dict(),
    )
    await store.create(keys.manifest(manifest.session), encode(manifest))


def test_2_500_sessions_take_a_few_requests_each(store: Store) -> None:
    async def fill() -> None:
        await asyncio.gather(*(write(store, f"s{number:04d}", Close()) for number in range(2500)))

    sync.run(fill())
    before = sum(requests_of(store).values())
    rows = list_sessions(store, details=0)
    assert len(rows) == 2500 and len({row.id for row in rows}) == 2500
    assert {row.state for row in rows} == {"closed"}
    assert sum(requests_of(store).values()) - before <= 3 * 2500 + 10
    assert [row.last_activity for row in rows] == sorted((row.last_activity for row in rows), reverse=True)
    assert len(rows.to_frame()) == 2500


def test_states(store: Store) -> None:
    sync.run(write(store, "open"))
    sync.run(write(store, "closed", Close()))
    sync.run(write(store, "expired", session_timeout=0.001))
    sync.run(write(store, "extended", Extend(SystemClock().wall() + 3600), session_timeout=0.001))
    for details in (0, 100):
        rows = {row.id: row.state for row in list_sessions(store, details=details)}
        assert rows == {"open": "open", "closed": "closed", "expired": "expired", "extended": "open"}


def test_the_newest_are_looked_into_first(store: Store) -> None:
    for number in range(3):
        session = Session(store, fleet=None, name=str(number))
        for _ in range(number + 1):
            session.compute(dask.delayed(1))
    rows = {row.name: row.runs for row in list_sessions(store, details=5)}
    assert rows == {"2": 3, "1": 2, "0": None}
    assert {row.name: row.runs for row in list_sessions(store, details=None)} == {"2": 3, "1": 2, "0": 1}
    assert "3: 3 pending" in str(list_sessions(store))
    assert "<td>3: 3 pending</td>" in list_sessions(store)._repr_html_()


def test_an_empty_store(store: Store) -> None:
    assert list_sessions(store) == []
    assert list_sessions(ReadOnly(store)) == []


def test_what_an_interrupted_cleanup_left(store: Store) -> None:
    session = Session(store, fleet=None)
    sync.run(store.delete([keys.entry(keys.session_log(session._link.session), 0)]))
    (row,) = list_sessions(store)
    assert row.state == "closed"
    attach(session.id, store=store).cleanup(force=True)
    assert list_sessions(store) == []


async def rewrite(store: Store, session: str, **changes: object) -> None:
    """Change the manifest of a session."""
    key = keys.manifest(SessionId(session))
    data = await store.get(key)
    assert data is not None
    await store.put(key, encode(msgspec.structs.replace(decode(Manifest, key, data), **changes)))


def test_a_session_that_cannot_be_read_hides_no_other(store: Store) -> None:
    good, newer, log_gone = (Session(store, fleet=None, name=name) for name in ("good", "newer", "damaged-log"))
    good.compute(dask.delayed(1))
    sync.run(rewrite(store, newer.id, settings={"setting_of_a_later_version": 1}))
    sync.run(store.put(keys.SESSIONS + "garbage", b"not a manifest"))
    sync.run(store.put(keys.entry(keys.session_log(SessionId(log_gone.id)), 0), b"not an entry"))
    for details in (0, None):
        rows = {row.id: (row.name, row.state) for row in list_sessions(store, details=details)}
        assert rows == {
            good.id: ("good", "open"),
            newer.id: ("newer", "unreadable"),
            log_gone.id: ("damaged-log", "unreadable"),
            "garbage": (None, "unreadable"),
        }
    assert "unreadable" in str(list_sessions(store))
    assert attach("good", store=store).id == good.id
    with pytest.raises(UnknownId, match="did you mean garbage"):
        attach("garbag", store=store)


def test_a_manifest_of_another_session_is_unreadable(store: Store) -> None:
    one, other = (Session(store, fleet=None, name=name) for name in ("one", "other"))
    theirs = sync.run(store.get(keys.manifest(SessionId(other.id))))
    sync.run(store.put(keys.manifest(SessionId(one.id)), theirs))
    rows = {row.id: (row.name, row.state) for row in list_sessions(store)}
    assert rows == {one.id: (None, "unreadable"), other.id: ("other", "open")}


def test_a_damaged_run_leaves_its_session_in_the_list(store: Store) -> None:
    session = Session(store, fleet=None, name="kept")
    run = session.compute(dask.delayed(1))
    sync.run(store.put(keys.plan(run.id), b"not a plan"))
    (row,) = list_sessions(store)
    assert (row.name, row.state, row.tasks) == ("kept", "open", None)
    sync.run(store.put(keys.entry(keys.session_log(SessionId(session.id)), 0), b"not an entry"))
    assert [row.name for row in list_sessions(store)] == ["kept"]  # its newest entry is as it should be


@pytest.mark.parametrize("details", [-1, 2.5, "all", True])
def test_bad_input(store: Store, details: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number of runs"):
        list_sessions(store, details=details)  # type: ignore[arg-type]
