"""What IAM allows tasks of the stand-in for ECS (`ecs_stand_in`) that have the role of a session or of the schedule."""

from __future__ import annotations

import json
from collections.abc import Callable
from email.message import Message
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import iam
from botocore.exceptions import ClientError
from ecs_stack import BUCKET
from ecs_task import RunningTask
from iam import ACCOUNT
from servers import REGION


class Rights:
    """Refuses what roles do not allow.

    Parameters
    ----------
    client
        Makes clients of moto, which knows the roles of sessions.
    tasks
        All that there are; who asks is known by their keys.
    """

    def __init__(self, client: Callable[[str], Any], tasks: list[RunningTask]) -> None:
        self._client, self._tasks = client, tasks
        #: roles of schedules that have been fired, and the stacks of which they are
        self.healers: dict[str, iam.Filled] = {}

    def refused(self, method: str, url: str, headers: Message, body: bytes) -> Any:
        """Return the answer to a request that IAM would refuse, as status, body and headers; None to any other."""
        service, _, call = headers.get("X-Amz-Target", "").partition(".")
        authorization = headers.get("Authorization", "")
        if service == "secretsmanager" and self.keeps(body, call, authorization):
            said = {"__type": "AccessDeniedException", "message": f"not authorized to perform: {service}:{call}"}
            return 400, json.dumps(said).encode(), {"Content-Type": "application/x-amz-json-1.1"}
        if not service and self.refuses(method, url, authorization):
            text = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
            return 403, text.encode(), {"Content-Type": "application/xml"}
        return None

    def refuses(self, method: str, url: str, authorization: str) -> bool:
        """Tell whether IAM would refuse a request to S3, of a task whose role is known here."""
        task = next((task for task in self._tasks if task.is_held and f"={task.key}/" in authorization), None)
        if task is None:
            return False
        parts = urlsplit(url)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = parse_qs(parts.query, keep_blank_values=True)
        actions = {"GET": "GetObject", "HEAD": "GetObject", "PUT": "PutObject", "DELETE": "DeleteObject"}
        if key:
            return not self._may(task.role, f"s3:{actions.get(method, 'PutObject')}", f"arn:aws:s3:::{bucket}/{key}")
        prefix = {"s3__prefix": query["prefix"][0]} if "prefix" in query else {}
        wanted = "s3:ListBucket" if method == "GET" and "list-type" in query else f"s3:Unknown{method}"
        return not self._may(task.role, wanted, f"arn:aws:s3:::{bucket}", **prefix)

    def keeps(self, body: bytes, call: str, authorization: str) -> bool:
        """Tell whether IAM would refuse a request to Secrets Manager, of a task whose role is known here."""
        task = next((task for task in self._tasks if task.is_held and f"={task.key}/" in authorization), None)
        secret = f"arn:aws:secretsmanager:{REGION}:{ACCOUNT}:secret:{json.loads(body).get('SecretId')}-AbCdEf"
        return task is not None and not self._may(task.role, f"secretsmanager:{call}", secret)

    def _may(self, role: str, action: str, resource: str, **context: str) -> bool:
        if role in self.healers:
            return self.healers[role].may("HealerRole", action, resource, **context)
        name = role.rpartition("/")[2]
        own = self._client("iam").get_role_policy(RoleName=name, PolicyName="session")["PolicyDocument"]
        boundary = iam.Filled(BucketName=BUCKET).properties("Boundary")["PolicyDocument"]
        return all(iam.allows(policy, action, resource, **context) for policy in (own, boundary))

    def knows(self, role: str) -> bool:
        """Tell whether a task may have a role; only those of single sessions are there."""
        try:
            return ":role/burst-dask/" not in role or bool(
                self._client("iam").get_role(RoleName=role.rpartition("/")[2])
            )
        except ClientError:
            return False
