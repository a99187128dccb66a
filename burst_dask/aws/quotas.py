"""How many processors an account may use at a time."""

from __future__ import annotations

from dataclasses import dataclass

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.errors import CloudError


@dataclass(frozen=True)
class Quota:
    """One quota of Service Quotas, in processors."""

    #: what it limits, in words
    what: str
    service: str
    code: str
    #: None: not known
    value: float | None = None

    def holds(self, workers: int, cpus: float) -> bool:
        """Tell whether so many workers of so many processors each may run.

        >>> Quota("Fargate", "fargate", "L-3032A538", 6.0).holds(2, 4)
        False
        """
        return self.value is None or workers * cpus <= self.value

    def __str__(self) -> str:
        return f"{self.what}: not known" if self.value is None else f"{self.what}: {self.value:g} vCPU at a time"

    def request(self, vcpus: float | None = None) -> str:
        """Return the command that asks for so many processors; by default for many, and twice as many as there are."""
        more = vcpus or max(256.0, 2 * (self.value or 0.0))
        return (
            f"`aws service-quotas request-service-quota-increase --service-code {self.service} "
            f"--quota-code {self.code} --desired-value {more:g}`"
        )


#: By launch type and whether on Spot. Those of EC2 are for the families A, C, D, H, I, M, R, T and Z.
QUOTAS = {
    ("FARGATE", False): Quota("Fargate", "fargate", "L-3032A538"),
    ("FARGATE", True): Quota("Fargate Spot", "fargate", "L-36FBB829"),
    ("EC2", False): Quota("EC2 On-Demand", "ec2", "L-1216C47A"),
    ("EC2", True): Quota("EC2 Spot", "ec2", "L-34B43A08"),
}


def read_quota(clients: Clients, launch_type: str, spot: bool) -> Quota:
    """Return the quota of that kind of workers.

    Raises
    ------
    AccessDenied
        The right servicequotas:GetServiceQuota is missing.
    """
    quota = QUOTAS[launch_type, spot]
    try:
        with explained("servicequotas:GetServiceQuota", quota.what):
            found = clients.client("service-quotas").get_service_quota(ServiceCode=quota.service, QuotaCode=quota.code)
    except CloudError as error:
        if code_of(error) != "NoSuchResourceException":
            raise
        found = _default(clients, quota)  # it has never been changed
    value = found.get("Quota", {}).get("Value")
    return Quota(quota.what, quota.service, quota.code, None if value is None else float(value))


def _default(clients: Clients, quota: Quota) -> dict[str, dict[str, float]]:
    """Return what AWS gives to every account; nothing if it does not say."""
    try:
        with explained("servicequotas:GetAWSDefaultServiceQuota", quota.what):
            found: dict[str, dict[str, float]] = clients.client("service-quotas").get_aws_default_service_quota(
                ServiceCode=quota.service, QuotaCode=quota.code
            )
            return found
    except CloudError as error:
        if code_of(error) == "NoSuchResourceException":
            return {}
        raise
