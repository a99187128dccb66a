"""``burst setup aws``: what is to be created or changed, then doing it.

The parameters of a stack that stands are kept unless others are asked for, so that asking again changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from burst_dask import sync
from burst_dask.aws import schedule
from burst_dask.aws.assets import TEMPLATE, asset
from burst_dask.aws.clients import Clients
from burst_dask.aws.events import Event, events_of, failure, wait_for
from burst_dask.aws.explain import code_of, explained
from burst_dask.aws.network import Network, choose_network
from burst_dask.aws.stack import STACK_TAG, Stack, describe, read_stack
from burst_dask.clock import Clock
from burst_dask.errors import AccessDenied, CloudError, ConfigError, WaitTimeout
from burst_dask.store.address import Address

#: Parameters that are kept from the stack that stands; the rest are those of the network and the bucket.
OPTIONS = (
    "PrivateEndpoints",
    "Prefix",
    "MoreBuckets",
    "MoreRead",
    "MoreWrite",
    "MoreDelete",
    "KmsKey",
    "DataDays",
    "LogDays",
    "SelfHealing",
    "HealEvery",
    "HealImage",
    "HealArchitecture",
    "InstanceTypesX86",
    "InstanceTypesArm",
    "LeastVCpus",
    "MostVCpus",
    "MostInstances",
    "InstanceVolume",
    "WarmX86",
    "WarmArm",
)
NETWORK = ("Vpc", "Subnets", "AssignPublicIp", "RouteTables")
BUCKET = ("BucketName", "CreateBucket")
#: Roles of services that an account has after their first use; a stack cannot be created without them.
_SERVICE_ROLES = {
    "AWSServiceRoleForECS": "ecs.amazonaws.com",
    "AWSServiceRoleForAutoScaling": "autoscaling.amazonaws.com",
    "AWSServiceRoleForEC2Spot": "spot.amazonaws.com",
}
_UNCHANGED = "Nothing was changed"
_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
#: States of a stack that never stood, and what that means.
_NEVER_STOOD = {
    "REVIEW_IN_PROGRESS": "it was planned, by a setup that was broken off or that somebody has not agreed to yet",
    **dict.fromkeys(("ROLLBACK_COMPLETE", "CREATE_FAILED", "ROLLBACK_FAILED"), "it is what a failed creation has left"),
}


@dataclass(frozen=True)
class Wish:
    """What a person asks of a stack; None and empty keep what there is, or take the default."""

    vpc: str | None = None
    subnets: tuple[str, ...] = ()
    bucket: str | None = None
    #: URLs of further stores that workers may use
    stores: tuple[str, ...] = ()
    #: further parameters of the template
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Change:
    """One resource that is created, changed or deleted."""

    action: str
    resource: str
    kind: str
    #: whether changing it means a new one in its place
    replaces: bool


@dataclass(frozen=True)
class Plan:
    """What `apply` does; AWS keeps it as a change set until then."""

    stack: str
    stack_id: str
    #: ``"CREATE"`` or ``"UPDATE"``
    kind: str
    change_set: str
    parameters: Mapping[str, str]
    changes: tuple[Change, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the stack is as it should be."""
        return not self.change_set  # one that changes outputs only has no changes of resources


@dataclass(frozen=True)
class Leftover:
    """A stack that never stood. One of the same name can be created when it is removed."""

    stack_id: str
    #: in words
    state: str


def leftover(clients: Clients, name: str) -> Leftover | None:
    """Return what a creation that failed or was never begun has left; None if there is no such thing."""
    found = describe(clients, name)
    if found is None or found["StackStatus"] not in _NEVER_STOOD:
        return None
    status = found["StackStatus"]
    return Leftover(str(found["StackId"]), f"The stack {name} is {status}: {_NEVER_STOOD[status]}")


