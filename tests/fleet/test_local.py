"""The local fleet with real processes; agents are stand-ins (`tests/worker/stand_in_agent.py`)."""

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from burst_dask.fleet import local, records
from burst_dask.fleet.base import Fleet
from burst_dask.fleet.local import LocalFleet, fleets_directory

STAND_IN = str(Path(__file__).parents[1] / "worker")


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(STAND_IN)
    monkeypatch.setattr(LocalFleet, "agent", "stand_in_agent")
    (tmp_path / "up").mkdir()
    monkeypatch.setenv("STAND_IN_DIRECTORY", str(tmp_path / "up"))
    yield tmp_path / "fleet"
    left = [process for process in everyone() if str(tmp_path) in " ".join(process.cmdline())]
    for process in left:
        process.kill()
    assert left == []


def everyone():
    """Processes that run and whose command line can be read."""
    for process in psutil.process_iter():
        try:
            if process.cmdline():
                yield process
        except psutil.Error:
            continue


def fleet_of(directory, session="sess1"):
    return LocalFleet(session, "file:///nowhere", directory=directory)


def wait_alive(fleet, count):
    """Wait until `count` agents run and have installed their signal handlers."""
    up = Path(os.environ["STAND_IN_DIRECTORY"])
    while len(found := fleet.processes()) != count or not all((up / f"{one.worker}.up").exists() for one in found):
        time.sleep(0.01)
    return found


def gone(pid):
    """Tell whether the process has ended, be it reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_gone(*pids):
    while not all(map(gone, pids)):
        time.sleep(0.01)


def test_start_ensure_stop_remove(directory):
    fleet = fleet_of(directory)
    assert isinstance(fleet, Fleet)
    assert fleet.alive() == 0 and fleet.processes() == [] and fleet.logs() == []
    fleet.stop()
    assert fleet.ensure(2) == 2
    assert fleet.ensure(2) == 0, "those that come up must count"
    wait_alive(fleet, 2)
    assert fleet.ensure(3) == 1
    wait_alive(fleet, 3)
    assert fleet.describe().startswith("3 worker processes")
    supervisors = [record.pid for record in records.read_all(directory).values()]
    fleet.stop()
    assert fleet.alive() == 0 and not any(records.find(pid, str(directory)) for pid in supervisors)
    assert len(fleet.logs()) == 2 and "stopping 2 workers" in "".join(log.read_text() for log in fleet.logs())
    assert fleet.describe().endswith(" ended")
    fleet.stop()
    fleet.remove()
    assert not directory.exists()
    fleet.remove()


def test_workers_outlive_the_client_and_another_client_stops_them(directory):
    client = (
        f"import sys; sys.path.insert(0, {STAND_IN!r});"
        "from burst_dask.fleet.local import LocalFleet; from pathlib import Path;"
        "LocalFleet.agent = 'stand_in_agent';"
        f"LocalFleet('sess1', 'file:///nowhere', directory=Path({str(directory)!r})).start(2)"
    )
    subprocess.run([sys.executable, "-c", client], check=True)
    fleet = fleet_of(directory)
    wait_alive(fleet, 2)
    fleet.stop()
    assert fleet.alive() == 0


def test_killed_agent_is_replaced_and_stays_on_record(directory):
    fleet = fleet_of(directory)
    fleet.start(1)
    ((worker, pid),) = wait_alive(fleet, 1)
    os.kill(pid, signal.SIGKILL)
    while not (found := fleet.processes()) or found[0].worker == worker:
        time.sleep(0.01)
    assert fleet.ensure(1) == 0
    wait_alive(fleet, 1)
    fleet.stop()


def test_killed_supervisor_leaves_nothing_and_is_not_counted(directory):
    fleet = fleet_of(directory)
    fleet.start(2)
    agents = [one.pid for one in wait_alive(fleet, 2)]
    ((path, record),) = records.read_all(directory).items()
    os.kill(record.pid, signal.SIGKILL)
    wait_gone(*agents)
    assert fleet.alive() == 0
    assert fleet.ensure(1) == 1 and not path.exists()
    wait_alive(fleet, 1)
    fleet.stop()


def test_agent_that_outlives_its_supervisor_is_found_and_killed(directory, monkeypatch):
    monkeypatch.setenv("STAND_IN", "deaf")
    fleet = fleet_of(directory)
    fleet.start(1)
    ((_, pid),) = wait_alive(fleet, 1)
    (record,) = records.read_all(directory).values()
    os.kill(record.pid, signal.SIGKILL)
    fleet.stop(grace=0.1)
    assert gone(pid)


def test_recycled_pid_is_left_alone(directory):
    """The record of a supervisor that is dead names a pid that somebody else has now."""
    directory.mkdir()
    records.write(directory / "old.json", records.SupervisorRecord(3, os.getpid(), {"worker1": os.getpid()}))
    fleet = fleet_of(directory)
    assert fleet.alive() == 0
    fleet.stop()
    assert list(directory.glob("*.json")) == []


def test_a_supervisor_has_time_to_tell_how_agents_ended_that_had_to_be_killed(directory, tmp_path, monkeypatch):
    """Killed after the grace, it left no record: others waited for the lease, and nobody knew what had happened."""
    monkeypatch.setenv("STAND_IN", "deaf")
    monkeypatch.setattr(local, "Options", functools.partial(local.Options, grace=0.1))
    fleet = LocalFleet("sess1", f"slow+file://{tmp_path}/store?put=2", directory=directory)
    fleet.start(1)
    ((worker, _),) = wait_alive(fleet, 1)
    fleet.stop(grace=0.1)
    (record,) = (tmp_path / "store").rglob("ended")
    assert record.parent.name == worker


def test_other_sessions_are_left_alone(directory, tmp_path):
    ours, theirs = fleet_of(directory), fleet_of(tmp_path / "theirs", "sess2")
    ours.start(1)
    theirs.start(1)
    wait_alive(ours, 1)
    wait_alive(theirs, 1)
    ours.stop()
    assert (ours.alive(), theirs.alive()) == (0, 1)
    theirs.stop()


def test_supervisor_without_a_record_ends_before_it_starts_agents(directory, tmp_path):
    """The client died between writing the record and the start, and the fleet was stopped meanwhile."""
    directory.mkdir()
    records.write(directory / "begun.json", records.SupervisorRecord(2))
    fleet_of(directory).stop()
    options = msgspec.json.encode({"session": "sess1", "store": "file:///nowhere", "agent": "stand_in_agent"}).decode()
    command = [sys.executable, "-m", "burst_dask.fleet.launch", str(directory / "begun.json"), options]
    assert subprocess.run(command, check=False, timeout=30).returncode == 0
    assert list((tmp_path / "up").iterdir()) == []


def test_deleted_directory_stops_the_fleet(directory):
    fleet = fleet_of(directory)
    fleet.start(1)
    ((_, pid),) = wait_alive(fleet, 1)
    (record,) = records.read_all(directory).values()
    for path in directory.glob("*.json"):
        path.unlink()
    os.kill(pid, signal.SIGKILL)
    wait_gone(record.pid)
    assert fleet.alive() == 0


def test_workers_import_what_the_client_can_import(directory, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "own modules"))
    environment = fleet_of(directory)._environ()
    assert str(tmp_path / "own modules") in environment["PYTHONPATH"].split(os.pathsep)


def test_default_directory_is_user_data():
    assert fleet_of(None).directory == fleets_directory() / "sess1"
