"""A task of the stand-in for ECS (`ecs_stand_in`), as a process of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from iam import ACCOUNT
from servers import REGION

if TYPE_CHECKING:
    from ecs_stand_in import EcsStandIn


class RunningTask:
    """A task, and its process."""

    def __init__(self, stand_in: EcsStandIn, request: dict[str, Any], definition: dict[str, Any]) -> None:
        self.id = hashlib.sha256(os.urandom(16)).hexdigest()[:32]
        self.arn = f"arn:aws:ecs:{REGION}:{ACCOUNT}:task/{request['cluster']}/{self.id}"
        self.request, self.definition = request, definition
        self.container = definition["containerDefinitions"][0]
        self.status, self.desired = "PROVISIONING", "RUNNING"
        self.stop_code = self.reason = self.container_reason = ""
        self.exit_code: int | None = None
        self.created = stand_in.now()
        self.stopped = 0.0
        strategy = request.get("capacityProviderStrategy") or [{"capacityProvider": request["launchType"]}]
        self.provider = strategy[0]["capacityProvider"]
        self.process: subprocess.Popen[bytes] | None = None
        self._stand_in = stand_in
        self.home = Path(tempfile.mkdtemp(prefix="task-", dir=stand_in.directory))

    # ------------------------------------------------------------------ its life

    @property
    def environment(self) -> dict[str, str]:
        """What the container sees."""
        override = self._override
        named = [*self.container.get("environment", ()), *override.get("environment", ())]
        own = {"HOME": str(self.home)} | ({"AWS_ACCESS_KEY_ID": self.key} if self.is_held else {})
        return self._stand_in.image | own | {one["name"]: one["value"] for one in named}

    @property
    def key(self) -> str:
        """By which its requests are known."""
        return f"ROLE{self.id[:16].upper()}"

    @property
    def is_held(self) -> bool:
        """Whether it has the role of a single session, or of the schedule."""
        return ":role/burst-dask/" in self.role or self.role in self._stand_in.rights.healers

    @property
    def command(self) -> list[str]:
        override = self._override
        return [*self.container.get("entryPoint", ()), *override.get("command", self.container.get("command", ()))]

    @property
    def role(self) -> str:
        """ARN of the role that the task's processes have."""
        override = self.request.get("overrides", {}).get("taskRoleArn")
        return str(override or self.definition.get("taskRoleArn", ""))

    @property
    def _override(self) -> dict[str, Any]:
        overrides = self.request.get("overrides", {}).get("containerOverrides", [])
        assert all(one["name"] == self.container["name"] for one in overrides)
        return overrides[0] if overrides else {}

    def start(self) -> None:
        """Run the container's process, or fail as ECS does."""
        if reason := self._stand_in.unfit(self):
            self.over("TaskFailedToStart", reason)
            return
        if self.provider in self._stand_in.without_machines:
            return
        if not self._stand_in.processes:
            self.status = "RUNNING"
            return
        self.process = subprocess.Popen(
            self.command,
            env=self.environment,
            cwd=self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.status = "RUNNING"
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        """Pass on what the process writes, until it ends."""
        process = self.process
        assert process is not None and process.stdout is not None
        log = self._stand_in.stream(self)
        for line in process.stdout:
            log(line.decode(errors="replace").rstrip("\n"))
        code = process.wait()
        self.exit_code = code if code >= 0 else 128 - code
        self.over(self.stop_code or "EssentialContainerExited", self.reason or "Essential container in task exited")

    def over(self, code: str, reason: str) -> None:
        self.stop_code, self.reason = code, reason
        self.status = self.desired = "STOPPED"
        self.stopped = self._stand_in.now()

    def stop(self, code: str, reason: str) -> None:
        """Send SIGTERM, and SIGKILL after the stop timeout."""
        if self.status == "STOPPED":
            return
        self.stop_code, self.reason, self.desired = code, reason, "STOPPED"
        if self.process is None:
            self.over(code, reason)
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)
        timer = threading.Timer(float(self.container.get("stopTimeout", 30)), self.kill)
        timer.daemon = True
        timer.start()

    def kill(self, code: str = "", reason: str = "") -> None:
        """End all its processes at once."""
        if code:
            self.stop_code, self.reason, self.desired = code, reason, "STOPPED"
        if self.process is None and code:
            self.over(code, reason)
        if self.process is None or self.process.poll() is not None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()

    # ------------------------------------------------------------------ as ECS tells of it

    def told(self) -> dict[str, Any]:
        container: dict[str, Any] = {"name": self.container["name"], "lastStatus": self.status}
        if self.exit_code is not None:
            container["exitCode"] = self.exit_code
        if self.container_reason:
            container["reason"] = self.container_reason
        more: dict[str, Any] = {}
        if self.desired == "STOPPED":
            more = {"stopCode": self.stop_code, "stoppedReason": self.reason}
        if self.stopped:
            more["stoppedAt"] = self.stopped
        return {
            "taskArn": self.arn,
            "clusterArn": f"arn:aws:ecs:{REGION}:{ACCOUNT}:cluster/{self.request['cluster']}",
            "taskDefinitionArn": self.definition["taskDefinitionArn"],
            "lastStatus": self.status,
            "desiredStatus": self.desired,
            "startedBy": self.request.get("startedBy", ""),
            "group": self.request.get("group", ""),
            "tags": self.request.get("tags", []),
            "capacityProviderName": self.provider,
            "createdAt": self.created,
            "containers": [container],
            **more,
        }
