"""``burst teardown aws``: removes the stack, and data only when told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from burst_dask import sync
from burst_dask.aws import isolation, schedule, secrets
from burst_dask.aws.clients import Clients
from burst_dask.aws.events import Event, events_of, failure, wait_for
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.setup import bucket_region
from burst_dask.aws.stack import SESSION_TAG, STACK_TAG, Stack, describe, read_stack, repository_name
from burst_dask.clock import Clock
from burst_dask.errors import AccessDenied, CloudError, ConfigError, WaitTimeout

_UNCHANGED = "Nothing was removed"
_STOPPED = "Its tasks were stopped, and the stack is still there: run `burst teardown aws` again"
_STOP_LONGEST = 300.0
#: What DescribeTasks takes at a time.
_DESCRIBED = 100
_NO_CLUSTER = {"ClusterNotFoundException"}


@dataclass(frozen=True)
class Removal:
    """What `remove` is to do."""

    stack: Stack
    stack_id: str
    #: number of running tasks by session
    running: dict[str, int]
    #: whether a stack of this name made the bucket, so that it may be deleted
    owns_bucket: bool
    #: names of secrets with keys of signed sessions; None when they may not be listed
    keys: tuple[str, ...] | None = ()

    @property
    def told_keys(self) -> str:
        """What a person should know of keys of signed sessions; empty without any."""
        if self.keys is None:
            return "Whether keys of signed sessions are in Secrets Manager is not known: you may not list secrets"
        if not self.keys:
            return ""
        count = f"{len(self.keys)} keys" if len(self.keys) > 1 else "the key"
        sessions = "signed sessions" if len(self.keys) > 1 else "a signed session"
        return f"{count} of {sessions} in Secrets Manager"


def look(clients: Clients, name: str) -> Removal | None:
    """Return what there is to remove; None if there is no such stack."""
    found = describe(clients, name)
    stack = read_stack(clients, name)
    if found is None or stack is None:
        return None
    tasks = list(running_tasks(clients, stack.cluster, _UNCHANGED)) if stack.cluster else []
    sessions = Counter(_session(task) for task in tasks if not schedule.is_its(task, stack))
    owns = bool(stack.bucket) and _owns(clients, stack)
    return Removal(stack, str(found["StackId"]), dict(sessions), owns, _keys(clients, name))


def remove(
    clients: Clients,
    removal: Removal,
    clock: Clock,
    tell: Callable[[Event], None],
    *,
    data: bool = False,
    stop: bool = False,
) -> None:
    """Remove a stack, its images, and with `data` its bucket, all that lies in it, and keys of its signed sessions.

    Parameters
    ----------
    stop
        Whether to stop the tasks that run, instead of refusing.

    Raises
    ------
    ConfigError
        Tasks run, or the bucket is not ours to delete; nothing was removed.
    CloudError
        AWS refuses; the message says what is left.
    """
    stack = removal.stack
    if removal.running and not stop:
        told = ", ".join(f"{count} of session {session}" for session, count in sorted(removal.running.items()))
        raise ConfigError(
            f"tasks run in the stack {stack.name}: {told}. End them by `burst cancel` or `burst scale SESSION 0`, or "
            f"pass --stop-tasks: what they have committed is kept, unless --data deletes it. {_UNCHANGED}"
        )
    if data and not removal.owns_bucket:
        raise ConfigError(
            f"the bucket {stack.bucket} was not made by this stack (it lacks the tag {STACK_TAG}={stack.name}), so "
            f"--data does not delete it. {_UNCHANGED}"
        )
    schedule.end(clients, stack, _UNCHANGED)  # it would start others
    stop_tasks(clients, stack, clock)
    isolation.delete_roles(clients, stack, _STOPPED)  # before the policy that bounds them
    _end_instances(clients, removal, clock)
    _remove_definitions(clients, stack)
    _remove_images(clients, stack)
    kept = "Run `burst teardown aws` again once that is put right"
    with explained("cloudformation:DeleteStack", f"the stack {stack.name}", kept):
        clients.client("cloudformation").delete_stack(StackName=removal.stack_id)
    status = wait_for(clients, removal.stack_id, clock, tell)
    if status != "DELETE_COMPLETE":
        raise failure(events_of(clients, removal.stack_id), f"the stack {stack.name} was not removed", kept)
    if data:
        delete_bucket(clients, stack.bucket, removal.keys or ())
        _delete_keys(clients, removal.keys or ())  # without which nobody could read what they have signed


def running_tasks(clients: Clients, cluster: str, kept: str) -> Iterator[dict[str, Any]]:
    """Yield what ECS says of the tasks of a cluster that run or are about to."""
    ecs = clients.client("ecs")
    try:
        with explained("ecs:ListTasks", f"the cluster {cluster}", kept):
            pages = list(ecs.get_paginator("list_tasks").paginate(cluster=cluster, desiredStatus="RUNNING"))
    except CloudError as error:
        if code_of(error) in _NO_CLUSTER:
            return
        raise
    for page in pages:
        if page["taskArns"]:
            with explained("ecs:DescribeTasks", f"the cluster {cluster}", kept):
                yield from ecs.describe_tasks(cluster=cluster, tasks=page["taskArns"], include=["TAGS"])["tasks"]


def stop_tasks(clients: Clients, stack: Stack, clock: Clock) -> None:
    """Stop all tasks of a stack's cluster; workers hand over what they hold. Returns when they are gone.

    ECS does not list one that was told to stop among those that run, and workers may start others meanwhile.
    """
    ecs, kept = clients.client("ecs"), _begun(stack)
    stopping: set[str] = set()
    until = clock.monotonic() + _STOP_LONGEST
    while True:
        for task in running_tasks(clients, stack.cluster, kept):
            arn = str(task["taskArn"])
            try:
                with explained("ecs:StopTask", arn, kept):
                    ecs.stop_task(cluster=stack.cluster, task=arn, reason="burst teardown aws")
            except CloudError as error:
                if code_of(error) != "InvalidParameterException":  # it has ended meanwhile, and is forgotten
                    raise
            stopping.add(arn)
        if not stopping:
            return
        stopping = _not_stopped(clients, stack.cluster, sorted(stopping), kept)
        if clock.monotonic() > until:
            raise WaitTimeout(f"tasks of {stack.cluster} have not stopped within five minutes. {kept}")
        sync.run(clock.sleep(2.0))


def _begun(stack: Stack) -> str:
    """Say how far it has come while tasks are stopped, and how to go on: `burst setup aws` sees no schedule missing."""
    schedule = f"The schedule {stack.schedule} is removed, and s" if stack.schedule else "S"
    return f"{schedule}ome tasks may have been stopped; all else is there. Run `burst teardown aws` again"


def _not_stopped(clients: Clients, cluster: str, arns: list[str], kept: str) -> set[str]:
    """Return which of some tasks still run or end."""
    left: set[str] = set()
    for first in range(0, len(arns), _DESCRIBED):
        with explained("ecs:DescribeTasks", f"the cluster {cluster}", kept):
            found = clients.client("ecs").describe_tasks(cluster=cluster, tasks=arns[first : first + _DESCRIBED])
        left.update(str(task["taskArn"]) for task in found["tasks"] if task.get("lastStatus") != "STOPPED")
    return left


def delete_bucket(clients: Clients, bucket: str, keys: tuple[str, ...] = ()) -> None:
    """Delete a bucket and all that is in it, also old versions; `keys` are named as left if that fails."""
    s3 = clients.client("s3")
    kept = f"The stack is gone, and part of the bucket {bucket} may be: `burst teardown aws --data` cannot find it any "
    kept += f"more. Delete it by `aws s3 rb --force s3://{bucket}`. {_left(keys)}"
    with explained("s3:ListBucketVersions", bucket, kept):
        for page in s3.get_paginator("list_object_versions").paginate(Bucket=bucket):
            doomed = [
                {"Key": one["Key"], "VersionId": one["VersionId"]}
                for one in (*page.get("Versions", ()), *page.get("DeleteMarkers", ()))
            ]
            if doomed:
                with explained("s3:DeleteObject", bucket, kept):
                    answer = s3.delete_objects(Bucket=bucket, Delete={"Objects": doomed, "Quiet": True})
                for failed in answer.get("Errors", ()):
                    raise CloudError(f"{failed['Key']} was not deleted: {failed.get('Message')}. {kept}")
    with explained("s3:DeleteBucket", bucket, kept):
        s3.delete_bucket(Bucket=bucket)


def _delete_keys(clients: Clients, keys: tuple[str, ...]) -> None:
    for number, key in enumerate(keys):
        try:
            secrets.delete(clients, key)
        except CloudError as error:
            raise type(error)(f"{error}. The stack and its bucket are gone. {_left(keys[number:])}") from error


def _left(keys: tuple[str, ...]) -> str:
    """Say which keys of signed sessions are left, and how to delete them; empty without any."""
    if not keys:
        return ""
    command = "`aws secretsmanager delete-secret --force-delete-without-recovery --secret-id NAME`"
    return (
        f"These keys of signed sessions are left, at 0.40 USD a month each: {', '.join(keys)}. Delete each by {command}"
    )


def _keys(clients: Clients, name: str) -> tuple[str, ...] | None:
    """Return the names of secrets with keys of a stack's sessions; None when they may not be listed."""
    try:
        return tuple(secrets.of_stack(clients, name))
    except AccessDenied:
        return None


