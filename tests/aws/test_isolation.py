"""`isolated=True`: what the role of one session may do, that it can never be more, and that nothing of it is left."""

from __future__ import annotations

import json

import dask
import iam
import pytest
from iam import ACCOUNT, ARN, BUCKET, CLUSTER, Filled

from burst_dask import Session
from burst_dask.api import fleets
from burst_dask.aws import isolation
from burst_dask.aws.stack import Stack
from burst_dask.errors import AccessDenied, CloudUnavailable
from burst_dask.fleet.ecs import EcsFleet, EcsPlan
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, ShardId, WorkerId

OURS, THEIRS = SessionId("ours1234"), SessionId("theirs12")
OBJECTS = f"arn:aws:s3:::{BUCKET}/burst/"
KEY = f"arn:aws:kms:us-east-1:{ACCOUNT}:key/1"
ECS_TASKS = "ecs-tasks.amazonaws.com"


def stack_of(**parameters):
    filled = Filled(**parameters)
    return filled, Stack.of("burst-dask", "us-east-1", iam.output(filled))


def rights(earlier=None, **parameters):
    """Return what tells whether a session's role may do something: its policy and its boundary must both allow it."""
    filled, stack = stack_of(**parameters)
    own = isolation.policy(stack, OURS, BUCKET, "burst", earlier)
    boundary = filled.properties("Boundary")["PolicyDocument"]

    def may(action, resource, **context):
        return iam.allows(own, action, resource, **context) and iam.allows(boundary, action, resource, **context)

    return may


def objects_of(session):
    """Return keys of all kinds that workers of a session write."""
    run, shard = RunId(f"{session}.run"), ShardId("00001")
    return [
        keys.entry(keys.session_log(session), 3),
        keys.clock(session),
        keys.beat(session, WorkerId("w1")),
        keys.ended(session, WorkerId("w1")),
        keys.difference(session, "d"),
        keys.complete(run),
        keys.entry(keys.shard_log(run, shard), 0),
        keys.segment(run, shard, "s"),
        keys.task_logs(run, shard, "s"),
    ]


def read_of(session):
    run = RunId(f"{session}.run")
    return [*objects_of(session), keys.manifest(session), keys.code(session, "d"), keys.plan(run), keys.pack(run, 0)]


# ---------------------------------------------------------------------------- what it may


def test_it_reads_and_writes_its_own_session():
    may = rights()
    assert [key for key in read_of(OURS) if not may("s3:GetObject", OBJECTS + key)] == []
    assert [key for key in objects_of(OURS) if not may("s3:PutObject", OBJECTS + key)] == []
    bucket = f"arn:aws:s3:::{BUCKET}"
    assert may("s3:ListBucket", bucket, s3__prefix=f"burst/{keys.workers(OURS)}")
    assert may("s3:ListBucket", bucket), "or S3 answers 403 for what is not there yet"
    segment = keys.segment(RunId(f"{OURS}.run"), ShardId("00001"), "s")
    assert may("s3:DeleteObject", OBJECTS + segment)
    assert not may("s3:DeleteObject", OBJECTS + segment + keys.LASTING), "what was asked for"
    assert not may("s3:DeleteObject", OBJECTS + keys.plan(RunId(f"{OURS}.run")))


def test_it_neither_reads_nor_writes_another_session():
    may = rights()
    for key in read_of(THEIRS):
        for action in ("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"):
            assert not may(action, OBJECTS + key), (action, key)
    for prefix in ("burst/s/", "burst/", "burst/sessions/", f"burst/{keys.session_prefix(THEIRS)}", ""):
        assert not may("s3:ListBucket", f"arn:aws:s3:::{BUCKET}", s3__prefix=prefix), prefix
    assert not may("s3:PutObject", OBJECTS + keys.manifest(OURS)), "not even its own manifest"
    longer = SessionId(f"{OURS}5")
    assert not any(may("s3:GetObject", OBJECTS + key) for key in read_of(longer)), "whose id begins alike"


