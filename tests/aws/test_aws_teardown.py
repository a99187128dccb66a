"""`burst teardown aws`: what it removes, what it keeps, and when it refuses."""

from __future__ import annotations

import json

import pytest
import servers
from botocore.exceptions import ClientError

from burst_dask.aws import secrets, teardown
from burst_dask.aws.stack import read_stack

BUCKET = "burst-dask-123456789012-us-east-1"
MANIFEST = json.dumps(
    {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"digest": "sha256:1"},
        "layers": [],
    }
)


def buckets(account):
    return [one["Name"] for one in account.clients.client("s3").list_buckets()["Buckets"]]


@pytest.fixture
def filled(stack):
    """A stack with an image and with data."""
    stack.clients.client("s3").put_object(Bucket=BUCKET, Key="burst/s/x/plan", Body=b"data")
    stack.clients.client("ecr").put_image(repositoryName="burst-dask", imageManifest=MANIFEST, imageTag="t-arm64")
    stack.calls.clear()
    return stack


@pytest.fixture
def running(filled):
    """… and with a task of a session, until it is stopped."""
    task = {
        "taskArn": "arn:task/1",
        "lastStatus": "RUNNING",
        "tags": [{"key": "burst-dask:session", "value": "nightly"}],
    }
    filled.running = ["arn:task/1"]
    filled.answers("ecs:ListTasks", lambda _: {"taskArns": list(filled.running)})
    filled.statuses = iter(["RUNNING", "RUNNING", "DEACTIVATING", "DEPROVISIONING"])  # look, remove, and after the stop
    filled.answers(
        "ecs:DescribeTasks",
        lambda asked: {
            "tasks": [task | {"taskArn": arn, "lastStatus": next(filled.statuses, "STOPPED")} for arn in asked["tasks"]]
        },
    )
    filled.answers("ecs:StopTask", lambda asked: filled.running.remove(asked["task"]) or {"task": task})
    return filled


def test_keeps_data_unless_told(filled, burst):
    shown = burst("teardown", "aws", input="y\n")
    assert shown.exit_code == 0, shown.output
    assert (
        f"removes the stack burst-dask in us-east-1 with its images and logs, and not the bucket {BUCKET}"
        in shown.output
    )
    assert shown.output.endswith(f"the bucket {BUCKET} is kept, and `burst setup aws` finds it again\n")
    assert read_stack(filled.clients) is None
    deleted = filled.asked("ecr:BatchDeleteImage")
    assert [id["imageTag"] for one in deleted for id in one["imageIds"]] == ["t-arm64"]
    assert not filled.asked("s3:DeleteObjects")


@pytest.fixture
def signed(filled):
    """… and with keys of signed sessions, of this stack and of others."""
    for session in ("k3w9x2mq", "7gfh2yab"):
        secrets.create(filled.clients, secrets.secret_name("burst-dask", session, session[0] == "7"), bytes(32))
    secrets.create(filled.clients, secrets.secret_name("burst-dask-2", "k3w9x2mq"), bytes(32))
    client = filled.clients.client("secretsmanager")
    client.create_secret(Name="burst-dask/session/mine", SecretString="somebody's, of such a name")
    filled.calls.clear()
    return filled


def names_of_secrets(account):
    return {one["Name"] for one in account.clients.client("secretsmanager").list_secrets()["SecretList"]}


OTHERS = {"burst-dask-2/session/k3w9x2mq", "burst-dask/session/mine"}
KEYS = {"burst-dask/session/k3w9x2mq", "burst-dask/isolated/7gfh2yab"}


def test_keys_of_signed_sessions_stay_with_their_data(signed, burst):
    shown = burst("teardown", "aws", "--yes")
    assert "2 keys of signed sessions in Secrets Manager stay with it, at 0.40 USD a month each" in shown.output
    assert names_of_secrets(signed) == OTHERS | KEYS


