"""The stack that `burst setup aws` makes, as the rest of the package sees it: names and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.errors import BurstError, CloudError

#: The name of the stack unless another one is asked for.
DEFAULT_NAME = "burst-dask"
#: On everything that the stack makes, and on every task of a session: whose it is. The value is the name of the stack.
STACK_TAG = "burst-dask:stack"
#: On every task: its session.
SESSION_TAG = "burst-dask:session"
#: Where stores lie in the stack's bucket unless another prefix is asked for.
DEFAULT_PREFIX = "burst"
#: Names of architectures, as Python and this package write them, and as ECS and images do.
ARCHITECTURES = ("x86_64", "arm64")
ECS_ARCHITECTURES = {"x86_64": "X86_64", "arm64": "ARM64"}
IMAGE_ARCHITECTURES = {"x86_64": "amd64", "arm64": "arm64"}
#: A stack in one of these can be used.
USABLE = {"CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE"}


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """The outputs of a stack.

    Examples
    --------
    >>> outputs = {"Bucket": "b", "Cluster": "c", "Subnets": "subnet-1,subnet-2", "AssignPublicIp": "ENABLED"}
    >>> stack = Stack.of("burst-dask", "eu-west-1", outputs)
    >>> stack.store, stack.subnets, stack.assign_public_ip
    ('s3://b/burst?region=eu-west-1', ('subnet-1', 'subnet-2'), True)
    """

    name: str
    region: str
    bucket: str
    #: prefix of the keys below which workers may write
    prefix: str
    cluster: str
    #: ARNs
    task_role: str
    execution_role: str
    log_group: str
    #: URI of the image repository, without a tag
    repository: str
    #: URI of the image that workers run unless another one is asked for; empty before one was pushed
    image: str
    subnets: tuple[str, ...]
    security_groups: tuple[str, ...]
    #: whether tasks on Fargate need a public address to reach the registry
    assign_public_ip: bool
    #: names of capacity providers on EC2, by ``"x86_64"``, ``"x86_64-spot"``, ``"arm64"``, ``"arm64-spot"``
    capacity_providers: Mapping[str, str]
    #: the CodeBuild project that builds images
    builder: str = ""
    #: ARN of the key that encrypts the bucket; empty: S3's own
    kms_key: str = ""
    #: ARN of the policy that bounds roles of single sessions; empty: a stack of an older version, which has none
    boundary: str = ""
    #: name of the schedule that has work go on when nobody is left, and the image that it runs; empty: there is none
    schedule: str = ""
    heal_image: str = ""
    status: str = ""

    @classmethod
    def of(cls, name: str, region: str, outputs: Mapping[str, str], image: str = "", status: str = "") -> Stack:
        """Return the stack with those outputs; what an older stack lacks is empty."""

        def several(key: str) -> tuple[str, ...]:
            return tuple(filter(None, outputs.get(key, "").split(",")))

        providers = {
            f"{arch}{kind}": outputs.get(f"CapacityProvider{title}{kind.removeprefix('-').capitalize()}", "")
            for arch, title in (("x86_64", "X86"), ("arm64", "Arm"))
            for kind in ("", "-spot")
        }
        return cls(
            name=name,
            region=region,
            bucket=outputs.get("Bucket", ""),
            prefix=outputs.get("Prefix", DEFAULT_PREFIX),
            cluster=outputs.get("Cluster", ""),
            task_role=outputs.get("TaskRole", ""),
            execution_role=outputs.get("ExecutionRole", ""),
            log_group=outputs.get("LogGroup", ""),
            repository=outputs.get("Repository", ""),
            image=image,
            subnets=several("Subnets"),
            security_groups=several("SecurityGroups"),
            assign_public_ip=outputs.get("AssignPublicIp") == "ENABLED",
            capacity_providers={key: value for key, value in providers.items() if value},
            builder=outputs.get("Builder", ""),
            kms_key=outputs.get("KmsKey", ""),
            boundary=outputs.get("Boundary", ""),
            schedule=outputs.get("Schedule", ""),
            heal_image=outputs.get("HealImage", ""),
            status=status,
        )

    @property
    def store(self) -> str:
        """The URL of the stack's store."""
        return f"s3://{self.bucket}/{self.prefix}?region={self.region}"

    @property
    def usable(self) -> bool:
        """Whether its creation or last change ended well."""
        return self.status in USABLE


def read_stack(clients: Clients, name: str = DEFAULT_NAME) -> Stack | None:
    """Return the stack of that name with its outputs; None if there is none.

    Raises
    ------
    AccessDenied
        The right cloudformation:DescribeStacks is missing.
    CloudError
        AWS does not answer.
    """
    found = describe(clients, name)
    if found is None or found["StackStatus"] in ("DELETE_COMPLETE", "REVIEW_IN_PROGRESS"):
        return None
    outputs = {one["OutputKey"]: one["OutputValue"] for one in found.get("Outputs", ())}
    repository = outputs.get("Repository", "")
    image = f"{repository}:{newest_tag(clients, repository)}" if repository else ""
    return Stack.of(name, clients.region, outputs, "" if image.endswith(":") else image, found["StackStatus"])


def describe(clients: Clients, name: str) -> dict[str, Any] | None:
    """Return what DescribeStacks says of a stack; None if there is none."""
    try:
        with explained("cloudformation:DescribeStacks", f"the stack {name}"):
            answer: dict[str, Any] = clients.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]
            return answer
    except CloudError as error:
        if code_of(error) == "ValidationError" and "does not exist" in str(error):
            return None
        raise


def repository_name(uri: str) -> str:
    """Return the name of a repository from its URI.

    >>> repository_name("123456789012.dkr.ecr.eu-west-1.amazonaws.com/burst-dask/worker")
    'burst-dask/worker'
    """
    return uri.partition("/")[2]


def newest_tag(clients: Clients, repository: str) -> str:
    """Return the tag of the image that was pushed last for all architectures; empty if there is none or none may look.

    An image's tag is ``<hash>``; those of its architectures are ``<hash>-x86_64`` and ``<hash>-arm64``.
    """
    try:
        with explained("ecr:DescribeImages", repository):
            pages = (
                clients.client("ecr")
                .get_paginator("describe_images")
                .paginate(repositoryName=repository_name(repository), filter={"tagStatus": "TAGGED"})
            )
            images = [image for page in pages for image in page["imageDetails"]]
    except BurstError:
        return ""  # `burst doctor aws` says why
    tags = [
        (image["imagePushedAt"], tag)
        for image in images
        for tag in image.get("imageTags", ())
        if not tag.endswith(tuple(f"-{arch}" for arch in ARCHITECTURES))
    ]
    return max(tags)[1] if tags else ""
