"""Sessions on ECS whose workers have a role of their own, and are held to it by a stand-in (`tests/aws`)."""

from __future__ import annotations

import dask
import pytest
from acting import QUICK
from servers import REGION
from test_survives import chains

from burst_dask import Session, attach, sync
from burst_dask.errors import ConfigError, FleetError, StoreAccessDenied
from burst_dask.store import open_store


@pytest.fixture
def isolated(ecs, tmp_path, monkeypatch):
    """Makes sessions whose workers have a role of their own. Their S3 is behind the stand-in, which knows who asks."""
    monkeypatch.setattr("burst_dask.fleet.ecs.fleet._STOP_POLL", 0.1)
    made = []

    def make(**arguments):
        store = f"s3://burst-dask-tests/burst/{tmp_path.name}?region={REGION}"
        defaults = {"fleet": "ecs", "workers": 1, "cpu": 0.25, "memory": "2GiB", "progress": False, "isolated": True}
        made.append(Session(store, **{**defaults, **QUICK, **arguments}))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)
    assert roles_of_sessions(ecs) == [] and ecs.running == []


def roles_of_sessions(ecs):
    return [one["Arn"] for one in ecs.client("iam").list_roles(PathPrefix="/burst-dask/")["Roles"]]


def try_to(verb, store, key):
    """What a task may do that wants to know what is not its own."""

    async def go():
        opened = open_store(store)
        await (opened.put(key, b"x") if verb == "write" else opened.get(key))

    try:
        sync.run(go())
    except StoreAccessDenied:
        return "denied"
    return "done"


def test_workers_of_a_session_can_neither_read_nor_write_another_one(isolated, ecs):
    ours, theirs = isolated(), isolated()
    assert dask.delayed(sum)([1, 2]).compute(scheduler=ours) == 3 == dask.delayed(sum)([1, 2]).compute(scheduler=theirs)
    assert sorted(roles_of_sessions(ecs)) == sorted(task.role for task in ecs.tasks), "each has its own"
    own, other = f"s/{ours.id}/clock", f"s/{theirs.id}/log/00000000"
    tried = [("write", own), ("read", own), ("read", other), ("write", other), ("write", f"sessions/{ours.id}")]
    found = [dask.delayed(try_to)(verb, ours.store, key) for verb, key in tried]
    assert dask.compute(found, scheduler=ours)[0] == ["done", "done", "denied", "denied", "denied"]


def test_the_key_of_an_isolated_session_is_for_its_own_role_only(isolated, ecs):
    ecs.image["AWS_ENDPOINT_URL"] = ecs.endpoint
    burst = isolated(signed=True)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    names = {one["Name"] for one in ecs.client("secretsmanager").list_secrets()["SecretList"]}
    assert f"burst-dask/isolated/{burst.id}" in names and f"burst-dask/session/{burst.id}" not in names


def test_a_lost_worker_of_an_isolated_session_is_replaced_by_one_with_the_same_role(isolated, ecs, marks, monkeypatch):
    monkeypatch.setattr("burst_dask.client.guard.EACH_EVERY", 0.1)
    monkeypatch.setattr("burst_dask.scaling.healer.SETTLED_AFTER", 1.0)
    monkeypatch.setattr("burst_dask.fleet.ecs.fleet.LOOK_EVERY", 0.2)
    burst = isolated(workers=2)
    values, expected = chains(marks, 6, 5, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 2)
    for task in list(ecs.running):
        ecs.take_back(task)
    marks.open("gate")
    assert attach(run.id, store=burst.store, progress=False).result(timeout=120) == expected
    assert len(ecs.tasks) > 2 and {task.role for task in ecs.tasks} == set(roles_of_sessions(ecs))


def test_a_role_that_is_known_late_delays_workers_and_no_more(isolated, ecs, monkeypatch):
    monkeypatch.setattr("burst_dask.fleet.ecs.launching.ROLE_PATIENCE", 0.0)
    monkeypatch.setattr("burst_dask.scaling.healer.SETTLED_AFTER", 1.0)
    monkeypatch.setattr("burst_dask.client.guard.EACH_EVERY", 0.1)
    unknown = "ECS was unable to assume the role 'arn:aws:iam::1:role/x' that was provided for this task."
    ecs.once("RunTask", (400, "ClientException", unknown), times=2)
    with pytest.warns(UserWarning, match=r"no worker of session \w+ was started yet: .*tried again a minute from now"):
        burst = isolated()
    assert ecs.tasks == [] and len(roles_of_sessions(ecs)) == 1
    with pytest.warns(UserWarning, match=r"workers of session \w+ are not started now: ECS may not assume"):
        assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    assert [task.role for task in ecs.tasks] == roles_of_sessions(ecs)


def test_an_isolated_session_that_cannot_start_leaves_no_role(isolated, ecs):
    ecs.always("RunTask", (400, "ClientException", "You've reached the limit on the number of vCPUs"))
    with pytest.raises(FleetError, match="quota"):
        isolated()
    assert roles_of_sessions(ecs) == []


def test_only_the_store_of_the_stack_can_be_isolated(ecs, tmp_path):
    store = f"s3://burst-dask-tests/{tmp_path.name}?region={REGION}"
    with pytest.raises(ConfigError, match=r"isolated=True with the store .* bound to the stack's own store"):
        Session(store, fleet="ecs", isolated=True)
    with pytest.raises(ConfigError, match="isolated with fleet='local'"):
        Session(store, fleet="local", isolated=True)


def test_a_session_that_goes_on_is_not_less_isolated_than_it_says(isolated):
    isolated(name="nightly", isolated=False)
    with pytest.raises(ConfigError, match=r"isolated=True, but session \w+ of that name was opened without"):
        isolated(name="nightly", resume=True)
