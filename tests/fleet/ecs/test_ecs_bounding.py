"""How many workers the quotas of an account allow for."""

import asyncio

import msgspec
import pytest

from burst_dask.aws.clients import Clients
from burst_dask.fleet.ecs.bounding import bound_of
from burst_dask.fleet.ecs.fleet import QUOTA_EVERY


def bound(fleet):
    return asyncio.run(fleet.bound())


def test_the_quota_bounds_a_fleet_and_is_asked_for_once_an_hour(fleet_of, ecs, clock):
    fleet = fleet_of(cpu=4, memory=8 << 30)
    ecs.quotas = {"L-3032A538": 30.0, "L-36FBB829": 9.0}
    found = bound(fleet)
    assert found.workers == 7
    assert found.why == (
        "Fargate: 30 vCPU at a time. Ask for more: `aws service-quotas request-service-quota-increase "
        "--service-code fargate --quota-code L-3032A538 --desired-value 256`, which may take a day"
    )
    ecs.quotas = {"L-3032A538": 60.0}
    clock.pause(QUOTA_EVERY - 1)
    assert bound(fleet) == found and len(ecs.names("GetServiceQuota")) == 1
    clock.pause(1)
    assert bound(fleet).workers == 15


@pytest.mark.parametrize(("spot", "workers"), [(False, 30), (True, 9), ("with-fallback", 39)])
def test_which_quotas_count(fleet_of, ecs, spot, workers):
    ecs.quotas = {"L-3032A538": 30.0, "L-36FBB829": 9.0}
    assert bound(fleet_of(spot=spot)).workers == workers


def test_a_quota_that_is_not_known_bounds_nothing(fleet_of, ecs, clock):
    fleet = fleet_of(spot="with-fallback")
    ecs.quotas = {"L-3032A538": 30.0}
    ecs.always("GetServiceQuota", (400, "AccessDeniedException", "no"))
    assert bound(fleet) is None
    asked = len(ecs.names("GetServiceQuota"))
    assert bound(fleet) is None and len(ecs.names("GetServiceQuota")) == asked, "nor is it asked again and again"


def test_on_instances_the_quota_counts_whole_ones(fleet_of, ecs):
    """Three workers share a machine of 8 processors."""
    ecs.quotas = {"L-1216C47A": 20.0, "L-34B43A08": 8.0}
    made = fleet_of().plan
    plan = msgspec.structs.replace(
        made, launch_type="EC2", cpu=2048, instance_type="m5.2xlarge", per_instance=3, vcpus=8, only_that_type=True
    )
    clients = Clients.of()

    def workers(**changes):
        found = bound_of(clients, msgspec.structs.replace(plan, **changes))
        return found and found.workers

    assert workers() == 6
    assert workers(spot="with-fallback") == 9
    assert workers(only_that_type=False) == 10, "others may come, whose processors workers have to themselves"
    assert workers(instance_type="g5.2xlarge") is None, "those with GPUs have another quota"
