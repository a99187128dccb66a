"""Workers on ECS: a session on S3 whose containers are really run, by a stand-in (`tests/aws/ecs_stand_in.py`)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import dask
import pytest
from acting import QUICK, check, children
from ecs_stack import push_image
from servers import REGION
from test_survives import chains

from burst_dask import Session, attach, sync
from burst_dask.api.overview import list_sessions
from burst_dask.aws.assets import TEMPLATE, asset
from burst_dask.aws.clients import Clients
from burst_dask.aws.stack import read_stack
from burst_dask.errors import ConfigError, CredentialsExpired, FleetError

EXPIRED = (400, "ExpiredTokenException", "The security token included in the request is expired")


@pytest.fixture
def store(ecs, tmp_path, monkeypatch):
    """A store in the stack's bucket; clients look after their fleet often."""
    monkeypatch.setattr("burst_dask.client.guard.EACH_EVERY", 0.1)
    monkeypatch.setattr("burst_dask.scaling.healer.SETTLED_AFTER", 1.0)
    monkeypatch.setattr("burst_dask.fleet.ecs.fleet.LOOK_EVERY", 0.2)
    monkeypatch.setattr("burst_dask.fleet.ecs.fleet._STOP_POLL", 0.1)
    return f"s3://burst-dask-tests/{tmp_path.name}?endpoint_url={ecs.moto}&region={REGION}"


@pytest.fixture
def sessions(store, ecs):
    """Makes sessions on ECS, and cleans them up; no task must be left then."""
    made = []

    def make(**arguments):
        defaults = {"fleet": "ecs", "workers": 2, "cpu": 0.25, "memory": "2GiB", "progress": False}
        made.append(Session(store, **{**defaults, **QUICK, **arguments}))
        return made[-1]

    yield make
    ecs.faults.clear()
    for session in made:
        session.cleanup(force=True)
    assert ecs.running == [] and not [one for task in ecs.tasks if task.process for one in children(task.process.pid)]


def wait_until(what):
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_session_on_ecs(sessions, ecs):
    burst = sessions(workers=2, spot=True, tags={"project": "ice"})
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    (request,) = ecs.names("RunTask")
    assert (request["count"], request["capacityProviderStrategy"][0]["capacityProvider"]) == (2, "FARGATE_SPOT")
    assert ecs.tasks[0].command == ["burst", "worker"], "the container runs nothing else"
    burst.cleanup(force=True)
    assert ecs.running == []


def test_workers_of_a_signed_session_read_its_key_in_secrets_manager(sessions, ecs, store, tmp_path, monkeypatch):
    ecs.image["AWS_ENDPOINT_URL"] = ecs.endpoint
    burst = sessions(workers=1, signed=True)
    name = f"burst-dask/session/{burst.id}"
    assert f"with the key in the secret {name} in {REGION}" in str(burst.status())
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    (request,) = ecs.names("RunTask")
    (override,) = request["overrides"]["containerOverrides"]
    told = {one["name"]: one["value"] for one in override["environment"]}
    assert told["BURST_KEY"] == f"secretsmanager:{REGION}:{name}"
    client = ecs.client("secretsmanager")
    secret = client.get_secret_value(SecretId=name)["SecretBinary"]
    assert secret.hex() not in str(ecs.calls) and str(secret) not in str(ecs.calls)

    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("BURST_KEYS", str(tmp_path / "another machine"))
        run = attach(burst.id, store=store, signed=True).compute(dask.delayed(sum)([1, 5]))
        assert run.result(timeout=60) == (6,)
    burst.cleanup(force=True)
    assert name not in [one["Name"] for one in client.list_secrets()["SecretList"]]


def test_a_lost_worker_is_replaced_and_results_are_right(sessions, ecs, marks):
    burst = sessions(workers=3, spot=True)
    values, expected = chains(marks, 20, 10)
    run = burst.compute(*values)
    marks.wait("started", 40)
    ecs.take_back(ecs.running[0])
    assert run.result(timeout=120) == expected
    run.wait(timeout=60)
    check(burst, run.id)
    wait_until(lambda: len(ecs.running) == 3 or sync.run(burst._link.start_workers(eager=True)))
    assert "one stopped: Spot took its machine back" in str(burst.status())


