"""Sizes of workers: what Fargate has, and what fits on instances."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burst_dask.aws import capacity
from burst_dask.aws.capacity import FARGATE, InstanceType, Size, fargate_size, instance_type, per_instance
from burst_dask.aws.clients import Clients
from burst_dask.errors import ConfigError

PAIRS = [Size(cpu, memory) for cpu, choice in FARGATE.items() for memory in choice]


def test_what_fargate_has_is_taken_as_it_is():
    assert len(PAIRS) == 3 + 4 + 7 + 13 + 23 + 12 + 12
    assert all(fargate_size(pair) == pair for pair in PAIRS)


@given(st.integers(1, 16_384), st.integers(1, 122_880))
def test_what_it_has_not_becomes_the_nearest_that_is_at_least_as_large(cpu, memory):
    found = fargate_size(Size(cpu, memory))
    assert found in PAIRS and found.cpu >= cpu and found.memory >= memory
    between = [pair for pair in PAIRS if cpu <= pair.cpu <= found.cpu and memory <= pair.memory <= found.memory]
    assert between == [found], "a smaller one would have done"


def test_more_memory_than_goes_with_the_processors_takes_more_of_them():
    assert fargate_size(Size(1024, 9 * 1024)) == Size(2048, 9 * 1024)
    assert fargate_size(Size(3072, 8 * 1024)) == Size(4096, 8 * 1024)


def test_too_large_for_fargate():
    with pytest.raises(ConfigError, match=r'16 vCPU with 120 GiB at most\. Larger ones .* launch_type="EC2"'):
        fargate_size(Size(32 * 1024, 1024))


def test_instances_are_asked_for(ecs):
    clients = Clients.of()
    large = instance_type(clients, "m5.large")
    assert large == InstanceType("m5.large", 2, 8192, "x86_64")
    assert instance_type(clients, "c6g.xlarge").arch == "arm64"
    assert per_instance(Size(1024, 3072), large) == 2
    assert per_instance(Size(1024, 4096), large) == 1, "the system has its part of the memory"
    assert per_instance(Size(4096, 1024), large) == 0


def test_an_instance_that_is_not_there_is_named_with_those_that_are_like_it(ecs):
    with pytest.raises(ConfigError, match=r"instance_type='m5.lagre': there is none in us-east-1"):
        instance_type(Clients.of(), "m5.lagre")
    with pytest.raises(ConfigError, match=r"none in us-east-1; there are .*m5"):
        instance_type(Clients.of(), "m5x.large")


def test_an_instance_on_which_nothing_runs(ecs, monkeypatch):
    monkeypatch.setattr(capacity, "ARCHITECTURES", ("riscv",))
    with pytest.raises(ConfigError, match="workers run on riscv"):
        instance_type(Clients.of(), "m5.large")
