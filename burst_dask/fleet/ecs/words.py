"""What ECS says of tasks that do not start or have stopped, in words. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

from burst_dask.aws.capacity import Size
from burst_dask.errors import CloudError, CloudLimit, CloudUnavailable

#: The beginning of the reason with which this package stops tasks.
OURS = "burst:"

_QUOTA_HELP = (
    "`burst doctor aws` shows the quotas; ask for more in the console under Service Quotas, start fewer or smaller "
    "workers, or wait until others have ended"
)
_PULL_HELP = "push it with `burst image push`, or name another one with image="
_NETWORK_HELP = (
    "`burst doctor aws` checks the way: a public address, a NAT gateway, or endpoints for ECR, S3 and CloudWatch Logs"
)

#: Reasons in the answer of RunTask -> kind and words. `CloudUnavailable` is tried again.
_FAILURES: tuple[tuple[str, type[CloudError], str], ...] = (
    (r"capacity is unavailable", CloudUnavailable, "AWS has no machine of that kind free in these zones at this time"),
    (r"RESOURCE:\s*CPU", CloudUnavailable, "no instance of the cluster has the processors free"),
    (r"RESOURCE:\s*MEMORY", CloudUnavailable, "no instance of the cluster has the memory free"),
    (r"RESOURCE:\s*(ENI|PORTS)", CloudUnavailable, "no instance of the cluster has a network interface or port free"),
    (r"RESOURCE", CloudUnavailable, "no instance of the cluster has what a worker needs free"),
    (r"AGENT", CloudUnavailable, "the ECS agent of the instances is not connected"),
    (r"EMPTY CAPACITY|no container instances", CloudUnavailable, "the cluster has no instance yet"),
    (r"limit on the number of (vCPUs|tasks)", CloudLimit, f"the account's quota is used up; {_QUOTA_HELP}"),
    (r"quota|limit", CloudLimit, f"a quota of the account is used up; {_QUOTA_HELP}"),
    (
        r"ATTRIBUTE|memberOf",
        CloudError,
        "no instance of the cluster is of the type or architecture that is asked for: leave instance_type= out, or "
        "have the stack start such instances with `burst setup aws`",
    ),
    (r"LOCATION|INACTIVE", CloudError, "the instances of the cluster take no tasks"),
)

#: Messages of calls that were refused -> kind and words.
_REFUSALS: tuple[tuple[str, type[CloudError], str], ...] = (
    (
        r"unable to assume the role",
        CloudError,
        "ECS may not assume a role of the stack, or you may not pass it: `burst setup aws` sets its trust and your "
        "right iam:PassRole",
    ),
    (r"limit on the number of (vCPUs|tasks)", CloudLimit, f"the account's quota is used up; {_QUOTA_HELP}"),
    (
        r"PROVISIONING",
        CloudLimit,
        "the cluster has as many tasks that wait for an instance as it may have: more are started when these run",
    ),
    (r"ClusterNotFound", CloudError, "the cluster is gone: the stack was removed; `burst setup aws` makes it again"),
    (r"No Fargate configuration|Invalid '?(cpu|memory)'?", CloudError, "Fargate has no machine of that size"),
    (
        r"capacity provider",
        CloudError,
        "the cluster lacks the capacity provider: `burst setup aws` puts it in place",
    ),
    (
        r"(subnet|security group)\S* .*(not exist|invalid)|InvalidSubnet",
        CloudError,
        "see subnets= and security_groups=",
    ),
)

_UNKNOWN_ROLE = re.compile(r"unable to assume the role|role\S* (is|was) (not valid|invalid|not found)", re.IGNORECASE)

#: What a stopped task says -> words. The first that fits counts.
_STOPS: tuple[tuple[str, str], ...] = (
    (r"spot|SpotInterruption", "Spot took its machine back"),
    (r"OutOfMemory|OOM", "it used more memory than its container has"),
    (
        r"no descriptor matching platform|does not contain descriptor|no match(ing manifest)? for platform|"
        r"exec format error",
        f"its image is for another architecture: set arch=, or build it for both; {_PULL_HELP}",
    ),
    (
        r"CannotPull\S*.*(not found|manifest unknown|does not exist|failed to resolve)",
        f"its image is not there; {_PULL_HELP}",
    ),
    (
        r"CannotPull\S*.*(denied|unauthorized|no basic auth)",
        "its image may not be read: the stack's execution role needs rights on that registry",
    ),
    (r"CannotPull|pull (image|registry)|registry auth", f"its image could not be pulled; {_NETWORK_HELP}"),
    (r"ResourceInitialization\S*.*(log|CloudWatch)", f"its log could not be opened; {_NETWORK_HELP}"),
    (r"ResourceInitialization", f"it could not be set up; {_NETWORK_HELP}"),
    (r"unable to assume|AccessDenied|not authorized", "its role lacks a right: run `burst setup aws` again"),
    (r"Capacity is unavailable", "AWS had no machine of that kind free"),
    (r"network interface", "it got no network interface; the subnet may have no free address"),
    (r"CannotStartContainer|CannotCreateContainer|ContainerRuntime", "its container could not be started"),
    (r"Host EC2|instance .*terminated|TerminationNotice", "its machine was taken away"),
)
_EXITS = {
    1: "its workers kept dying; its log says of what",
    2: "it was started with arguments that `burst worker` does not know: is the image as new as this client?",
    3: "it refused the session; its log says why",
    126: "its image cannot run `burst worker`",
    127: "its image has no command `burst`: install burst-dask in it",
    137: "its container was killed, as for want of memory",
    139: "it crashed in native code",
}


class Failure(NamedTuple):
    """Why workers were not started."""

    kind: type[CloudError]
    text: str

    @property
    def may_pass(self) -> bool:
        return issubclass(self.kind, CloudUnavailable)


class Stopped(NamedTuple):
    """What ECS keeps of a task that has stopped."""

    task: str
    #: ``"SpotInterruption"``, ``"EssentialContainerExited"``, …
    code: str
    reason: str
    #: None: its container did not run
    exit_code: int | None = None
    container_reason: str = ""


def of_failure(reason: str, detail: str = "") -> Failure:
    """Return what a failure in the answer of RunTask means.

    >>> of_failure("RESOURCE:CPU").text
    'no instance of the cluster has the processors free (RESOURCE:CPU)'
    """
    said = f"{reason}: {detail}" if detail else reason
    for pattern, kind, words in _FAILURES:
        if re.search(pattern, said, re.IGNORECASE):
            return Failure(kind, f"{words} ({said})")
    return Failure(CloudError, said or "ECS gave no reason")


def is_unknown_role(error: CloudError) -> bool:
    """Tell whether ECS does not know a role that a task is to have, or may not take it yet."""
    return _UNKNOWN_ROLE.search(str(error)) is not None


def of_error(error: CloudError, size: Size) -> Failure:
    """Return what a refused call means."""
    text = str(error)
    if type(error) is CloudError:
        for pattern, kind, words in _REFUSALS:
            if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
                return Failure(
                    kind, f"{words}. Workers are {size}. {text}" if "Fargate has" in words else f"{words}. {text}"
                )
    return Failure(type(error), text)


def why_stopped(one: Stopped) -> str | None:
    """Return why a task has stopped, None if it has ended in order.

    >>> why_stopped(Stopped("t1", "EssentialContainerExited", "Essential container in task exited", 0)) is None
    True
    >>> why_stopped(Stopped("t1", "SpotInterruption", "Your Spot Task was interrupted.", 143))
    'Spot took its machine back (Your Spot Task was interrupted.)'
    """
    if one.code == "UserInitiated":
        return None if one.reason.startswith(OURS) else f"somebody stopped it: {one.reason or 'without a reason'}"
    said = ": ".join(part for part in (one.container_reason, one.reason) if part)
    if "Essential container" in one.reason:
        said = one.container_reason  # the other part says nothing
    for pattern, words in _STOPS:
        if re.search(pattern, f"{one.code} {said}", re.IGNORECASE | re.DOTALL):
            return f"{words} ({said or one.code})"
    if one.exit_code == 0:
        return None
    if one.exit_code is None:
        return said or one.code or "ECS gives no reason"
    words = _EXITS.get(one.exit_code, "its container ended")
    return f"{words} (exit code {one.exit_code}{': ' + said if said else ''})"
