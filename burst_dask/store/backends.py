"""An address made into an obstore store: credentials, region, endpoint, time limits."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from obstore.store import AzureStore, GCSStore, LocalStore, MemoryStore, S3Store

from burst_dask.errors import ConfigError, StoreAccessDenied
from burst_dask.store.address import Address
from burst_dask.store.files import Files
from burst_dask.store.obstore_adapter import FileStore, ObstoreStore, Traits
from burst_dask.store.translate import NO_CREDENTIALS, translate

if TYPE_CHECKING:  # obstore has these for type checkers only
    from obstore.store import ClientConfig, RetryConfig

_NO_RETRIES: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
#: The adapter sets the deadline of each request; this one only ends what it has given up.
_CLIENT: ClientConfig = {"connect_timeout": timedelta(seconds=5), "timeout": timedelta(minutes=10)}
_DEFAULT_REGION = "us-east-1"

#: The memory stores of this process by name.
_MEMORIES: dict[str, MemoryStore] = {}


def connect(address: Address) -> ObstoreStore:
    """Return the store at `address`; no request is sent.

    Raises
    ------
    ConfigError
        The address cannot be of a store.
    StoreAccessDenied
        There are no credentials, or the directory cannot be created.
    """
    return _CONNECT[address.scheme](address)


def _connect_memory(address: Address) -> ObstoreStore:
    if address.path:
        raise ConfigError(f"{address.url}: a memory store has a name and no path: memory://{address.place}")
    store = _MEMORIES.setdefault(address.place, MemoryStore())
    return ObstoreStore(store, address.url, Traits(remote=False, bulk_delete=True, ordered=True))


def _connect_file(address: Address) -> ObstoreStore:
    path = Path(address.path)
    durable = address.options.get("durable", "true").lower()
    if durable not in ("true", "false"):
        raise ConfigError(f"durable={durable!r}: whether writes survive a power loss is true or false")
    try:
        files = Files(path, durable=durable == "true")
        store = LocalStore(path)
    except FileExistsError:
        raise ConfigError(f"{address.url} is a file; a store is a directory") from None
    except Exception as error:
        raise translate(error, "open", address.url) from None
    return FileStore(store, address.url, files)


def _connect_s3(address: Address) -> ObstoreStore:
    options = dict(address.options)
    provider: Any = None
    if (botocore := _aws_session()) is not None:
        if "region" not in options and (region := _aws_region(botocore)):
            options["region"] = region
        if "endpoint_url" not in options and (endpoint := _aws_endpoint(botocore)):
            options["endpoint_url"] = endpoint
        if not _is_true(options.get("skip_signature")):
            provider = _aws_credentials(botocore, address.url)
    address = replace(address, options=dict(sorted(options.items())))
    endpoint = options.pop("endpoint_url", None)
    config: dict[str, Any] = {"region": _DEFAULT_REGION} | options
    if endpoint:
        config |= {"endpoint": endpoint.rstrip("/")}
        config.setdefault("virtual_hosted_style_request", "false")
    store = _build(
        S3Store,
        address,
        endpoint,
        config=config,
        credential_provider=provider,
    )
    bulk = not _is_true(options.get("disable_bulk_delete"))
    express = _is_true(options.get("s3_express")) or address.place.endswith("--x-s3")
    return ObstoreStore(store, address.url, Traits(remote=True, bulk_delete=bulk, ordered=not express))


def _connect_gs(address: Address) -> ObstoreStore:
    options = dict(address.options)
    endpoint = options.pop("endpoint_url", None)
    config = options | ({"base_url": endpoint} if endpoint else {})
    store = _build(GCSStore, address, endpoint, config=config)
    return ObstoreStore(store, address.url, Traits(remote=True, bulk_delete=False, ordered=True))


def _connect_az(address: Address) -> ObstoreStore:
    options = dict(address.options)
    account = options.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT_NAME")
    if not account and not _is_true(options.get("use_emulator")):
        raise ConfigError(
            f"{address.url}: the storage account is not known: add ?account_name=…, set "
            "AZURE_STORAGE_ACCOUNT_NAME, or write abfs://container@account.dfs.core.windows.net/prefix"
        )
    if account:
        options["account_name"] = account
    address = replace(address, options=dict(sorted(options.items())))
    endpoint = options.pop("endpoint_url", None)
    config = options | ({"endpoint": endpoint} if endpoint else {})
    store = _build(AzureStore, address, endpoint, config=config)
    # Its batches fail at an absent object, so objects are deleted one by one.
    return ObstoreStore(store, address.url, Traits(remote=True, bulk_delete=False, ordered=True))


_CONNECT = {
    "memory": _connect_memory,
    "file": _connect_file,
    "s3": _connect_s3,
    "gs": _connect_gs,
    "az": _connect_az,
}


def _build(kind: Any, address: Address, endpoint: str | None, **settings: Any) -> Any:
    """Return an obstore store of a cloud; plain HTTP is allowed where the endpoint says so."""
    client: ClientConfig = {**_CLIENT, "allow_http": bool(endpoint and endpoint.startswith("http://"))}
    try:
        return kind(
            address.place,
            prefix=address.path or None,
            client_options=client,
            retry_config=_NO_RETRIES,
            **{name: value for name, value in settings.items() if value is not None},
        )
    except Exception as error:
        raise ConfigError(f"{address.url} cannot be opened: {str(error).splitlines()[0]}") from None


def _is_true(value: str | None) -> bool:
    return str(value).lower() in ("true", "1", "yes")


def _aws_session() -> Any:
    """Return the session that boto3 uses by default, or None without boto3: obstore's own chain then serves."""
    try:
        import boto3  # noqa: PLC0415 - only for S3, and optional
    except ImportError:
        return None
    try:
        return boto3.DEFAULT_SESSION or boto3.Session()
    except Exception as error:
        raise ConfigError(f"the AWS configuration cannot be used: {error}") from None


def _aws_region(session: Any) -> str | None:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or session.region_name


def _aws_endpoint(session: Any) -> str | None:
    """Return the endpoint from AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile."""
    from botocore.configprovider import ConfiguredEndpointProvider  # noqa: PLC0415 - only for S3, and optional
    from botocore.session import Session  # noqa: PLC0415 - only for S3, and optional

    try:
        core = Session(profile=session.profile_name if session.profile_name != "default" else None)
        if core.get_config_variable("ignore_configured_endpoint_urls"):
            return None
        endpoint = ConfiguredEndpointProvider(core.full_config, core.get_scoped_config(), "s3").provide()
    except Exception as error:
        raise ConfigError(f"the AWS configuration cannot be used: {error}") from None
    return str(endpoint) if endpoint else None


def _aws_credentials(session: Any, url: str) -> Any:
    """Return obstore's view of the credentials of `session`, which renews them before they expire."""
    from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - only for S3, and optional

    try:
        found = session.get_credentials() is not None
    except Exception as error:
        raise StoreAccessDenied(f"{url}: the credentials cannot be read: {error}") from None
    if not found:
        raise StoreAccessDenied(f"{url}: {NO_CREDENTIALS}")
    return Boto3CredentialProvider(session, ttl=timedelta(minutes=5))
