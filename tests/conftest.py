"""Servers, stores and processes shared by all tests; each server is started once, when a test first needs it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# What tests of other folders play with, too: the stage of the agent, the contract of stores.
sys.path.insert(0, str(Path(__file__).parent / "worker"))
sys.path.insert(0, str(Path(__file__).parent / "store"))
sys.path.insert(0, str(Path(__file__).parent / "aws"))
sys.path.insert(0, str(Path(__file__).parent))
import servers
from acting import Gate, Marks, children

from burst_dask import Session

if TYPE_CHECKING:
    from breaking import Case
    from ecs_stand_in import Clock, EcsStandIn

    from burst_dask.fleet.ecs import EcsFleet
    from burst_dask.protocol.keys import RunId

pytest.register_assert_rewrite("contract")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--aws", action="store_true", help="use the AWS account of the environment, which costs money")
    parser.addoption("--aws-limit", type=float, default=1.0, help="what that may cost at most, in USD")


@pytest.fixture(scope="session")
def aws_credentials() -> Iterator[None]:
    """Credentials that the test servers take, and nothing of the developer's own AWS configuration."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in servers.CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield


@pytest.fixture(scope="session")
def moto_server(aws_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a moto server."""
    yield from _serving(servers.moto(tmp_path_factory.mktemp("moto") / "log"))


@pytest.fixture(scope="session")
def ecs_moto(aws_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a moto server of its own, in which the stack stands that fleets on ECS need."""
    from ecs_stack import stand

    with servers.moto(tmp_path_factory.mktemp("ecs") / "log") as endpoint:
        stand(endpoint)
        yield endpoint


@pytest.fixture
def ecs(ecs_moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[EcsStandIn]:
    """ECS, whose tasks are processes of this machine; AWS is there for everybody."""
    from ecs_stand_in import EcsStandIn

    (tmp_path / "tasks").mkdir()
    stand_in = EcsStandIn(ecs_moto, tmp_path / "tasks")
    monkeypatch.setenv("AWS_ENDPOINT_URL", stand_in.endpoint)
    monkeypatch.setenv("AWS_REGION", servers.REGION)
    yield stand_in
    stand_in.close()


@pytest.fixture
def clock() -> Clock:
    """Time that passes when somebody waits."""
    from ecs_stand_in import Clock

    return Clock()


@pytest.fixture
def fleet_of(ecs: EcsStandIn, clock: Clock) -> Callable[..., EcsFleet]:
    """Makes fleets on ECS whose tasks are no processes; takes `session`, and arguments as of `Session`."""
    from ecs_stand_in import Impatient

    from burst_dask.aws.stack import read_stack
    from burst_dask.clock import Entropy
    from burst_dask.fleet.ecs import EcsArguments, EcsFleet, EcsPlan

    ecs.processes, ecs.now = False, clock.wall
    clients = Impatient.of()
    stack = read_stack(clients)
    assert stack is not None
    ecs.calls.clear()

    def make(
        session: str = "sess1", cpu: float = 1, memory: int = 2 << 30, opened: float = 0.0, **arguments: Any
    ) -> EcsFleet:
        plan = EcsPlan.made(EcsArguments(**arguments), cpu, memory, clients, stack)
        return EcsFleet(session, "s3://bucket/p", plan, opened=opened, clients=clients, clock=clock, entropy=Entropy(7))

    return make


@pytest.fixture(scope="session")
def localstack_server(aws_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of LocalStack's S3."""
    home = tmp_path_factory.mktemp("localstack")
    yield from _serving(servers.localstack(home / "log", home))


@pytest.fixture(scope="session")
def rclone_server(aws_credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of ``rclone serve s3``."""
    home = tmp_path_factory.mktemp("rclone")
    (home / "data").mkdir()
    yield from _serving(servers.rclone(home / "log", home / "data"))


def _serving(server: AbstractContextManager[str]) -> Iterator[str]:
    try:
        with server as endpoint:
            yield endpoint
    except servers.Unavailable as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


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
def burst(tmp_path: Path) -> Iterator[Session]:
    """A session with two workers in this process."""
    session = Session(f"memory://{tmp_path.name}", workers=2, progress=False, wait_poll_min=0.005)
    yield session
    session.cleanup(force=True)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Session]:
    """A session without workers."""
    session = Session(f"memory://{tmp_path.name}", fleet=None, progress=False, wait_poll_min=0.005)
    yield session
    session.cleanup(force=True)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of calls are written when they are asked for, and not because time passes."""
    monkeypatch.setattr("burst_dask.api.grouping.QUIET", 3600.0)
    monkeypatch.setattr("burst_dask.api.grouping.MOST_WAIT", 3600.0)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path / "gate")
    yield gate
    gate.open()  # so that no thread is left waiting


@pytest.fixture
def external(tmp_path: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes that the test has started; killed at its end."""
    processes: list[subprocess.Popen[bytes]] = []
    yield processes
    for process in processes:
        for one in [*children(process.pid), process]:
            one.kill()
        process.wait()


@pytest.fixture(scope="session")
def healthy() -> tuple[RunId, dict[str, bytes]]:
    """A run that agents have completed, and all objects of its store."""
    from breaking import play

    return asyncio.run(play())


@pytest.fixture
async def case(healthy: tuple[RunId, dict[str, bytes]]) -> Case:
    """A copy of it, to be broken."""
    from breaking import Case

    return await Case.copy_of(*healthy)


@pytest.fixture
def again(tmp_path: Path) -> Iterator[Callable[..., Session]]:
    """Opens a session as a script does that runs again; the first call makes it. Workers are in this process."""
    opened: list[Session] = []

    def open_session(**settings: Any) -> Session:
        settings = {"name": "nightly", "workers": 2, "wait_poll_min": 0.005, **settings}
        opened.append(Session(f"memory://{tmp_path.name}", resume=True, progress=False, **settings))
        return opened[-1]

    yield open_session
    for session in opened:
        session.cleanup(force=True)
