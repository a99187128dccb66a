"""`burst setup aws`: what it shows, asks, sends, and says when it cannot."""

from __future__ import annotations

import json
import re

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from burst_dask.aws import setup
from burst_dask.aws.assets import TEMPLATE, asset
from burst_dask.aws.stack import read_stack

BUCKET = "burst-dask-123456789012-us-east-1"


def test_shows_what_it_creates_and_asks(account, burst):
    shown = burst("setup", "aws", input="n\n")
    assert shown.exit_code == 0
    assert "create  Bucket             AWS::S3::Bucket\n" in shown.output
    assert f"Bucket: {BUCKET}\nData of sessions, results too, is deleted after 90 days" in shown.output
    assert shown.output.endswith("Do it? [y/N]: n\nNothing was changed\n")
    assert read_stack(account.clients) is None
    assert not account.asked("cloudformation:ExecuteChangeSet")


def test_ctrl_c_at_the_question_leaves_nothing(account, burst):
    shown = burst("setup", "aws", input="")
    assert shown.exit_code != 0
    assert read_stack(account.clients) is None
    assert not account.asked("cloudformation:ExecuteChangeSet")
    assert account.asked("cloudformation:DeleteStack") or account.asked("cloudformation:DeleteChangeSet")


def test_creates_and_tells_the_next_line(account, burst):
    shown = burst("setup", "aws", input="y\n")
    assert "The stack burst-dask stands." in shown.output
    assert f"store  s3://{BUCKET}/burst?region=us-east-1" in shown.output
    assert shown.output.endswith("Next:\n  burst image push --region us-east-1\n")
    stack = read_stack(account.clients)
    assert (stack.bucket, stack.cluster, stack.assign_public_ip) == (BUCKET, "burst-dask", True)
    assert stack.capacity_providers == {
        "x86_64": "burst-dask-x86",
        "x86_64-spot": "burst-dask-x86-spot",
        "arm64": "burst-dask-arm",
        "arm64-spot": "burst-dask-arm-spot",
    }
    assert len(stack.subnets) == 6 and len(stack.security_groups) == 1


def test_again_changes_nothing(stack, burst):
    shown = burst("setup", "aws")
    assert shown.exit_code == 0 and shown.output.startswith("The stack burst-dask was up to date.")
    assert not stack.asked("cloudformation:ExecuteChangeSet")


def test_again_keeps_what_was_asked_for_before(account, burst):
    burst("setup", "aws", "--yes", "--log-days", "7")
    assert not json.loads(burst("setup", "aws", "--yes", "--json").stdout)["changed"]
    assert account.sent()["LogDays"] == "7"


def test_changes_what_is_asked_for(stack, burst):
    before = stack.has()
    stack.answers("cloudformation:ExecuteChangeSet", {})  # moto cannot change policies
    stack.answers("cloudformation:DescribeStackEvents", {"StackEvents": []})
    status = iter(["CREATE_COMPLETE", "CREATE_COMPLETE", "UPDATE_IN_PROGRESS", "UPDATE_COMPLETE", "UPDATE_COMPLETE"])
    described = stack.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"][0]
    stack.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described | {"StackStatus": next(status)}]})
    shown = burst("setup", "aws", "--yes", "--log-days", "7", "--no-self-healing")
    assert shown.output.startswith("Changing the stack burst-dask in us-east-1:")
    assert shown.exit_code == 0 and "The stack burst-dask stands." in shown.output
    sent = stack.sent()
    assert (sent.pop("LogDays"), sent.pop("SelfHealing")) == ("7", "false")
    assert sent.items() <= before.items()
    assert stack.asked("cloudformation:CreateChangeSet")[-1]["ChangeSetType"] == "UPDATE"


def test_what_costs_without_a_worker_is_told(account, burst):
    stored = "While no worker runs, only what is stored costs"
    assert f"\n{stored}\n" in burst("setup", "aws", "--dry-run").output
    shown = burst("setup", "aws", "--dry-run", "--warm", "1", "--instance-types", "c7i.large", "--private-endpoints")
    assert "\nPrivate endpoints cost about 7 USD a month, for each of seven in each zone, from now on\n" in shown.output
    assert f"\nDisks of instances that are kept ready cost from now on\n{stored}, and that\n" in shown.output


