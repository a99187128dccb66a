"""The tasks of one session on ECS: which there are, what became of them, and stopping them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.stack import Stack
from burst_dask.errors import CloudError, CloudUnavailable
from burst_dask.fleet.ecs.definition import started_by, task_id
from burst_dask.fleet.ecs.words import Stopped
from burst_dask.protocol.keys import SessionId

#: What DescribeTasks takes at a time.
_DESCRIBED = 100
#: Calls of StopTask at a time: ECS allows 40 a second.
_AT_ONCE = 8
#: States in which a task's container does not run any more.
OVER = {"DEPROVISIONING", "STOPPED", "DELETED"}
#: Stopped tasks that are looked into at most.
_LOOKED_INTO = 400


@dataclass(frozen=True)
class Task:
    """A task as ECS describes it."""

    arn: str
    #: ``"PROVISIONING"``, ``"PENDING"``, ``"RUNNING"``, …
    status: str
    #: ``"RUNNING"``, or ``"STOPPED"`` when it is to end
    desired: str
    #: the capacity provider
    provider: str
    #: of the start that it belongs to, as `definition.group_of`
    group: str
    #: seconds since 1970
    created: float
    #: who has started it
    by: str
    stopped: Stopped
    #: when, in seconds since 1970; 0 while it has not
    stopped_at: float = 0.0

    @property
    def id(self) -> str:
        return task_id(self.arn)

    @property
    def ended_in_order(self) -> bool:
        """Whether its workers ended by themselves, and not for a failure."""
        return self.stopped.code == "EssentialContainerExited" and self.stopped.exit_code == 0

    @classmethod
    def of(cls, told: dict[str, Any]) -> Task:
        """Return the task that an answer of DescribeTasks tells of."""
        container: dict[str, Any] = next(iter(told.get("containers", ())), {})

        def when(name: str) -> float:
            return float(told[name].timestamp()) if name in told else 0.0

        return cls(
            arn=told["taskArn"],
            status=told.get("lastStatus", ""),
            desired=told.get("desiredStatus", ""),
            provider=told.get("capacityProviderName", ""),
            group=told.get("group", ""),
            created=when("createdAt"),
            by=told.get("startedBy", ""),
            stopped_at=when("stoppedAt"),
            stopped=Stopped(
                task=task_id(told["taskArn"]),
                code=told.get("stopCode", ""),
                reason=told.get("stoppedReason", ""),
                exit_code=container.get("exitCode"),
                container_reason=container.get("reason", ""),
            ),
        )


class Tasks:
    """The tasks of one session, and no others."""

    def __init__(self, clients: Clients, stack: Stack, session: SessionId) -> None:
        self._ecs = clients.client("ecs")
        self._cluster = stack.cluster
        self._mine = started_by(session)

    def running(self) -> list[str]:
        """Return the ARNs of tasks that run or come up, and are not to end."""
        return self._list(startedBy=self._mine)

    def stopped(self) -> list[Task]:
        """Return the tasks that have stopped within the last hour or so, which is as long as ECS keeps them."""
        return self.described(self.past()[:_LOOKED_INTO])

    def past(self) -> list[str]:
        """Return the ARNs of tasks that have stopped, or are to."""
        try:
            return self._list(startedBy=self._mine, desiredStatus="STOPPED")
        except CloudError as error:
            if code_of(error) != "InvalidParameterException":
                raise
        # The reference says that startedBy must be the only filter, and means it for some others.
        everybody = self.described(self._list(desiredStatus="STOPPED"))
        return [task.arn for task in everybody if task.by == self._mine]

    def _list(self, **filters: str) -> list[str]:
        with explained("ecs:ListTasks", f"the cluster {self._cluster}"):
            pages = self._ecs.get_paginator("list_tasks").paginate(cluster=self._cluster, **filters)
            return [arn for page in pages for arn in page["taskArns"]]

    def described(self, arns: Sequence[str]) -> list[Task]:
        """Return what is known of tasks; one that ECS does not know, or not yet, is left out."""
        found: list[Task] = []
        for start in range(0, len(arns), _DESCRIBED):
            with explained("ecs:DescribeTasks", f"the cluster {self._cluster}"):
                answer = self._ecs.describe_tasks(cluster=self._cluster, tasks=list(arns[start : start + _DESCRIBED]))
            found += [Task.of(told) for told in answer["tasks"]]
        return found

    def stop(self, arns: Iterable[str], reason: str) -> list[str]:
        """Have tasks end: SIGTERM, and SIGKILL when the time for that is over. It does not wait for them.

        Returns
        -------
        list
            ARNs of those that could not be told now, since AWS throttles: try them again.
        """

        def one(arn: str) -> str | None:
            try:
                with explained("ecs:StopTask", arn, "Tasks may still run"):
                    self._ecs.stop_task(cluster=self._cluster, task=arn, reason=reason)
            except CloudUnavailable:
                return arn
            except CloudError as error:
                if code_of(error) != "InvalidParameterException":  # there is no such task any more
                    raise
            return None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return [arn for arn in pool.map(one, arns) if arn is not None]
