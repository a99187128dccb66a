"""What ECS says, in words."""

import pytest

from burst_dask.aws.capacity import Size
from burst_dask.errors import AccessDenied, CloudError, CloudLimit, CloudUnavailable
from burst_dask.fleet.ecs.words import Stopped, of_error, of_failure, why_stopped


@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        (
            "Capacity is unavailable at this time. Please try again later",
            CloudUnavailable,
            "no machine of that kind free",
        ),
        ("RESOURCE:CPU", CloudUnavailable, "has the processors free"),
        ("RESOURCE:MEMORY", CloudUnavailable, "has the memory free"),
        ("RESOURCE:ENI", CloudUnavailable, "network interface"),
        ("AGENT", CloudUnavailable, "agent of the instances"),
        ("You've reached the limit on the number of vCPUs you can run concurrently", CloudLimit, "burst doctor aws"),
        ("ATTRIBUTE", CloudError, "type or architecture"),
        ("MemberOf placement constraint unsatisfied", CloudError, "type or architecture"),
        ("Something new", CloudError, "Something new"),
    ],
)
def test_failures_of_run_task(reason, kind, words):
    failure = of_failure(reason)
    assert failure.kind is kind and words in failure.text and reason in failure.text
    assert failure.may_pass == (kind is CloudUnavailable)


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("ECS was unable to assume the role 'arn:…' that was provided for this task", CloudError, "iam:PassRole"),
        ("You've reached the limit on the number of tasks you can run concurrently", CloudLimit, "quota is used up"),
        ("The cluster has reached its limit of tasks in the PROVISIONING state", CloudLimit, "wait for an instance"),
        ("No Fargate configuration exists for given values", CloudError, "Workers are 1 vCPU with 2 GiB"),
        ("The specified capacity provider was not found", CloudError, "puts it in place"),
        ("The subnet ID 'subnet-1' does not exist", CloudError, "see subnets="),
    ],
)
def test_refused_calls(said, kind, words):
    failure = of_error(CloudError(f"ecs:RunTask failed: ClientException: {said}"), Size(1024, 2048))
    assert failure.kind is kind and words in failure.text and said in failure.text


def test_what_is_told_already_stays():
    assert of_error(AccessDenied("you lack the right"), Size(1, 1)) == (AccessDenied, "you lack the right")


def stopped(code="TaskFailedToStart", reason="", exit_code=None, container=""):
    return Stopped("t1", code, reason, exit_code, container)


@pytest.mark.parametrize(
    ("told", "words"),
    [
        (stopped("SpotInterruption", "Your Spot Task was interrupted.", 143), "Spot took its machine back"),
        (
            stopped(
                "EssentialContainerExited",
                "Essential container in task exited",
                137,
                "OutOfMemoryError: Container killed due to memory usage",
            ),
            "more memory than its container has",
        ),
        (stopped(reason="CannotPullContainerError: failed to resolve ref x: not found"), "image is not there"),
        (stopped(reason="CannotPullContainerError: pull access denied for x"), "may not be read"),
        (stopped(reason="CannotPullContainerError: i/o timeout"), "could not be pulled"),
        (
            stopped(
                reason="CannotPullContainerError: image Manifest does not contain descriptor matching platform 'l'"
            ),
            "for another architecture: set arch=",
        ),
        (stopped("EssentialContainerExited", "", 1, "exec /usr/bin/burst: exec format error"), "another architecture"),
        (stopped(reason="ResourceInitializationError: unable to pull secrets or registry auth"), "could not be pulled"),
        (
            stopped(reason="ResourceInitializationError: failed to create CloudWatch log stream"),
            "log could not be opened",
        ),
        (stopped(reason="ECS was unable to assume the role"), "lacks a right"),
        (stopped(reason="Timeout waiting for network interface provisioning to complete."), "network interface"),
        (stopped(reason="Capacity is unavailable at this time"), "no machine of that kind free"),
        (stopped("EssentialContainerExited", "Host EC2 (instance i-1) terminated."), "machine was taken away"),
        (stopped("EssentialContainerExited", "Essential container in task exited", 3), "refused the session"),
        (stopped("EssentialContainerExited", "Essential container in task exited", 127), "no command `burst`"),
        (
            stopped("EssentialContainerExited", "Essential container in task exited", 9),
            r"its container ended (exit code 9)",
        ),
        (stopped("UserInitiated", "by hand"), "somebody stopped it: by hand"),
        (stopped("InternalError", "Something new"), "Something new"),
    ],
)
def test_why_tasks_have_stopped(told, words):
    assert words in (why_stopped(told) or "")


@pytest.mark.parametrize(
    "told",
    [
        stopped("EssentialContainerExited", "Essential container in task exited", 0),
        stopped("UserInitiated", "burst: scaled to 2 workers", 0),
        stopped("UserInitiated", "burst: stopped by a client", 143),
    ],
)
def test_ends_in_order_are_not_told_of(told):
    assert why_stopped(told) is None