def test_a_session_that_was_resumed_reads_the_results_of_the_one_before_and_writes_none():
    may = rights(earlier=THEIRS)
    segment = OBJECTS + keys.segment(RunId(f"{THEIRS}.run"), ShardId("00001"), "s-kept")
    assert may("s3:GetObject", segment) and not may("s3:PutObject", segment) and not may("s3:DeleteObject", segment)
    assert not may("s3:GetObject", OBJECTS + keys.manifest(THEIRS))


def test_it_reads_one_secret():
    may = rights()
    secret = f"{ARN.format('secretsmanager')}secret:burst-dask/isolated/"
    assert may("secretsmanager:GetSecretValue", f"{secret}{OURS}-a1B2c3")
    for other in (f"{secret}{THEIRS}-a1B2c3", f"{secret}{OURS}-more-a1B2c3", f"{secret}{OURS}5-a1B2c3"):
        assert not may("secretsmanager:GetSecretValue", other)


def test_it_uses_the_key_of_the_stack_if_there_is_one():
    assert rights(KmsKey=KEY)("kms:Decrypt", KEY) and not rights()("kms:Decrypt", KEY)


def test_it_starts_workers_of_its_own_session_and_role_only():
    may = rights()
    definition = f"{ARN.format('ecs')}task-definition/burst-dask-worker-0a1b2c3d4e5f:1"
    tagged = {"aws__RequestTag/burst_dask:session": OURS}
    assert may("ecs:RunTask", definition, ecs__cluster=CLUSTER, **tagged)
    assert not may("ecs:RunTask", definition, ecs__cluster=CLUSTER, **{"aws__RequestTag/burst_dask:session": THEIRS})
    assert not may("ecs:RunTask", definition, ecs__cluster=f"{CLUSTER}2", **tagged)
    healer = f"{ARN.format('ecs')}task-definition/burst-dask-healer:1"
    assert not may("ecs:RunTask", healer, ecs__cluster=CLUSTER, **tagged)
    task = f"{ARN.format('ecs')}task/burst-dask/1"
    for action in ("ecs:StopTask", "ecs:DescribeTasks"):
        assert may(action, task, **{"aws__ResourceTag/burst_dask:session": OURS})
        assert not may(action, task, **{"aws__ResourceTag/burst_dask:session": THEIRS})
    filled, stack = stack_of()
    passed = {"iam__PassedToService": ECS_TASKS}
    assert may("iam:PassRole", isolation.role_arn(stack, OURS), **passed)
    assert may("iam:PassRole", stack.execution_role, **passed)
    assert not may("iam:PassRole", isolation.role_arn(stack, OURS), iam__PassedToService="ec2.amazonaws.com")
    for other in (isolation.role_arn(stack, THEIRS), stack.task_role, filled.attribute("HealerRole.Arn")):
        assert not may("iam:PassRole", other, **passed), "a task with more rights"


def test_where_workers_start_no_others_it_does_not_either():
    may, (_, stack) = rights(SelfHealing="false"), stack_of()
    definition = f"{ARN.format('ecs')}task-definition/burst-dask-worker-0a1b2c3d4e5f:1"
    assert not may("ecs:RunTask", definition, ecs__cluster=CLUSTER, **{"aws__RequestTag/burst_dask:session": OURS})
    assert not may("iam:PassRole", isolation.role_arn(stack, OURS), iam__PassedToService=ECS_TASKS)
    assert may("s3:GetObject", OBJECTS + keys.manifest(OURS))


def test_a_role_with_any_policy_is_held_by_its_boundary_to_what_all_workers_may():
    """A client may only make roles with this boundary. Here it gives one all rights there are."""
    for parameters in ({}, {"KmsKey": KEY}, {"SelfHealing": "false"}):
        filled, stack = stack_of(**parameters)
        boundary = filled.properties("Boundary")["PolicyDocument"]
        known = {"ecs__cluster": CLUSTER, "ecs__CreateAction": "RunTask", "iam__PassedToService": ECS_TASKS}
        tried = [(action, resource) for action in ACTIONS for resource in resources(filled, stack)]
        more = {
            (action, resource)
            for action, resource in tried
            if iam.allows(boundary, action, resource, **known) and not filled.may("TaskRole", action, resource, **known)
        }
        role = isolation.role_arn(stack, OURS)
        secret = f"{ARN.format('secretsmanager')}secret:burst-dask/isolated/x-a1B2c3"
        heals = parameters.get("SelfHealing") != "false"
        assert more == {("secretsmanager:GetSecretValue", secret), *([("iam:PassRole", role)] if heals else [])}
        assert any(iam.allows(boundary, *one, **known) for one in tried), "the check can see what is allowed"


