"""Which fleet a session has: what is chosen when it is opened, and what clients do when it cannot be asked."""

import threading
import warnings

import dask
import msgspec
import pytest
from servers import REGION

from burst_dask import Session, attach, sync
from burst_dask.api.arguments import Given
from burst_dask.api.fleets import ECS_WORKERS, Chosen, choose, fleet_of
from burst_dask.config import Settings
from burst_dask.errors import (
    AccessDenied,
    CloudError,
    CloudLimit,
    CloudUnavailable,
    ConfigError,
    CredentialsExpired,
    CredentialsMissing,
    FleetError,
)
from burst_dask.fleet.ecs import EcsArguments, EcsFleet, EcsPlan
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.fleet.local import LocalFleet
from burst_dask.protocol import keys
from burst_dask.protocol.records import FleetChoice, Manifest, decode, encode
from burst_dask.protocol.session_records import Scale
from burst_dask.store.address import Address
from burst_dask.worker.memory_watch import processors

ON_S3 = f"s3://burst-dask-tests/p?region={REGION}"


def chosen(fleet, url=ON_S3, workers=None, cpu=None, cloud=None, **settings):
    return choose(fleet, Address.parse(url), workers, cpu, Given({}, Settings.of(**settings), cloud))


def test_local_asks_nobody(monkeypatch):
    monkeypatch.setattr("burst_dask.api.fleets.Clients", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for url in ("/data", "memory://x", "gs://bucket/p", "s3://bucket/p?endpoint_url=http://minio:9000"):
            assert chosen("auto", url) == Chosen(FleetChoice("local"), processors(), Settings())
        assert chosen("local").workers == processors()
        assert chosen(None).workers is None
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://minio:9000")
        assert chosen("auto").fleet.kind == "local"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fleet": "ec2"}, "'auto', 'local', 'ecs', 'distributed' or None"),
        ({"fleet": "local", "cloud": EcsArguments(spot=True)}, r"spot with fleet='local': these are for fleet='ecs'"),
        ({"fleet": None, "cloud": EcsArguments(arch="arm64")}, r"arch with fleet=None"),
        ({"fleet": "local", "cpu": 0.5}, "parts of a processor are had on Fargate"),
        ({"fleet": "ecs", "url": "/data"}, "its workers do not see this machine"),
        ({"fleet": "ecs", "workers": 0}, "needs at least 1"),
        ({"fleet": "ecs", "cloud": EcsArguments(spot="perhaps")}, "with-fallback"),
    ],
)
def test_bad_arguments_are_told_before_anybody_is_asked(monkeypatch, arguments, message):
    monkeypatch.setattr("burst_dask.api.fleets.Clients", None)
    with pytest.raises(ConfigError, match=message):
        chosen(**arguments)


def test_ecs_is_checked_and_written_down(ecs):
    found = chosen("ecs", cpu=2, memory_limit=6_000_000_000)
    plan = msgspec.convert(found.fleet.options, EcsPlan)
    assert (found.fleet.kind, found.workers, plan.size) == ("ecs", ECS_WORKERS, (2048, 6144))
    assert (found.settings.threads, found.settings.memory_limit) == (2, plan.worker_memory)
    assert chosen("ecs", threads=4).settings.threads == 4
    assert chosen("auto", "s3://b/p?endpoint_url=http://minio", cloud=EcsArguments(spot=True)).fleet.kind == "ecs"


def test_the_price_of_fargate_spot_is_what_it_costs_at_most(ecs):
    def note(**settings):
        return chosen("ecs", **settings).fleet.options["price_note"]

    assert "Fargate Spot costs up to 70 % less" in note(cloud=EcsArguments(spot=True))
    assert note(cloud=EcsArguments(spot="with-fallback")) and not note()
    assert not note(cloud=EcsArguments(spot=True), worker_price=0.02), "who says a price knows what it is of"


def test_no_stack(ecs, monkeypatch):
    monkeypatch.setenv("BURST_STACK", "another")
    with pytest.raises(ConfigError, match=r"there is no stack another in us-east-1; `burst setup aws` makes one"):
        chosen("ecs")
    with pytest.warns(UserWarning, match=r"workers run on this machine.*there is no stack another"):
        assert chosen("auto").fleet.kind == "local"


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"status": "UPDATE_IN_PROGRESS"}, "is UPDATE_IN_PROGRESS"), ({"image": ""}, "burst image push")],
)
def test_a_stack_that_is_not_ready(ecs, monkeypatch, changes, message):
    from burst_dask.aws.stack import read_stack

    def read(clients, name):
        return msgspec.structs.replace(read_stack(clients, name), **changes)

    monkeypatch.setattr("burst_dask.api.fleets.read_stack", read)
    with pytest.raises(ConfigError, match=message):
        chosen("ecs")
    with pytest.warns(UserWarning, match=rf"workers run on this machine.*{message}"):
        assert chosen("auto").fleet.kind == "local"


