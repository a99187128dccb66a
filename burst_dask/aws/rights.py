"""Which rights whoever uses the stack needs, and which of them are missing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import explained
from burst_dask.aws.isolation import role_path
from burst_dask.aws.secrets import secret_name
from burst_dask.aws.stack import Stack, repository_name
from burst_dask.errors import AccessDenied, CloudError

_ASSUMED = re.compile(r"arn:([\w-]+):sts::(\d+):assumed-role/([^/]+)/")


@dataclass(frozen=True)
class Right:
    """One right, and what it is for."""

    action: str
    resource: str
    #: what does not work without it
    purpose: str
    #: whether sessions cannot have workers at all without it
    needed: bool = True
    #: the service that a role is passed to
    passed_to: str = ""


def rights_of(clients: Clients, stack: Stack) -> tuple[Right, ...]:
    """Return what a person needs to use a stack that stands."""
    arn = f"arn:{clients.partition}"
    here = f"{clients.region}:{clients.account}"
    cluster = _cluster(clients, stack)
    tasks = f"{arn}:ecs:{here}:task/{stack.cluster}/*"
    definitions = f"{arn}:ecs:{here}:task-definition/{stack.name}-worker-none:1"
    logs = f"{arn}:logs:{here}:log-group:{stack.log_group}:*"
    bucket = f"{arn}:s3:::{stack.bucket}"
    objects = f"{bucket}/{stack.prefix}/*"
    repository = f"{arn}:ecr:{here}:repository/{repository_name(stack.repository)}"
    return (
        Right("s3:ListBucket", bucket, "sessions"),
        Right("s3:GetObject", objects, "sessions"),
        Right("s3:PutObject", objects, "sessions"),
        Right("s3:DeleteObject", objects, "cleaning up"),
        Right("ecs:RegisterTaskDefinition", "*", "starting workers"),
        Right("ecs:DescribeTaskDefinition", "*", "starting workers"),
        Right("ecs:RunTask", definitions, "starting workers"),
        Right("ecs:TagResource", tasks, "starting workers"),
        Right("iam:PassRole", stack.task_role, "starting workers", passed_to="ecs-tasks.amazonaws.com"),
        Right("iam:PassRole", stack.execution_role, "starting workers", passed_to="ecs-tasks.amazonaws.com"),
        Right("ecs:ListTasks", "*", "seeing and stopping workers"),
        Right("ecs:DescribeTasks", tasks, "seeing and stopping workers"),
        Right("ecs:StopTask", tasks, "stopping workers"),
        Right("ecr:BatchGetImage", repository, "checking the image", needed=False),
        Right("ecr:DescribeImages", repository, "finding the newest image"),
        Right("logs:GetLogEvents", logs, "session.worker_logs()", needed=False),
        Right("logs:FilterLogEvents", logs, "session.worker_logs()", needed=False),
        Right("ec2:DescribeInstanceTypes", "*", "launch_type='EC2'", needed=False),
        Right("ec2:DescribeSpotPriceHistory", "*", "prices of Spot", needed=False),
        Right("pricing:GetProducts", "*", "prices of today", needed=False),
        Right("servicequotas:GetServiceQuota", "*", "quotas", needed=False),
        *_of_keys(f"{arn}:secretsmanager:{here}:secret:{secret_name(stack.name, '')}*", "signed=True"),
        Right("ecs:DescribeClusters", cluster, "burst doctor aws", needed=False),
        *(_of_key(stack.kms_key) if stack.kms_key else ()),
        *(_of_isolation(clients, stack) if stack.boundary else ()),
    )


def _of_key(key: str) -> Iterator[Right]:
    """Yield what reading and writing an encrypted bucket takes besides the rights on the bucket."""
    for action in ("kms:Decrypt", "kms:GenerateDataKey"):
        yield Right(action, key, "sessions, since the bucket is encrypted with that key")


def _of_keys(keys: str, purpose: str) -> Iterator[Right]:
    """Yield what whoever opens signed sessions needs, on secrets of such names."""
    for action in ("CreateSecret", "TagResource", "GetSecretValue", "DeleteSecret"):
        yield Right(f"secretsmanager:{action}", keys, purpose, needed=False)


def _of_isolation(clients: Clients, stack: Stack) -> Iterator[Right]:
    """Yield what whoever opens sessions with roles of their own needs: on roles below one path only."""
    arn, account = f"arn:{clients.partition}", clients.account
    roles = f"{arn}:iam::{account}:role{role_path(stack)}*"
    for action in ("iam:CreateRole", "iam:PutRolePolicy", "iam:DeleteRolePolicy", "iam:DeleteRole"):
        yield Right(action, roles, "isolated=True", needed=False)
    yield Right("iam:PassRole", roles, "isolated=True", needed=False, passed_to="ecs-tasks.amazonaws.com")
    secrets = f"{arn}:secretsmanager:{clients.region}:{account}:secret:{secret_name(stack.name, '', isolated=True)}*"
    yield from _of_keys(secrets, "isolated=True with signed=True")


def _cluster(clients: Clients, stack: Stack) -> str:
    return f"arn:{clients.partition}:ecs:{clients.region}:{clients.account}:cluster/{stack.cluster}"


def missing(clients: Clients, stack: Stack) -> tuple[list[Right], str]:
    """Return the rights that are missing, and how that was found out or why it could not be.

    IAM is asked, which knows all of it but the policies of the organisation. Without the right to ask it, calls are
    made that cannot do anything.
    """
    rights = rights_of(clients, stack)
    try:
        principal = _principal(clients)
        if principal.endswith(":root"):
            return [], "the root of the account may do all; better use a role"
        return list(
            _simulated(clients, principal, rights, _known(clients, stack))
        ), f"as IAM's simulation tells for {principal}"
    except AccessDenied:
        return list(_tried(clients, stack, rights)), (
            "as calls that cannot do anything tell; you may not ask IAM (iam:SimulatePrincipalPolicy), so that "
            "iam:PassRole and some others are not known"
        )


def _principal(clients: Clients) -> str:
    """Return the ARN whose policies count: of a role, not of its session."""
    arn = clients.identity["Arn"]
    if not (assumed := _ASSUMED.match(arn)):
        return arn
    with explained("iam:GetRole", assumed.group(3)):  # its path is not in the session's ARN
        return str(clients.client("iam").get_role(RoleName=assumed.group(3))["Role"]["Arn"])


def _known(clients: Clients, stack: Stack) -> dict[str, str]:
    """Return what policies may be bound to, and IAM knows of a real call only."""
    return {
        "ecs:cluster": _cluster(clients, stack),
        "ecs:CreateAction": "RunTask",
        "iam:PermissionsBoundary": stack.boundary,
    }


def _simulated(clients: Clients, principal: str, rights: tuple[Right, ...], of_call: dict[str, str]) -> Iterator[Right]:
    iam = clients.client("iam")
    for right in rights:
        known = of_call | {"iam:PassedToService": right.passed_to}
        with explained("iam:SimulatePrincipalPolicy", principal):
            answer = iam.simulate_principal_policy(
                PolicySourceArn=principal,
                ActionNames=[right.action],
                ResourceArns=[right.resource],
                ContextEntries=[
                    {"ContextKeyName": key, "ContextKeyValues": [value], "ContextKeyType": "string"}
                    for key, value in known.items()
                    if value
                ],
            )
        if any(result["EvalDecision"] != "allowed" for result in answer["EvaluationResults"]):
            yield right


def _tried(clients: Clients, stack: Stack, rights: tuple[Right, ...]) -> Iterator[Right]:
    """Yield what is refused when it is tried in a way that cannot do anything."""
    by_action = {right.action: right for right in reversed(rights)}  # of several, the first one is tried
    for action, call in _harmless(clients, stack).items():
        try:
            with explained(action):
                call()
        except AccessDenied:
            yield by_action[action]
        except CloudError:
            continue  # refused for another reason, after the rights were looked at


def _harmless(clients: Clients, stack: Stack) -> dict[str, Callable[[], Any]]:
    """Return calls that cannot do anything, by action: they only read, or ask for what there is not."""
    ecs, logs, ec2, s3 = (clients.client(name) for name in ("ecs", "logs", "ec2", "s3"))
    none, name = "0" * 32, f"{stack.name}-worker-none"
    key = f"{stack.prefix}/doctor-none"
    return {
        "s3:ListBucket": lambda: s3.list_objects_v2(Bucket=stack.bucket, Prefix=f"{stack.prefix}/", MaxKeys=1),
        "s3:GetObject": lambda: s3.get_object(Bucket=stack.bucket, Key=key),
        "ecs:RegisterTaskDefinition": lambda: ecs.register_task_definition(family=name, containerDefinitions=[]),
        "ecs:DescribeTaskDefinition": lambda: ecs.describe_task_definition(taskDefinition=name),
        "ecs:RunTask": lambda: ecs.run_task(cluster=stack.cluster, taskDefinition=name),
        "ecs:StopTask": lambda: ecs.stop_task(cluster=stack.cluster, task=none),
        "ecs:ListTasks": lambda: ecs.list_tasks(cluster=stack.cluster, maxResults=1),
        "ecs:DescribeTasks": lambda: ecs.describe_tasks(cluster=stack.cluster, tasks=[none]),
        "ecs:DescribeClusters": lambda: ecs.describe_clusters(clusters=[stack.cluster]),
        "ecr:DescribeImages": lambda: clients.client("ecr").describe_images(
            repositoryName=repository_name(stack.repository), maxResults=1
        ),
        "ecr:BatchGetImage": lambda: clients.client("ecr").batch_get_image(
            repositoryName=repository_name(stack.repository), imageIds=[{"imageTag": "none"}]
        ),
        "logs:GetLogEvents": lambda: logs.get_log_events(logGroupName=stack.log_group, logStreamName="none"),
        "logs:FilterLogEvents": lambda: logs.filter_log_events(logGroupName=stack.log_group, limit=1),
        "secretsmanager:GetSecretValue": lambda: clients.client("secretsmanager").get_secret_value(
            SecretId=secret_name(stack.name, "none")
        ),
        "ec2:DescribeInstanceTypes": lambda: ec2.describe_instance_types(DryRun=True),
        "ec2:DescribeSpotPriceHistory": lambda: ec2.describe_spot_price_history(DryRun=True),
    }
