"""A role of its own for one session, which may do nothing outside of it: ``Session(isolated=True)``.

The stack has a policy that bounds such roles (`Stack.boundary`), and whoever opens the session makes the role, below a
path that tells the stack. So a client needs rights on that path only, with that boundary only.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

from burst_dask.aws import secrets
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.stack import SESSION_TAG, Stack
from burst_dask.errors import AccessDenied, CloudError, CloudLimit
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId

#: The one policy of such a role.
POLICY = "session"
_UNOPENED = "No session was opened. isolated=True needs it, and `burst doctor aws` tells what else you lack for it"
_GONE = "NoSuchEntity"


def role_path(stack: Stack) -> str:
    """Return the path of the roles of single sessions of a stack; roles are of all regions, stacks are not.

    >>> role_path(Stack.of("team-a", "eu-west-1", {}))
    '/burst-dask/team-a/eu-west-1/'
    """
    return f"/burst-dask/{stack.name}/{stack.region}/"


def role_name(stack: str, session: SessionId) -> str:
    """Return the name of a session's role: up to 41 of the 64 characters that there may be.

    >>> role_name("team-a", SessionId("k3w9x2mq"))
    'team-a-k3w9x2mq'
    """
    return f"{stack}-{session}"


def secret_name(stack: str, session: SessionId) -> str:
    """Return the name of the one secret that a session's role may read.

    >>> secret_name("team-a", SessionId("k3w9x2mq"))
    'team-a/isolated/k3w9x2mq'
    """
    return secrets.secret_name(stack, session, isolated=True)


def role_arn(stack: Stack, session: SessionId) -> str:
    """Return the ARN that a session's role has, or would have."""
    partition, account = _account(stack)
    return f"arn:{partition}:iam::{account}:role{role_path(stack)}{role_name(stack.name, session)}"


def trust(stack: Stack) -> dict[str, Any]:
    """Return who may take the role: tasks of ECS in this account and region, as for the role of all workers."""
    partition, account = _account(stack)
    return {
        "Version": "2012-10-17",
        "Statement": [
            {
                "Effect": "Allow",
                "Principal": {"Service": "ecs-tasks.amazonaws.com"},
                "Action": "sts:AssumeRole",
                "Condition": {
                    "StringEquals": {"aws:SourceAccount": account},
                    "ArnLike": {"aws:SourceArn": f"arn:{partition}:ecs:{stack.region}:{account}:*"},
                },
            }
        ],
    }


def policy(
    stack: Stack, session: SessionId, bucket: str, path: str, earlier: SessionId | None = None
) -> dict[str, Any]:
    """Return what workers of one session may do.

    Parameters
    ----------
    bucket, path
        Of the store; the path without slashes around it.
    earlier
        The session of the same name that is over, and whose results are used (``resume=True``).
    """
    partition, account = _account(stack)
    arn, objects = f"arn:{partition}", f"arn:{partition}:s3:::{bucket}/{path}/"
    own = f"{objects}{keys.session_prefix(session)}"
    read = [] if earlier is None else [f"{objects}{keys.runs(earlier)}*"]
    secret = f"secret:{secret_name(stack.name, session)}-??????"  # AWS adds six letters to the name
    statements = [
        # Without it, S3 answers 403 and not 404 for an object that is not there yet, which workers wait for. That
        # check knows no prefix, hence IfExists.
        {
            "Effect": "Allow",
            "Action": "s3:ListBucket",
            "Resource": f"{arn}:s3:::{bucket}",
            "Condition": {"StringLikeIfExists": {"s3:prefix": [f"{path}/{keys.session_prefix(session)}*"]}},
        },
        _allow("s3:GetObject", [f"{own}*", f"{objects}{keys.manifest(session)}", *read]),
        _allow(["s3:PutObject", "s3:AbortMultipartUpload"], f"{own}*"),
        _allow("s3:DeleteObject", f"{own}runs/*/segments/*"),
        _allow("s3:DeleteObject", f"{arn}:s3:::*{keys.LASTING}") | {"Effect": "Deny"},
        _allow("secretsmanager:GetSecretValue", f"{arn}:secretsmanager:{stack.region}:{account}:{secret}"),
        *_healing(stack, session, f"{arn}:ecs:{stack.region}:{account}"),
    ]
    if stack.kms_key:
        statements.append(_allow(["kms:Decrypt", "kms:GenerateDataKey"], stack.kms_key))
    return {"Version": "2012-10-17", "Statement": statements}