def test_keys_of_signed_sessions_go_with_their_data(signed, burst, monkeypatch):
    monkeypatch.setattr(teardown, "delete_bucket", lambda clients, bucket, keys: None)
    shown = burst("teardown", "aws", "--yes", "--data")
    assert "2 keys of signed sessions in Secrets Manager are deleted, too." in shown.output
    assert names_of_secrets(signed) == OTHERS


@pytest.mark.parametrize("call", ["s3:DeleteBucket", "secretsmanager:DeleteSecret"])
def test_keys_that_are_left_are_named(signed, burst, call):
    """They cost, and the stack by whose name a teardown finds them is gone."""
    signed.answers("cloudformation:DeleteStack", {})  # moto would delete the bucket
    (described,) = signed.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    status = iter(["CREATE_COMPLETE", "CREATE_COMPLETE", "DELETE_COMPLETE"])
    signed.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described | {"StackStatus": next(status)}]})
    signed.denies(call)
    shown = burst("teardown", "aws", "--yes", "--data")
    assert (shown.exit_code, f"you lack the right {call}" in shown.output) == (1, True)
    told = shown.output.partition("These keys of signed sessions are left, at 0.40 USD a month each: ")[2]
    assert set(told.partition(". Delete each by `aws secretsmanager")[0].split(", ")) == KEYS


def test_without_the_right_to_list_secrets_keys_stay_and_that_is_told(signed, burst):
    signed.denies("secretsmanager:ListSecrets")
    assert (
        "Whether keys of signed sessions are in Secrets Manager is not known"
        in burst("teardown", "aws", "--yes").output
    )
    signed.allows("secretsmanager:ListSecrets")
    assert names_of_secrets(signed) == OTHERS | KEYS


def test_asks(filled, burst):
    assert burst("teardown", "aws", input="n\n").output.endswith("Nothing was removed\n")
    assert read_stack(filled.clients) is not None


def test_deletes_data_when_told(filled, burst):
    # moto deletes the bucket of a stack whatever the template says of it
    filled.answers("cloudformation:DeleteStack", {})
    status = iter(["CREATE_COMPLETE", "CREATE_COMPLETE", "DELETE_IN_PROGRESS", "DELETE_COMPLETE"])
    (described,) = filled.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    filled.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described | {"StackStatus": next(status)}]})
    shown = burst("teardown", "aws", "--yes", "--data", "--json")
    assert json.loads(shown.stdout) == {"removed": True, "bucket": None}
    assert BUCKET not in buckets(filled)


def test_a_bucket_of_others_is_never_deleted(account, burst):
    account.clients.client("s3").create_bucket(Bucket="mine")
    burst("setup", "aws", "--yes", "--bucket", "mine")
    shown = burst("teardown", "aws", "--yes", "--data")
    assert shown.exit_code == 1 and "the bucket mine was not made by this stack" in shown.output
    assert "mine" in buckets(account) and read_stack(account.clients) is not None


def test_a_bucket_of_another_stack_is_never_deleted(stack, burst):
    tags = [{"Key": "burst-dask:stack", "Value": "burst-dask"}]
    stack.clients.client("s3").put_bucket_tagging(Bucket=BUCKET, Tagging={"TagSet": tags})
    assert burst("setup", "aws", "--yes", "--stack", "team-a", "--bucket", BUCKET).exit_code == 0
    shown = burst("teardown", "aws", "--yes", "--data", "--stack", "team-a")
    assert shown.exit_code == 1 and "lacks the tag burst-dask:stack=team-a" in shown.output
    assert BUCKET in buckets(stack) and read_stack(stack.clients, "team-a") is not None


def test_refuses_while_tasks_run(running, burst):
    shown = burst("teardown", "aws", "--yes")
    assert shown.exit_code == 1
    assert "tasks run in the stack burst-dask: 1 of session nightly" in shown.output
    assert "--stop-tasks" in shown.output
    assert read_stack(running.clients) is not None


