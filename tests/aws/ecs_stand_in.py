"""A stand-in for ECS: it starts, as processes of this machine, the very command and environment that RunTask names.

It is a small HTTP server in front of moto. What concerns tasks (RunTask, ListTasks, DescribeTasks, StopTask) it answers
itself, as well as quotas; everything else, also of ECS, goes to moto. A task's process gets a clean environment: what
an image and ECS give it, the task definition's and the override's, and nothing of whoever runs the tests. What it
writes goes to the log stream that the definition names; SIGTERM and SIGKILL come as ECS sends them.

What tasks ask of S3 and of Secrets Manager is held to what their role allows (`ecs_rights`).
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
import iam
from botocore.config import Config
from ecs_rights import Rights
from ecs_task import RunningTask
from servers import CREDENTIALS, REGION

from burst_dask.aws.clients import Clients

#: Pairs that Fargate takes, as its documentation has them: CPU units -> least, most and step in GiB.
FARGATE = {
    "512": (1, 4, 1),
    "1024": (2, 8, 1),
    "2048": (4, 16, 1),
    "4096": (8, 30, 1),
    "8192": (16, 60, 4),
    "16384": (32, 120, 8),
}
#: An answer: what was asked for is done, and the connection breaks before the news of it comes.
LOST = "lost"
#: Takes the name of a call and its request; returns an answer, an error as (status, code, message), or None to go on.
Fault = Callable[[str, dict[str, Any]], Any]


class EcsStandIn:
    """The server; see the module.

    Parameters
    ----------
    moto
        Endpoint of moto.
    directory
        For homes of tasks.
    image
        Environment that the image gives: by default one in which this package and the tests can be imported, and
        the credentials that the task role would give.
    processes
        Whether tasks really run; without, they are RUNNING until they are stopped.
    """

    def __init__(self, moto: str, directory: Path, image: dict[str, str] | None = None, processes: bool = True) -> None:
        self.moto, self.directory, self.processes = moto, directory, processes
        self.image = image or {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "AWS_EC2_METADATA_DISABLED": "true",
            **CREDENTIALS,
        }
        #: architectures of the image
        self.architectures = {"X86_64", "ARM64"}
        #: images that cannot be pulled
        self.missing_images: set[str] = set()
        #: the clock
        self.now = time.time
        #: quotas of processors by their codes
        self.quotas: dict[str, float] = {}
        #: capacity providers whose tasks wait for a machine
        self.without_machines: set[str] = set()
        self.tasks: list[RunningTask] = []
        #: calls of ECS, as (name, request)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.faults: list[Fault] = []
        self.rights = Rights(self.client, self.tasks)
        self._tokens: dict[str, tuple[dict[str, Any], list[RunningTask]]] = {}
        self._lock = threading.RLock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        for task in self.tasks:
            task.kill()

    def client(self, service: str) -> Any:
        """Return a client of moto itself."""
        return boto3.client(service, endpoint_url=self.moto, region_name=REGION)

    # ------------------------------------------------------------------ what tests do

    @property
    def running(self) -> list[RunningTask]:
        return [task for task in self.tasks if task.desired == "RUNNING"]

    def take_back(self, task: RunningTask) -> None:
        """Lose a task as Spot does when even its two minutes are not given."""
        task.kill("SpotInterruption", "Your Spot Task was interrupted.")

    def names(self, call: str) -> list[dict[str, Any]]:
        """Return the requests of a call."""
        return [request for name, request in self.calls if name == call]

    def once(self, call: str, answer: Any, times: int = 1) -> None:
        """Answer the next requests of a call so."""
        left = itertools.count(times, -1)
        self.faults.append(lambda name, request: answer if name == call and next(left) > 0 else None)

    def always(self, call: str, answer: Any) -> None:
        self.faults.append(lambda name, request: answer if name == call else None)

    def unfit(self, task: RunningTask) -> str:
        """Return why a task's image cannot run, as ECS says it."""
        image = task.container["image"]
        if image in self.missing_images:
            return (
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed to resolve ref "
                f"{image}: not found"
            )
        wanted = task.definition["runtimePlatform"]["cpuArchitecture"]
        if wanted not in self.architectures:
            platform = {"X86_64": "linux/amd64", "ARM64": "linux/arm64"}[wanted]
            return (
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): image Manifest does not "
                f"contain descriptor matching platform '{platform}'"
            )
        return ""

    def stream(self, task: RunningTask) -> Callable[[str], None]:
        """Return what writes a line to a task's log stream."""
        options = task.container["logConfiguration"]["options"]
        logs = self.client("logs")
        place = {
            "logGroupName": options["awslogs-group"],
            "logStreamName": f"{options['awslogs-stream-prefix']}/{task.container['name']}/{task.id}",
        }
        logs.create_log_stream(**place)

        def write(line: str) -> None:
            logs.put_log_events(**place, logEvents=[{"timestamp": int(time.time() * 1000), "message": line or " "}])

        return write

    def fire(self, stack: str) -> RunningTask:
        """Do what EventBridge does when it is time: start what the schedule of a stack names."""
        told = self.client("cloudformation").describe_stacks(StackName=stack)["Stacks"][0]["Parameters"]
        parameters = {one["ParameterKey"]: one["ParameterValue"] for one in told}
        parameters["Subnets"] = parameters["Subnets"].split(",")
        filled = iam.Filled(stack, **parameters)
        target = filled.properties("Schedule")["Target"]["EcsParameters"]
        # moto leaves out much of a definition that a stack brings.
        definition = _camel(filled.properties("HealerDefinition"))
        self.rights.healers[definition["taskRoleArn"]] = filled
        self.client("ecs").register_task_definition(**definition)
        assert f"/{definition['family']}:" in target["TaskDefinitionArn"]
        network = target["NetworkConfiguration"]["AwsvpcConfiguration"]
        ecs = boto3.client("ecs", endpoint_url=self.endpoint, region_name=REGION)
        answer = ecs.run_task(
            cluster=stack,
            taskDefinition=definition["family"],
            launchType=target["LaunchType"],
            count=target["TaskCount"],
            networkConfiguration={
                "awsvpcConfiguration": {name[0].lower() + name[1:]: network[name] for name in network}
            },
        )
        return next(task for task in self.tasks if task.arn == answer["tasks"][0]["taskArn"])

    # ------------------------------------------------------------------ calls

    def answer(self, call: str, request: dict[str, Any]) -> Any:
        """Return what ECS answers; None: moto does."""
        with self._lock:
            self.calls.append((call, request))
            found = next((one for fault in self.faults if (one := fault(call, request)) is not None), None)
            if found is not None and found != LOST:
                return found
            known = {
                "RunTask": self._run_task,
                "ListTasks": self._list_tasks,
                "DescribeTasks": self._describe_tasks,
                "StopTask": self._stop_task,
                "RegisterTaskDefinition": self._register,
                "GetServiceQuota": self._quota,
            }
            answer = known[call](request) if call in known else None
            return LOST if found == LOST else answer

    def _run_task(self, request: dict[str, Any]) -> Any:
        token = request.get("clientToken", "")
        rest = {name: value for name, value in request.items() if name != "clientToken"}
        if token in self._tokens:
            same, tasks = self._tokens[token]
            if same != rest:
                return 400, "ConflictException", "The provided clientToken is already in use."
            return {"tasks": [task.told() for task in tasks], "failures": []}
        if not 1 <= request.get("count", 1) <= 10:
            return 400, "InvalidParameterException", "Count must be between 1 and 10."
        found = self.client("ecs").describe_task_definition(taskDefinition=request["taskDefinition"])["taskDefinition"]
        definition = json.loads(json.dumps(found, default=str))
        if (definition["networkMode"] == "awsvpc") != ("networkConfiguration" in request):
            return 400, "InvalidParameterException", "Network Configuration is for networkMode 'awsvpc'."
        role = request.get("overrides", {}).get("taskRoleArn", "")
        if self.processes and not self.rights.knows(role):
            return (
                400,
                "ClientException",
                f"ECS was unable to assume the role '{role}' that was provided for this task.",
            )
        tasks = [RunningTask(self, request, definition) for _ in range(request.get("count", 1))]
        self.tasks += tasks
        self._tokens[token] = rest, tasks
        answer = {"tasks": [task.told() for task in tasks], "failures": []}
        for task in tasks:  # what becomes of them is not in the answer
            task.start()
        return answer

    def _list_tasks(self, request: dict[str, Any]) -> Any:
        wanted = request.get("desiredStatus", "RUNNING")
        mine = [task for task in self.tasks if task.request["cluster"] == request["cluster"]]
        if "startedBy" in request:
            mine = [task for task in mine if task.request.get("startedBy") == request["startedBy"]]
        arns = [task.arn for task in mine if task.desired == wanted]
        start = int(request.get("nextToken", 0))
        page = {"taskArns": arns[start : start + 100]}
        return page | ({"nextToken": str(start + 100)} if len(arns) > start + 100 else {})

    def _describe_tasks(self, request: dict[str, Any]) -> Any:
        if len(request["tasks"]) > 100:
            return 400, "InvalidParameterException", "Tasks cannot be more than 100."
        there = {task.arn: task for task in self.tasks}
        return {
            "tasks": [there[arn].told() for arn in request["tasks"] if arn in there],
            "failures": [{"arn": arn, "reason": "MISSING"} for arn in request["tasks"] if arn not in there],
        }

    def _stop_task(self, request: dict[str, Any]) -> Any:
        for task in self.tasks:
            if task.arn == request["task"]:
                task.stop("UserInitiated", request.get("reason", ""))
                return {"task": task.told()}
        return 400, "InvalidParameterException", "The referenced task was not found."

    def _quota(self, request: dict[str, Any]) -> Any:
        """Answer for an account that may have as many as its quotas say, and enough of what they do not tell."""
        return {"Quota": {"QuotaCode": request["QuotaCode"], "Value": self.quotas.get(request["QuotaCode"], 1024.0)}}

    def _register(self, request: dict[str, Any]) -> Any:
        """Refuse what Fargate has not; moto would not mind."""
        if "FARGATE" not in request.get("requiresCompatibilities", ()):
            return None
        cpu, memory = request["cpu"], int(request["memory"])
        least, most, step = FARGATE.get(cpu, (0, 0, 1))
        small = cpu == "256" and memory in (512, 1024, 2048)
        if small or (memory % (step * 1024) == 0 and least * 1024 <= memory <= most * 1024):
            return None
        return 400, "ClientException", "No Fargate configuration exists for given values."

    # ------------------------------------------------------------------ HTTP

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                service, _, call = self.headers.get("X-Amz-Target", "").partition(".")
                if service.startswith(("AmazonEC2ContainerService", "ServiceQuotas")):
                    answer = stand_in.answer(call, json.loads(body or b"{}"))
                    if answer is not None:
                        self.tell(answer)
                        return
                elif refused := stand_in.rights.refused(self.command, self.path, self.headers, body):
                    self.send(*refused)
                    return
                host = urlsplit(stand_in.moto).netloc
                connection = http.client.HTTPConnection(host, timeout=60)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "connection"}
                connection.request(self.command, self.path, body=body, headers=headers)
                response = connection.getresponse()
                self.send(response.status, response.read(), dict(response.getheaders()))
                connection.close()

            do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_one

            def tell(self, answer: Any) -> None:
                if answer == LOST:
                    self.close_connection = True
                    return
                headers = {"Content-Type": "application/x-amz-json-1.1"}
                if isinstance(answer, tuple):
                    status, code, message, *more = answer
                    data = {"__type": code, "message": message, **(more[0] if more else {})}
                    self.send(status, json.dumps(data).encode(), headers)
                else:
                    self.send(200, json.dumps(answer).encode(), headers)

            def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date", "server"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def _camel(node: Any) -> Any:
    """Return properties of a template as calls have them."""
    if isinstance(node, dict):
        return {name[0].lower() + name[1:]: _camel(value) for name, value in node.items()}
    return [_camel(one) for one in node] if isinstance(node, list) else node


class Clock:
    """Time passes when somebody waits, or the test says so."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


class Impatient(Clients):
    """Without retries of botocore, which wait by the real clock."""

    def _make(self, service: str) -> Any:
        config = Config(retries={"mode": "standard", "total_max_attempts": 1})
        return self.session.client(service, region_name=self.region, config=config)
