"""The schedule of the stack, which runs ``burst heal`` every few minutes: its image, what it costs, and its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from burst_dask.aws import prices
from burst_dask.aws.capacity import Size
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.pushing import architectures_of
from burst_dask.aws.stack import ARCHITECTURES, ECS_ARCHITECTURES, Stack
from burst_dask.errors import CloudError, ConfigError

#: What the template gives to the task.
SIZE = Size(256, 512)
#: Minutes between looks. A look takes one, most of it for the image; and workers heal their fleet every few seconds.
LEAST, MOST = 5, 1440
_MINUTES_A_MONTH = 730 * 60
#: USD an hour of a public address, in all regions, since February 2024.
_ADDRESS = 0.005


def parameters(clients: Clients, name: str, stack: Stack | None, found: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of the template that follow from that a schedule is wanted: its image.

    Parameters
    ----------
    stack
        As it stands; None before it does.
    found
        The other parameters.

    Raises
    ------
    ConfigError
        There is no image yet, or the schedule cannot be so often.
    """
    every = int(found.get("HealEvery", "0"))
    if not every:
        return {}
    if not LEAST <= every <= MOST:
        raise ConfigError(
            f"--heal-every {every}: must be {LEAST} to {MOST} minutes, or 0 for never: a look takes about a minute, "
            "and workers that are alive look after each other every few seconds. Nothing was changed"
        )
    if stack is None or not stack.image:
        if found.get("HealImage"):  # it cannot be seen which one is the newest
            return {}
        before = "" if stack else "`burst setup aws` without --heal-every, "
        raise ConfigError(
            f"--heal-every {every}: the schedule runs the image of workers, and the stack {name} has none yet. In this "
            f"order: {before}`burst image push`, `burst setup aws --heal-every {every}`. Nothing was changed"
        )
    # Arm costs a fifth less.
    there = architectures_of(clients, stack.image) or ()
    arch = next((arch for arch in reversed(ARCHITECTURES) if arch in there), ARCHITECTURES[0])
    return {"HealImage": stack.image, "HealArchitecture": ECS_ARCHITECTURES[arch]}


def told(clients: Clients, found: Mapping[str, str]) -> str:
    """Return what a schedule does and costs, in words; empty if there is none."""
    every = int(found.get("HealEvery", "0"))
    if not every:
        return ""
    arch = next(arch for arch, name in ECS_ARCHITECTURES.items() if name == found.get("HealArchitecture", "X86_64"))
    price = prices.of_fargate(clients, SIZE, arch)
    starts = round(_MINUTES_A_MONTH / every)
    hourly = price.hourly + (_ADDRESS if found.get("AssignPublicIp") == "ENABLED" else 0.0)
    return (
        f"Every {every} minutes a task looks where work waits with no worker alive: {starts:,} starts a month of "
        f"{SIZE} ({arch}), each paid for a minute or so: about {starts / 60 * hourly:.2f} USD, by {price.source}"
    )


def outdated(stack: Stack, image: str) -> str:
    """Return in words that the schedule runs another image than `image`; empty if it does not."""
    if not stack.schedule or image in ("", stack.heal_image):
        return ""
    return f"The schedule of the stack {stack.name} runs {stack.heal_image}; `burst setup aws` has it run {image}"


def is_its(task: Mapping[str, Any], stack: Stack) -> bool:
    """Tell whether a task of the stack's cluster was started by the schedule.

    >>> stack = Stack.of("team-a", "eu-west-1", {})
    >>> is_its({"taskDefinitionArn": "arn:aws:ecs:eu-west-1:1:task-definition/team-a-healer:3"}, stack)
    True
    """
    return f":task-definition/{stack.name}-healer:" in task.get("taskDefinitionArn", "")


def end(clients: Clients, stack: Stack, kept: str) -> None:
    """Delete the schedule, so that it starts nothing while the stack is removed."""
    if not stack.schedule:
        return
    try:
        with explained("scheduler:DeleteSchedule", stack.schedule, kept):
            clients.client("scheduler").delete_schedule(Name=stack.schedule)
    except CloudError as error:
        if code_of(error) != "ResourceNotFoundException":
            raise