def test_stops_tasks_when_told(running, burst):
    assert burst("teardown", "aws", "--yes", "--stop-tasks").exit_code == 0
    (stopped,) = running.asked("ecs:StopTask")
    assert stopped["task"] == "arn:task/1"
    names = [name for name, _ in running.calls]
    assert names.index("ecs:StopTask") < names.index("cloudformation:DeleteStack")
    assert next(running.statuses, None) is None, "it waits until they have stopped, though they are listed no more"


def test_what_a_teardown_that_stops_half_way_has_done_is_told(running, burst):
    running.denies("ecs:StopTask")
    shown = burst("teardown", "aws", "--yes", "--stop-tasks")
    again = "ome tasks may have been stopped; all else is there. Run `burst teardown aws` again"
    assert f". S{again}" in shown.output and "Nothing was removed" not in shown.output
    (described,) = running.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    described["Outputs"].append({"OutputKey": "Schedule", "OutputValue": "burst-dask-heal"})
    running.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described]})
    running.answers("scheduler:DeleteSchedule", {})
    running.statuses = iter(["RUNNING"] * 2)
    shown = burst("teardown", "aws", "--yes", "--stop-tasks")
    assert f"The schedule burst-dask-heal is removed, and s{again}" in shown.output


def test_a_task_that_has_ended_meanwhile_needs_no_stopping(running, burst):
    def gone(asked):
        running.running.remove(asked["task"])
        raise ClientError({"Error": {"Code": "InvalidParameterException", "Message": "not found"}}, "StopTask")

    running.answers("ecs:StopTask", gone)
    assert burst("teardown", "aws", "--yes", "--stop-tasks").exit_code == 0
    assert read_stack(running.clients) is None


def test_stops_also_the_tasks_that_workers_start_meanwhile(running, burst):
    """Workers look after their fleet until they have ended."""

    def stop(asked):
        running.running.remove(asked["task"])
        if asked["task"] == "arn:task/1":
            running.running.append("arn:task/2")
        return {"task": {}}

    running.answers("ecs:StopTask", stop)
    assert burst("teardown", "aws", "--yes", "--stop-tasks").exit_code == 0
    assert [one["task"] for one in running.asked("ecs:StopTask")] == ["arn:task/1", "arn:task/2"]


def test_instances_are_protected_and_so_ended_by_force(filled, burst):
    ending = [{"AutoScalingGroupName": "g", "Instances": [{"InstanceId": "i-1"}]}]
    idle = {"AutoScalingGroupName": "h", "Instances": []}
    looks = iter([[*ending, idle], ending, []])  # it takes a while until they have ended
    filled.answers("autoscaling:DescribeAutoScalingGroups", lambda _: {"AutoScalingGroups": next(looks)})
    filled.answers("autoscaling:DeleteAutoScalingGroup", {})
    filled.answers("ecs:ListContainerInstances", {"containerInstanceArns": ["arn:instance/1"]})
    filled.answers("ecs:DeregisterContainerInstance", {})
    assert burst("teardown", "aws", "--yes").exit_code == 0
    assert filled.asked("autoscaling:DeleteAutoScalingGroup") == [{"AutoScalingGroupName": "g", "ForceDelete": True}]
    (gone,) = filled.asked("ecs:DeregisterContainerInstance")
    assert gone == {"cluster": "burst-dask", "containerInstance": "arn:instance/1", "force": True}
    names = [name for name, _ in filled.calls]
    assert names.index("ecs:DeregisterContainerInstance") < names.index("cloudformation:DeleteStack")


