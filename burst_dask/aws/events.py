"""Waiting for a stack: its events as they come, and of a failure the first cause."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from burst_dask import sync
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, denied_in, explained
from burst_dask.clock import Clock
from burst_dask.errors import CloudError, WaitTimeout

_POLL = 3.0
#: CloudFormation waits for hours for some resources; ours take five minutes.
_LONGEST = 1800.0
_FOLLOWS = re.compile(r"cancelled|canceled|The following resource\(s\) failed", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """Something that happened to one resource of a stack."""

    id: str
    resource: str
    kind: str
    status: str
    reason: str

    @property
    def failed(self) -> bool:
        """Whether it is a cause: not a rollback, and not cancelled because another one failed."""
        return self.status.endswith("_FAILED") and not _FOLLOWS.search(self.reason)


def events_of(clients: Clients, stack_id: str) -> list[Event]:
    """Return the events of a stack since its last change began, oldest first."""
    found: list[Event] = []
    pages = clients.client("cloudformation").get_paginator("describe_stack_events").paginate(StackName=stack_id)
    with explained("cloudformation:DescribeStackEvents", stack_id):
        for page in pages:
            for one in page["StackEvents"]:  # newest first
                found.append(_event(one))
                if _begins(one, stack_id):
                    return found[::-1]
    return found[::-1]


def wait_for(
    clients: Clients, stack_id: str, clock: Clock, tell: Callable[[Event], None], old: frozenset[str] = frozenset()
) -> str:
    """Wait until nothing of a stack is in progress, telling each event once; return its status.

    Raises
    ------
    CredentialsExpired
        They have expired meanwhile; AWS goes on without.
    WaitTimeout
        It takes more than half an hour; AWS goes on.
    """
    told = set(old)
    until = clock.monotonic() + _LONGEST
    while True:
        status = _status(clients, stack_id)
        for event in events_of(clients, stack_id):
            if event.id not in told:
                told.add(event.id)
                tell(event)
        if not status.endswith("_IN_PROGRESS") or status == "REVIEW_IN_PROGRESS":
            return status
        if clock.monotonic() > until:
            raise WaitTimeout(f"{stack_id} is still {status} after half an hour; AWS goes on. Ask again later")
        sync.run(clock.sleep(_POLL))


def failure(events: list[Event], what: str, kept: str) -> CloudError:
    """Return the error for a change of a stack that failed: the reason of the first resource that did."""
    cause = next((event for event in events if event.failed), None)
    if cause is None:
        return CloudError(f"{what}: AWS does not say why; look into the events of the stack in the console. {kept}")
    where = f"{cause.resource} ({cause.kind})"
    return denied_in(cause.reason, f"creating {where}", kept) or CloudError(
        f"{what}: {where}: {cause.reason.rstrip('. ')}. {kept}"
    )


def _status(clients: Clients, stack_id: str) -> str:
    try:
        kept = "AWS goes on with the stack. Run the same command again to see how it went"
        with explained("cloudformation:DescribeStacks", stack_id, kept):
            return str(clients.client("cloudformation").describe_stacks(StackName=stack_id)["Stacks"][0]["StackStatus"])
    except CloudError as error:
        if code_of(error) == "ValidationError":
            return "DELETE_COMPLETE"
        raise


def _event(one: dict[str, Any]) -> Event:
    return Event(
        str(one["EventId"]),
        str(one.get("LogicalResourceId", "")),
        str(one.get("ResourceType", "")),
        str(one.get("ResourceStatus", "")),
        str(one.get("ResourceStatusReason", "")),
    )


def _begins(one: dict[str, Any], stack_id: str) -> bool:
    """Tell whether an event is that a person has asked for a change."""
    return one.get("PhysicalResourceId") == stack_id and one.get("ResourceStatusReason") == "User Initiated"