ACTIONS = [
    *("s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:ListBucket", "s3:PutBucketPolicy", "s3:DeleteBucket"),
    *("ecs:RunTask", "ecs:StopTask", "ecs:DescribeTasks", "ecs:ListTasks", "ecs:TagResource", "ecs:ExecuteCommand"),
    *("ecs:RegisterTaskDefinition", "iam:PassRole", "iam:CreateRole", "iam:PutRolePolicy", "iam:AttachRolePolicy"),
    *("iam:DeleteRolePermissionsBoundary", "iam:PutRolePermissionsBoundary", "iam:CreatePolicyVersion"),
    *("sts:AssumeRole", "secretsmanager:GetSecretValue", "secretsmanager:PutSecretValue", "kms:Decrypt"),
    *("kms:CreateGrant", "logs:PutLogEvents", "ecr:BatchGetImage", "cloudformation:UpdateStack", "ec2:RunInstances"),
]


def resources(filled, stack):
    ecs, secrets = ARN.format("ecs"), ARN.format("secretsmanager")
    return [
        *("*", f"arn:aws:s3:::{BUCKET}", "arn:aws:s3:::other", "arn:aws:s3:::other/burst/s/x/y"),
        *(OBJECTS + key for key in (*read_of(OURS), keys.PROBED, keys.over(OURS), "s/x/runs/y/segments/z-kept")),
        *(f"arn:aws:s3:::{BUCKET}/image/x.zip", f"arn:aws:s3:::{BUCKET}/burst2/s/x/y"),
        *(f"{ecs}task-definition/burst-dask-worker-0a:1", f"{ecs}task-definition/burst-dask-healer:1"),
        *(f"{ecs}task/burst-dask/1", f"{ecs}task/other/1", CLUSTER),
        *(stack.task_role, stack.execution_role, filled.attribute("HealerRole.Arn"), isolation.role_arn(stack, OURS)),
        *(f"arn:aws:iam::{ACCOUNT}:role/admin", f"arn:aws:iam::{ACCOUNT}:role/burst-dask/other/x"),
        *(f"{secrets}secret:burst-dask/isolated/x-a1B2c3", f"{secrets}secret:other-a1B2c3", KEY),
    ]


def test_only_tasks_of_this_account_and_region_take_it():
    filled, stack = stack_of()
    assert isolation.trust(stack) == filled.properties("TaskRole")["AssumeRolePolicyDocument"]


def test_names_fit():
    assert len(isolation.role_name("a" * 32, SessionId("k3w9x2mq"))) <= 64
    _, stack = stack_of(KmsKey=KEY)
    assert len(json.dumps(isolation.policy(stack, OURS, "b" * 63, "p/" * 30, THEIRS))) < 10_240, "of inline policies"


# ---------------------------------------------------------------------------- what a worker does


class Watched:
    """A store that notes what is asked of it, as rights of S3."""

    def __init__(self, inner, asked):
        self._inner, self._asked = inner, asked

    def __getattr__(self, name):
        return getattr(self._inner, name)

    async def create(self, key, body):
        self._asked.add(("s3:PutObject", key))
        return await self._inner.create(key, body)

    async def put(self, key, body):
        self._asked.add(("s3:PutObject", key))
        await self._inner.put(key, body)

    async def time(self, key):
        self._asked |= {("s3:PutObject", key), ("s3:GetObject", key)}
        return await self._inner.time(key)

    async def get(self, key):
        self._asked.add(("s3:GetObject", key))
        return await self._inner.get(key)

    async def get_ranges(self, key, spans):
        self._asked.add(("s3:GetObject", key))
        return await self._inner.get_ranges(key, spans)

    async def delete(self, keys):
        doomed = list(keys)
        self._asked |= {("s3:DeleteObject", key) for key in doomed}
        await self._inner.delete(doomed)

    def list(self, prefix, *, after=""):
        self._asked.add(("s3:ListBucket", prefix))
        return self._inner.list(prefix, after=after)

    async def folders(self, prefix):
        self._asked.add(("s3:ListBucket", prefix))
        return await self._inner.folders(prefix)


