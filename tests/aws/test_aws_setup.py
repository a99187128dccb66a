"""`burst setup aws`: what it shows, asks, sends, and says when it cannot."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from burst_dask.aws import schedule, setup
from burst_dask.aws.assets import TEMPLATE, asset
from burst_dask.aws.stack import read_stack

BUCKET = "burst-dask-123456789012-us-east-1"
README = Path(__file__).parents[2] / "README.md"


def parameters(account):
    """Return the parameters of the template that were sent last."""
    sent = account.asked("cloudformation:CreateChangeSet")[-1]
    return {one["ParameterKey"]: one["ParameterValue"] for one in sent["Parameters"]}


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
    assert parameters(account)["LogDays"] == "7"


def test_changes_what_is_asked_for(stack, burst):
    before = parameters_of_stack(stack)
    stack.answers("cloudformation:ExecuteChangeSet", {})  # moto cannot change policies
    stack.answers("cloudformation:DescribeStackEvents", {"StackEvents": []})
    status = iter(["CREATE_COMPLETE", "CREATE_COMPLETE", "UPDATE_IN_PROGRESS", "UPDATE_COMPLETE", "UPDATE_COMPLETE"])
    described = stack.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"][0]
    stack.answers("cloudformation:DescribeStacks", lambda _: {"Stacks": [described | {"StackStatus": next(status)}]})
    shown = burst("setup", "aws", "--yes", "--log-days", "7", "--no-self-healing")
    assert shown.output.startswith("Changing the stack burst-dask in us-east-1:")
    assert shown.exit_code == 0 and "The stack burst-dask stands." in shown.output
    sent = parameters(stack)
    assert (sent.pop("LogDays"), sent.pop("SelfHealing")) == ("7", "false")
    assert sent.items() <= before.items()
    assert stack.asked("cloudformation:CreateChangeSet")[-1]["ChangeSetType"] == "UPDATE"


def parameters_of_stack(account):
    (found,) = account.clients.client("cloudformation").describe_stacks(StackName="burst-dask")["Stacks"]
    return {one["ParameterKey"]: one["ParameterValue"] for one in found["Parameters"]}


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


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_default_vpc(account, burst):
    account.answers("ec2:DescribeVpcs", {"Vpcs": [{"VpcId": "vpc-1", "IsDefault": False}]})
    shown = burst("setup", "aws", "--yes")
    assert shown.exit_code == 1
    assert shown.output == (
        "Error: us-east-1 has no default VPC. Choose one of its others by --vpc: vpc-1. Or create the default one by "
        "`aws ec2 create-default-vpc --region us-east-1`, which is free. Nothing was changed\n"
    )


def test_subnets_without_a_way_out(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.1.0/24")["Subnet"]["SubnetId"]
    shown = burst("setup", "aws", "--yes", "--vpc", vpc)
    assert shown.exit_code == 1 and f"from {subnet} no image can be fetched" in shown.output
    assert "--private-endpoints" in shown.output
    assert burst("setup", "aws", "--yes", "--vpc", vpc, "--private-endpoints").exit_code == 0
    assert (parameters(account)["PrivateEndpoints"], parameters(account)["AssignPublicIp"]) == ("true", "DISABLED")


def test_what_costs_without_a_worker_is_told(account, burst):
    stored = "While no worker runs, only what is stored costs"
    assert f"\n{stored}\n" in burst("setup", "aws", "--dry-run").output
    shown = burst("setup", "aws", "--dry-run", "--warm", "1", "--instance-types", "c7i.large", "--private-endpoints")
    assert "\nPrivate endpoints cost about 7 USD a month, for each of seven in each zone, from now on\n" in shown.output
    assert f"\nDisks of instances that are kept ready cost from now on\n{stored}, and that\n" in shown.output


def test_subnets_behind_a_nat_need_no_public_address(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    public = ec2.describe_subnets()["Subnets"][0]["SubnetId"]
    zone = ec2.describe_subnets()["Subnets"][0]["AvailabilityZone"]
    private = ec2.create_subnet(VpcId=vpc, CidrBlock="172.31.200.0/24", AvailabilityZone=zone)["Subnet"]["SubnetId"]
    address = ec2.allocate_address(Domain="vpc")["AllocationId"]
    nat = ec2.create_nat_gateway(SubnetId=public, AllocationId=address)["NatGateway"]["NatGatewayId"]
    table = ec2.create_route_table(VpcId=vpc)["RouteTable"]["RouteTableId"]
    ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", NatGatewayId=nat)
    ec2.associate_route_table(RouteTableId=table, SubnetId=private)
    burst("setup", "aws", "--yes")
    sent = parameters(account)
    assert (sent["Subnets"], sent["AssignPublicIp"], sent["RouteTables"]) == (private, "DISABLED", table)


def test_an_endpoint_that_is_there_is_not_made_again(account, burst):
    ec2 = account.clients.client("ec2")
    vpc = ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.create_vpc_endpoint(VpcId=vpc, ServiceName="com.amazonaws.us-east-1.s3", RouteTableIds=[table])
    burst("setup", "aws", "--yes")
    assert parameters(account)["RouteTables"] == ""


def test_the_stacks_own_endpoint_is_not_taken_for_somebody_elses(stack, burst):
    """Where it has no tag that tells, the stack would delete it, and its workers had no free way to S3."""
    before = parameters_of_stack(stack)
    assert before["RouteTables"]
    untagged = stack.clients.client("ec2").describe_vpc_endpoints()["VpcEndpoints"]
    stack.answers("ec2:DescribeVpcEndpoints", {"VpcEndpoints": [one | {"Tags": []} for one in untagged]})
    burst("setup", "aws", "--dry-run", "--subnets", before["Subnets"])
    assert parameters(stack)["RouteTables"] == before["RouteTables"]


def test_more_subnets_than_a_page_has(account, burst):
    found = account.clients.client("ec2").describe_subnets()["Subnets"]
    pages = {None: {"Subnets": found[:4], "NextToken": "more"}, "more": {"Subnets": found[4:]}}
    account.answers("ec2:DescribeSubnets", lambda asked: pages[asked.get("NextToken")])
    burst("setup", "aws", "--dry-run")
    assert len(parameters(account)["Subnets"].split(",")) == len(found) == 6


def test_no_such_subnet(account, burst):
    shown = burst("setup", "aws", "--yes", "--subnets", "subnet-00000000")
    assert shown.exit_code == 1 and "aws ec2 describe-subnets" in shown.output


# ── bucket ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_bucket_that_is_there_is_used(account, burst):
    account.clients.client("s3").create_bucket(Bucket="mine")
    shown = burst("setup", "aws", "--yes", "--bucket", "mine")
    assert "Bucket: mine (it is there already)" in shown.output and "is deleted" not in shown.output
    assert (parameters(account)["BucketName"], parameters(account)["CreateBucket"]) == ("mine", "false")


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
    sent = parameters(account)
    assert sent["MoreBuckets"] == "arn:aws:s3:::other"
    assert sent["MoreRead"] == "arn:aws:s3:::other/team/*"
    assert sent["MoreWrite"] == "arn:aws:s3:::other/team/s/*,arn:aws:s3:::other/team/*/s/*"
    first, second = sent["MoreWrite"].split(",")
    assert sent["MoreDelete"] == f"{first}/runs/*/segments/*,{second}/runs/*/segments/*"
    assert burst("setup", "aws", "--store", "gs://other/team").exit_code == 1


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────────────────────────


def push(account, tag, *archs):
    """Have an image in the repository."""
    kind = "application/vnd.oci.image.index.v1+json"
    parts = [{"digest": f"sha256:{tag}", "platform": {"architecture": arch}} for arch in archs]
    account.clients.client("ecr").put_image(
        repositoryName="burst-dask",
        imageManifest=json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": parts}),
        imageManifestMediaType=kind,
        imageTag=tag,
    )
    return f"123456789012.dkr.ecr.us-east-1.amazonaws.com/burst-dask:{tag}"


def test_a_schedule_needs_an_image_and_so_comes_later(account, burst):
    shown = burst("setup", "aws", "--yes", "--heal-every", "15")
    assert shown.exit_code == 1 and read_stack(account.clients) is None
    order = "`burst setup aws` without --heal-every, `burst image push`, `burst setup aws --heal-every 15`"
    assert f"the stack burst-dask has none yet. In this order: {order}. Nothing was changed" in shown.output
    burst("setup", "aws", "--yes")
    shown = burst("setup", "aws", "--yes", "--heal-every", "15")
    assert "In this order: `burst image push`, `burst setup aws --heal-every 15`" in shown.output


def test_a_schedule_with_its_image_and_what_it_costs(stack, burst):
    image = push(stack, "new", "amd64", "arm64")
    shown = burst("setup", "aws", "--heal-every", "15", "--dry-run")
    sent = parameters(stack)
    assert (sent["HealEvery"], sent["HealImage"], sent["HealArchitecture"]) == ("15", image, "ARM64")
    hourly = 0.25 * 0.03238 + 0.5 * 0.00356 + 0.005  # with a public address
    told = (
        "Every 15 minutes a task looks where work waits with no worker alive: 2,920 starts a month of 0.25 vCPU with "
        f"0.5 GiB (arm64), each paid for a minute or so: about {2920 / 60 * hourly:.2f} USD, by the table of"
    )
    assert told in shown.output
    on_x86 = hourly + 0.25 * (0.04048 - 0.03238) + 0.5 * (0.004445 - 0.00356)
    costs = f"(in us-east-1 {2920 / 60 * hourly:.2f} USD a month on Arm, {2920 / 60 * on_x86:.2f} on x86)"
    assert costs in README.read_text()


def test_a_schedule_on_the_only_architecture_that_there_is(stack, burst):
    push(stack, "new", "amd64")
    assert "(x86_64), each paid" in burst("setup", "aws", "--heal-every", "60", "--dry-run").output
    assert parameters(stack)["HealArchitecture"] == "X86_64"


@pytest.fixture
def scheduled(stack):
    """A stack with a schedule. moto cannot change stacks, so it is made anew."""
    formation, image = stack.clients.client("cloudformation"), f"{read_stack(stack.clients).repository}:first"
    kept = (*setup.OPTIONS, *setup.NETWORK, *setup.BUCKET)
    found = {key: value for key, value in parameters_of_stack(stack).items() if key in kept}
    found |= {"HealEvery": "15", "HealImage": image}
    formation.delete_stack(StackName="burst-dask")
    formation.create_stack(
        StackName="burst-dask",
        TemplateBody=asset(TEMPLATE).read_text(),
        Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in found.items()],
    )
    assert push(stack, "first", "amd64") == image
    stack.calls.clear()
    return stack, image


def test_a_schedule_takes_the_newest_image_and_stays_when_it_cannot_be_seen(scheduled, burst):
    account, first = scheduled
    assert (read_stack(account.clients).schedule, read_stack(account.clients).heal_image) == ("burst-dask-heal", first)
    burst("setup", "aws", "--dry-run")
    assert parameters(account)["HealImage"] == first
    newest = push(account, "second", "amd64")
    burst("setup", "aws", "--dry-run")
    assert parameters(account)["HealImage"] == newest
    account.denies("ecr:DescribeImages")
    burst("setup", "aws", "--dry-run")
    assert (parameters(account)["HealImage"], parameters(account)["HealEvery"]) == (first, "15")


def test_the_doctor_looks_at_the_schedule(scheduled, burst):
    account, first = scheduled
    assert f"ok      schedule: burst-dask-heal runs {first}\n" in burst("doctor", "aws").output
    newest = push(account, "second", "amd64")
    assert f"`burst setup aws` has it run {newest}\n" in burst("doctor", "aws").output
    account.clients.client("ecr").batch_delete_image(repositoryName="burst-dask", imageIds=[{"imageTag": "first"}])
    assert f"note    schedule: there is no {first} any more" in burst("doctor", "aws").output


def test_an_image_that_is_pushed_is_not_that_of_the_schedule(scheduled):
    account, first = scheduled
    stack = read_stack(account.clients)
    assert schedule.outdated(stack, first) == ""
    said = f"The schedule of the stack burst-dask runs {first}; `burst setup aws` has it run {first}2"
    assert schedule.outdated(stack, f"{first}2") == said


@pytest.mark.parametrize("minutes", ["1", "4", "1441"])
def test_a_schedule_within_reason(stack, burst, minutes):
    shown = burst("setup", "aws", "--yes", "--heal-every", minutes)
    assert shown.exit_code == 1 and "must be 5 to 1440 minutes, or 0 for never" in shown.output


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
