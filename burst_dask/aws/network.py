"""Where workers run: subnets, and how each reaches S3 and the image registry."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import code_of, explained
from burst_dask.errors import CloudError, ConfigError

#: How a subnet reaches the internet: through a NAT; through a gateway, with a public address; not at all.
Way = Literal["nat", "public", "none"]
_ZONE = re.compile(r"[a-z]+(-[a-z]+)+-\d[a-z]")  # not those of a Local Zone, where no Fargate is
_UNCHANGED = "Nothing was changed"
#: Interface endpoints that take the place of a way to the internet: for the image, and for the log, without which ECS
#: starts no task. The layers of an image come from S3.
_NEEDED = {"ecr.api", "ecr.dkr", "logs"}


@dataclass(frozen=True)
class Subnet:
    """One subnet, and what leads out of it."""

    id: str
    vpc: str
    zone: str
    free: int
    route_table: str
    way: Way
    #: whether its routes lead to S3 without the internet, by an endpoint of the stack or another one
    s3_endpoint: bool
    #: services with interface endpoints in its network, such as ``"ecr.api"``
    endpoints: frozenset[str]

    def reaches_s3(self, public_ip: bool) -> bool:
        """Tell whether a worker there can reach the store."""
        return self.s3_endpoint or self._reaches_out(public_ip)

    def reaches_registry(self, public_ip: bool) -> bool:
        """Tell whether an image can be fetched there, and a log be opened."""
        return self._reaches_out(public_ip) or self.endpoints >= _NEEDED

    def _reaches_out(self, public_ip: bool) -> bool:
        return self.way == "nat" or (self.way == "public" and public_ip)


@dataclass(frozen=True)
class Network:
    """The subnets that a stack is to use."""

    vpc: str
    subnets: tuple[Subnet, ...]
    assign_public_ip: bool
    #: route tables of the subnets that have no gateway endpoint of S3 but one of the stack's own
    route_tables: tuple[str, ...]


def choose_network(
    clients: Clients,
    stack: str,
    vpc: str | None = None,
    subnets: Sequence[str] = (),
    private_endpoints: bool = False,
) -> Network:
    """Return where workers are to run: in the subnets asked for, or in one of each zone of the VPC.

    Subnets with a NAT are preferred, because workers need no public address there.

    Raises
    ------
    ConfigError
        There is no default VPC, no such subnet, or none from which the registry can be reached.
    """
    vpc = vpc or (None if subnets else _default_vpc(clients))
    found = look_at(clients, stack, vpc, subnets)
    if not found:
        raise ConfigError(f"the VPC {vpc} has no subnets in {clients.region}; choose another by --vpc. {_UNCHANGED}")
    if len({subnet.vpc for subnet in found}) > 1:
        raise ConfigError(f"the subnets {', '.join(subnets)} are of different VPCs; choose those of one. {_UNCHANGED}")
    chosen = found if subnets else _best(found, private_endpoints)
    public = any(subnet.way == "public" for subnet in chosen) and not private_endpoints
    lost = [subnet.id for subnet in chosen if not (private_endpoints or subnet.reaches_registry(public))]
    if lost:
        raise ConfigError(
            f"from {', '.join(lost)} no image can be fetched: there is no route to an internet gateway or a NAT, and "
            f"no endpoint of ECR. Choose others by --subnets, or pass --private-endpoints (about 7 USD a month for "
            f"each of seven endpoints in each zone). {_UNCHANGED}"
        )
    zones = [subnet.zone for subnet in chosen]
    if private_endpoints and len(set(zones)) < len(zones):
        raise ConfigError(f"--private-endpoints takes one subnet of each zone; some are of the same. {_UNCHANGED}")
    tables = sorted({subnet.route_table for subnet in chosen if subnet.route_table and not subnet.s3_endpoint})
    return Network(chosen[0].vpc, tuple(chosen), public, tuple(tables))


def look_at(
    clients: Clients, stack: str, vpc: str | None, subnets: Sequence[str] = (), own_endpoints: bool = False
) -> list[Subnet]:
    """Return subnets of a VPC, or those named, with what leads out of them.

    Parameters
    ----------
    own_endpoints
        Whether the gateway endpoint that the stack itself has made counts; not when it is decided whether to make it.
    """
    ec2 = clients.client("ec2")
    try:
        with explained("ec2:DescribeSubnets", kept=_UNCHANGED):
            asked: dict[str, Any] = {"SubnetIds": list(subnets)} if subnets else {"Filters": [_filter("vpc-id", vpc)]}
            listed = _all(ec2, "describe_subnets", "Subnets", **asked)
    except CloudError as error:
        if code_of(error) == "InvalidSubnetID.NotFound":
            raise ConfigError(f"{error}; `aws ec2 describe-subnets` lists those of {clients.region}") from None
        raise
    vpcs = sorted({one["VpcId"] for one in listed})
    if not vpcs:
        return []
    with explained("ec2:DescribeRouteTables", kept=_UNCHANGED):
        tables = _all(ec2, "describe_route_tables", "RouteTables", Filters=[_filter("vpc-id", *vpcs)])
    with explained("ec2:DescribeVpcEndpoints", kept=_UNCHANGED):
        endpoints = _all(ec2, "describe_vpc_endpoints", "VpcEndpoints", Filters=[_filter("vpc-id", *vpcs)])
    endpoints = [one for one in endpoints if _works(one) and (own_endpoints or not _is_of(one, stack))]
    return [_subnet(one, tables, endpoints) for one in sorted(listed, key=lambda one: str(one["SubnetId"]))]


def _default_vpc(clients: Clients) -> str:
    with explained("ec2:DescribeVpcs", kept=_UNCHANGED):
        found = _all(clients.client("ec2"), "describe_vpcs", "Vpcs")
    for one in found:
        if one.get("IsDefault"):
            return str(one["VpcId"])
    others = ", ".join(one["VpcId"] for one in found[:5])
    raise ConfigError(
        f"{clients.region} has no default VPC. "
        + (f"Choose one of its others by --vpc: {others}. Or create" if others else "Create")
        + f" the default one by `aws ec2 create-default-vpc --region {clients.region}`, which is free. {_UNCHANGED}"
    )


def _best(found: Iterable[Subnet], private_endpoints: bool) -> list[Subnet]:
    """Return for each zone the subnet with the most free addresses, of those with the best way out."""
    regular = [subnet for subnet in found if _ZONE.fullmatch(subnet.zone)] or list(found)
    ways: tuple[Way, ...] = ("none", "nat", "public") if private_endpoints else ("nat", "public", "none")
    way = next(way for way in ways if any(subnet.way == way for subnet in regular))
    best: dict[str, Subnet] = {}
    for subnet in regular:
        if subnet.way == way and (subnet.zone not in best or subnet.free > best[subnet.zone].free):
            best[subnet.zone] = subnet
    return [best[zone] for zone in sorted(best)]


def _subnet(one: dict[str, Any], tables: list[dict[str, Any]], endpoints: list[dict[str, Any]]) -> Subnet:
    table = _table_of(one, [table for table in tables if table["VpcId"] == one["VpcId"]])
    id = str(table["RouteTableId"]) if table else ""
    here = [endpoint for endpoint in endpoints if endpoint["VpcId"] == one["VpcId"]]
    return Subnet(
        id=str(one["SubnetId"]),
        vpc=str(one["VpcId"]),
        zone=str(one["AvailabilityZone"]),
        free=int(one.get("AvailableIpAddressCount", 0)),
        route_table=id,
        way=_way(table["Routes"] if table else ()),
        s3_endpoint=any(
            endpoint["ServiceName"].endswith(".s3")
            and (id in endpoint.get("RouteTableIds", ()) or endpoint.get("VpcEndpointType") == "Interface")
            for endpoint in here
        ),
        endpoints=frozenset(
            _service(endpoint["ServiceName"]) for endpoint in here if endpoint.get("VpcEndpointType") == "Interface"
        ),
    )


def _all(ec2: Any, call: str, what: str, **asked: Any) -> list[dict[str, Any]]:
    """Return what a call lists, on all its pages."""
    return [one for page in ec2.get_paginator(call).paginate(**asked) for one in page[what]]


def _works(endpoint: dict[str, Any]) -> bool:
    """Tell whether an endpoint takes what is sent to a service under its usual name."""
    state = str(endpoint.get("State", "available")).lower()
    if state not in ("available", "pending"):  # rejected, failed, being deleted, …
        return False
    return endpoint.get("VpcEndpointType") != "Interface" or bool(endpoint.get("PrivateDnsEnabled", True))


def _service(name: str) -> str:
    """Return a service's part of the name of its endpoint.

    >>> _service("com.amazonaws.eu-west-1.ecr.api"), _service("cn.com.amazonaws.cn-north-1.ecr.api")
    ('ecr.api', 'ecr.api')
    """
    return name.partition("com.amazonaws.")[2].partition(".")[2]


def _table_of(subnet: dict[str, Any], tables: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the route table of a subnet: its own, or the main one of the VPC."""
    main = None
    for table in tables:
        for association in table.get("Associations", ()):
            if association.get("SubnetId") == subnet["SubnetId"]:
                return table
            if association.get("Main"):
                main = table
    return main


def _way(routes: Iterable[dict[str, Any]]) -> Way:
    for route in routes:
        if route.get("DestinationCidrBlock") != "0.0.0.0/0" or route.get("State") == "blackhole":
            continue
        # a transit gateway, a peering or an appliance leads out as a NAT does: without a public address
        return "public" if str(route.get("GatewayId", "")).startswith("igw-") else "nat"
    return "none"


def _is_of(endpoint: dict[str, Any], stack: str) -> bool:
    return any(
        tag["Key"] == "aws:cloudformation:stack-name" and tag["Value"] == stack for tag in endpoint.get("Tags", ())
    )


def _filter(name: str, *values: str | None) -> dict[str, Any]:
    return {"Name": name, "Values": list(values)}
