"""What is sent to ECS."""

import msgspec

from burst_dask.aws.stack import Stack
from burst_dask.fleet.ecs.definition import client_token, run_request, task_definition
from burst_dask.fleet.ecs.plan import EcsPlan

STACK = Stack.of(
    "burst-dask",
    "eu-west-1",
    {
        "Cluster": "burst-dask",
        "Subnets": "subnet-1,subnet-2",
        "SecurityGroups": "sg-1",
        "LogGroup": "/logs",
        "CapacityProviderX86": "own-x86",
    },
)
FARGATE = EcsPlan(stack=STACK, cpu=4096, memory=16_384, image="registry/worker:1", tags={"project": "ice"})
EC2 = msgspec.structs.replace(FARGATE, launch_type="EC2", instance_type="m5.xlarge", only_that_type=True)


def request(plan, provider, count=3, number=7):
    return run_request(plan, "arn:definition:1", "sess1", "s3://bucket/prefix", provider, count, number)


def test_a_shape_has_one_definition():
    same, other = (
        task_definition(msgspec.structs.replace(FARGATE, **change)) for change in ({"tags": {}}, {"cpu": 8192})
    )
    assert task_definition(FARGATE) == same, "what a run says of itself is no part of the shape"
    assert task_definition(FARGATE)["family"] != other["family"]
    assert other["family"].startswith("burst-dask-worker-"), "the rights of workers go by it"


def test_fargate():
    definition, asked = task_definition(FARGATE), request(FARGATE, "FARGATE_SPOT")
    assert (definition["cpu"], definition["memory"], definition["networkMode"]) == ("4096", "16384", "awsvpc")
    assert asked["networkConfiguration"]["awsvpcConfiguration"]["subnets"] == ["subnet-1", "subnet-2"]
    assert asked["capacityProviderStrategy"] == [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
    own = msgspec.structs.replace(FARGATE, subnets=("subnet-9",), security_groups=("sg-9",))
    network = request(own, "FARGATE")["networkConfiguration"]["awsvpcConfiguration"]
    assert network == {"subnets": ["subnet-9"], "securityGroups": ["sg-9"], "assignPublicIp": "DISABLED"}


def test_a_role_of_its_own_is_named_at_the_start_and_stands_in_no_definition():
    """So a session's worker that starts others cannot have the role of the stack by leaving it out."""
    first, second = (
        msgspec.structs.replace(FARGATE, isolated=True, task_role=f"arn:role/{name}") for name in ("a", "b")
    )
    assert "taskRoleArn" not in task_definition(first) and "taskRoleArn" in task_definition(FARGATE)
    assert task_definition(first) == task_definition(second), "sessions share it"
    assert request(first, "FARGATE")["overrides"]["taskRoleArn"] == "arn:role/a"
    assert "taskRoleArn" not in request(FARGATE, "FARGATE")["overrides"]


def test_several_workers_share_an_instance():
    definition, asked = task_definition(EC2), request(EC2, "x86_64")
    (container,) = definition["containerDefinitions"]
    assert (container["cpu"], container["memory"], definition["networkMode"]) == (4096, 16_384, "bridge")
    assert "networkConfiguration" not in asked, "that is the instance's"
    assert asked["capacityProviderStrategy"] == [{"capacityProvider": "own-x86", "weight": 1}]
    assert asked["placementStrategy"] == [{"type": "binpack", "field": "memory"}]
    assert asked["placementConstraints"][0]["expression"] == "attribute:ecs.instance-type == m5.xlarge"
    assert "placementConstraints" not in request(msgspec.structs.replace(EC2, only_that_type=False), "x86_64")


def test_the_environment_is_that_of_burst_worker():
    (override,) = request(FARGATE, "FARGATE")["overrides"]["containerOverrides"]
    environment = {one["name"]: one["value"] for one in override["environment"]}
    assert environment["BURST_SESSION"] == "sess1" and environment["BURST_STORE"] == "s3://bucket/prefix"
    assert (environment["BURST_PROCESSES"], environment["BURST_THREADS"]) == ("1", "4")
    assert int(environment["BURST_MEMORY_LIMIT"]) < 16_384 << 20, "its supervisor needs some, too"
    assert {"key": "project", "value": "ice"} in request(FARGATE, "FARGATE")["tags"]


def test_a_token_tells_one_call_from_another():
    asked = request(FARGATE, "FARGATE")
    token = client_token(asked, 1)
    assert token == client_token(dict(reversed(asked.items())), 1) and len(token) <= 64
    others = [
        client_token(request(FARGATE, "FARGATE", count=4), 1),
        client_token(request(FARGATE, "FARGATE", number=8), 1),
        client_token(asked, 2),
    ]
    assert len({token, *others}) == 4
