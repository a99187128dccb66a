"""What workers on ECS have written: the streams of the stack's log group that are a session's."""

from __future__ import annotations

from typing import Any

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.stack import Stack
from burst_dask.errors import CloudError
from burst_dask.fleet.base import ProcessLog, opening_line
from burst_dask.fleet.ecs.definition import CONTAINER, STREAMS

#: Lines of each stream that are read at most, the last ones.
LINES = 10_000


class Logs:
    """Reads CloudWatch Logs."""

    def __init__(self, clients: Clients, stack: Stack) -> None:
        self._logs = clients.client("logs")
        self._group = stack.log_group

    def of_session(self, session: str, since: float) -> list[ProcessLog]:
        """Return what the workers of a session have written, also those that ECS has forgotten.

        Parameters
        ----------
        since
            When the session was opened, in seconds since 1970.
        """
        return [self.stream(name) for name in self._found(opening_line(session), since)]

    def stream(self, name: str) -> ProcessLog:
        """Return the last lines of a stream; nothing if it is not there."""
        events: list[dict[str, Any]] = []
        arguments: dict[str, Any] = {"logGroupName": self._group, "logStreamName": name, "startFromHead": False}
        token = None
        while len(events) < LINES:
            try:
                with explained("logs:GetLogEvents", self._group):
                    answer = self._logs.get_log_events(**arguments, **({"nextToken": token} if token else {}))
            except CloudError as error:
                if code_of(error) == "ResourceNotFoundException":
                    break
                raise
            events = answer["events"] + events
            if not answer["events"] or answer["nextBackwardToken"] == token:
                break
            token = answer["nextBackwardToken"]
        return ProcessLog(name, "\n".join(event["message"] for event in events[-LINES:]))

    def _found(self, line: str, since: float) -> list[str]:
        """Return the names of streams with that text in one of their lines, the oldest first."""
        try:
            with explained("logs:FilterLogEvents", self._group):
                pages = self._logs.get_paginator("filter_log_events").paginate(
                    logGroupName=self._group,
                    logStreamNamePrefix=f"{STREAMS}/{CONTAINER}/",
                    filterPattern=f'"{line}"',
                    startTime=int(max(0.0, since - 3600) * 1000),  # clocks may differ
                )
                found = [(event["timestamp"], event["logStreamName"]) for page in pages for event in page["events"]]
        except CloudError as error:
            if code_of(error) == "ResourceNotFoundException":
                return []
            raise
        return list(dict.fromkeys(name for _, name in sorted(found)))