@pytest.fixture
def slow(filled):
    """Instances that take longer to end than anybody waits."""
    group = {"AutoScalingGroupName": "g", "Instances": [{"InstanceId": "i-1"}, {"InstanceId": "i-2"}]}
    filled.groups = [group]

    def delete(asked):
        group["Status"] = "Delete in progress"
        return {}

    filled.answers("autoscaling:DescribeAutoScalingGroups", lambda _: {"AutoScalingGroups": list(filled.groups)})
    filled.answers("autoscaling:DeleteAutoScalingGroup", delete)
    filled.instances = ["arn:instance/1", "arn:instance/2"]
    filled.answers("ecs:ListContainerInstances", lambda _: {"containerInstanceArns": list(filled.instances)})
    filled.answers(
        "ecs:DeregisterContainerInstance", lambda asked: filled.instances.remove(asked["containerInstance"]) or {}
    )
    return filled


def test_instances_that_do_not_end_in_time_are_named(slow, burst, monkeypatch):
    clock = iter(range(0, 10_000, 200))
    monkeypatch.setattr("burst_dask.clock.SystemClock.monotonic", lambda self: next(clock))
    shown = burst("teardown", "aws", "--yes")
    assert shown.exit_code == 1
    assert "2 instances of the group g, such as i-1 have not ended within five minutes. AWS goes on" in shown.output
    assert "its images, logs and bucket are still there, but no worker can run on EC2 in it any more" in shown.output
    assert "run `burst teardown aws` again in some minutes, which ends what was begun" in shown.output
    assert read_stack(slow.clients) is not None and not slow.asked("ecr:BatchDeleteImage")


@pytest.mark.parametrize("gone", [True, False])
def test_a_second_teardown_ends_what_the_first_has_begun(slow, burst, monkeypatch, gone):
    """The groups are gone or on their way, and the cluster, which must have no instances, still knows them."""
    with monkeypatch.context() as patch:
        clock = iter(range(0, 10_000, 200))
        patch.setattr("burst_dask.clock.SystemClock.monotonic", lambda self: next(clock))
        assert burst("teardown", "aws", "--yes").exit_code == 1
    looks = iter([[] if gone else slow.groups, []])
    slow.answers("autoscaling:DescribeAutoScalingGroups", lambda _: {"AutoScalingGroups": next(looks, [])})
    assert burst("teardown", "aws", "--yes").exit_code == 0
    assert len(slow.asked("autoscaling:DeleteAutoScalingGroup")) == 1, "once is enough"
    assert slow.instances == [] and read_stack(slow.clients) is None


def test_the_schedule_ends_first_and_its_task_is_nobody_s_session(running, burst):
    """It may be looking just now; that is no reason to refuse, and it must start nothing meanwhile."""
    healer = "arn:aws:ecs:us-east-1:123456789012:task-definition/burst-dask-healer:1"
    looking = {"taskArn": "arn:task/1", "lastStatus": "RUNNING", "taskDefinitionArn": healer, "tags": []}
    running.answers(
        "ecs:DescribeTasks", lambda _: {"tasks": [looking | {"lastStatus": next(running.statuses, "STOPPED")}]}
    )
    (described,) = running.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    described["Outputs"].append({"OutputKey": "Schedule", "OutputValue": "burst-dask-heal"})
    running.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described]})
    running.fails("scheduler:DeleteSchedule", "ResourceNotFoundException")  # an earlier teardown did it
    running.answers("cloudformation:DeleteStack", lambda _: running.allows("cloudformation:DescribeStacks") or {})
    burst("teardown", "aws", "--yes")
    names = [name for name, _ in running.calls]
    assert (
        names.index("scheduler:DeleteSchedule")
        < names.index("ecs:StopTask")
        < names.index("cloudformation:DeleteStack")
    )


def test_task_definitions_go_out_of_use(filled, burst):
    ecs = filled.clients.client("ecs")
    container = {"name": "worker", "image": "x", "memory": 512}
    ecs.register_task_definition(family="burst-dask-worker-abc", containerDefinitions=[container])
    others = ["burst-dask-worker-2-worker-abc", "other"]  # of a stack called burst-dask-worker-2, and of nobody
    for family in others:
        ecs.register_task_definition(family=family, containerDefinitions=[container])
    burst("teardown", "aws", "--yes")
    active = ecs.list_task_definitions(status="ACTIVE")["taskDefinitionArns"]
    assert [arn.rpartition("/")[2] for arn in active] == [f"{family}:1" for family in others]


