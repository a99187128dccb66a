"""How many workers an account may run at a time: its quotas of processors, in workers of a plan."""

from __future__ import annotations

import re

from burst_dask.aws.capacity import UNITS
from burst_dask.aws.clients import Clients
from burst_dask.aws.quotas import Quota, read_quota
from burst_dask.errors import CloudError
from burst_dask.fleet.ecs.plan import EC2, WITH_FALLBACK, EcsPlan
from burst_dask.scaling.sizing import Bound

#: Families of instances that the quotas are for which are read; others, such as those with GPUs, have their own.
_FAMILIES = {"a", "c", "d", "h", "i", "im", "is", "m", "r", "t", "z"}
#: Which quotas bound a plan: those of Spot, those of others, or both.
_POOLS = {False: (False,), True: (True,), WITH_FALLBACK: (True, False)}


def bound_of(clients: Clients, plan: EcsPlan) -> Bound | None:
    """Return how many workers of a plan may run at a time, were they all that the account runs.

    None when that is not known: no right to ask, no answer, or instances that have quotas of their own.
    """
    if plan.launch_type == EC2 and _family(plan.instance_type) not in _FAMILIES:
        return None
    try:
        quotas = [read_quota(clients, plan.launch_type, spot) for spot in _POOLS[plan.spot]]
    except CloudError:
        return None
    known = [(quota, quota.value) for quota in quotas if quota.value is not None]
    if len(known) < len(quotas):
        return None
    said = " and ".join(str(quota) for quota, _ in known)
    return Bound(sum(fitting(plan, value) for _, value in known), f"{said}. {_more(quotas)}")


def fitting(plan: EcsPlan, vcpus: float) -> int:
    """Return how many workers of a plan so many processors are enough for.

    Those of an instance count in full. Where the stack may start instances of several types, it is not known how many
    processors those have that no worker has room on, and none are counted.

    Examples
    --------
    >>> from burst_dask.aws.stack import Stack
    >>> stack = Stack.of("burst-dask", "eu-west-1", {"Cluster": "burst-dask"})
    >>> fitting(EcsPlan(stack=stack, image="i", cpu=4096, memory=8192), 10)
    2
    >>> shared = {"launch_type": "EC2", "instance_type": "m5.2xlarge", "only_that_type": True}
    >>> fitting(EcsPlan(stack=stack, image="i", cpu=2048, memory=10_000, per_instance=3, vcpus=8, **shared), 20)
    6
    """
    if plan.only_that_type and plan.vcpus and plan.per_instance:
        return int(vcpus // plan.vcpus) * plan.per_instance
    return int(vcpus * UNITS // plan.cpu)


def _family(instance_type: str) -> str:
    """Return the letters of a type's family; those of the stack's own types when it may start several.

    >>> _family("c8a.xlarge"), _family("trn1.2xlarge"), _family("")
    ('c', 'trn', 'c')
    """
    found = re.match(r"[a-z]+", instance_type)
    return found.group() if found else "c"


def _more(quotas: list[Quota]) -> str:
    return f"Ask for more: {' and '.join(quota.request() for quota in quotas)}, which may take a day"