def test_dry_run_changes_nothing(account, burst):
    shown = burst("setup", "aws", "--dry-run", "--json")
    assert json.loads(shown.stdout)["changed"] is False
    assert {"action": "Add", "resource": "Cluster", "kind": "AWS::ECS::Cluster", "replaces": False} in json.loads(
        shown.stdout
    )["changes"]
    assert read_stack(account.clients) is None


def test_json_goes_alone_to_standard_output(account, burst):
    shown = burst("setup", "aws", "--yes", "--json")
    assert json.loads(shown.stdout)["stack"]["bucket"] == BUCKET
    assert "Creating the stack" in shown.stderr


def test_every_resource_of_the_stack_is_tagged_by_cloudformation(account, burst):
    burst("setup", "aws", "--yes")
    (sent,) = account.asked("cloudformation:CreateChangeSet")
    assert sent["Tags"] == [{"Key": "burst-dask:stack", "Value": "burst-dask"}]
    assert sent["Capabilities"] == ["CAPABILITY_IAM"]


def test_service_roles_that_an_account_lacks_are_created(account, burst):
    burst("setup", "aws", "--yes")
    made = [one["AWSServiceName"] for one in account.asked("iam:CreateServiceLinkedRole")]
    assert made == ["ecs.amazonaws.com", "autoscaling.amazonaws.com", "spot.amazonaws.com"]


# ── bucket ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bucket_that_is_there_is_used(account, burst):
    account.clients.client("s3").create_bucket(Bucket="mine")
    shown = burst("setup", "aws", "--yes", "--bucket", "mine")
    assert "Bucket: mine (it is there already)" in shown.output and "is deleted" not in shown.output
    assert (account.sent()["BucketName"], account.sent()["CreateBucket"]) == ("mine", "false")


