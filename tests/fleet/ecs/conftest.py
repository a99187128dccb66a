"""Fleets on the stand-in of ECS, with a clock that tests move, and tasks that need not really run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from botocore.config import Config
from ecs_stand_in import EcsStandIn

from burst_dask.aws.clients import Clients
from burst_dask.aws.stack import read_stack
from burst_dask.clock import Entropy
from burst_dask.fleet.ecs import EcsArguments, EcsFleet, EcsPlan


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


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def fleet_of(ecs: EcsStandIn, clock: Clock) -> Callable[..., EcsFleet]:
    """Makes fleets whose tasks are no processes; `session`, and arguments as of `Session`."""
    ecs.processes, ecs.now = False, clock.wall

    clients = Impatient.of()
    stack = read_stack(clients)
    assert stack is not None
    ecs.calls.clear()

    def make(session: str = "sess1", cpu: float = 1, memory: int = 2 << 30, **arguments: Any) -> EcsFleet:
        plan = EcsPlan.made(EcsArguments(**arguments), cpu, memory, clients, stack)
        return EcsFleet(session, "s3://bucket/p", plan, clients=clients, clock=clock, entropy=Entropy(7))

    return make
