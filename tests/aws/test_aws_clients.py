"""Clients: regions, profiles, and what is missing."""

from __future__ import annotations

import sys
import threading

import pytest

from burst_dask.aws.clients import Clients
from burst_dask.errors import ConfigError

pytestmark = pytest.mark.usefixtures("aws_credentials")


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch):
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


def test_without_boto3(monkeypatch):
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match=r"pip install 'burst-dask\[aws\]'"):
        Clients.of(region="eu-west-1")


def test_without_a_region():
    with pytest.raises(ConfigError, match="no AWS region is set: pass --region"):
        Clients.of()


def test_the_region_is_that_asked_for_then_of_the_environment(monkeypatch):
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert Clients.of().region == "us-west-2"
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    assert Clients.of().region == "eu-central-1"
    assert Clients.of(region="eu-west-1").region == "eu-west-1"


def test_no_such_profile():
    with pytest.raises(ConfigError, match=r"profile \(nosuch\) could not be found; `aws configure list-profiles`"):
        Clients.of(region="eu-west-1", profile="nosuch")


def test_the_partition_of_other_clouds():
    assert Clients.of(region="cn-north-1").partition == "aws-cn"


def test_threads_get_the_same_client():
    clients = Clients.of(region="eu-west-1")
    found = []
    threads = [threading.Thread(target=lambda: found.append(clients.client("sts"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(client) for client in found}) == 1


def test_an_endpoint_may_be_set(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert Clients.of(region="eu-west-1").client("ecs").meta.endpoint_url == "http://127.0.0.1:1"