def _session(task: dict[str, Any]) -> str:
    return next((str(tag["value"]) for tag in task.get("tags", ()) if tag["key"] == SESSION_TAG), "(unknown)")


def _owns(clients: Clients, stack: Stack) -> bool:
    """Tell whether a bucket was made by a stack of that name; without the right to know, it was not."""
    try:
        if bucket_region(clients, stack.bucket) is None:
            return False
        with explained("s3:GetBucketTagging", stack.bucket):
            tags = clients.client("s3").get_bucket_tagging(Bucket=stack.bucket)["TagSet"]
    except CloudError:
        return False
    return any((tag["Key"], tag["Value"]) == (STACK_TAG, stack.name) for tag in tags)  # not by another one


def _end_instances(clients: Clients, removal: Removal, clock: Clock) -> None:
    """Delete groups that have instances by force, and wait: they are protected from being ended by CloudFormation.

    What an earlier teardown has begun is waited for and ended, too.
    """
    with explained("cloudformation:ListStackResources", removal.stack_id, _STOPPED):
        pages = (
            clients.client("cloudformation").get_paginator("list_stack_resources").paginate(StackName=removal.stack_id)
        )
        groups = [
            one["PhysicalResourceId"]
            for page in pages
            for one in page["StackResourceSummaries"]
            if one["ResourceType"] == "AWS::AutoScaling::AutoScalingGroup" and one.get("PhysicalResourceId")
        ]
    there = _groups(clients, groups)
    ending = {group["AutoScalingGroupName"] for group in there if group.get("Status")}  # "Delete in progress"
    doomed = [
        group["AutoScalingGroupName"]
        for group in there
        if group["Instances"] or group.get("WarmPoolConfiguration") or group["AutoScalingGroupName"] in ending
    ]
    for name in doomed:
        if name not in ending:
            with explained("autoscaling:DeleteAutoScalingGroup", name, _STOPPED):
                clients.client("autoscaling").delete_auto_scaling_group(AutoScalingGroupName=name, ForceDelete=True)
    until = clock.monotonic() + _STOP_LONGEST
    while left := _groups(clients, doomed):
        if clock.monotonic() > until:
            raise WaitTimeout(_unended(removal.stack, left))
        sync.run(clock.sleep(5.0))
    if removal.stack.cluster:
        _deregister_instances(clients, removal.stack.cluster)


