"""Whole sessions with real worker processes, on every kind of store."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import servers
from acting import Marks, children


@pytest.fixture(scope="session", autouse=True)
def data_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fleets keep their records and logs away from those of the user."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture(scope="module", params=["directory", "moto", "localstack"])
def any_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a new store of each kind."""
    if request.param == "directory":
        return str(tmp_path_factory.mktemp("store"))
    import boto3

    endpoint = request.getfixturevalue(f"{request.param}_server")
    bucket = f"acceptance-{os.getpid()}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name=servers.REGION)
    client.create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix?endpoint_url={endpoint}&region={servers.REGION}"


@pytest.fixture
def marks(tmp_path: Path) -> Iterator[Marks]:
    directory = tmp_path / "marks"
    directory.mkdir()
    yield Marks(directory)


@pytest.fixture
def external(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the test has started; killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        for one in [*children(process.pid), process]:
            one.kill()
        process.wait()