def double(values):
    return [2 * value for value in values]


def test_it_may_all_that_a_worker_does(monkeypatch, tmp_path):
    asked = set()
    monkeypatch.setattr(
        fleets,
        "InProcessFleet",
        lambda session, store, **options: InProcessFleet(session, Watched(store, asked), **options),
    )
    (tmp_path / "helpers_of_isolation.py").write_text("ANSWER = 42\n")
    with Session("memory://isolation", workers=2, code=[tmp_path / "helpers_of_isolation.py"], progress=False) as burst:
        large = [dask.delayed(double)(list(range(200_000))) for _ in range(4)]
        assert dask.delayed(len)(large).compute(scheduler=burst) == 4
        session = SessionId(burst.id)
    burst.cleanup(force=True)
    assert {action for action, _ in asked} >= {"s3:PutObject", "s3:GetObject", "s3:ListBucket"}
    _, stack = stack_of()
    own = isolation.policy(stack, session, BUCKET, "burst")

    def may(action, key):
        if action == "s3:ListBucket":
            return iam.allows(own, action, f"arn:aws:s3:::{BUCKET}", s3__prefix=f"burst/{key}")
        return iam.allows(own, action, OBJECTS + key)

    assert sorted(one for one in asked if not may(*one)) == []


# ---------------------------------------------------------------------------- making it, and what is left


@pytest.fixture
def made(stack):
    """The stack as it stands in moto."""
    from burst_dask.aws.stack import read_stack

    found = read_stack(stack.clients)
    stack.calls.clear()
    return stack, found


def roles(account, path="/burst-dask/"):
    return [one["RoleName"] for one in account.clients.client("iam").list_roles(PathPrefix=path)["Roles"]]


def test_it_is_made_and_deleted(made):
    account, stack = made
    arn = isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    there = account.clients.client("iam").get_role(RoleName=f"burst-dask-{OURS}")["Role"]
    assert there["Arn"] == arn == isolation.role_arn(stack, OURS)
    assert there["PermissionsBoundary"]["PermissionsBoundaryArn"] == stack.boundary
    document = account.clients.client("iam").get_role_policy(RoleName=f"burst-dask-{OURS}", PolicyName="session")
    assert document["PolicyDocument"] == isolation.policy(stack, OURS, BUCKET, "burst")
    isolation.delete_role(account.clients, stack, OURS)
    assert roles(account) == []
    isolation.delete_role(account.clients, stack, OURS)  # again: what is not there does no harm


@pytest.mark.parametrize("action", ["iam:CreateRole", "iam:PutRolePolicy"])
def test_a_right_that_lacks_is_told_and_nothing_is_left(made, action):
    account, stack = made
    account.denies(action)
    with pytest.raises(AccessDenied, match=rf"lack the right {action}.*No session was opened.*`burst doctor aws`"):
        isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    assert roles(account) == []


def test_a_role_whose_making_was_not_answered_is_deleted(made):
    account, stack = made
    create = account.clients.client("iam").create_role

    def lost(asked):
        account.allows("iam:CreateRole")
        create(**asked)
        raise CloudUnavailable("the connection broke")

    account.answers("iam:CreateRole", lost)
    with pytest.raises(CloudUnavailable):
        isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    assert roles(account) == []
    account.answers("iam:CreateRole", lost)
    account.denies("iam:DeleteRole")
    with pytest.raises(CloudUnavailable), pytest.warns(UserWarning, match=f"The role burst-dask-{OURS} is left"):
        isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")


