"""`burst doctor aws`: what keeps workers from running is told in words, before any is started."""

from __future__ import annotations

import json

import msgspec
import pytest
from botocore.exceptions import NoCredentialsError

from burst_dask.aws.image import sources_here
from burst_dask.aws.pushing import INDEX_TYPE
from burst_dask.aws.rights import rights_of
from burst_dask.aws.stack import read_stack

BUCKET = "burst-dask-123456789012-us-east-1"
REPOSITORY = "123456789012.dkr.ecr.us-east-1.amazonaws.com/burst-dask"


def put_image(account, *archs, tag=None):
    manifests = [
        {"digest": f"sha256:{arch}", "size": 1, "platform": {"architecture": arch, "os": "linux"}} for arch in archs
    ]
    account.clients.client("ecr").put_image(
        repositoryName="burst-dask",
        imageManifest=json.dumps({"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": manifests}),
        imageManifestMediaType=INDEX_TYPE,
        imageTag=tag or sources_here().tag,
    )


@pytest.fixture
def ready(stack):
    """A stack with an image for both architectures, and a bucket as the template makes it."""
    put_image(stack, "amd64", "arm64")
    every = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")
    block = dict.fromkeys(every, True)
    stack.clients.client("s3").put_public_access_block(Bucket=BUCKET, PublicAccessBlockConfiguration=block)
    stack.calls.clear()
    return stack


@pytest.fixture
def told(burst):
    """Return what `burst doctor aws` finds of a level, as ``"topic: text"``, and check the exit code."""

    def ask(level, *arguments):
        shown = burst("doctor", "aws", "--json", *arguments)
        found = json.loads(shown.stdout)
        assert shown.exit_code == (0 if found["healthy"] else 1)
        return [f"{one['topic']}: {one['text']}" for one in found["findings"] if one["level"] == level]

    return ask


def test_all_is_well(ready, burst):
    shown = burst("doctor", "aws")
    assert shown.exit_code == 0, shown.output
    assert shown.output.startswith(
        "stack burst-dask in us-east-1\nok      credentials: you are arn:aws:sts::123456789012"
    )
    assert f"ok      image: {REPOSITORY}:{sources_here().tag} for x86_64 and arm64\n" in shown.output
    assert shown.output.endswith("workers can run\n")


def test_nothing_is_started_or_changed(ready, told):
    told("ok")
    verbs = {name.partition(":")[2] for name, _ in ready.calls}
    assert all(verb.startswith(("Describe", "Get", "List", "Head", "Batch", "Simulate")) for verb in verbs), verbs


def test_the_other_doctor_still_looks_into_stores(burst, tmp_path):
    shown = burst("doctor", "k3w9x2mq", "--store", str(tmp_path))
    assert shown.exit_code == 1 and "holds nothing of 'k3w9x2mq'" in shown.output


def test_no_stack(account, told):
    assert told("blocks") == ["stack: there is none: run `burst setup aws --stack burst-dask --region us-east-1`"]


def test_no_credentials(ready, told):
    def fail(_):
        raise NoCredentialsError

    ready.answers("cloudformation:DescribeStacks", fail)
    (blocks,) = told("blocks")
    assert blocks.startswith("credentials: no AWS credentials found") and "aws sso login" in blocks


def test_expired_credentials(ready, told):
    ready.fails(
        "cloudformation:DescribeStacks", "ExpiredToken", "The security token included in the request is expired"
    )
    (blocks,) = told("blocks")
    assert blocks.startswith("credentials: the AWS credentials have expired")


# ── rights ───────────────────────────────────────────────────────────────────────────────────────────────────────────

RIGHTS = (
    "s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:DeleteObject", "ecs:RegisterTaskDefinition",
    "ecs:DescribeTaskDefinition", "ecs:RunTask", "ecs:TagResource", "iam:PassRole", "ecs:ListTasks",
    "ecs:DescribeTasks", "ecs:StopTask", "ecr:DescribeImages",
)  # fmt: skip


def test_iam_is_asked_of_each_right(ready, told):
    for right in RIGHTS:
        ready.answers(
            "iam:SimulatePrincipalPolicy",
            lambda asked, right=right: {
                "EvaluationResults": [
                    {"EvalDecision": "implicitDeny" if asked["ActionNames"] == [right] else "allowed"}
                ]
            },
        )
        blocks = told("blocks")
        assert blocks and all(one.startswith(f"rights: you lack {right}") for one in blocks), right


