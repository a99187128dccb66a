"""What workers cost: as AWS says, and by a dated table where it does not."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from burst_dask.aws import prices
from burst_dask.aws.capacity import Size

SIZE = Size(4096, 16384)


def product(usage: str, usd: str) -> str:
    terms = {"OnDemand": {"a": {"priceDimensions": {"b": {"unit": "Hrs", "pricePerUnit": {"USD": usd}}}}}}
    return json.dumps({"product": {"attributes": {"usagetype": usage}}, "terms": terms})


def listed(*products: str) -> dict[str, Any]:
    return {"PriceList": list(products), "FormatVersion": "aws_v1"}


@pytest.mark.parametrize(
    ("arch", "usages"),
    [
        ("x86_64", ("EU-Fargate-vCPU-Hours:perCPU", "EU-Fargate-GB-Hours")),
        ("arm64", ("EU-Fargate-ARM-vCPU-Hours:perCPU", "EU-Fargate-ARM-GB-Hours")),
    ],
)
def test_fargate_as_the_price_list_says(account: Any, arch: str, usages: tuple[str, str]) -> None:
    others = [
        product("EU-Fargate-EphemeralStorage-GB-Hours", "9"),
        product("EU-Fargate-Windows-vCPU-Hours:perCPU", "9"),
    ]
    answer = listed(*others, product(usages[0], "0.05"), product(usages[1], "0.005"))
    account.answers("pricing:GetProducts", answer)
    price = prices.of_fargate(account.clients, SIZE, arch)
    assert price.hourly == pytest.approx(4 * 0.05 + 16 * 0.005)
    assert price.source == "the AWS Price List"


def test_the_price_of_spot_is_not_taken_for_that_of_others(account: Any) -> None:
    """Bills have such usage types, and a limit of costs must hold."""
    spot = [
        product("EU-SpotUsage-Fargate-vCPU-Hours:perCPU", "0.01"),
        product("EU-SpotUsage-Fargate-GB-Hours", "0.001"),
    ]
    account.answers("pricing:GetProducts", listed(*spot))
    assert prices.TABLE_DATE in prices.of_fargate(account.clients, SIZE, "x86_64").source
    others = [product("Fargate-vCPU-Hours:perCPU", "0.05"), product("Fargate-GB-Hours", "0.005")]
    account.answers("pricing:GetProducts", listed(*spot, *others))
    assert prices.of_fargate(account.clients, SIZE, "x86_64").hourly == pytest.approx(4 * 0.05 + 16 * 0.005)


def test_fargate_by_the_table_where_aws_does_not_say(account: Any) -> None:
    account.denies("pricing:GetProducts")
    price = prices.of_fargate(account.clients, SIZE, "x86_64")
    assert price.hourly == pytest.approx(4 * 0.04048 + 16 * 0.004445)
    assert prices.TABLE_DATE in price.source
    account.answers("pricing:GetProducts", listed(product("EU-Fargate-GB-Hours", "0.005")))
    assert prices.TABLE_DATE in prices.of_fargate(account.clients, SIZE, "x86_64").source, "one of two is not enough"


def test_instances(account: Any) -> None:
    free = product("EU-BoxUsage:m5.large", "0.0000000000")
    account.answers(
        "pricing:GetProducts",
        listed(product("EU-BoxUsage:m5.large2", "9"), free, product("EU-BoxUsage:m5.large", "0.107")),
    )
    assert prices.of_instance(account.clients, "m5.large", False) == (0.107, "the AWS Price List")
    account.answers("pricing:GetProducts", listed())
    assert prices.of_instance(account.clients, "m5.large", False) is None
    account.denies("pricing:GetProducts")
    assert prices.of_instance(account.clients, "m5.large", False) is None


def test_spot_costs_what_it_does_now_where_it_costs_most(account: Any) -> None:
    def seen(zone: str, hour: int, price: str) -> dict[str, Any]:
        return {"AvailabilityZone": zone, "Timestamp": datetime(2026, 11, 24, hour, tzinfo=UTC), "SpotPrice": price}

    history = [seen("a", 9, "0.9"), seen("a", 10, "0.04"), seen("b", 10, "0.05"), seen("b", 3, "0.01")]
    account.answers("ec2:DescribeSpotPriceHistory", {"SpotPriceHistory": history})
    assert prices.of_instance(account.clients, "m5.large", True) == (0.05, "the history of Spot prices")
    account.answers("ec2:DescribeSpotPriceHistory", {"SpotPriceHistory": []})
    assert prices.of_instance(account.clients, "m5.large", True) is None
