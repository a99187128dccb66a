"""Workers beside the workers of a real `distributed` cluster on this machine."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from acting import QUICK, until
from distributed import Client, LocalCluster

from burst_dask import Session, attach
from burst_dask.errors import ConfigError, FleetError
from burst_dask.fleet import cluster as cluster_fleet
from burst_dask.fleet.cluster import ClusterFleet, address_of_default, spread
from burst_dask.store.signing import key_in


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    place = str(tmp_path_factory.mktemp("cluster"))
    options = {"n_workers": 2, "threads_per_worker": 1, "memory_limit": "1GiB", "local_directory": place}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # tasks are functions of this module
        cluster = LocalCluster(dashboard_address=None, **options)
    with cluster:
        yield cluster


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    session = Session(str(tmp_path / "store"), fleet=None, progress=False, **QUICK)
    yield session
    session.cleanup(force=True)


@pytest.fixture
def fleet(cluster: LocalCluster, session: Session) -> Iterator[ClusterFleet]:
    fleet = ClusterFleet(session.id, session.store, cluster.scheduler_address)
    yield fleet
    fleet.remove()
    assert fleet.alive() == 0


def double(number: int) -> int:
    return 2 * number


def test_a_cluster_lends_its_machines(cluster: LocalCluster, session: Session, fleet: ClusterFleet) -> None:
    run = session.map(double, range(20))
    session.flush()
    assert fleet.ensure(3) == 3 and fleet.ensure(3) == 0
    assert sorted(fleet._counts().values()) == [1, 2], "spread over the cluster"
    assert [future.result(timeout=60) for future in run] == list(range(0, 40, 2))
    until(lambda: session.status().workers.alive == 3)
    again = ClusterFleet(session.id, session.store, cluster.scheduler_address)
    assert "3 worker processes beside the workers of the cluster" in again.describe()
    again.stop()
    assert fleet.alive() == 0


def test_workers_end_with_the_worker_of_the_cluster_beside_which_they_run(
    cluster: LocalCluster, session: Session, fleet: ClusterFleet
) -> None:
    fleet.ensure(2)
    pids = fleet._client.run(os.getpid)
    pid = pids[min(pids)]
    beside = [one for one in psutil.Process(pid).children(recursive=True) if session.id in " ".join(one.cmdline())]
    assert beside
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in beside))
    until(lambda: len(fleet._client.scheduler_info()["workers"]) == 2)  # its nanny has started another
    assert fleet.ensure(2) == 1


def test_without_a_cluster_that_is_said(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_fleet, "CONNECT", 0.5)
    with pytest.raises(ConfigError, match=r"make one with distributed.Client\(address\)"):
        address_of_default()
    nowhere = ClusterFleet(session.id, session.store, "tcp://127.0.0.1:1")
    with pytest.raises(FleetError, match=r"the cluster at tcp://127\.0\.0\.1:1 does not answer"):
        nowhere.ensure(1)


def test_the_default_client_names_the_cluster(cluster: LocalCluster) -> None:
    with Client(cluster):
        assert address_of_default() == cluster.scheduler_address


def test_a_session_inside_a_cluster(cluster: LocalCluster, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none: make one"):
        Session(str(tmp_path / "store"), fleet="distributed")
    with Client(cluster):
        burst = Session(str(tmp_path / "store"), fleet="distributed", progress=False, **QUICK)
    try:
        until(lambda: burst.status().workers.alive == 2)  # as many as the cluster has, unless it is said
        assert burst.submit(double, 21).result(timeout=60) == 42
        again = attach(burst.id, store=burst.store)  # without a client of the cluster
        again.scale(3)
        until(lambda: burst.status().workers.alive == 3)
        again.adapt(minimum=1, maximum=4)
        assert [future.result(timeout=60) for future in again.map(double, range(50))] == list(range(0, 100, 2))
    finally:
        burst.cleanup(force=True)
    assert ClusterFleet(burst.id, burst.store, cluster.scheduler_address).alive() == 0


def test_the_key_of_a_signed_session_goes_by_the_clusters_own_messages(cluster: LocalCluster, tmp_path: Path) -> None:
    with Client(cluster):
        burst = Session(str(tmp_path / "store"), fleet="distributed", progress=False, signed=True, **QUICK)
    try:
        assert burst.submit(double, 21).result(timeout=60) == 42
        key = key_in(burst._link.store, burst.id)
        assert key is not None
        until(lambda: burst.status().workers.alive == 2)
        told, places = [repr(burst._link.fleet._arguments)], []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # others come and go
                words = process.cmdline()
                if burst.id in " ".join(words):
                    told.append(str(process.environ()) + str(words))
                    places += [place for option, place in itertools.pairwise(words) if option == "--key"]
        assert len(told) >= 1 + 4, "supervisors and workers"
        assert not any(key.secret.hex() in text or str(key.secret) in text for text in told)
        beside = places[0]
        assert Path(beside).stat().st_mode & 0o777 == 0o600
    finally:
        burst.cleanup(force=True)
    assert not Path(beside).exists()


def test_spread_fills_up_where_the_fewest_are() -> None:
    assert spread(0, {"a": 1}) == {}
    assert spread(5, {"a": 0, "b": 0}) == {"a": 3, "b": 2}