def test_aws_that_does_not_answer(monkeypatch):
    def refuse(clients, name):
        raise AccessDenied("you lack the right cloudformation:DescribeStacks")

    monkeypatch.setattr("burst_dask.api.fleets.read_stack", refuse)
    with pytest.raises(AccessDenied):
        chosen("ecs")
    with pytest.warns(UserWarning, match="workers run on this machine.*you lack the right"):
        assert chosen("auto").fleet.kind == "local"


# ---------------------------------------------------------------------------- of a session that is there


def test_every_client_has_the_fleet_that_the_manifest_names(tmp_path, ecs):
    assert isinstance(fleet_of(Session("memory://fleets", fleet=None)._link), InProcessFleet)
    session = Session(tmp_path / "store", fleet=None)
    assert isinstance(fleet_of(session._link), LocalFleet)
    sync.run(session._link.append(Scale(2)))

    def rewrite(**changes):
        store, key = session._link.store, keys.manifest(session.id)
        manifest = decode(Manifest, key, sync.run(store.get(key)))
        sync.run(store.put(key, encode(msgspec.structs.replace(manifest, **changes))))

    rewrite(host="another machine")
    assert attach(session.id, store=session.store)._link.fleet is None, "processes of another machine"
    rewrite(fleet=chosen("ecs").fleet)
    calls = len(ecs.calls)
    assert isinstance(attach(session.id, store=session.store)._link.fleet, EcsFleet)
    assert len(ecs.calls) == calls, "who only reads results asks nothing of ECS"
    rewrite(fleet=FleetChoice("ecs", {"size": 7}))
    with pytest.raises(ConfigError, match=r"written by another version of burst_dask.*update this one"):
        attach(session.id, store=session.store)


class Refusing:
    """A fleet of a cloud that does nothing but refuse."""

    def __init__(self, error):
        self.error, self.asked = error, 0

    def ensure(self, workers):
        self.asked += 1
        raise self.error

    def notes(self):
        raise self.error

    def remove(self):
        pass


@pytest.fixture
def refused(alone, monkeypatch):
    """A session without workers, whose fleet refuses; makes a run."""
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.0)
    sync.run(alone._link.append(Scale(1)))

    def refused(error):
        alone._link.fleet = Refusing(error)
        with pytest.warns(UserWarning, match=str(error)):
            run = alone.compute(dask.delayed(1))
        return alone._link.guard, run

    return refused


@pytest.mark.parametrize("kind", [CloudUnavailable, CloudLimit, AccessDenied, CredentialsMissing, ConfigError])
def test_what_may_pass_or_be_done_by_others_is_a_warning(refused, recwarn, kind):
    guard, run = refused(kind("not now"))
    for _ in range(3):
        sync.run(guard.check())
    told = [str(one.message) for one in recwarn if "are not started now: not now" in str(one.message)]
    assert len(told) == 1, "who waits looks often, and is told once"
    assert run.status().state == "pending"


@pytest.mark.parametrize("kind", [CredentialsExpired, CloudError])
def test_what_does_not_pass_ends_the_wait_when_nobody_works(refused, kind):
    guard, _ = refused(kind("not like this"))
    with pytest.raises(kind, match="not like this"):
        sync.run(guard.check())


def test_a_refusal_while_others_work_is_a_warning(refused, alone):
    guard, run = refused(CloudError("not like this"))
    worker = InProcessFleet(alone.id, alone._link.store)
    worker.start(1)
    try:
        while not alone.status().workers.alive:
            pass
        with pytest.warns(UserWarning, match="are not started now: not like this"):
            assert run.result(timeout=30) == (1,)
            sync.run(guard.check())
    finally:
        worker.stop()


class Dying(Refusing):
    """A fleet whose workers end at once; it notes which threads call it."""

    def __init__(self, error):
        super().__init__(error)
        self.threads = set()

    def ensure(self, workers):
        self.threads.add(threading.current_thread().name)
        return workers

    replace_lost = ensure

    def describe(self):
        self.ensure(0)
        return "2 stopped: its image is not there"

    def notes(self):
        self.ensure(0)
        return []


def test_nothing_is_asked_on_the_event_loop(alone, monkeypatch):
    """A cloud takes its time, and everything else of this process would wait."""
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 0.0)
    sync.run(alone._link.append(Scale(1)))
    alone._link.fleet = fleet = Dying(None)
    run = alone.compute(dask.delayed(1))
    alone.status()
    with pytest.raises(FleetError, match=r"keep ending before they finish a task.*2 stopped: its image is not there"):
        run.wait(timeout=30)
    assert fleet.threads and sync_thread() not in fleet.threads


def sync_thread():
    async def name():
        return threading.current_thread().name

    return sync.run(name())


def test_the_status_says_what_cannot_be_known(refused, alone):
    refused(AccessDenied("you lack the right ecs:ListTasks"))
    assert alone.status().notes == ("what became of workers is not known: you lack the right ecs:ListTasks",)
