"""Starting workers in all sessions of a store, as a schedule does."""

from __future__ import annotations

import json
from typing import Any

import dask
import msgspec
import pytest
from click.testing import CliRunner

from burst_dask import Session, attach, sync
from burst_dask.api import healing
from burst_dask.api.healing import Healed, heal_all
from burst_dask.cli import main
from burst_dask.errors import CloudLimit
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.records import FleetChoice, encode
from burst_dask.protocol.session_records import Close, Extend, Scale
from burst_dask.store import open_store, requests_of
from burst_dask.store.base import listed


class Cloud:
    """A fleet elsewhere, which notes what it starts."""

    begun: dict[str, int]
    boot = 60.0

    def __init__(self, link: Any) -> None:
        self.link = link

    async def counted(self) -> dict[int, int]:
        return {}

    async def shrink(self, workers: int) -> None:
        raise AssertionError

    async def resting(self) -> int:
        return 0

    async def begin(self, number: int, workers: int, still: Any) -> None:
        if self.link.manifest.name == "refused":
            raise CloudLimit("the quota of vCPUs is used up")
        self.begun[self.link.session] = workers

    def notes(self) -> list[str]:
        return []


@pytest.fixture
def place(tmp_path, monkeypatch):
    Cloud.begun = {}
    monkeypatch.setattr(healing, "fleet_of", Cloud)
    return str(tmp_path / "store")


def left(place: str, name: str, tasks: int, kind: str = "ecs") -> Session:
    """Leave a session with so many tasks to be done by five workers, of which none is there."""
    session = Session(place, fleet=None, name=name, progress=False)
    if tasks:
        session.compute(*[dask.delayed(abs)(-number) for number in range(tasks)])
    link = session._link
    sync.run(link.append(Scale(5)))
    manifest = msgspec.structs.replace(link.manifest, fleet=FleetChoice(kind))
    sync.run(link.store.put(keys.manifest(session.id), encode(manifest)))
    return session


def test_workers_are_started_where_work_waits(place) -> None:
    many, few = left(place, "many", 50), left(place, "few", 2)
    left(place, "done", 0)
    left(place, "local", 5, kind="local")
    sync.run(left(place, "closed", 5)._link.append(Close()))
    refused = left(place, "refused", 5)
    found = {one.session: one for one in heal_all(open_store(place))}
    assert Cloud.begun == {many.id: 5, few.id: 2}
    assert found == {
        many.id: Healed(many.id, 5),
        few.id: Healed(few.id, 2),
        refused.id: Healed(refused.id, 0, "the quota of vCPUs is used up"),
    }
    assert [one.session for one in heal_all(open_store(place))] == [], "they are on their way"


def test_what_is_over_is_read_once(place) -> None:
    """A schedule costs as much on a store with thousands of ended sessions as on an empty one."""
    for number in range(12):
        sync.run(left(place, f"closed {number}", 1)._link.append(Close()))
    left(place, "local", 1, kind="local")
    store = open_store(place)
    heal_all(store)
    first = sum(requests_of(store).values())
    assert first > 3 * 13
    store = open_store(place)
    heal_all(store)
    assert sum(requests_of(store).values()) == 2, "a listing of the sessions, and one of those that are over"


def expire(session: Session) -> None:
    """Let a session's time pass."""
    manifest = msgspec.structs.replace(
        session._link.manifest, fleet=FleetChoice("ecs"), settings={"absolute_timeout": 1e9, "session_timeout": 1e-3}
    )
    sync.run(session._link.store.put(keys.manifest(session.id), encode(manifest)))


def test_a_session_that_goes_on_is_looked_at_again(place, monkeypatch) -> None:
    session = left(place, "expired", 3)
    expire(session)
    assert heal_all(open_store(place)) == [] and _over(place) == [], "a client whose clock is behind may be there"
    monkeypatch.setattr(healing, "SURELY", 0.0)
    assert heal_all(open_store(place)) == [] and Cloud.begun == {}
    assert _over(place) == [session.id]
    attach(session.id, store=place).extend(3600)
    assert _over(place) == []
    assert heal_all(open_store(place)) == [Healed(session.id, 3)]


def test_one_that_is_extended_while_it_is_marked_is_not_passed_by(place, monkeypatch) -> None:
    monkeypatch.setattr(healing, "SURELY", 0.0)
    session = left(place, "expired", 3)
    expire(session)
    mark = healing._mark

    async def later(link):
        """Somebody extends it after it was seen to have expired, and before the mark is there."""
        await log.append_session(link.store, link.session, link.state, session._link.author, Extend(4e9))
        await link.store.delete([keys.over(link.session)])
        await mark(link)

    monkeypatch.setattr(healing, "_mark", later)
    assert heal_all(open_store(place)) == []
    assert _over(place) == []
    assert heal_all(open_store(place)) == [Healed(session.id, 3)]


def test_a_cleanup_leaves_no_mark(place) -> None:
    session = left(place, "expired", 1, kind="local")
    heal_all(open_store(place))
    assert _over(place) == [session.id]
    session.cleanup(force=True)
    assert _over(place) == []


def _over(place: str) -> list[str]:
    async def look() -> list[str]:
        return [meta.key.removeprefix(keys.OVER) async for meta in listed(open_store(place), keys.OVER)]

    return sync.run(look())


def test_at_the_command_line(place) -> None:
    session = left(place, "work", 3)
    done = CliRunner().invoke(main, ["heal", "--store", place])
    assert (done.exit_code, done.output) == (0, f"{session.id}: 3 workers started\n")
    assert CliRunner().invoke(main, ["heal", "--store", place]).output == "nobody is missed\n"
    left(place, "refused", 1)
    done = CliRunner().invoke(main, ["heal", "--store", place, "--json"])
    assert done.exit_code == 1 and "quota" in json.loads(done.output)[0]["why"]
