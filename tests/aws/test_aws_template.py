"""The template: cfn-lint finds nothing, and what must hold of it for safety holds."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sysconfig

import pytest
from iam import ARN, BUCKET, CLUSTER, STACK, TEMPLATE, Filled, listed

from burst_dask.aws import secrets
from burst_dask.aws.assets import asset
from burst_dask.aws.stack import Stack
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, ShardId

TEXT = asset("stack.yaml").read_text()


RESOURCES = TEMPLATE["Resources"]


def properties(name):
    return RESOURCES[name]["Properties"]


def of_kind(kind):
    return {name: one["Properties"] for name, one in RESOURCES.items() if one["Type"] == kind}


def statements(role):
    """Yield what a role may do, by all its policies."""
    for policy in properties(role).get("Policies", ()):
        yield from policy["PolicyDocument"]["Statement"]
    for policy in of_kind("AWS::IAM::Policy").values():
        if {"Ref": role} in policy["Roles"]:
            yield from policy["PolicyDocument"]["Statement"]


def test_cfn_lint_finds_nothing():
    command = [f"{sysconfig.get_path('scripts')}/cfn-lint", "--format", "json", str(asset("stack.yaml"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, json.loads(done.stdout or "[]")) == (0, []), done.stderr


def test_it_can_be_sent_as_it_is():
    assert len(TEXT.encode()) <= 51_200  # more must be uploaded first


def test_the_bucket_is_private_encrypted_and_kept():
    bucket = properties("Bucket")
    assert set(bucket["PublicAccessBlockConfiguration"].values()) == {True}
    assert len(bucket["PublicAccessBlockConfiguration"]) == 4
    (rule,) = bucket["BucketEncryption"]["ServerSideEncryptionConfiguration"]
    assert rule["ServerSideEncryptionByDefault"]["SSEAlgorithm"] == {"If": ["HasKey", "aws:kms", "AES256"]}
    for name in ("Bucket", "BucketPolicy"):
        assert RESOURCES[name]["DeletionPolicy"] == "RetainExceptOnCreate"
        assert RESOURCES[name]["UpdateReplacePolicy"] == "Retain"


def test_the_bucket_takes_encrypted_connections_only():
    (statement,) = properties("BucketPolicy")["PolicyDocument"]["Statement"]
    assert (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
    assert statement["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    assert len(statement["Resource"]) == 2


def test_old_data_and_aborted_uploads_go():
    aborted, sources, data = properties("Bucket")["LifecycleConfiguration"]["Rules"]
    assert aborted["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    assert sources["ExpirationInDays"] == 7
    assert data["If"][1]["ExpirationInDays"] == {"Ref": "DataDays"}


def test_workers_write_below_their_store_only():
    written = [one for one in statements("TaskRole") if "s3:PutObject" in listed(one["Action"])]
    below = {"Sub": "arn:${AWS::Partition}:s3:::${BucketName}/${Prefix}/s/*"}
    nested = {"Sub": "arn:${AWS::Partition}:s3:::${BucketName}/${Prefix}/*/s/*"}
    assert [one["Resource"] for one in written] == [[below, nested], {"Ref": "MoreWrite"}]
    actions = {action for one in statements("TaskRole") for action in listed(one["Action"])}
    assert not {action for action in actions if "*" in action}


def test_workers_delete_intermediate_results_and_never_what_was_asked_for():
    deleting = [one for one in statements("TaskRole") if any("Delete" in action for action in listed(one["Action"]))]
    assert {action for one in deleting for action in listed(one["Action"])} == {"s3:DeleteObject"}
    allowed = [one["Resource"] for one in deleting if one["Effect"] == "Allow"]
    segment = keys.segment(RunId("sess.run"), ShardId("00000"), "name")
    ours, theirs = allowed
    assert theirs == {"Ref": "MoreDelete"}
    pattern = ours[0]["Sub"].partition("${Prefix}/")[2]
    assert fnmatch.fnmatchcase(segment, pattern)
    for other in (keys.entry(keys.shard_log(RunId("sess.run"), ShardId("00000")), 0), keys.plan(RunId("sess.run"))):
        assert not fnmatch.fnmatchcase(other, pattern)
    (denied,) = [one["Resource"]["Sub"] for one in deleting if one["Effect"] == "Deny"]
    assert denied.endswith(f"*{keys.LASTING}")


def test_an_object_that_is_not_there_is_404_for_workers():
    """S3 answers 403 to a GET of what is not there, unless listing is allowed whatever the prefix."""
    (condition,) = [one["Condition"] for one in statements("TaskRole") if one.get("Sid") == "List"]
    assert list(condition) == ["StringLikeIfExists"]


#: Actions that can be allowed for all resources only.
KNOW_NO_RESOURCE = {
    "ecr:GetAuthorizationToken",
    "ecs:ListTasks",
    "servicequotas:GetServiceQuota",
    "servicequotas:GetAWSDefaultServiceQuota",
}


def test_workers_read_keys_of_their_stacks_sessions_and_make_none():
    found = {
        role: [one for one in statements(role) if "secretsmanager" in str(one["Action"])]
        for role in of_kind("AWS::IAM::Role")
    }
    (ours,), (healers,) = found.pop("TaskRole"), found.pop("HealerRole")
    assert not any(found.values()), "only tasks, and the schedule, which reads and continues logs, have to do with keys"
    assert healers["Action"] == "secretsmanager:GetSecretValue"
    assert ours["Action"] == "secretsmanager:GetSecretValue"
    here = "arn:${AWS::Partition}:secretsmanager:${AWS::Region}:${AWS::AccountId}:secret:"
    assert ours["Resource"] == {"Sub": here + "${AWS::StackName}/session/*"}
    prefix = ours["Resource"]["Sub"].removeprefix(here).replace("${AWS::StackName}", "stack")
    assert fnmatch.fnmatchcase(secrets.secret_name("stack", "k3w9x2mq") + "-AbCdEf", prefix)
    assert not fnmatch.fnmatchcase(secrets.secret_name("stack", "k3w9x2mq", isolated=True) + "-AbCdEf", prefix)


def test_private_workers_reach_secrets_manager():
    services = [one["ServiceName"]["Sub"] for one in of_kind("AWS::EC2::VPCEndpoint").values()]
    assert "com.amazonaws.${AWS::Region}.secretsmanager" in services
    endpoints = [one for one in of_kind("AWS::EC2::VPCEndpoint").values() if one["VpcEndpointType"] == "Interface"]
    assert len(endpoints) == 7 and all(one["PrivateDnsEnabled"] for one in endpoints)


@pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole", "BuilderRole", "HealerRole", "ScheduleRole"])
def test_no_role_may_do_all(role):
    for statement in statements(role):
        assert "*" not in "".join(listed(statement["Action"])), statement
        if statement["Resource"] == "*":
            assert set(listed(statement["Action"])) <= KNOW_NO_RESOURCE, statement


def test_workers_pass_their_own_roles_to_ecs_only():
    (passing,) = [one for one in statements("TaskRole") if one["Action"] == "iam:PassRole"]
    assert passing["Resource"] == [{"GetAtt": "TaskRole.Arn"}, {"GetAtt": "ExecutionRole.Arn"}]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ecs-tasks.amazonaws.com"}}


@pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole", "BuilderRole", "HealerRole", "ScheduleRole"])
def test_nobody_elses_tasks_or_builds_take_a_role(role):
    (trust,) = properties(role)["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Condition"]["StringEquals"]["aws:SourceAccount"] == {"Ref": "AWS::AccountId"}


def test_nobody_connects_to_workers():
    assert "SecurityGroupIngress" not in properties("WorkerGroup")
    (allowed,) = properties("EndpointGroup")["SecurityGroupIngress"]
    assert (allowed["FromPort"], allowed["SourceSecurityGroupId"]) == (443, {"Ref": "WorkerGroup"})


def test_instances_ask_for_tokens_and_tasks_cannot_ask_at_all():
    templates = of_kind("AWS::EC2::LaunchTemplate")
    assert len(templates) == 2
    for template in templates.values():
        options = template["LaunchTemplateData"]["MetadataOptions"]
        assert (options["HttpTokens"], options["HttpPutResponseHopLimit"]) == ("required", 1)
        assert template["LaunchTemplateData"]["BlockDeviceMappings"][0]["Ebs"]["Encrypted"] is True


def test_no_instance_runs_by_itself():
    groups = of_kind("AWS::AutoScaling::AutoScalingGroup")
    assert len(groups) == 4
    for group in groups.values():
        assert group["MinSize"] == "0" and "DesiredCapacity" not in group
    for provider in of_kind("AWS::ECS::CapacityProvider").values():
        scaling = provider["AutoScalingGroupProvider"]
        assert scaling["ManagedScaling"]["Status"] == scaling["ManagedTerminationProtection"] == "ENABLED"


def test_both_kinds_of_capacity_for_both_architectures():
    for arch in ("X86", "Arm"):
        on_demand = properties(f"Group{arch}")["MixedInstancesPolicy"]["If"][2]
        spot = properties(f"Group{arch}Spot")["MixedInstancesPolicy"]
        assert on_demand["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 100
        assert spot["InstancesDistribution"]["OnDemandPercentageAboveBaseCapacity"] == 0
        for policy in (on_demand, spot):
            template = policy["LaunchTemplate"]
            assert template["LaunchTemplateSpecification"]["LaunchTemplateId"] == {"Ref": f"Template{arch}"}
            requirements = template["Overrides"][0]["InstanceRequirements"]
            assert requirements["AllowedInstanceTypes"] == {"Ref": f"InstanceTypes{arch}"}
        assert properties(f"Template{arch}")["LaunchTemplateData"]["ImageId"] == {"Ref": f"Image{arch}"}


def test_images_are_scanned_and_expire():
    repository = properties("Repository")
    assert repository["ImageScanningConfiguration"] == {"ScanOnPush": True}
    assert repository["ImageTagMutability"] == "IMMUTABLE"
    rules = json.loads(repository["LifecyclePolicy"]["LifecyclePolicyText"])["rules"]
    assert {rule["action"]["type"] for rule in rules} == {"expire"}
    untagged, tagged = (rule["selection"] for rule in rules)
    assert untagged["tagStatus"] == "untagged"
    # A session that is open, or the schedule, may run one that is neither new nor the newest: nothing goes by its age.
    assert (tagged["countType"], tagged["countNumber"]) == ("imageCountMoreThan", 300)


def test_logs_expire():
    groups = of_kind("AWS::Logs::LogGroup")
    assert len(groups) == 2 and all(group["RetentionInDays"] == {"Ref": "LogDays"} for group in groups.values())


def test_what_has_no_price_by_itself_is_on_and_the_rest_is_off():
    defaults = {name: one.get("Default") for name, one in TEMPLATE["Parameters"].items()}
    off = ("PrivateEndpoints", "WarmX86", "WarmArm", "HealEvery")
    assert [defaults[name] for name in off] == ["false", 0, 0, 0]


def test_all_outputs_are_read():
    outputs = {name: name.lower() for name in TEMPLATE["Outputs"]}
    stack = Stack.of("burst-dask", "eu-west-1", outputs)
    told = json.dumps([getattr(stack, name) for name in stack.__struct_fields__]).lower()
    assert [name for name, value in outputs.items() if value not in told and name != "AssignPublicIp"] == []


# ---------------------------------------------------------------------------- the schedule

SCHEDULED = Filled(HealEvery=15, HealImage="registry/worker:1", HealArchitecture="ARM64")
OBJECTS = f"arn:aws:s3:::{BUCKET}/burst/"


def test_the_schedule_is_off_unless_asked_for():
    parts = ("Schedule", "ScheduleRole", "HealerDefinition", "HealerRole")
    assert not any(Filled().has(name) for name in parts)
    assert all(SCHEDULED.has(name) for name in parts)


def test_the_schedule_runs_one_small_task_of_the_image():
    schedule, definition = SCHEDULED.properties("Schedule"), SCHEDULED.properties("HealerDefinition")
    assert (schedule["ScheduleExpression"], schedule["FlexibleTimeWindow"]) == ("rate(15 minutes)", {"Mode": "OFF"})
    target = schedule["Target"]
    assert (target["Arn"], target["EcsParameters"]["TaskCount"]) == (CLUSTER, 1)
    assert target["EcsParameters"]["TaskDefinitionArn"].rpartition("/")[2] == f"{STACK}-healer:1"
    assert (definition["Cpu"], definition["Memory"], definition["NetworkMode"]) == ("256", "512", "awsvpc")
    assert definition["RuntimePlatform"]["CpuArchitecture"] == "ARM64"
    (container,) = definition["ContainerDefinitions"]
    assert container["Image"] == "registry/worker:1"
    store = f"s3://{BUCKET}/burst?region=us-east-1"
    assert [*container["EntryPoint"], *container["Command"]] == ["burst", "heal", "--store", store]


def test_the_schedule_starts_its_task_and_nothing_else():
    context = {"ecs__cluster": CLUSTER}
    healer = f"{ARN.format('ecs')}task-definition/{STACK}-healer:7"
    assert SCHEDULED.may("ScheduleRole", "ecs:RunTask", healer, **context)
    assert not SCHEDULED.may("ScheduleRole", "ecs:RunTask", healer, ecs__cluster=f"{CLUSTER}2")
    worker = f"{ARN.format('ecs')}task-definition/{STACK}-worker-0a:1"
    assert not SCHEDULED.may("ScheduleRole", "ecs:RunTask", worker, **context)
    passed = {"iam__PassedToService": "ecs-tasks.amazonaws.com"}
    roles = {name: SCHEDULED.attribute(f"{name}.Arn") for name in ("HealerRole", "ExecutionRole", "TaskRole")}
    may = {name for name, arn in roles.items() if SCHEDULED.may("ScheduleRole", "iam:PassRole", arn, **passed)}
    assert may == {"HealerRole", "ExecutionRole"}


def test_only_schedules_of_this_account_and_region_take_its_role():
    (statement,) = SCHEDULED.properties("ScheduleRole")["AssumeRolePolicyDocument"]["Statement"]
    assert statement["Condition"]["StringEquals"] == {
        "aws:SourceAccount": "123456789012",
        "aws:SourceArn": f"{ARN.format('scheduler')}schedule-group/default",
    }
    assert "GroupName" not in SCHEDULED.properties("Schedule"), "which is the default one"


def test_workers_start_workers_of_their_stack_and_nothing_else():
    definitions = f"{ARN.format('ecs')}task-definition/"
    others = (f"{STACK}-healer:1", f"{STACK}-2-worker-0a:1", f"{STACK}2-worker-0a:1", "other:1")
    may = [
        name
        for name in (f"{STACK}-worker-0a:1", *others)
        if SCHEDULED.may("TaskRole", "ecs:RunTask", f"{definitions}{name}", ecs__cluster=CLUSTER)
    ]
    assert may == [f"{STACK}-worker-0a:1"]


def test_the_task_of_the_schedule_starts_workers_and_writes_session_logs_only():
    def may(action, resource, **context):
        return SCHEDULED.may("HealerRole", action, resource, **context)

    run = RunId("sess.run")
    for key in (keys.manifest("sess"), keys.plan(run), keys.entry(keys.session_log("sess"), 0)):
        assert may("s3:GetObject", OBJECTS + key)
    assert may("s3:PutObject", OBJECTS + keys.entry(keys.session_log("sess"), 12))
    assert may("s3:PutObject", OBJECTS + keys.over("sess")) and may("s3:DeleteObject", OBJECTS + keys.over("sess"))
    others = (
        keys.manifest("sess"),
        keys.entry(keys.shard_log(run, ShardId("00001")), 12),
        keys.entry(keys.shard_log(run, ShardId("00001-3")), 12),
        keys.segment(run, ShardId("00001"), "x"),
        keys.plan(run),
        keys.code("sess", "digest"),
        keys.beat("sess", "w1"),
    )
    assert [key for key in others if may("s3:PutObject", OBJECTS + key)] == []
    everything = (*others, keys.entry(keys.session_log("sess"), 12))
    assert [key for key in everything if may("s3:DeleteObject", OBJECTS + key)] == []
    definitions = f"{ARN.format('ecs')}task-definition/{STACK}-"
    assert may("ecs:RunTask", f"{definitions}worker-0a:1", ecs__cluster=CLUSTER)
    assert not may("ecs:RunTask", f"{definitions}healer:1", ecs__cluster=CLUSTER), "not itself"
    passed = {"iam__PassedToService": "ecs-tasks.amazonaws.com"}
    account = "arn:aws:iam::123456789012:role/"
    assert may("iam:PassRole", f"{account}burst-dask/{STACK}/us-east-1/{STACK}-sess", **passed), (
        "of a session with its own"
    )
    assert may("iam:PassRole", SCHEDULED.attribute("TaskRole.Arn"), **passed)
    for other in (f"{account}admin", f"{account}burst-dask/{STACK}/eu-west-1/x", SCHEDULED.attribute("HealerRole.Arn")):
        assert not may("iam:PassRole", other, **passed)
