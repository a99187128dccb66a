"""Starting workers in all sessions of a store, as a schedule does."""

from __future__ import annotations

import json
from typing import Any

import dask
import msgspec
import pytest
from click.testing import CliRunner

from burst_dask import Session, healing, sync
from burst_dask.cli import main
from burst_dask.errors import CloudLimit
from burst_dask.healing import Healed, heal_all
from burst_dask.protocol import keys
from burst_dask.protocol.records import FleetChoice, encode
from burst_dask.protocol.session_records import Close, Scale
from burst_dask.store import open_store


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


def test_at_the_command_line(place) -> None:
    session = left(place, "work", 3)
    done = CliRunner().invoke(main, ["heal", "--store", place])
    assert (done.exit_code, done.output) == (0, f"{session.id}: 3 workers started\n")
    assert CliRunner().invoke(main, ["heal", "--store", place]).output == "nobody is missed\n"
    left(place, "refused", 1)
    done = CliRunner().invoke(main, ["heal", "--store", place, "--json"])
    assert done.exit_code == 1 and "quota" in json.loads(done.output)[0]["why"]
