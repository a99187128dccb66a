"""The template: cfn-lint finds nothing, and what must hold of it for safety holds."""

from __future__ import annotations

import fnmatch
import json
import subprocess
import sysconfig
from typing import Any

import pytest
import yaml

from burst_dask.aws import secrets
from burst_dask.aws.assets import asset
from burst_dask.aws.stack import Stack
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, ShardId

TEXT = asset("stack.yaml").read_text()


class _Loader(yaml.SafeLoader):
    pass


def _tag(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return {suffix: loader.construct_scalar(node)}
    if isinstance(node, yaml.SequenceNode):
        return {suffix: loader.construct_sequence(node, deep=True)}
    return {suffix: loader.construct_mapping(node, deep=True)}


_Loader.add_multi_constructor("!", _tag)
TEMPLATE = yaml.load(TEXT, _Loader)
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


def listed(value):
    return value if isinstance(value, list) else [value]


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


def test_workers_read_keys_of_their_stacks_sessions_and_make_none():
    found = {
        role: [one for one in statements(role) if "secretsmanager" in str(one["Action"])]
        for role in of_kind("AWS::IAM::Role")
    }
    (ours,) = found.pop("TaskRole")
    assert not any(found.values()), "only tasks have to do with keys"
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


@pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole", "BuilderRole"])
def test_no_role_may_do_all(role):
    for statement in statements(role):
        assert "*" not in "".join(listed(statement["Action"])), statement
        if statement["Resource"] == "*":
            assert statement["Action"] in ("ecr:GetAuthorizationToken", "ecs:ListTasks"), statement


def test_workers_pass_their_own_roles_to_ecs_only():
    (passing,) = [one for one in statements("TaskRole") if one["Action"] == "iam:PassRole"]
    assert passing["Resource"] == [{"GetAtt": "TaskRole.Arn"}, {"GetAtt": "ExecutionRole.Arn"}]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": "ecs-tasks.amazonaws.com"}}


@pytest.mark.parametrize("role", ["TaskRole", "ExecutionRole", "BuilderRole"])
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


def test_logs_expire():
    groups = of_kind("AWS::Logs::LogGroup")
    assert len(groups) == 2 and all(group["RetentionInDays"] == {"Ref": "LogDays"} for group in groups.values())


def test_what_has_no_price_by_itself_is_on_and_the_rest_is_off():
    defaults = {name: one.get("Default") for name, one in TEMPLATE["Parameters"].items()}
    assert (defaults["PrivateEndpoints"], defaults["WarmX86"], defaults["WarmArm"]) == ("false", 0, 0)


def test_all_outputs_are_read():
    outputs = {name: name.lower() for name in TEMPLATE["Outputs"]}
    stack = Stack.of("burst-dask", "eu-west-1", outputs)
    told = json.dumps([getattr(stack, name) for name in stack.__struct_fields__]).lower()
    assert [name for name, value in outputs.items() if value not in told and name != "AssignPublicIp"] == []
