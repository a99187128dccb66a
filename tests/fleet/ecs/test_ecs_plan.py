"""Arguments of a fleet on ECS: what is wrong with them is told, and what follows from them."""

import msgspec
import pytest

from burst_dask.aws.capacity import Size
from burst_dask.aws.clients import Clients
from burst_dask.aws.stack import read_stack
from burst_dask.errors import ConfigError
from burst_dask.fleet.ecs import EcsArguments, EcsPlan, settings_of

GIB = 1 << 30


@pytest.fixture
def made(ecs):
    """Makes plans for a stack that stands."""

    def made(cpu=None, memory=None, stack=None, **arguments):
        wanted = EcsArguments(**arguments)
        wanted.check()
        clients = Clients.of()
        return EcsPlan.made(wanted, cpu, memory, clients, stack or read_stack(clients))

    return made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"launch_type": "fargate"}, "'FARGATE' or 'EC2'"),
        ({"instance_type": "c8a xlarge"}, "such as 'c8a.xlarge'"),
        ({"instance_type": "m5.large", "launch_type": "FARGATE"}, "has no instances"),
        ({"spot": "maybe"}, "True, False or 'with-fallback'"),
        ({"arch": "amd64"}, "'x86_64' or 'arm64'"),
        ({"image": ""}, "URI of an image"),
        ({"subnets": "subnet-1"}, "list of ids"),
        ({"subnets": ["sg-1"]}, "list of ids"),
        ({"subnets": []}, "there are 0"),
        ({"security_groups": [f"sg-{n}" for n in range(6)]}, "there are 6, and RunTask takes 1 to 5"),
        ({"subnets": ["subnet-1"], "launch_type": "EC2"}, "network of the stack"),
        ({"tags": {"a": 1}}, "dict of texts"),
        ({"isolated": "yes"}, "True or False"),
        ({"tags": {"aws:x": "y"}}, "does not begin with 'aws:'"),
        ({"tags": {str(n): "" for n in range(41)}}, "40 is the most"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=message):
        EcsArguments(**arguments).check()


def test_what_is_not_said_follows(made):
    plan = made()
    assert (plan.size, plan.threads, plan.launch_type, plan.arch) == (Size(1024, 4096), 1, "FARGATE", "x86_64")
    assert plan.image.endswith("/burst-dask:0a1b2c")
    assert made(cpu=4).size == Size(4096, 16_384)
    assert made(cpu=0.25).threads == 1
    assert settings_of(made(cpu=2)) == {"threads": 2, "memory_limit": 8 * GIB - (64 << 20)}


def test_sixteen_gigabytes_fit_into_what_fargate_has(made, recwarn):
    plan = made(cpu=4, memory=16_000_000_000)
    assert plan.size == Size(4096, 15 * 1024) and plan.worker_memory >= 16_000_000_000
    assert not recwarn.list


def test_an_invalid_pair_gets_the_nearest_and_is_told_of(made):
    with pytest.warns(UserWarning, match="Fargate has no 1 vCPU with 9 GiB: workers get 2 vCPU with 9 GiB"):
        assert made(cpu=1, memory=9 * GIB).size == Size(2048, 9 * 1024)
    with pytest.raises(ConfigError, match="more than Fargate has"):
        made(cpu=64)


def test_a_worker_takes_all_of_an_instance_or_its_share(made):
    plan = made(instance_type="m5.large")
    assert (plan.launch_type, plan.size, plan.per_instance) == ("EC2", Size(2048, 7690), 1)
    assert plan.only_that_type, "the stack starts no others"
    half = made(instance_type="m5.large", cpu=1)
    assert (half.size, half.per_instance) == (Size(1024, 3845), 2)
    with pytest.raises(ConfigError, match=r"16 GiB does not fit on m5\.large, which has 2 vCPU with 7\.51 GiB"):
        made(instance_type="m5.large", memory=16 * GIB)


def test_the_architecture_is_that_of_the_instance(made):
    with pytest.warns(UserWarning, match=r"may start other instances than c6g\.xlarge: the cheapest of c6g\.\*, m6g"):
        plan = made(instance_type="c6g.xlarge", cpu=2, memory=3 * GIB)
    assert plan.arch == "arm64" and not plan.only_that_type, "others may come: who waits for one type waits for ever"
    with pytest.raises(ConfigError, match=r"arch='arm64', but m5\.large is x86_64"):
        made(instance_type="m5.large", arch="arm64")


def test_an_instance_that_the_stack_does_not_start(made):
    with pytest.raises(ConfigError, match=r"starts m5\.large of 2 to 8 processors only.*aws --instance-types …"):
        made(instance_type="c5.large")
    with pytest.raises(ConfigError, match=r"starts c6g\.\*, m6g\.\* of 2 to 8 processors only.*--instance-types-arm"):
        made(instance_type="c6g.16xlarge", cpu=1)


def test_a_worker_that_does_not_fit_on_all_that_may_be_started(made):
    """It would wait for ever, and ECS would start one instance after another for it."""
    with pytest.raises(ConfigError, match=r"4 vCPU with 16 GiB does not fit on all .* such as c6g\.large"):
        made(launch_type="EC2", arch="arm64", cpu=4)
    with pytest.raises(
        ConfigError, match=r"does not fit on all .* such as c6g\.large, which has 2 vCPU with 3\.63 GiB"
    ):
        made(instance_type="c6g.2xlarge")
    plan = made(launch_type="EC2", arch="arm64", cpu=1, memory=GIB)
    assert (plan.instance_type, plan.per_instance) == ("", 0)


def test_the_stack_lacks_what_is_asked_for(made):
    with pytest.raises(
        ConfigError, match=r"a capacity provider arm64-spot; the stack burst-dask has arm64, x86_64, x8"
    ):
        made(launch_type="EC2", arch="arm64", spot=True, memory=GIB)
    stack = read_stack(Clients.of())
    with pytest.raises(ConfigError, match="has no image for workers yet: `burst image push`"):
        made(stack=msgspec.structs.replace(stack, image=""))
    assert made(stack=msgspec.structs.replace(stack, image=""), image="r/i:t").image == "r/i:t"
    with pytest.raises(ConfigError, match="names no subnets"):
        made(stack=msgspec.structs.replace(stack, subnets=()))


def test_a_plan_survives_the_manifest(made):
    plan = made(cpu=2, spot="with-fallback", tags={"project": "ice"}, subnets=["subnet-1"])
    told = msgspec.msgpack.decode(msgspec.msgpack.encode(msgspec.to_builtins(plan)))
    assert msgspec.convert(told, EcsPlan) == plan


def test_a_stack_of_an_older_version_cannot_isolate(made):
    older = msgspec.structs.replace(read_stack(Clients.of()), boundary="")
    with pytest.raises(ConfigError, match="no boundary for roles of single sessions; `burst setup aws` brings it"):
        made(stack=older, isolated=True)
    assert str(made(isolated=True)).endswith("(x86_64), with a role of their own")