def test_what_is_stopped_hands_over_at_once(sessions, ecs, marks):
    """The lease is an hour: nobody takes over what was not handed over."""
    burst = sessions(workers=2, lease=3600.0)
    values, expected = chains(marks, 12, 5, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 2)
    burst.scale(1)
    assert len(ecs.running) == 1
    marks.open("gate")
    assert run.result(timeout=60) == expected
    check(burst, run.id)
    (ended,) = [task for task in ecs.tasks if task.desired == "STOPPED"]
    assert (ended.exit_code, ended.stop_code) == (0, "UserInitiated")


def test_scaled_to_nothing_and_up_again_by_another_client(sessions, ecs, marks, store):
    burst = sessions(workers=2)
    values, expected = chains(marks, 6, 5, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 2)
    command = [sys.executable, "-m", "burst_dask.cli", "scale", burst.id]
    environment = {**os.environ, "BURST_STORE": store, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "0"], env=environment, check=True)
    assert ecs.running == []
    marks.open("gate")
    subprocess.run([*command, "3"], env=environment, check=True)
    assert len(ecs.running) == 3
    assert attach(run.id, store=store).result(timeout=60) == expected
    check(burst, run.id)


def test_the_client_dies_and_another_one_goes_on(sessions, ecs, marks, store):
    burst = sessions(workers=2)
    values, expected = chains(marks, 10, 5, gate="gate")
    run_id = burst.compute(*values).id
    marks.wait("started", 2)
    for task in list(ecs.running):  # and all workers with it
        os.killpg(task.process.pid, signal.SIGKILL)
        task.process.wait()
    wait_until(lambda: not ecs.running)
    marks.open("gate")
    later = attach(run_id, store=store, progress=False)
    assert later.result(timeout=120) == expected, "whoever waits has workers started again"
    check(burst, run_id)


def test_a_script_that_runs_again_goes_on_with_the_workers_that_are_there(sessions, ecs):
    first = sessions(name="nightly", resume=True)
    assert dask.delayed(sum, pure=True)([1, 2]).compute(scheduler=first) == 3
    again = sessions(name="nightly", resume=True)
    assert again.id == first.id and len(ecs.tasks) == 2
    assert dask.delayed(sum, pure=True)([3, 4]).compute(scheduler=again) == 7
    assert again._link.fleet is not None, "it replaces workers that are lost"


# ---------------------------------------------------------------------------- what stands in the way


@pytest.mark.parametrize("fault", ["missing", "architecture"])
def test_workers_that_never_come_up(sessions, ecs, fault):
    if fault == "missing":
        ecs.missing_images.add("registry/worker:1")
    else:
        ecs.architectures = {"X86_64"}
    burst = sessions(image="registry/worker:1", arch="arm64")
    run = burst.compute(dask.delayed(1))
    words = {"missing": "its image is not there; push it", "architecture": "its image is for another architecture"}
    with pytest.raises(FleetError, match=rf"keep ending before they finish a task.*{words[fault]}"):
        run.result(timeout=60)
    assert any(words[fault] in note for note in burst.status().notes)
    burst.scale(0)


def test_a_quota_that_is_smaller_than_the_fleet(sessions, ecs, marks):
    """Nothing is asked for in vain, and the status says how to have more."""
    ecs.quotas = {"L-3032A538": 0.6}
    burst = sessions(workers=5, cpu=0.25)
    run = burst.compute(*chains(marks, 2, 2, gate="gate")[0])
    marks.wait("started", 1)
    assert [request["count"] for request in ecs.names("RunTask")] == [2]
    (note,) = burst.status().notes
    assert note.startswith(
        "of the 5 workers that were asked for, 2 can run at a time: Fargate: 0.6 vCPU at a time. Ask"
    )
    assert "aws service-quotas request-service-quota-increase" in note
    marks.open("gate")
    run.wait(timeout=60)
    assert len(ecs.tasks) == 2 and burst.status().notes == ()


def test_a_session_that_cannot_start_workers_leaves_nothing(sessions, ecs, store):
    denied = "ECS was unable to assume the role 'arn:aws:iam::123456789012:role/x' that was provided for this task."
    ecs.always("RunTask", (400, "ClientException", denied))
    with pytest.raises(FleetError, match="may not assume a role of the stack"):
        sessions()
    assert ecs.tasks == [] and list_sessions(store) == []