def test_a_bucket_in_another_region(account, burst):
    account.clients.client("s3").create_bucket(
        Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    shown = burst("setup", "aws", "--yes", "--bucket", "far")
    assert shown.exit_code == 1
    assert "the bucket far is in eu-west-1, and the stack would be in us-east-1" in shown.output
    assert "Pass --region eu-west-1, or another --bucket" in shown.output


def test_a_bucket_of_somebody_else(account, burst):
    account.fails("s3:HeadBucket", "403", "Forbidden")
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1
    assert f"you lack the right s3:ListBucket on the bucket {BUCKET}, or it belongs to another account" in shown.output


def test_a_stack_keeps_its_bucket(stack, burst):
    shown = burst("setup", "aws", "--yes", "--bucket", "other")
    assert shown.exit_code == 1 and f"the stack burst-dask has the bucket {BUCKET}" in shown.output


def test_further_stores(account, burst):
    burst("setup", "aws", "--yes", "--store", "s3://other/team")
    sent = account.sent()
    assert sent["MoreBuckets"] == "arn:aws:s3:::other"
    assert sent["MoreRead"] == "arn:aws:s3:::other/team/*"
    assert sent["MoreWrite"] == "arn:aws:s3:::other/team/s/*,arn:aws:s3:::other/team/*/s/*"
    first, second = sent["MoreWrite"].split(",")
    assert sent["MoreDelete"] == f"{first}/runs/*/segments/*,{second}/runs/*/segments/*"
    assert burst("setup", "aws", "--store", "gs://other/team").exit_code == 1


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────────


def event(number, resource, status, reason, id="stack-1"):
    return {
        "EventId": str(number),
        "StackId": id,
        "StackName": "burst-dask",
        "LogicalResourceId": resource,
        "PhysicalResourceId": id if resource == "burst-dask" else "",
        "ResourceType": "AWS::CloudFormation::Stack" if resource == "burst-dask" else "AWS::IAM::Role",
        "ResourceStatus": status,
        "ResourceStatusReason": reason,
        "Timestamp": number,
    }


@pytest.fixture
def failing(account):
    """Have the creation of the stack fail, for a reason."""

    def fail(reason):
        account.answers("cloudformation:ExecuteChangeSet", {})
        events = [
            event(5, "burst-dask", "ROLLBACK_IN_PROGRESS", "The following resource(s) failed to create: [TaskRole]."),
            event(4, "Cluster", "CREATE_FAILED", "Resource creation cancelled"),
            event(3, "TaskRole", "CREATE_FAILED", reason),
            event(2, "burst-dask", "CREATE_IN_PROGRESS", "User Initiated"),
            event(1, "burst-dask", "REVIEW_IN_PROGRESS", "User Initiated"),
        ]

        def described(asked):
            done = bool(account.asked("cloudformation:ExecuteChangeSet"))
            if not done:
                raise missing
            return {"Stacks": [{"StackId": "stack-1", "StackName": "burst-dask", "StackStatus": "ROLLBACK_COMPLETE"}]}

        missing = ClientError(
            {"Error": {"Code": "ValidationError", "Message": "Stack with id burst-dask does not exist"}},
            "DescribeStacks",
        )
        account.answers("cloudformation:DescribeStacks", described)
        account.answers(
            "cloudformation:DescribeStackEvents",
            lambda _: {"StackEvents": events if account.asked("cloudformation:ExecuteChangeSet") else events[-1:]},
        )

    return fail


def test_a_failed_creation_names_the_first_cause(failing, burst):
    failing("Limit exceeded for Roles")
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1
    assert "  create failed TaskRole: Limit exceeded for Roles\n" in shown.output
    assert shown.output.endswith(
        "Error: the stack burst-dask was not created: TaskRole (AWS::IAM::Role): Limit exceeded for Roles. "
        "What had been created was removed again\n"
    )


def test_a_failed_creation_names_the_right_that_lacks(failing, burst):
    failing(
        "User: arn:aws:iam::123456789012:user/me is not authorized to perform: iam:CreateRole on resource: "
        "arn:aws:iam::123456789012:role/x because no identity-based policy allows the iam:CreateRole action"
    )
    shown = burst("setup", "aws", "--yes")
    assert (
        "you lack the right iam:CreateRole on arn:aws:iam::123456789012:role/x (because no identity-based policy "
        "allows the iam:CreateRole action), which creating TaskRole (AWS::IAM::Role) needs" in shown.output
    )


def test_what_a_failed_creation_has_left_is_removed_first(account, burst, failing):
    burst("setup", "aws", input="n\n")
    account.answers(
        "cloudformation:DescribeStacks",
        {"Stacks": [{"StackId": "stack-1", "StackName": "burst-dask", "StackStatus": "ROLLBACK_FAILED"}]},
    )
    account.answers(
        "cloudformation:DescribeStackEvents", {"StackEvents": [event(1, "TaskRole", "DELETE_FAILED", "no")]}
    )
    shown = burst("setup", "aws", "--yes")
    assert account.asked("cloudformation:DeleteStack")[-1] == {"StackName": "stack-1"}
    assert "what an earlier creation has left cannot be removed: TaskRole (AWS::IAM::Role): no" in shown.output


def test_aws_refuses_the_template(account, burst):
    account.answers(
        "cloudformation:DescribeChangeSet", {"Status": "FAILED", "StatusReason": "Parameter Vpc is bad", "Changes": []}
    )
    shown = burst("setup", "aws", "--yes")
    assert shown.output == "Error: AWS refuses the stack burst-dask: Parameter Vpc is bad. Nothing was changed\n"
    assert read_stack(account.clients) is None


@pytest.mark.parametrize("name", ["Upper", "aws-burst", "ecs-1", "a" * 33, "1st"])
def test_names_that_a_stack_cannot_have(account, burst, name):
    shown = burst("setup", "aws", "--stack", name)
    assert shown.exit_code == 1 and "cannot name a stack" in shown.output


def test_a_warm_pool_needs_one_type(account, burst):
    for types in ((), ("--instance-types", "c7i.*")):
        shown = burst("setup", "aws", "--yes", "--warm", "2", *types)
        assert shown.exit_code == 1 and "begin --instance-types with one" in shown.output
    assert burst("setup", "aws", "--yes", "--warm", "2", "--instance-types", "c7i.xlarge").exit_code == 0


#: Each call that setting up makes, and the right that it needs if that has another name.
CALLS = {
    "sts:GetCallerIdentity": None,
    "cloudformation:DescribeStacks": None,
    "cloudformation:CreateChangeSet": None,
    "cloudformation:DescribeChangeSet": None,
    "cloudformation:DescribeStackEvents": None,
    "cloudformation:ExecuteChangeSet": None,
    "ec2:DescribeVpcs": None,
    "ec2:DescribeSubnets": None,
    "ec2:DescribeRouteTables": None,
    "ec2:DescribeVpcEndpoints": None,
    "s3:HeadBucket": "s3:ListBucket",
    "iam:CreateServiceLinkedRole": None,
}
#: Calls without which setting up goes on.
SPARED = {"iam:GetRole", "ecr:DescribeImages"}


def test_these_are_all_calls(account, burst):
    burst("setup", "aws", "--yes")
    assert {name for name, _ in account.calls} == CALLS.keys() | SPARED


def test_each_right_that_lacks_is_named(account, burst):
    for call, right in CALLS.items():
        account.clients._made.pop("identity", None)
        account.denies(call, right)
        shown = burst("setup", "aws", "--yes")
        account.allows(call)
        assert (shown.exit_code, f"you lack the right {right or call} on " in shown.output) == (1, True), call
        assert "Add it to the policy of arn:aws:iam::123456789012:user/me" in shown.output
    assert read_stack(account.clients) is None


def test_rights_that_setting_up_can_do_without(account, burst):
    for call in SPARED:
        account.denies(call)
    assert burst("setup", "aws", "--yes").exit_code == 0


def test_credentials_that_expire_in_the_middle(account, burst):
    account.fails("cloudformation:DescribeStackEvents", "ExpiredToken", "The security token is expired")
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1 and "the AWS credentials have expired" in shown.output
    assert "`aws sso login`" in shown.output


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (NoCredentialsError(), "no AWS credentials found"),
        (EndpointConnectionError(endpoint_url="https://x"), "AWS cannot be reached"),
    ],
)
def test_without_credentials_or_network(account, burst, error, said):
    def fail(_):
        raise error

    account.answers("cloudformation:DescribeStacks", fail)
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1 and said in shown.output