def _unended(stack: Stack, left: list[dict[str, Any]]) -> str:
    """Say what is left of groups whose instances take long to end, and how to go on."""
    groups = [
        f"{len(group['Instances'])} instances of the group {group['AutoScalingGroupName']}"
        + (f", such as {group['Instances'][0]['InstanceId']}" if group["Instances"] else "")
        for group in left
    ]
    return (
        f"{'; '.join(groups)} have not ended within five minutes. AWS goes on ending them, and they cost until then. "
        f"The stack {stack.name}, its images, logs and bucket are still there, but no worker can run on EC2 in it any "
        "more: run `burst teardown aws` again in some minutes, which ends what was begun"
    )


def _groups(clients: Clients, names: list[str]) -> list[dict[str, Any]]:
    """Return what is known of groups of instances; those that are gone are not among them."""
    if not names:
        return []
    with explained("autoscaling:DescribeAutoScalingGroups", ", ".join(names), "The stack is still there"):
        answer = clients.client("autoscaling").describe_auto_scaling_groups(AutoScalingGroupNames=names)
        return list(answer["AutoScalingGroups"])


def _deregister_instances(clients: Clients, cluster: str) -> None:
    """Have the cluster forget instances that have ended; it cannot be deleted while it has any."""
    ecs = clients.client("ecs")
    try:
        with explained("ecs:ListContainerInstances", f"the cluster {cluster}", _STOPPED):
            pages = ecs.get_paginator("list_container_instances").paginate(cluster=cluster)
            found = [arn for page in pages for arn in page["containerInstanceArns"]]
    except CloudError as error:
        if code_of(error) in _NO_CLUSTER:
            return
        raise
    for arn in found:
        with explained("ecs:DeregisterContainerInstance", arn, _STOPPED):
            ecs.deregister_container_instance(cluster=cluster, containerInstance=arn, force=True)