def test_credentials_that_expire_while_workers_work(sessions, ecs, marks):
    """Workers have their own: they go on, and so does who waits."""
    burst = sessions(workers=1)
    values, expected = chains(marks, 3, 2, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 1)
    ecs.always("ListTasks", EXPIRED)
    with pytest.warns(UserWarning, match=r"are not started now: the AWS credentials have expired"):
        with pytest.raises(TimeoutError):
            run.result(timeout=2)
        marks.open("gate")
        assert run.result(timeout=60) == expected


@pytest.mark.filterwarnings("ignore:.*are not started now.*expired")  # until it is known that the last one is dead
def test_credentials_that_expire_when_no_worker_is_left(sessions, ecs, marks):
    burst = sessions(workers=1)
    values, expected = chains(marks, 3, 2, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 1)
    ecs.always("ListTasks", EXPIRED)
    ecs.take_back(ecs.running[0])
    marks.open("gate")
    with pytest.raises(CredentialsExpired, match=r"aws sso login.*What workers have committed is kept"):
        run.result(timeout=60)
    ecs.faults.clear()  # renewed
    assert run.result(timeout=60) == expected


def test_a_cleanup_by_who_may_not_stop_tasks(sessions, ecs):
    burst = sessions(workers=1)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    ecs.always("StopTask", (400, "AccessDeniedException", "no"))
    with pytest.warns(UserWarning, match=r"end by themselves, within a minute: you lack the right ecs:StopTask"):
        burst.cleanup(force=True)
    wait_until(lambda: not ecs.running)
    assert ecs.tasks[0].exit_code == 0


def test_capacity_that_comes_later(sessions, ecs, marks):
    burst = sessions(workers=1)
    burst.scale(0)
    run = burst.compute(dask.delayed(sum)([1, 2]))
    none = {"tasks": [], "failures": [{"reason": "Capacity is unavailable at this time. Please try again later"}]}
    ecs.once("RunTask", none, times=3)
    burst.scale(1)
    assert run.result(timeout=60) == (3,)


def test_an_invalid_pair_gets_the_nearest_valid_one(sessions, ecs):
    with pytest.warns(UserWarning, match=r"Fargate has no 1 vCPU with 1 GiB: workers get 1 vCPU with 2 GiB"):
        burst = sessions(workers=1, cpu=1, memory="1GiB")
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    with pytest.raises(ConfigError, match="more than Fargate has"):
        sessions(memory="500GiB")


# ---------------------------------------------------------------------------- the default, logs


def test_ecs_is_the_default_where_the_stack_stands(ecs, tmp_path, monkeypatch):
    bucket = f"s3://burst-dask-tests/{tmp_path.name}?region={REGION}"
    with pytest.warns(
        UserWarning, match=r"1 workers run on ECS, in the stack burst-dask in us-east-1, and cost: 1 vCPU"
    ):
        burst = Session(bucket, workers=1, progress=False, **QUICK)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3 and len(ecs.running) == 1
    burst.cleanup(force=True)
    monkeypatch.setenv("BURST_STACK", "another")
    with pytest.warns(UserWarning, match=r"workers run on this machine.*there is no stack another in us-east-1"):
        local = Session(bucket, workers=1, progress=False, **QUICK)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=local) == 3 and ecs.running == []
    local.cleanup(force=True)


def say(word):
    print(word)
    return word


