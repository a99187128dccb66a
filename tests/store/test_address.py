"""What addresses mean, and what they refuse."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burst_dask.errors import ConfigError
from burst_dask.store import default_url, open_store
from burst_dask.store.address import Address


@pytest.mark.parametrize(
    ("text", "scheme", "place", "path"),
    [
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("s3a://bucket/a/b/", "s3", "bucket", "a/b"),
        ("S3://bucket/with%20space", "s3", "bucket", "with space"),
        ("gs://bucket/a", "gs", "bucket", "a"),
        ("az://container/a?account_name=me", "az", "container", "a"),
        ("abfs://container@me.dfs.core.windows.net/a", "az", "container", "a"),
        ("file:///tmp/a%3Fb", "file", "", "/tmp/a?b"),
        ("file://localhost/tmp/a/", "file", "", "/tmp/a"),
        ("/tmp/a?b", "file", "", "/tmp/a?b"),
        (Path("/tmp/a"), "file", "", "/tmp/a"),
        ("memory://name", "memory", "name", ""),
        ("slow+s3://bucket/a?put=1", "s3", "bucket", "a"),
    ],
)
def test_forms(text, scheme, place, path):
    address = Address.parse(text)
    assert (address.scheme, address.place, address.path) == (scheme, place, path)
    assert Address.parse(address.url) == address


def test_relative_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Address.parse("some/store").path == str(tmp_path / "some" / "store")
    assert Address.parse("~/store").path == str(Path.home() / "store")


def test_options_become_part_of_the_url_and_win_over_it():
    address = Address.parse("s3://b/p?region=us-west-2", endpoint_url="http://127.0.0.1:9000", region="eu-west-1")
    assert address.url == "s3://b/p?endpoint_url=http://127.0.0.1:9000&region=eu-west-1"
    assert Address.parse(address.url) == address


@given(
    path=st.lists(
        st.text(st.characters(exclude_characters="/", exclude_categories=["Cs", "Cc"]), min_size=1), max_size=4
    ),
    value=st.text(st.characters(exclude_categories=["Cs", "Cc"])),
)
def test_urls_keep_what_they_were_made_of(path, value):
    address = Address("s3", "bucket", "/".join(path), {"region": value})
    assert Address.parse(address.url) == address


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("ftp://host/x", "supported are s3://"),
        ("http://host/x", "supported are s3://"),
        ("s3://", "s3://name/prefix"),
        ("s3:///prefix", "lacks a bucket"),
        ("memory://", "lacks a name"),
        ("file://host/x", "absolute path"),
        ("file://", "absolute path"),
        ("s3://bucket?regoin=x", "known: .*region"),
        ("s3://bucket#part", "%23"),
        ("memory://name?region=x", "unknown option 'region'"),
        ("s3://bucket?put=1", "unknown option 'put'"),
        ("slow+memory://name?put=fast", "number of seconds"),
        ("slow+memory://name?put=-1", "number of seconds"),
        ("slow+memory://name?put=nan", "number of seconds"),
        ("s3://bucket?region", "malformed"),
        ("s3://[bucket", "malformed"),
    ],
)
def test_what_is_wrong_is_said(text, says):
    with pytest.raises(ConfigError, match=says):
        open_store(text)


@pytest.mark.parametrize(
    "option",
    [
        "secret_access_key",
        "aws_secret_access_key",
        "access_key_id",
        "aws_access_key_id",
        "session_token",
        "token",
        "account_key",
        "sas_token",
        "sas_key",
        "client_secret",
        "service_account_key",
        "bearer_token",
        "password",
    ],
)
@pytest.mark.parametrize("scheme", ["s3", "gs", "az"])
def test_secrets_are_refused_and_not_repeated(scheme, option):
    for call in (
        lambda: open_store(f"{scheme}://bucket", **{option: "hunter2"}),
        lambda: open_store(f"{scheme}://bucket?{option}=hunter2"),
    ):
        with pytest.raises(ConfigError, match="environment") as caught:
            call()
        assert option in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_credentials_before_the_host_are_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="must not hold credentials") as caught:
        open_store("s3://AKIA:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)


def test_default_store_is_a_directory_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    store = open_store()
    assert store.url == default_url()
    assert Path(store.url.removeprefix("file://")).is_dir()
    assert Path(store.url.removeprefix("file://")).is_relative_to(tmp_path)


def test_azure_needs_an_account(monkeypatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/x")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "mine")
    assert open_store("az://container/x").url == "az://container/x?account_name=mine"


def test_memory_store_has_no_path():
    with pytest.raises(ConfigError, match="no path"):
        open_store("memory://name/path")


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        open_store(tmp_path / "file")
