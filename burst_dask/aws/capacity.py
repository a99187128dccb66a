"""How large a worker can be: what Fargate offers, and what fits on an instance.

Fargate's pairs of processors and memory are those of "Task CPU and memory" in the Amazon ECS Developer Guide
(https://docs.aws.amazon.com/AmazonECS/latest/developerguide/fargate-tasks-services.html), which the API reference
repeats under `RegisterTaskDefinition`. No call tells them. Of instances, `DescribeInstanceTypes` tells what each has.

Processors are counted in CPU units, 1,024 each, and memory in MiB, as ECS does.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.stack import ARCHITECTURES
from burst_dask.errors import CloudError, ConfigError

#: CPU units of a processor.
UNITS = 1024
#: CPU units -> MiB that a task on Fargate may have with them.
FARGATE: dict[int, tuple[int, ...]] = {
    256: (512, 1024, 2048),
    512: tuple(range(1024, 4096 + 1, 1024)),
    1024: tuple(range(2048, 8192 + 1, 1024)),
    2048: tuple(range(4096, 16_384 + 1, 1024)),
    4096: tuple(range(8192, 30_720 + 1, 1024)),
    8192: tuple(range(16_384, 61_440 + 1, 4096)),
    16_384: tuple(range(32_768, 122_880 + 1, 8192)),
}
#: GiB that cost as much as a processor on Fargate, within a few per cent in all regions: of several pairs that are
#: large enough, the nearest is the one that costs least.
_GIB_A_PROCESSOR = 9.1
#: What the system and the agent of ECS take of an instance's memory at most: so many MiB, and that part of it. An
#: m5.large of 8,192 MiB offers 7,762 to tasks.
_SYSTEM_MIB, _SYSTEM_PART = 256, 0.03


class Size(NamedTuple):
    """Processors and memory of a worker.

    >>> print(Size(4096, 16384), "|", Size(256, 512))
    4 vCPU with 16 GiB | 0.25 vCPU with 0.5 GiB
    """

    #: CPU units
    cpu: int
    #: MiB
    memory: int

    def __str__(self) -> str:
        return f"{self.cpu / UNITS:g} vCPU with {self.memory / 1024:.4g} GiB"


class InstanceType(NamedTuple):
    """What an instance of a type has."""

    name: str
    cpus: int
    #: MiB
    memory: int
    #: ``"x86_64"`` or ``"arm64"``
    arch: str

    @property
    def usable(self) -> Size:
        """What tasks can have of it.

        >>> print(InstanceType("m5.large", 2, 8192, "x86_64").usable.memory)
        7690
        """
        return Size(self.cpus * UNITS, int(self.memory * (1 - _SYSTEM_PART)) - _SYSTEM_MIB)


def fargate_size(size: Size) -> Size:
    """Return the nearest size that Fargate has and that is at least as large.

    Raises
    ------
    ConfigError
        Fargate has none so large.

    Examples
    --------
    >>> print(fargate_size(Size(4096, 15_259)))  # "16GB"
    4 vCPU with 15 GiB
    >>> print(fargate_size(Size(1024, 16_384)))
    2 vCPU with 16 GiB
    """
    fits = [Size(cpu, memory) for cpu, choice in FARGATE.items() for memory in choice]
    fits = [one for one in fits if one.cpu >= size.cpu and one.memory >= size.memory]
    if not fits:
        largest = Size(max(FARGATE), max(FARGATE[max(FARGATE)]))
        raise ConfigError(
            f"a worker of {size} is more than Fargate has: {largest} at most. "
            'Larger ones run on instances: launch_type="EC2", instance_type=…'
        )
    return min(fits, key=lambda one: one.cpu / UNITS * _GIB_A_PROCESSOR + one.memory / 1024)


def per_instance(size: Size, instance: InstanceType) -> int:
    """Return how many workers of `size` an instance has room for.

    >>> per_instance(Size(1024, 2048), InstanceType("m5.large", 2, 8192, "x86_64"))
    2
    >>> per_instance(Size(1024, 7000), InstanceType("m5.large", 2, 8192, "x86_64"))
    1
    """
    return min(instance.usable.cpu // size.cpu, instance.usable.memory // size.memory)


def instance_type(clients: Clients, name: str) -> InstanceType:
    """Return what AWS says of a type of instances.

    Raises
    ------
    ConfigError
        There is none of that name in the region, or workers cannot run on it.
    """
    try:
        with explained("ec2:DescribeInstanceTypes", name, "Nothing was started"):
            found = clients.client("ec2").describe_instance_types(InstanceTypes=[name])["InstanceTypes"]
    except CloudError as error:
        if code_of(error).startswith("InvalidInstanceType"):
            raise ConfigError(_no_such(clients, name)) from None
        raise
    if not found:
        raise ConfigError(_no_such(clients, name))
    usable = _of(found)
    if not usable:
        raise ConfigError(f"instance_type={name!r}: workers run on {' and '.join(ARCHITECTURES)}, which it is not")
    return usable[0]


def instance_types(clients: Clients, names: Sequence[str]) -> list[InstanceType]:
    """Return what AWS says of all types with these names, which may have wildcards."""
    filters = [{"Name": "instance-type", "Values": list(names)}]
    with explained("ec2:DescribeInstanceTypes", ", ".join(names), "Nothing was started"):
        pages = clients.client("ec2").get_paginator("describe_instance_types").paginate(Filters=filters)
        return _of([told for page in pages for told in page["InstanceTypes"]])


def _of(told: Iterable[dict[str, Any]]) -> list[InstanceType]:
    """Return the types on which workers can run."""
    return [
        InstanceType(one["InstanceType"], one["VCpuInfo"]["DefaultVCpus"], one["MemoryInfo"]["SizeInMiB"], arch)
        for one in told
        for arch in ARCHITECTURES
        if arch in one["ProcessorInfo"]["SupportedArchitectures"]
    ]


def _no_such(clients: Clients, name: str) -> str:
    """Say that there is no such type, and which ones have a like name."""
    said = f"instance_type={name!r}: there is none in {clients.region}"
    try:
        with explained("ec2:DescribeInstanceTypeOfferings"):
            pages = clients.client("ec2").get_paginator("describe_instance_type_offerings").paginate()
            offered = sorted({one["InstanceType"] for page in pages for one in page["InstanceTypeOfferings"]})
    except CloudError:
        return said  # that helps, but is not what was asked for
    near = difflib.get_close_matches(name, offered, 3)
    return f"{said}; there are {', '.join(near)}" if near else said
