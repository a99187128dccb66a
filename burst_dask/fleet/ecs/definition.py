"""What is sent to ECS for a fleet: the task definition, and the RunTask request. Pure: data in, data out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec

from burst_dask.aws.stack import ECS_ARCHITECTURES, SESSION_TAG, STACK_TAG
from burst_dask.fleet.ecs.plan import EC2, FARGATE, EcsPlan
from burst_dask.protocol.keys import SessionId

#: The one container of a task.
CONTAINER = "worker"
#: First part of the names of log streams; the others are the container's name and the task's id.
STREAMS = "burst"
#: Seconds from SIGTERM to SIGKILL: a worker commits and hands over in under six.
STOP_TIMEOUT = 30
#: What RunTask starts at a time at most.
BATCH = 10


def task_definition(plan: EcsPlan) -> dict[str, Any]:
    """Return a task definition whose name tells its content: one is made for each shape, and used again."""
    stack = plan.stack
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": plan.image,
        "essential": True,
        # It stands here so that any image will do that has the package. With it, an image's own CMD does not count.
        "entryPoint": ["burst", "worker"],
        "stopTimeout": STOP_TIMEOUT,
        "linuxParameters": {"initProcessEnabled": True},  # reaps what tasks leave behind, and passes SIGTERM on
        "logConfiguration": {
            "logDriver": "awslogs",
            "options": {
                "awslogs-group": stack.log_group,
                "awslogs-region": stack.region,
                "awslogs-stream-prefix": STREAMS,
                # A worker must not wait for its log: what does not fit is dropped.
                "mode": "non-blocking",
                "max-buffer-size": "4m",
            },
        },
    }
    definition: dict[str, Any] = {
        # A session's own role is named when its tasks are started. One definition serves all such sessions, and none
        # of their workers could have the role of the stack by leaving that out.
        **({} if plan.isolated else {"taskRoleArn": stack.task_role}),
        "executionRoleArn": stack.execution_role,
        "requiresCompatibilities": [plan.launch_type],
        "runtimePlatform": {"cpuArchitecture": ECS_ARCHITECTURES[plan.arch], "operatingSystemFamily": "LINUX"},
        "tags": [{"key": STACK_TAG, "value": stack.name}],
    }
    if plan.launch_type == FARGATE:
        definition |= {"networkMode": "awsvpc", "cpu": str(plan.cpu), "memory": str(plan.memory)}
    else:
        # No network interface for each task: an instance has room for more workers than for interfaces.
        definition["networkMode"] = "bridge"
        container |= {"cpu": plan.cpu, "memory": plan.memory}
    definition["containerDefinitions"] = [container]
    # Workers may start others by the name of the stack that the definition begins with.
    return {"family": f"{stack.name}-worker-{_digest(definition, 12)}"} | definition


def run_request(
    plan: EcsPlan,
    definition: str,
    session: SessionId,
    store: str,
    provider: str,
    count: int,
    number: int,
    *,
    key: str = "",
) -> dict[str, Any]:
    """Return a RunTask request, but for its token.

    Parameters
    ----------
    definition
        ARN of the task definition.
    store
        URL of the store.
    provider
        One of `EcsPlan.providers`.
    number
        Of the start that the tasks belong to (`burst_dask.scaling`).
    key
        Where the key of a signed session is, and never the key itself: who may describe tasks sees their environments.
    """
    stack = plan.stack
    tags = {**plan.tags, STACK_TAG: stack.name, SESSION_TAG: session}
    environment = {
        "AWS_REGION": stack.region,  # not set by ECS on instances; the store's address has its own if it differs
        "BURST_SESSION": session,
        "BURST_STORE": store,
        "BURST_PROCESSES": "1",
        "BURST_THREADS": str(plan.threads),
        "BURST_MEMORY_LIMIT": str(plan.worker_memory),
    }
    if key:
        environment["BURST_KEY"] = key
    request: dict[str, Any] = {
        "cluster": stack.cluster,
        "taskDefinition": definition,
        "count": count,
        "startedBy": started_by(session),
        "group": group_of(session, number),
        "enableECSManagedTags": True,
        "tags": _pairs("key", tags),
        "overrides": {"containerOverrides": [{"name": CONTAINER, "environment": _pairs("name", environment)}]},
    }
    if plan.isolated:
        request["overrides"]["taskRoleArn"] = plan.task_role
    if plan.launch_type == EC2:
        request["capacityProviderStrategy"] = [{"capacityProvider": stack.capacity_providers[provider], "weight": 1}]
        # As many workers on an instance as fit, so that few instances are paid for.
        request["placementStrategy"] = [{"type": "binpack", "field": "memory"}]
        if plan.only_that_type:
            expression = f"attribute:ecs.instance-type == {plan.instance_type}"
            request["placementConstraints"] = [{"type": "memberOf", "expression": expression}]
    else:
        request["capacityProviderStrategy"] = [{"capacityProvider": provider, "weight": 1}]
        request["networkConfiguration"] = {
            "awsvpcConfiguration": {
                "subnets": list(plan.subnets or stack.subnets),
                "securityGroups": list(plan.security_groups or stack.security_groups),
                "assignPublicIp": "ENABLED" if stack.assign_public_ip else "DISABLED",
            }
        }
    return request


def started_by(session: SessionId) -> str:
    """Return what ECS keeps of each task's session, and finds them by.

    >>> started_by(SessionId("k3w9x2mq"))
    'burst-k3w9x2mq'
    """
    return f"burst-{session}"


def group_of(session: SessionId, number: int) -> str:
    """Return what ECS keeps of each task's start.

    >>> group_of(SessionId("k3w9x2mq"), 7)
    'burst-k3w9x2mq-7'
    """
    return f"{started_by(session)}-{number}"


def number_of(group: str, session: SessionId) -> int:
    """Return the number of the start that `group_of` was made from; -1 for any other group.

    >>> [number_of(group, SessionId("k3w9x2mq")) for group in (group_of(SessionId("k3w9x2mq"), 7), "by hand")]
    [7, -1]
    """
    number = group.removeprefix(f"{started_by(session)}-")
    return int(number) if number.isdecimal() else -1


def client_token(request: Mapping[str, Any], call: int) -> str:
    """Return the token by which ECS knows that two requests are the same one, and does the second one not again.

    The request names the start that its tasks belong to, of which there is one only. So a retry whose first answer was
    lost starts nothing more, also when what the first one started has ended meanwhile.

    Parameters
    ----------
    call
        Which of the start's calls it is: a start is several batches, and what is refused is asked for again.
    """
    return f"burst-{_digest([dict(request), call], 40)}"


def stream_name(task: str) -> str:
    """Return the log stream of a task with that id or ARN.

    >>> stream_name("arn:aws:ecs:eu-west-1:123456789012:task/burst-dask/0a1b2c")
    'burst/worker/0a1b2c'
    """
    return f"{STREAMS}/{CONTAINER}/{task_id(task)}"


def task_id(arn: str) -> str:
    return arn.rpartition("/")[2]


def _pairs(first: str, values: Mapping[str, str]) -> list[dict[str, str]]:
    return [{first: name, "value": value} for name, value in values.items()]


def _digest(content: Any, length: int) -> str:
    return hashlib.sha256(msgspec.json.encode(content, order="sorted")).hexdigest()[:length]