def test_roles_may_be_passed_to_ecs_only(ready, told):
    told("ok")
    passed = [one for one in ready.asked("iam:SimulatePrincipalPolicy") if one["ActionNames"] == ["iam:PassRole"]]
    contexts = [{one["ContextKeyName"]: one["ContextKeyValues"] for one in call["ContextEntries"]} for call in passed]
    assert len(contexts) == 3, "the roles of the stack, and those of single sessions"
    for context in contexts:
        assert context["iam:PassedToService"] == ["ecs-tasks.amazonaws.com"]
        assert context["ecs:cluster"] == ["arn:aws:ecs:us-east-1:123456789012:cluster/burst-dask"]


def test_an_encrypted_bucket_takes_rights_on_its_key(ready):
    stack = read_stack(ready.clients)
    key = "arn:aws:kms:us-east-1:123456789012:key/1"
    found = {right.action: right for right in rights_of(ready.clients, msgspec.structs.replace(stack, kms_key=key))}
    for action in ("kms:Decrypt", "kms:GenerateDataKey"):
        assert (found[action].resource, found[action].needed) == (key, True)
        assert action not in {right.action for right in rights_of(ready.clients, stack)}


def test_policies_of_a_role_count_not_its_session(ready, told):
    ready.clients.client("iam").create_role(RoleName="dev", Path="/team/", AssumeRolePolicyDocument="{}")
    arn = "arn:aws:sts::123456789012:assumed-role/dev/me"
    ready.clients.identity["Arn"] = arn
    told("ok")
    asked = ready.asked("iam:SimulatePrincipalPolicy")[0]
    assert asked["PolicySourceArn"] == "arn:aws:iam::123456789012:role/team/dev"


#: Calls that are tried when IAM may not be asked, with the right that each tells of.
TRIED = {
    "s3:ListObjectsV2": "s3:ListBucket",
    "s3:GetObject": "s3:GetObject",
    "ecs:RegisterTaskDefinition": "ecs:RegisterTaskDefinition",
    "ecs:DescribeTaskDefinition": "ecs:DescribeTaskDefinition",
    "ecs:RunTask": "ecs:RunTask",
    "ecs:StopTask": "ecs:StopTask",
    "ecs:ListTasks": "ecs:ListTasks",
    "ecs:DescribeTasks": "ecs:DescribeTasks",
}


def test_without_the_right_to_ask_calls_are_tried(ready, told):
    ready.denies("iam:SimulatePrincipalPolicy")
    ready.answers("ecs:RegisterTaskDefinition", {})  # moto would register one without a container
    for call, right in TRIED.items():
        ready.denies(call, right)
        found = told("blocks")
        ready.allows(call)
        assert [one.partition(" on ")[0].partition(",")[0] for one in found] == [f"rights: you lack {right}"]


def test_what_is_tried_can_start_nothing(ready, told):
    ready.denies("iam:SimulatePrincipalPolicy")
    assert any("calls that cannot do anything tell" in one for one in told("ok") + told("note"))
    assert ready.asked("ecs:RunTask")[:1] == [{"cluster": "burst-dask", "taskDefinition": "burst-dask-worker-none"}]
    assert ready.asked("ecs:RegisterTaskDefinition")[0]["containerDefinitions"] == []


def test_what_may_not_be_looked_at_does_not_block(ready, told):
    for call in LOOKED:
        answer = ready._answers.get(call)
        ready.denies(call)
        found = told("note")
        assert any(f"cannot be looked at: you lack the right {call}" in note for note in found), call
        assert told("blocks") == []
        ready.allows(call) if answer is None else ready.answers(call, answer)


LOOKED = (
    "ecs:DescribeClusters",
    "ec2:DescribeSubnets",
    "ec2:DescribeRouteTables",
    "ec2:DescribeVpcEndpoints",
    "ecr:BatchGetImage",
    "servicequotas:GetServiceQuota",
    "s3:GetPublicAccessBlock",
)


def test_the_right_to_see_the_stack(ready, told):
    ready.denies("cloudformation:DescribeStacks")
    (blocks,) = told("blocks")
    assert "you lack the right cloudformation:DescribeStacks" in blocks


# ── network ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_subnets_without_a_way_to_s3_and_the_registry(ready, told):
    ec2 = ready.clients.client("ec2")
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.delete_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
    ready.answers("ec2:DescribeVpcEndpoints", {"VpcEndpoints": []})
    blocks = told("blocks")
    assert len(blocks) == 12
    assert any("has no way to S3: no gateway endpoint, no NAT, no gateway" in one for one in blocks)
    assert any(
        "has no way to the image registry and to CloudWatch Logs: add a NAT, or run `burst setup aws --private-e" in one
        for one in blocks
    )


def endpoints(*services, **more):
    return [
        {
            "VpcEndpointType": "Interface",
            "ServiceName": f"com.amazonaws.us-east-1.{service}",
            "State": "available",
            "PrivateDnsEnabled": True,
            **more,
        }
        for service in services
    ]


