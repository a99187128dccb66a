"""Clients of AWS services: one account, one region, made when they are first needed."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from burst_dask.aws.explain import explained
from burst_dask.errors import ConfigError

_MISSING = "AWS needs boto3, which is not installed: pip install 'burst-dask[aws]'"
_NO_REGION = (
    "no AWS region is set: pass --region (or region=), set AWS_REGION, or run `aws configure set region eu-west-1`. "
    "Nothing was changed"
)


@dataclass(frozen=True, eq=False)
class Clients:
    """The clients of one account in one region.

    Calls are retried by botocore, three times with jitter, and are sent to AWS_ENDPOINT_URL where that is set.

    Examples
    --------
    >>> clients = Clients.of(region="eu-west-1")
    >>> clients.region, clients.partition
    ('eu-west-1', 'aws')
    >>> clients.client("ecs") is clients.client("ecs")
    True
    """

    region: str
    #: a `boto3.Session`
    session: Any = field(repr=False)
    _made: dict[str, Any] = field(default_factory=dict, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @classmethod
    def of(cls, region: str | None = None, profile: str | None = None) -> Clients:
        """Return clients for a region and a profile; what is None comes from the environment, as with `aws`.

        Raises
        ------
        ConfigError
            boto3 is not installed, there is no such profile, or no region is set.
        """
        try:
            import boto3  # noqa: PLC0415 - optional
            from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - comes with boto3
        except ImportError:
            raise ConfigError(_MISSING) from None
        try:
            session = boto3.Session(profile_name=profile)
            found = region or os.environ.get("AWS_REGION") or session.region_name
        except BotoCoreError as error:
            raise ConfigError(
                f"the AWS configuration cannot be used: {error}; `aws configure list-profiles` shows the profiles"
            ) from None
        if not found:
            raise ConfigError(_NO_REGION)
        return cls(found, session)

    def client(self, service: str) -> Any:
        """Return the client of a service, such as ``"ecs"``; the same one each time, and threads may share it."""
        with self._lock:  # making a client is not thread-safe, unlike using it
            if service not in self._made:
                self._made[service] = self._make(service)
            return self._made[service]

    def in_region(self, region: str) -> Clients:
        """Return clients of the same account elsewhere: some services answer for all regions in one."""
        return self if region == self.region else replace(self, region=region, _made={}, _lock=threading.RLock())

    def _make(self, service: str) -> Any:
        from botocore.config import Config  # noqa: PLC0415 - comes with boto3, which is optional
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - the same

        config = Config(
            retries={"mode": "standard", "total_max_attempts": 4},
            connect_timeout=5,
            read_timeout=30,
            user_agent_extra="burst_dask",
        )
        try:
            return self.session.client(service, region_name=self.region, config=config)
        except (BotoCoreError, ValueError) as error:
            raise ConfigError(f"the AWS configuration cannot be used for {service}: {error}") from None

    @property
    def partition(self) -> str:
        """``"aws"``, or that of China or GovCloud: the second part of every ARN."""
        return str(self.session.get_partition_for_region(self.region))

    @property
    def account(self) -> str:
        """The number of the account; asks AWS the first time."""
        return str(self.identity["Account"])

    @property
    def identity(self) -> dict[str, str]:
        """What GetCallerIdentity says: Account, Arn, UserId."""
        with self._lock:
            if "identity" not in self._made:
                with explained("sts:GetCallerIdentity"):
                    self._made["identity"] = self.client("sts").get_caller_identity()
            found: dict[str, str] = self._made["identity"]
            return found
