"""Which instances the stack starts for workers on EC2. Whoever chooses them is not told how large a worker is.

So a worker must fit on the smallest that may come: it would wait for ever, next to an instance that costs.
"""

from __future__ import annotations

import fnmatch
import warnings
from typing import NamedTuple

from burst_dask.aws import capacity
from burst_dask.aws.capacity import InstanceType, Size
from burst_dask.aws.clients import Clients
from burst_dask.aws.stack import Stack, describe
from burst_dask.errors import ConfigError

#: Parameters of the stack, and options of `burst setup aws`, that say which types it starts.
_PARAMETERS = {
    "x86_64": ("InstanceTypesX86", "--instance-types"),
    "arm64": ("InstanceTypesArm", "--instance-types-arm"),
}


class Started(NamedTuple):
    """What a stack starts of an architecture."""

    #: names with wildcards; empty when that is not known
    types: tuple[str, ...]
    #: processors
    least: int
    most: int
    #: what changes it
    option: str

    def includes(self, instance: InstanceType) -> bool:
        """Tell whether a type is among them; so is each when they are not known.

        >>> Started(("m5.*",), 4, 64, "").includes(InstanceType("m5.large", 2, 8192, "x86_64"))
        False
        """
        named = not self.types or any(fnmatch.fnmatchcase(instance.name, kind) for kind in self.types)
        return named and self.least <= instance.cpus <= self.most

    def __str__(self) -> str:
        return f"{', '.join(self.types)} of {self.least} to {self.most} processors"


def started(clients: Clients, stack: Stack, arch: str) -> Started:
    """Return what a stack starts, which its parameters tell."""
    told = (describe(clients, stack.name) or {}).get("Parameters", ())
    parameters = {one["ParameterKey"]: one.get("ParameterValue", "") for one in told}
    name, option = _PARAMETERS[arch]
    return Started(
        types=tuple(filter(None, parameters.get(name, "").split(","))),
        least=int(parameters.get("LeastVCpus", 1)),
        most=int(parameters.get("MostVCpus", 1 << 20)),
        option=f"`burst setup aws {option} …`",
    )


def check_type(there: Started, stack: Stack, instance: InstanceType) -> None:
    """Raise `ConfigError` if the stack does not start instances of a type."""
    if not there.includes(instance):
        raise ConfigError(
            f"instance_type={instance.name!r}: the stack {stack.name} starts {there} only. Choose one of these, or "
            f"change that: {there.option}"
        )


def check_fit(clients: Clients, there: Started, stack: Stack, size: Size, wanted: InstanceType | None) -> bool:
    """Raise `ConfigError` if a worker might get too small an instance; tell if the wanted type is the only one."""
    if wanted is not None and there.types == (wanted.name,):
        return True
    if not there.types:
        return False
    types = [one for one in capacity.instance_types(clients, there.types) if there.includes(one)]
    small = [one for one in types if capacity.per_instance(size, one) < 1]
    if small:
        smallest = min(small, key=lambda one: one.usable)
        raise ConfigError(
            f"a worker of {size} does not fit on all instances that the stack {stack.name} may start, such as "
            f"{smallest.name}, which has {smallest.usable} for workers. Ask for less with cpu= and memory=, or have "
            f"the stack start others: {there.option}"
        )
    if wanted is not None:
        warnings.warn(
            f"the stack {stack.name} may start other instances than {wanted.name}: the cheapest of {there}. To have "
            f"that type only: {there.option}",
            stacklevel=6,
        )
    return False