@pytest.mark.parametrize(
    ("logs", "blocked"),
    [
        (endpoints("logs"), False),
        ([], True),  # ECS starts no task whose log it cannot open
        (endpoints("logs", PrivateDnsEnabled=False), True),  # nobody finds it under the usual name
        (endpoints("logs", State="failed"), True),
    ],
)
def test_private_endpoints_that_lead_to_all_that_a_task_needs(ready, told, logs, blocked):
    ec2 = ready.clients.client("ec2")
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.delete_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
    (vpc,) = [one["VpcId"] for one in ec2.describe_vpcs()["Vpcs"]]
    found = [one | {"VpcId": vpc} for one in (*endpoints("ecr.api", "ecr.dkr", "s3"), *logs)]
    ready.answers("ec2:DescribeVpcEndpoints", {"VpcEndpoints": found})
    assert bool(told("blocks")) is blocked


def test_the_stacks_own_endpoint_leads_to_s3(ready, told):
    ec2 = ready.clients.client("ec2")
    (table,) = [one["RouteTableId"] for one in ec2.describe_route_tables()["RouteTables"]]
    ec2.delete_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0")
    assert all("image registry" in one for one in told("blocks"))


# ── image ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_image(stack, told):
    assert told("blocks") == [f"image: {REPOSITORY} is empty: run `burst image push`"]


def test_an_image_that_is_not_there(ready, told):
    assert told("blocks", "--image", f"{REPOSITORY}:gone") == [
        f"image: there is no {REPOSITORY}:gone: run `burst image push`"
    ]


def test_the_wrong_architecture(stack, told):
    put_image(stack, "amd64")
    assert told("blocks", "--arch", "x86_64") == []
    (blocks,) = told("blocks", "--arch", "arm64")
    assert "is of the wrong architecture: it has x86_64, and arm64 is asked for" in blocks
    assert "`burst image push --arch arm64`" in blocks


def test_an_image_of_another_installation(stack, told):
    put_image(stack, "amd64", "arm64", tag="0123456789abcdef")
    assert any("it was built of another version of burst_dask" in note for note in told("note"))


# ── quotas ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_quota_of_6_vcpu(ready, told):
    ready.answers("servicequotas:GetServiceQuota", {"Quota": {"Value": 6.0}})
    (note,) = [one for one in told("note", "--cpu", "4") if one.startswith("quotas")]
    assert note.startswith(
        "quotas: Fargate: 6 vCPU at a time, so 1 workers of 4 at most; ask for more: `aws service-quotas"
    )
    (blocks,) = told("blocks", "--workers", "10", "--cpu", "4")
    assert "of 10 workers of 4 vCPU each, 1 can run" in blocks and "--quota-code L-3032A538" in blocks
    (blocks,) = told("blocks", "--cpu", "4", "--workers", "100")
    assert "--desired-value 512" in blocks, "no quota that would not do either"
    (blocks,) = told("blocks", "--cpu", "16", "--launch-type", "EC2", "--spot")
    assert blocks.startswith("quotas: EC2 Spot: 6 vCPU at a time, less than one worker of 16 takes")


def test_a_quota_that_was_never_changed_is_the_default(ready, told):
    ready.fails("servicequotas:GetServiceQuota", "NoSuchResourceException")
    ready.answers("servicequotas:GetAWSDefaultServiceQuota", {"Quota": {"Value": 0.0}})
    (blocks,) = told("blocks")
    assert "Fargate: 0 vCPU at a time, less than one worker of 1 takes" in blocks


# ── store ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_store_in_another_region(ready, told):
    ready.clients.client("s3").create_bucket(
        Bucket="far", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"}
    )
    (blocks,) = told("blocks", "--store", "s3://far/x")
    assert "the bucket far is in eu-west-1, and workers are in us-east-1" in blocks
    assert "`burst setup aws --region eu-west-1`" in blocks


def test_a_store_that_workers_cannot_reach_or_write(ready, told):
    assert "cannot reach gs://x/y" in told("blocks", "--store", "gs://x/y")[0]
    assert "there is no bucket nowhere" in told("blocks", "--store", "s3://nowhere/x")[0]
    assert "workers may write below burst/ only" in told("blocks", "--store", f"s3://{BUCKET}/elsewhere")[0]
    assert told("blocks", "--store", f"s3://{BUCKET}/burst/team") == []


def test_a_bucket_that_others_may_get_into(ready, told):
    ready.clients.client("s3").delete_public_access_block(Bucket=BUCKET)
    assert any(f"public access to {BUCKET} is not blocked" in note for note in told("note"))