def test_no_stack(account, burst):
    assert burst("teardown", "aws", "--yes").output == f"there is no stack burst-dask in {servers.REGION}\n"


def test_a_failed_removal_says_why(filled, burst):
    (described,) = filled.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    filled.answers("cloudformation:DeleteStack", {})
    status = iter(["CREATE_COMPLETE", "CREATE_COMPLETE", "DELETE_FAILED"])
    filled.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described | {"StackStatus": next(status)}]})
    event = {
        "EventId": "1",
        "LogicalResourceId": "WorkerGroup",
        "ResourceType": "AWS::EC2::SecurityGroup",
        "ResourceStatus": "DELETE_FAILED",
        "ResourceStatusReason": "it has a dependent object",
        "StackId": "s",
        "StackName": "burst-dask",
        "Timestamp": 1,
    }
    filled.answers("cloudformation:DescribeStackEvents", {"StackEvents": [event]})
    shown = burst("teardown", "aws", "--yes")
    assert shown.exit_code == 1
    assert (
        "WorkerGroup (AWS::EC2::SecurityGroup): it has a dependent object. Run `burst teardown aws` again"
        in shown.output
    )


CALLS = {
    "cloudformation:DescribeStacks",
    "cloudformation:ListStackResources",
    "cloudformation:DeleteStack",
    "cloudformation:DescribeStackEvents",
    "autoscaling:DescribeAutoScalingGroups",
    "ecs:ListTasks",
    "ecs:DescribeTasks",
    "ecs:StopTask",
    "ecs:ListContainerInstances",
    "ecs:ListTaskDefinitionFamilies",
    "iam:ListRoles",
    "ecr:ListImages",
    "ecr:BatchDeleteImage",
}
#: Without them a bucket counts as that of somebody else, and is not deleted.
SPARED = {
    "sts:GetCallerIdentity",
    "s3:HeadBucket",
    "s3:GetBucketTagging",
    "ecr:DescribeImages",
    "secretsmanager:ListSecrets",  # without it keys of signed sessions stay, and that is told
}


def test_these_are_all_calls(running, burst):
    running.clients._made.pop("identity", None)
    burst("teardown", "aws", "--yes", "--stop-tasks")
    assert {name for name, _ in running.calls} == CALLS | SPARED


def test_each_right_that_lacks_is_named(running, burst):
    # in the order of the calls: what a refusal leaves undone, the next try does
    for call in dict.fromkeys(name for name, _ in calls_of(running, burst) if name in CALLS):
        answer = running._answers.get(call)
        running.denies(call)
        shown = burst("teardown", "aws", "--yes", "--stop-tasks")
        running.allows(call)
        if answer:
            running.answers(call, answer)
        assert (shown.exit_code, f"you lack the right {call}" in shown.output) == (1, True), call


def calls_of(account, burst):
    """Return the calls of a whole teardown, of a stack that is then set up again."""
    burst("teardown", "aws", "--yes", "--stop-tasks")
    found = list(account.calls)
    burst("setup", "aws", "--yes")
    account.clients.client("ecr").put_image(repositoryName="burst-dask", imageManifest=MANIFEST, imageTag="t-arm64")
    account.running.append("arn:task/1")
    return found


def test_without_the_right_to_know_a_bucket_is_not_deleted(running, burst):
    for call in SPARED - {"ecr:DescribeImages", "secretsmanager:ListSecrets"}:
        running.clients._made.pop("identity", None)
        running.denies(call)
        shown = burst("teardown", "aws", "--yes", "--stop-tasks", "--data")
        running.allows(call)
        assert (shown.exit_code, "--data does not delete it" in shown.output) == (1, True), call
    assert not running.asked("s3:DeleteBucket") and BUCKET in buckets(running)