def plan(clients: Clients, name: str, wish: Wish, clock: Clock) -> Plan:
    """Return what is to be created or changed, as a change set of AWS.

    Raises
    ------
    ConfigError
        Something that was asked for cannot be, or there is a `leftover`; the message says why. Nothing was changed.
    AccessDenied, CloudError
        AWS refuses; nothing was changed.
    """
    if not _NAME.fullmatch(name) or name.startswith(("aws", "ecs", "fargate")):
        raise ConfigError(
            f"{name!r} cannot name a stack: up to 32 lower-case letters, digits and dashes, and not beginning with "
            f"aws, ecs or fargate. {_UNCHANGED}"
        )
    before = describe(clients, name)
    if before is not None and before["StackStatus"] in _NEVER_STOOD:
        raise ConfigError(f"the stack {name} is {before['StackStatus']}, and must be removed first. {_UNCHANGED}")
    if before is not None and before["StackStatus"].endswith("_IN_PROGRESS"):
        raise ConfigError(f"the stack {name} is {before['StackStatus']}: somebody changes it now. Ask again later")
    old = {one["ParameterKey"]: one["ParameterValue"] for one in (before or {}).get("Parameters", ())}
    parameters = wanted_parameters(clients, name, wish, old)
    return _change_set(clients, name, "CREATE" if before is None else "UPDATE", parameters, clock)


