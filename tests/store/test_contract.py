"""The contract on each kind of store; BURST_TEST_STORE adds one, such as a real bucket's URL."""

import asyncio
import os

import pytest
from contract import StoreContract, listed
from servers import REGION

from burst_dask.clock import Entropy
from burst_dask.store import open_store

KINDS = ["memory", "file", "slow", "moto", "localstack", *(["given"] if "BURST_TEST_STORE" in os.environ else [])]


def bucket_url(endpoint: str) -> str:
    """Create the bucket that the contract uses; return its URL."""
    import boto3

    boto3.client("s3", endpoint_url=endpoint, region_name=REGION).create_bucket(Bucket="contract")
    return f"s3://contract?endpoint_url={endpoint}&region={REGION}"


@pytest.fixture(scope="module", params=KINDS)
def place(request, tmp_path_factory):
    """A URL with a place for a prefix."""
    match request.param:
        case "memory":
            return "memory://{}"
        case "file":
            return f"file://{tmp_path_factory.mktemp('stores')}/{{}}"
        case "slow":
            latencies = "put=0.00001&get=0.00001&list=0.00001"
            return f"slow+file://{tmp_path_factory.mktemp('stores')}/{{}}?{latencies}"
        case "given":
            return os.environ["BURST_TEST_STORE"].rstrip("/") + "/{}"
    endpoint = request.getfixturevalue(f"{request.param}_server")
    return bucket_url(endpoint).replace("s3://contract", "s3://contract/{}")


@pytest.fixture
def store(place):
    store = open_store(place.format(f"t{Entropy().token()}"))
    yield store
    asyncio.run(clear(store))


async def clear(store):
    await store.delete(await listed(store))


class TestContract(StoreContract):
    pass
