"""Where S3 finds its credentials, region and endpoint."""

import sys

import boto3
import pytest
from contract import in_loop

from burst_dask.errors import ConfigError, StoreAccessDenied
from burst_dask.store import open_store


@pytest.fixture
def aws(tmp_path, monkeypatch, aws_credentials):
    """An AWS configuration to write; no credentials but what a test puts there."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", None)
    return tmp_path


def test_no_credentials_is_said_at_once(aws):
    with pytest.raises(StoreAccessDenied, match=r"no credentials found: set AWS_ACCESS_KEY_ID.*aws sso login"):
        open_store("s3://bucket/x")


def test_public_bucket_needs_no_credentials(aws):
    assert open_store("s3://bucket/x", skip_signature="true").url == "s3://bucket/x?skip_signature=true"


@in_loop
async def test_profile_gives_credentials_region_and_endpoint(aws, monkeypatch, moto_server):
    (aws / "credentials").write_text("[work]\naws_access_key_id = testing\naws_secret_access_key = hunter2\n")
    (aws / "config").write_text(f"[profile work]\nregion = eu-west-1\nendpoint_url = {moto_server}\n")
    monkeypatch.setenv("AWS_PROFILE", "work")
    bucket = {"LocationConstraint": "eu-west-1"}
    boto3.Session().client("s3").create_bucket(Bucket="profiled", CreateBucketConfiguration=bucket)
    store = open_store("s3://profiled/x")
    assert store.url == f"s3://profiled/x?endpoint_url={moto_server}&region=eu-west-1"  # as workers need it
    assert await store.create("k", b"1")


def test_session_of_the_application_is_used(aws, monkeypatch):
    session = boto3.Session(aws_access_key_id="a", aws_secret_access_key="hunter2", region_name="eu-north-1")
    monkeypatch.setattr(boto3, "DEFAULT_SESSION", session)
    assert open_store("s3://bucket").url == "s3://bucket?region=eu-north-1"


@pytest.mark.parametrize("variable", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_region_of_the_environment(aws, monkeypatch, variable):
    monkeypatch.setenv(variable, "ap-south-1")
    assert open_store("s3://bucket", skip_signature="true").url == "s3://bucket?region=ap-south-1&skip_signature=true"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_endpoint_of_the_environment(aws, monkeypatch, variable):
    monkeypatch.setenv(variable, "http://127.0.0.1:9000")
    assert "endpoint_url=http://127.0.0.1:9000" in open_store("s3://bucket", skip_signature="true").url
    given = open_store("s3://bucket?endpoint_url=http://127.0.0.1:9001", skip_signature="true")
    assert "9000" not in given.url


def test_unknown_profile(aws, monkeypatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match="nobody"):
        open_store("s3://bucket")


@in_loop
async def test_expired_sso_login_says_how_to_renew_it(aws, monkeypatch):
    (aws / "config").write_text(
        "[default]\nsso_session = s\nsso_account_id = 1\nsso_role_name = r\nregion = eu-west-1\n"
        "[sso-session s]\nsso_region = eu-west-1\nsso_start_url = https://example.com\n"
    )
    monkeypatch.setenv("HOME", str(aws))
    store = open_store("s3://bucket", endpoint_url="http://127.0.0.1:9")
    with pytest.raises(StoreAccessDenied, match="aws sso login"):
        await store.get("k")


@in_loop
async def test_without_boto3_the_environment_still_serves(monkeypatch, moto_server):
    boto3.client("s3", endpoint_url=moto_server, region_name="us-east-1").create_bucket(Bucket="native")
    monkeypatch.setitem(sys.modules, "boto3", None)
    store = open_store("s3://native", endpoint_url=moto_server)
    assert await store.create("k", b"1")


@in_loop
async def test_secrets_are_never_shown(monkeypatch, moto_server):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    store = open_store("s3://never-created", endpoint_url=moto_server)
    with pytest.raises(Exception, match="no such bucket") as caught:
        await store.get("k")
    assert "hunter2" not in store.url + repr(store.inner.inner) + str(caught.value)
