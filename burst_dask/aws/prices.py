"""What a worker costs an hour: asked of AWS, and from a dated table where it does not say."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from burst_dask.aws.capacity import UNITS, Size
from burst_dask.aws.clients import Clients
from burst_dask.aws.explain import explained
from burst_dask.errors import CloudError

#: The Price List answers in a few regions only, for all of them.
PRICE_LIST_REGION = "us-east-1"
#: USD of a vCPU and of a GiB an hour on Fargate in us-east-1, as published in November 2026; Arm costs a fifth less.
#: Most other regions cost up to a third more.
TABLE = {"x86_64": (0.04048, 0.004445), "arm64": (0.03238, 0.00356)}
TABLE_DATE = "November 2026, us-east-1"
#: The Price List has no prices of Fargate Spot, which change with what is free, and no other API has: the page that
#: shows them to people reads a file of its own, which nobody has promised to be there or to be right tomorrow. A limit
#: of costs must hold, so that such workers count as what they cost at most.
SPOT_NOTE = "at most: Fargate Spot costs up to 70 % less, which no API of AWS tells exactly"
#: What may come before a usage type: a region. Other kinds have more of it, such as USE1-SpotUsage-Fargate-GB-Hours.
_REGION = re.compile(r"([A-Z0-9]+-)?")
#: What usage types of Fargate end with.
_FARGATE = {
    "x86_64": ("Fargate-vCPU-Hours:perCPU", "Fargate-GB-Hours"),
    "arm64": ("Fargate-ARM-vCPU-Hours:perCPU", "Fargate-ARM-GB-Hours"),
}


class Price(NamedTuple):
    """What something costs an hour."""

    #: USD
    hourly: float
    #: who says so
    source: str


def of_fargate(clients: Clients, size: Size, arch: str) -> Price:
    """Return what a worker of a size costs on Fargate.

    On Spot it costs less, and this is what it costs at most (`SPOT_NOTE`).

    Parameters
    ----------
    arch
        ``"x86_64"`` or ``"arm64"``.
    """
    usages = _FARGATE[arch]
    rates: tuple[float, ...] = TABLE[arch]
    source = f"the table of {TABLE_DATE}"
    try:
        found = _listed(clients, "AmazonECS", {"regionCode": clients.region, "productFamily": "Compute"})
        told = {usage: _rate(found, usage) for usage in usages}
        if all(rate is not None for rate in told.values()):
            rates, source = tuple(rate for rate in told.values() if rate is not None), "the AWS Price List"
    except CloudError:  # who may not ask, or cannot reach it
        pass
    return Price(size.cpu / UNITS * rates[0] + size.memory / 1024 * rates[1], source)


def of_instance(clients: Clients, name: str, spot: bool) -> Price | None:
    """Return what an instance of a type costs; None when AWS does not say.

    On Spot that is the highest price of now in the zones of the region.
    """
    try:
        return _of_spot(clients, name) if spot else _on_demand(clients, name)
    except CloudError:
        return None


def _of_spot(clients: Clients, name: str) -> Price | None:
    with explained("ec2:DescribeSpotPriceHistory", name):
        answer = clients.client("ec2").describe_spot_price_history(
            InstanceTypes=[name], ProductDescriptions=["Linux/UNIX"], MaxResults=100
        )
    newest: dict[str, tuple[Any, float]] = {}
    for one in answer["SpotPriceHistory"]:
        zone, seen = one["AvailabilityZone"], (one["Timestamp"], float(one["SpotPrice"]))
        newest[zone] = max(newest.get(zone, seen), seen)
    prices = [price for _, price in newest.values()]
    return Price(max(prices), "the history of Spot prices") if prices else None


def _on_demand(clients: Clients, name: str) -> Price | None:
    wanted = {
        "regionCode": clients.region,
        "instanceType": name,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }
    rate = _rate(_listed(clients, "AmazonEC2", wanted), f"BoxUsage:{name}")
    return None if rate is None else Price(rate, "the AWS Price List")


def _listed(clients: Clients, service: str, wanted: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return products of the Price List."""
    filters = [{"Type": "TERM_MATCH", "Field": field, "Value": value} for field, value in wanted.items()]
    pricing = clients.in_region(PRICE_LIST_REGION).client("pricing")
    with explained("pricing:GetProducts", service):
        pages = pricing.get_paginator("get_products").paginate(ServiceCode=service, Filters=filters)
        return [json.loads(product) for page in pages for product in page["PriceList"]]


def _rate(products: Iterable[dict[str, Any]], usage: str) -> float | None:
    """Return the USD an hour, without any commitment, of the product of a usage type, whatever its region.

    >>> dimension = {"unit": "Hrs", "pricePerUnit": {"USD": "0.0960000000"}}
    >>> terms = {"OnDemand": {"t": {"priceDimensions": {"d": dimension}}}}
    >>> _rate([{"product": {"attributes": {"usagetype": "EU-BoxUsage:m5.large"}}, "terms": terms}], "BoxUsage:m5.large")
    0.096
    """
    for product in products:
        told = product["product"]["attributes"].get("usagetype", "")
        if not told.endswith(usage) or not _REGION.fullmatch(told.removesuffix(usage)):
            continue
        for term in product.get("terms", {}).get("OnDemand", {}).values():
            for dimension in term["priceDimensions"].values():
                if (price := float(dimension["pricePerUnit"].get("USD", 0))) > 0:
                    return price
    return None