def wanted_parameters(clients: Clients, name: str, wish: Wish, old: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of the template, where `old` ones are those of the stack that stands."""
    found = {key: old[key] for key in (*OPTIONS, *NETWORK, *BUCKET) if key in old}
    found |= wish.options
    if wish.stores:
        found |= _more_stores(clients.partition, wish.stores)
    private = found.get("PrivateEndpoints") == "true"
    turned = "PrivateEndpoints" in wish.options and old.get("PrivateEndpoints", "false") != found["PrivateEndpoints"]
    if wish.vpc or wish.subnets or turned or "Subnets" not in old:
        vpc = wish.vpc or (old.get("Vpc") if turned and not wish.subnets else None)
        network = choose_network(clients, name, vpc, wish.subnets, private)
        found |= {
            "Vpc": network.vpc,
            "Subnets": ",".join(subnet.id for subnet in network.subnets),
            "AssignPublicIp": "ENABLED" if network.assign_public_ip else "DISABLED",
            "RouteTables": ",".join(_tables(network, old)),
        }
    found |= _bucket(clients, name, wish.bucket, old)
    if found.get("HealEvery", "0") != "0":
        found |= schedule.parameters(clients, name, read_stack(clients, name), found)
    for key, count in (("InstanceTypesX86", "WarmX86"), ("InstanceTypesArm", "WarmArm")):
        first = found.get(key, "*").split(",")[0]
        if found.get(count, "0") != "0" and "*" in first:
            raise ConfigError(
                f"a warm pool has instances of one type, but {first!r} stands for several: begin --instance-types "
                f"with one such as c7i.2xlarge. {_UNCHANGED}"
            )
    return found


def _tables(network: Network, old: Mapping[str, str]) -> list[str]:
    """Return the route tables to which the stack adds its endpoint of S3.

    Among them are those that have it already: it may look like somebody else's, and would be taken away.
    """
    own = {table for table in old.get("RouteTables", "").split(",") if table}
    return sorted({*network.route_tables, *(own & {subnet.route_table for subnet in network.subnets})})


def apply(clients: Clients, plan: Plan, clock: Clock, tell: Callable[[Event], None]) -> Stack:
    """Do what was planned, and return the stack when it stands.

    Raises
    ------
    CloudError
        It failed, with the reason of the first resource that did. What was there before is as it was.
    """
    _service_roles(clients)
    old = frozenset(event.id for event in events_of(clients, plan.stack_id))
    with explained("cloudformation:ExecuteChangeSet", f"the stack {plan.stack}", _UNCHANGED):
        clients.client("cloudformation").execute_change_set(ChangeSetName=plan.change_set, StackName=plan.stack_id)
    status = wait_for(clients, plan.stack_id, clock, tell, old)
    if status not in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        done = "created" if plan.kind == "CREATE" else "changed"
        kept = "What had been created was removed again" if plan.kind == "CREATE" else "The stack is as it was before"
        if status.endswith("ROLLBACK_FAILED"):
            kept = f"Undoing it failed, too: see the events of the stack {plan.stack} in the console"
        raise failure(events_of(clients, plan.stack_id), f"the stack {plan.stack} was not {done}", kept)
    return stack_of(clients, plan)


def stack_of(clients: Clients, plan: Plan) -> Stack:
    """Return the stack that a plan was for."""
    stack = read_stack(clients, plan.stack)
    if stack is None:
        raise CloudError(f"the stack {plan.stack} was deleted by somebody else in the meantime")
    return stack


def drop(clients: Clients, plan: Plan) -> None:
    """Forget a plan; a stack that was only planned leaves nothing."""
    cloudformation = clients.client("cloudformation")
    if plan.kind == "CREATE":
        with explained("cloudformation:DeleteStack", f"the stack {plan.stack}, which is empty"):
            cloudformation.delete_stack(StackName=plan.stack_id)
    elif plan.change_set:
        with explained("cloudformation:DeleteChangeSet", f"the stack {plan.stack}"):
            cloudformation.delete_change_set(ChangeSetName=plan.change_set, StackName=plan.stack_id)


def _change_set(clients: Clients, name: str, kind: str, parameters: Mapping[str, str], clock: Clock) -> Plan:
    """Have AWS work out what would change."""
    cloudformation = clients.client("cloudformation")
    with explained("cloudformation:CreateChangeSet", f"the stack {name}", _UNCHANGED):
        made = cloudformation.create_change_set(
            StackName=name,
            ChangeSetName=f"burst-{int(clock.wall())}",
            ChangeSetType=kind,
            TemplateBody=asset(TEMPLATE).read_text(),
            Parameters=[{"ParameterKey": key, "ParameterValue": value} for key, value in parameters.items()],
            Capabilities=["CAPABILITY_IAM"],
            Tags=[{"Key": STACK_TAG, "Value": name}],
        )
    id, stack_id = str(made["Id"]), str(made.get("StackId", name))
    until = clock.monotonic() + 300
    while True:
        with explained("cloudformation:DescribeChangeSet", f"the stack {name}", _UNCHANGED):
            found = cloudformation.describe_change_set(ChangeSetName=id, StackName=stack_id)
        if found["Status"] not in ("CREATE_PENDING", "CREATE_IN_PROGRESS"):
            break
        if clock.monotonic() > until:
            raise WaitTimeout(f"AWS has not worked out in five minutes what would change. {_UNCHANGED}")
        sync.run(clock.sleep(1.0))
    planned = Plan(name, stack_id, kind, id, parameters, tuple(map(_change, _changes(clients, id, stack_id, found))))
    if found["Status"] != "FAILED":
        return planned
    drop(clients, planned)
    reason = str(found.get("StatusReason", ""))
    if "didn't contain changes" in reason or "No updates are to be performed" in reason:
        return Plan(name, stack_id, kind, "", parameters, ())
    raise CloudError(f"AWS refuses the stack {name}: {reason.rstrip('. ')}. {_UNCHANGED}")


def _changes(clients: Clients, id: str, stack_id: str, first: dict[str, Any]) -> list[dict[str, Any]]:
    found = list(first.get("Changes", ()))
    while token := first.get("NextToken"):
        with explained("cloudformation:DescribeChangeSet", stack_id, _UNCHANGED):
            first = clients.client("cloudformation").describe_change_set(
                ChangeSetName=id, StackName=stack_id, NextToken=token
            )
        found += first.get("Changes", ())
    return found


def _change(one: dict[str, Any]) -> Change:
    change = one["ResourceChange"]
    return Change(
        str(change["Action"]),
        str(change["LogicalResourceId"]),
        str(change["ResourceType"]),
        change.get("Replacement") in ("True", "Conditional"),
    )


def remove_leftover(clients: Clients, left: Leftover, clock: Clock) -> None:
    """Remove what a creation that failed or was never begun has left."""
    with explained("cloudformation:DeleteStack", f"{left.stack_id}, which never stood", _UNCHANGED):
        clients.client("cloudformation").delete_stack(StackName=left.stack_id)
    status = wait_for(clients, left.stack_id, clock, lambda event: None)
    if status != "DELETE_COMPLETE":
        raise failure(
            events_of(clients, left.stack_id),
            "what an earlier creation has left cannot be removed",
            "Remove it in the console",
        )


def _bucket(clients: Clients, name: str, asked: str | None, old: Mapping[str, str]) -> dict[str, str]:
    """Return the bucket's name, and whether the stack is to create it."""
    if "BucketName" in old:
        if asked and asked != old["BucketName"]:
            raise ConfigError(
                f"the stack {name} has the bucket {old['BucketName']}, and data may lie in it: a stack keeps its "
                f"bucket. Use --store s3://{asked}/prefix to let workers use another one, too, or --stack for a "
                f"second stack. {_UNCHANGED}"
            )
        return {key: old[key] for key in BUCKET if key in old}
    # Not a name that only CloudFormation knows: so an earlier stack's bucket is found again.
    bucket = asked or f"{name}-{clients.account}-{clients.region}"
    region = bucket_region(clients, bucket)
    if region is None:
        return {"BucketName": bucket, "CreateBucket": "true"}
    if region != clients.region:
        raise ConfigError(
            f"the bucket {bucket} is in {region}, and the stack would be in {clients.region}: each byte would cost. "
            f"Pass --region {region}, or another --bucket. {_UNCHANGED}"
        )
    return {"BucketName": bucket, "CreateBucket": "false"}


def bucket_region(clients: Clients, bucket: str) -> str | None:
    """Return the region of a bucket of this account; None if there is none of that name anywhere.

    Raises
    ------
    AccessDenied
        It belongs to somebody else, or the right s3:ListBucket is missing.
    """
    try:
        with explained("s3:ListBucket", f"the bucket {bucket}, or it belongs to another account", _UNCHANGED):
            found = clients.client("s3").head_bucket(Bucket=bucket, ExpectedBucketOwner=clients.account)
    except CloudError as error:
        if code_of(error) in ("404", "NoSuchBucket"):
            return None
        raise
    headers = found["ResponseMetadata"]["HTTPHeaders"]
    return str(found.get("BucketRegion") or headers.get("x-amz-bucket-region") or clients.region)


def _more_stores(partition: str, urls: tuple[str, ...]) -> dict[str, str]:
    """Return the parameters that let workers use further stores."""
    addresses = [Address.parse(url) for url in urls]
    for address in addresses:
        if address.scheme != "s3":
            raise ConfigError(f"{address.url} is not on S3: --store takes s3://bucket/prefix. {_UNCHANGED}")
    arns = [(address, f"arn:{partition}:s3:::{address.place}") for address in addresses]
    below = [f"{arn}/{address.path}/" if address.path else f"{arn}/" for address, arn in arns]
    written = [f"{prefix}{star}s/*" for prefix in below for star in ("", "*/")]
    return {
        "MoreBuckets": ",".join(dict.fromkeys(arn for _, arn in arns)),
        "MoreRead": ",".join(f"{prefix}*" for prefix in below),
        "MoreWrite": ",".join(written),
        "MoreDelete": ",".join(f"{arns}/runs/*/segments/*" for arns in written),
    }


def _service_roles(clients: Clients) -> None:
    """Create the roles that the services of AWS itself need, where an account has none yet."""
    iam = clients.client("iam")
    for role, service in _SERVICE_ROLES.items():
        try:
            with explained("iam:GetRole", role):
                iam.get_role(RoleName=role)
        except AccessDenied:
            continue  # most accounts have it; otherwise the stack fails, and says so
        except CloudError as error:
            if code_of(error) != "NoSuchEntity":
                raise
            _create_service_role(clients, service)


def _create_service_role(clients: Clients, service: str) -> None:
    try:
        with explained("iam:CreateServiceLinkedRole", service, _UNCHANGED):
            clients.client("iam").create_service_linked_role(AWSServiceName=service)
    except CloudError as error:
        if code_of(error) not in ("InvalidInput", "EntityAlreadyExists"):  # somebody else was faster
            raise