def test_somebody_else_changes_the_stack(stack, burst):
    stack.answers("cloudformation:DescribeStacks", {"Stacks": [{"StackId": "s", "StackStatus": "UPDATE_IN_PROGRESS"}]})
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1 and "somebody changes it now" in shown.output


def test_the_parameters_are_those_of_the_template():
    text = asset(TEMPLATE).read_text()
    section = text[text.index("\nParameters:\n") : text.index("\nConditions:\n")]
    declared = set(re.findall(r"^  (\w+):$", section, re.MULTILINE))
    assert declared == {*setup.OPTIONS, *setup.NETWORK, *setup.BUCKET, "ImageX86", "ImageArm"}


# ── what never stood ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def planned(account):
    """A stack that somebody has planned and not agreed to yet."""
    account.clients.client("cloudformation").create_change_set(
        StackName="burst-dask",
        ChangeSetName="theirs",
        ChangeSetType="CREATE",
        TemplateBody='{"Resources": {"Cluster": {"Type": "AWS::ECS::Cluster"}}}',
    )
    account.calls.clear()
    return account


def status(account):
    return account.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"][0]["StackStatus"]


@pytest.mark.parametrize("arguments", [("--dry-run",), ("--dry-run", "--yes"), ()])
def test_what_never_stood_is_not_removed_unasked(planned, burst, arguments):
    shown = burst("setup", "aws", *arguments, input="n\n")
    assert shown.exit_code == 0 and shown.output.endswith("Nothing was changed\n")
    told = "The stack burst-dask is REVIEW_IN_PROGRESS: it was planned, by a setup that was broken off or that somebody"
    assert told in shown.output
    assert status(planned) == "REVIEW_IN_PROGRESS"
    assert {name.partition(":")[2] for name, _ in planned.calls} == {"DescribeStacks"}


def test_what_never_stood_gives_way(planned, burst):
    shown = burst("setup", "aws", input="y\ny\n")
    assert "Remove it? [y/N]: y" in shown.output and "The stack burst-dask stands." in shown.output
    assert status(planned) == "CREATE_COMPLETE"


def test_what_a_failed_creation_has_left_is_called_so(account, burst):
    failed = {"StackId": "stack-1", "StackName": "burst-dask", "StackStatus": "ROLLBACK_COMPLETE", "CreationTime": 1}
    account.answers("cloudformation:DescribeStacks", {"Stacks": [failed]})
    shown = burst("setup", "aws", "--dry-run", "--json")
    assert json.loads(shown.stdout) == {"changed": False, "changes": []}
    assert "ROLLBACK_COMPLETE: it is what a failed creation has left. It is removed, and then created" in shown.stderr