def _healing(stack: Stack, session: SessionId, ecs: str) -> list[dict[str, Any]]:
    """Return the rights to replace workers of this session; the boundary takes them where the stack does not heal."""
    cluster = {"ArnEquals": {"ecs:cluster": f"{ecs}:cluster/{stack.cluster}"}}
    tasks = f"{ecs}:task/{stack.cluster}/*"
    asked, there = ({"StringEquals": {f"aws:{kind}Tag/{SESSION_TAG}": session}} for kind in ("Request", "Resource"))
    return [
        _allow("ecs:RunTask", f"{ecs}:task-definition/{stack.name}-worker-*", cluster | asked),
        _allow(["ecs:DescribeTasks", "ecs:StopTask"], tasks, there),
        _allow("ecs:ListTasks", "*", cluster),
        _allow(["servicequotas:GetServiceQuota", "servicequotas:GetAWSDefaultServiceQuota"], "*"),
        _allow(
            "ecs:TagResource",
            tasks,
            {"StringEquals": {"ecs:CreateAction": "RunTask", f"aws:RequestTag/{SESSION_TAG}": session}},
        ),
        _allow(
            "iam:PassRole",
            [role_arn(stack, session), stack.execution_role],
            {"StringEquals": {"iam:PassedToService": "ecs-tasks.amazonaws.com"}},
        ),
    ]


def _allow(
    actions: str | list[str], resources: str | list[str], condition: dict[str, Any] | None = None
) -> dict[str, Any]:
    statement = {"Effect": "Allow", "Action": actions, "Resource": resources}
    return statement | ({"Condition": condition} if condition else {})


def make_role(
    clients: Clients, stack: Stack, session: SessionId, bucket: str, path: str, earlier: SessionId | None = None
) -> str:
    """Make the role of a session, and return its ARN; ECS may take some seconds until it knows it.

    The arguments are those of `policy`.

    Raises
    ------
    CloudError
        AWS refuses; nothing is left, or a warning names what is.
    """
    iam, name = clients.client("iam"), role_name(stack.name, session)
    arn = role_arn(stack, session)
    try:
        with explained("iam:CreateRole", arn, _UNOPENED):
            iam.create_role(
                Path=role_path(stack),
                RoleName=name,
                AssumeRolePolicyDocument=json.dumps(trust(stack)),
                PermissionsBoundary=stack.boundary,
                Description=f"Workers of session {session} of burst_dask, and what their tasks may do",
            )
    except (AccessDenied, CloudLimit):
        raise
    except BaseException:  # its answer may be lost
        _give_up(clients, stack, session)
        raise
    try:
        with explained("iam:PutRolePolicy", arn, _UNOPENED):
            document = json.dumps(policy(stack, session, bucket, path, earlier))
            iam.put_role_policy(RoleName=name, PolicyName=POLICY, PolicyDocument=document)
    except BaseException:
        _give_up(clients, stack, session)
        raise
    return arn


def _give_up(clients: Clients, stack: Stack, session: SessionId) -> None:
    """Delete the role of a session that is not opened; that it is left is a warning, and does not hide why."""
    try:
        delete_role(clients, stack, session)
    except CloudError as error:
        warnings.warn(str(error), stacklevel=3)


def delete_role(clients: Clients, stack: Stack, session: SessionId) -> None:
    """Delete the role of a session; one that is not there does no harm."""
    _delete(clients, stack, role_name(stack.name, session))


def delete_roles(clients: Clients, stack: Stack, kept: str) -> None:
    """Delete the roles of all sessions of a stack."""
    for name in roles_of(clients, stack, kept):
        _delete(clients, stack, name)


def roles_of(clients: Clients, stack: Stack, kept: str = "") -> list[str]:
    """Return the names of the roles of all sessions of a stack."""
    with explained("iam:ListRoles", f"the path {role_path(stack)}", kept):
        pages = clients.client("iam").get_paginator("list_roles").paginate(PathPrefix=role_path(stack))
        return [str(role["RoleName"]) for page in pages for role in page["Roles"]]


def _delete(clients: Clients, stack: Stack, name: str) -> None:
    iam = clients.client("iam")
    kept = (
        f"The role {name} is left. `burst teardown aws` deletes it, or `aws iam delete-role-policy --role-name {name} "
        f"--policy-name {POLICY}` and then `aws iam delete-role --role-name {name}`"
    )
    where = f"{role_path(stack)}{name}"
    calls: dict[str, Callable[[], Any]] = {
        "iam:DeleteRolePolicy": lambda: iam.delete_role_policy(RoleName=name, PolicyName=POLICY),
        "iam:DeleteRole": lambda: iam.delete_role(RoleName=name),
    }
    for action, call in calls.items():
        try:
            with explained(action, where, kept):
                call()
        except CloudError as error:
            if code_of(error) != _GONE:
                raise


def _account(stack: Stack) -> tuple[str, str]:
    """Return the partition and the account of a stack, which stand in the ARN of its role."""
    parts = stack.task_role.split(":")
    return parts[1], parts[4]