def _remove_definitions(clients: Clients, stack: Stack) -> None:
    """Take the task definitions of a stack out of use; they are free, and AWS keeps them for tasks of the past."""
    ecs = clients.client("ecs")
    with explained("ecs:ListTaskDefinitions", kept=_STOPPED):
        families = [
            family
            for page in ecs.get_paginator("list_task_definition_families").paginate(
                familyPrefix=f"{stack.name}-worker-", status="ACTIVE"
            )
            for family in page["families"]
            if "-" not in family.removeprefix(f"{stack.name}-worker-")  # of a stack whose name goes on so
        ]
        doomed = [
            arn
            for family in families
            for page in ecs.get_paginator("list_task_definitions").paginate(familyPrefix=family, status="ACTIVE")
            for arn in page["taskDefinitionArns"]
        ]
    for arn in doomed:
        with explained("ecs:DeregisterTaskDefinition", arn, "The stack is still there"):
            ecs.deregister_task_definition(taskDefinition=arn)


def _remove_images(clients: Clients, stack: Stack) -> None:
    if not stack.repository:
        return
    ecr, name = clients.client("ecr"), repository_name(stack.repository)
    try:
        with explained("ecr:ListImages", stack.repository, _STOPPED):
            ids = [
                id for page in ecr.get_paginator("list_images").paginate(repositoryName=name) for id in page["imageIds"]
            ]
        # An index is deleted before what it points to.
        ids.sort(key=lambda id: str(id.get("imageTag", "-")).count("-"))
        for first in range(0, len(ids), 100):
            with explained("ecr:BatchDeleteImage", stack.repository, "Some images may be gone; the stack is there"):
                ecr.batch_delete_image(repositoryName=name, imageIds=ids[first : first + 100])
    except CloudError as error:
        if code_of(error) != "RepositoryNotFoundException":
            raise