@pytest.mark.parametrize("action", ["iam:DeleteRolePolicy", "iam:DeleteRole"])
def test_what_cannot_be_deleted_is_named(made, action):
    account, stack = made
    isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    account.denies(action)
    with pytest.raises(AccessDenied, match=rf"{action}.*The role burst-dask-{OURS} is left.*`aws iam delete-role "):
        isolation.delete_role(account.clients, stack, OURS)
    account.denies("iam:PutRolePolicy")
    with (
        pytest.warns(UserWarning, match=rf"The role burst-dask-{THEIRS} is left"),
        pytest.raises(AccessDenied, match="iam:PutRolePolicy"),
    ):
        isolation.make_role(account.clients, stack, THEIRS, BUCKET, "burst")


def test_doctor_tells_what_is_missing_for_it(made, burst):
    account, stack = made
    account.answers(
        "iam:SimulatePrincipalPolicy",
        lambda asked: {
            "EvaluationResults": [
                {"EvalDecision": "implicitDeny" if asked["ActionNames"] == ["iam:CreateRole"] else "allowed"}
            ]
        },
    )
    said = burst("doctor", "aws").output
    roles_below = f"arn:aws:iam::{ACCOUNT}:role/burst-dask/burst-dask/us-east-1/*"
    assert f"note    rights: you lack iam:CreateRole on {roles_below}, for isolated=True" in said
    (asked,) = [one for one in account.asked("iam:SimulatePrincipalPolicy") if one["ActionNames"] == ["iam:CreateRole"]]
    context = {one["ContextKeyName"]: one["ContextKeyValues"] for one in asked["ContextEntries"]}
    assert context["iam:PermissionsBoundary"] == [stack.boundary]


def test_doctor_looks_for_rights_on_keys_of_isolated_sessions_too(made, burst):
    account, _ = made
    isolated = f"arn:aws:secretsmanager:us-east-1:{ACCOUNT}:secret:burst-dask/isolated/*"
    account.answers(
        "iam:SimulatePrincipalPolicy",
        lambda asked: {
            "EvaluationResults": [
                {"EvalDecision": "implicitDeny" if asked["ResourceArns"] == [isolated] else "allowed"}
            ]
        },
    )
    said = burst("doctor", "aws").output
    for action in ("CreateSecret", "TagResource", "GetSecretValue", "DeleteSecret"):
        assert f"you lack secretsmanager:{action} on {isolated}, for isolated=True with signed=True" in said


def test_doctor_tells_when_there_are_many_roles(made, burst, monkeypatch):
    account, stack = made
    assert "isolation" not in burst("doctor", "aws").output
    isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    assert "ok      isolation: 1 sessions have roles of their own" in burst("doctor", "aws").output
    monkeypatch.setattr("burst_dask.aws.diagnosis._MANY_ROLES", 1)
    assert "note    isolation: 1 sessions" in (said := burst("doctor", "aws").output)
    assert "`burst cleanup SESSION` deletes that of one that is over" in said


def test_a_role_that_cannot_be_deleted_is_a_warning(made):
    account, stack = made
    isolation.make_role(account.clients, stack, OURS, BUCKET, "burst")
    plan = EcsPlan(stack=stack, cpu=256, memory=512, image="i", isolated=True)
    account.denies("iam:DeleteRole")
    with pytest.warns(UserWarning, match=rf"you lack the right iam:DeleteRole.*The role burst-dask-{OURS} is left"):
        fleets.release(EcsFleet(OURS, "s3://bucket/p", plan, clients=account.clients))


def test_teardown_deletes_those_of_the_stack_and_of_no_other(made, burst):
    account, stack = made
    for session in (OURS, THEIRS):
        isolation.make_role(account.clients, stack, session, BUCKET, "burst")
    create = account.clients.client("iam").create_role
    others = {"another-stack": "burst-dask-2/us-east-1", "another-region": "burst-dask/eu-west-1"}
    for name, place in others.items():
        create(Path=f"/burst-dask/{place}/", RoleName=name, AssumeRolePolicyDocument="{}")
    assert burst("teardown", "aws", "--yes").exit_code == 0
    assert sorted(roles(account)) == sorted(others)
    names = [name for name, _ in account.calls]
    assert names.index("iam:DeleteRole") < names.index("cloudformation:DeleteStack"), "the boundary outlives them"