def test_logs_of_workers_are_found_while_and_after_they_run(sessions, ecs, store):
    burst = sessions(workers=1)
    assert dask.delayed(say)("hello").compute(scheduler=burst) == "hello"
    (log,) = burst.worker_logs()
    assert log.name == f"burst/worker/{ecs.tasks[0].id}" and f"workers for session {burst.id}" in log.text
    ((worker, *_),) = sync.run(burst._link.seen()).beats.items()
    assert burst.worker_logs(worker) and burst.worker_logs("nobody") == []
    burst.scale(0)
    shown = subprocess.run(
        [sys.executable, "-m", "burst_dask.cli", "logs", burst.id, "--processes", "--store", store],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout
    assert f"worker {worker} started" in shown and "hello" in shown


def test_the_stack_that_setup_makes_is_all_that_a_session_needs(ecs, monkeypatch):
    """From an empty account to a result, and back."""
    ec2 = ecs.client("ec2")
    gateway = ec2.create_internet_gateway()["InternetGateway"]["InternetGatewayId"]
    (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs(Filters=[{"Name": "is-default", "Values": ["true"]}])["Vpcs"]]
    ec2.attach_internet_gateway(InternetGatewayId=gateway, VpcId=vpc)
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", GatewayId=gateway)
    command = [sys.executable, "-m", "burst_dask.cli"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([*command, "setup", "aws", "--stack", "second", "--yes"], env=environment, check=True)
    monkeypatch.setenv("BURST_STACK", "second")
    stack = read_stack(Clients.of(), "second")
    assert stack is not None
    push_image(ecs.moto, "second")
    with pytest.warns(UserWarning, match="1 workers run on ECS, in the stack second"):
        burst = Session(stack.store, workers=1, progress=False, **QUICK)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=burst) == 3
    assert ecs.tasks[0].request["cluster"] == stack.cluster == "second"
    burst.cleanup(force=True)
    assert ecs.running == []
    spot = Session(stack.store, workers=2, launch_type="EC2", spot=True, progress=False, **QUICK)
    assert dask.delayed(sum)([1, 2]).compute(scheduler=spot) == 3
    assert {task.provider for task in ecs.tasks[1:]} == {stack.capacity_providers["x86_64-spot"]}
    spot.cleanup(force=True)


# ---------------------------------------------------------------------------- nobody is left


@pytest.fixture
def scheduled(ecs, monkeypatch):
    """The whole stack, with a schedule as `burst setup aws --heal-every 15` has it; returns its name and its store."""
    ec2, name = ecs.client("ec2"), "scheduled"
    parameters = {
        "Vpc": ec2.describe_vpcs()["Vpcs"][0]["VpcId"],
        "Subnets": ec2.describe_subnets()["Subnets"][0]["SubnetId"],
        "AssignPublicIp": "ENABLED",
        "BucketName": "burst-dask-scheduled",
        "HealEvery": "15",
        "HealImage": "123456789012.dkr.ecr.us-east-1.amazonaws.com/scheduled:0a1b2c",
    }
    ecs.client("cloudformation").create_stack(
        StackName=name,
        TemplateBody=asset(TEMPLATE).read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
    )
    push_image(ecs.moto, name)
    monkeypatch.setenv("BURST_STACK", name)
    ecs.image["AWS_ENDPOINT_URL"] = ecs.endpoint  # where AWS is
    stack = read_stack(Clients.of(), name)
    assert stack is not None and stack.schedule == "scheduled-heal"
    return name, stack.store


def test_a_schedule_has_work_go_on_when_nobody_is_left(ecs, scheduled, marks, monkeypatch):
    name, store = scheduled
    with monkeypatch.context() as patch:
        now = time.time
        patch.setattr("burst_dask.clock.SystemClock.wall", lambda self: now() - 900)  # it was opened long ago
        burst = Session(store, fleet="ecs", workers=2, cpu=0.25, memory="2GiB", progress=False, **QUICK)
    values, expected = chains(marks, 6, 5, gate="gate")
    run = burst.compute(*values)
    marks.wait("started", 2)
    fired = ecs.fire(name)
    wait_until(lambda: fired.status == "STOPPED")
    assert (fired.exit_code, len(ecs.running)) == (0, 2), "workers are alive: there is nothing to do"

    for task in list(ecs.running):
        os.killpg(task.process.pid, signal.SIGKILL)
        task.process.wait()
    wait_until(lambda: not ecs.running)
    marks.open("gate")

    fired = ecs.fire(name)
    assert fired.command[:2] == ["burst", "heal"] and fired.role.endswith("HealerRole")
    wait_until(lambda: fired.status == "STOPPED")
    assert (fired.exit_code, len(ecs.running)) == (0, 2)
    logs = ecs.client("logs").get_log_events(
        logGroupName="/burst-dask/scheduled", logStreamName=f"heal/healer/{fired.id}"
    )
    assert [event["message"] for event in logs["events"]] == [f"{burst.id}: 2 workers started"]
    again = ecs.fire(name)
    wait_until(lambda: again.status == "STOPPED")
    assert len([task for task in ecs.tasks if task.command[1] == "worker"]) == 4, "and none twice"

    def complete():
        """What workers have done; nobody waits, who would start some."""
        return burst.status().runs[0].state == "done"

    wait_until(complete)
    assert run.result(timeout=60) == expected
    burst.cleanup(force=True)
    assert ecs.running == []
