"""Addresses of stores: what a URL means, and how to write one that opens the same store elsewhere.

::

    s3://bucket/prefix?region=eu-west-1&endpoint_url=http://127.0.0.1:9000
    gs://bucket/prefix
    az://container/prefix?account_name=mine
    abfs://container@mine.dfs.core.windows.net/prefix
    file:///absolute/directory, or a plain path
    file:///directory?durable=false            writes are not synced, so a power loss may take or tear the last ones
    memory://name                              shared by all that open it in this process
    slow+file:///tmp/x?put=0.04&get=0.027      the same with latencies in seconds, for benchmarks
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

import platformdirs

from burst_dask.errors import ConfigError

SUPPORTED = "s3://, gs://, az:// (or abfs://), file://, memory:// and plain paths"
SLOW = "slow+"
_ALIASES = {"s3a": "s3", "gcs": "gs", "azure": "az", "adl": "az", "abfs": "az", "abfss": "az"}
#: Options of each kind of store. All may be shown: none is a secret.
_OPTIONS = {
    "s3": {
        "endpoint_url",
        "region",
        "virtual_hosted_style_request",
        "server_side_encryption",
        "sse_kms_key_id",
        "sse_bucket_key_enabled",
        "checksum_algorithm",
        "disable_bulk_delete",
        "request_payer",
        "s3_express",
        "skip_signature",
        "unsigned_payload",
    },
    "gs": {"endpoint_url", "skip_signature"},
    "az": {"account_name", "endpoint_url", "use_azure_cli", "use_emulator", "use_fabric_endpoint", "skip_signature"},
    "file": {"durable"},
    "memory": set[str](),
}
_LATENCIES = {"put", "create", "get", "list", "delete"}
_SECRET = re.compile(r"secret|token|password|signature|sas|credential|access_?key|account_?key|service_account_key")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


@dataclass(frozen=True)
class Address:
    """Where a store is.

    >>> Address.parse("s3://bucket/some/prefix/", region="eu-west-1").url
    's3://bucket/some/prefix?region=eu-west-1'
    """

    #: a key of `_OPTIONS`
    scheme: str
    #: bucket, container or name; empty for a directory
    place: str
    #: prefix of keys without slashes around it, or the absolute directory
    path: str
    options: dict[str, str] = field(default_factory=dict)
    #: seconds by verb; None unless the URL starts with `SLOW`
    latencies: dict[str, float] | None = None

    @classmethod
    def parse(cls, url: str | os.PathLike[str], **options: str) -> Address:
        """Return what `url` and `options` name; an option wins over the same one in the URL.

        Raises
        ------
        ConfigError
            The URL is malformed, or an option is unknown or a secret.
        """
        text = os.fspath(url)
        slow = text.startswith(SLOW)
        text = text.removeprefix(SLOW)
        query: dict[str, str]
        if not (found := _SCHEME.match(text)):
            scheme, place, path, query = "file", "", str(Path(text).expanduser().absolute()), {}
            if not text:
                raise ConfigError(f"the store's address is empty; supported are {SUPPORTED}")
        else:
            scheme, place, path, query = _split(found.group(1).lower(), text)
        query |= {name: str(value) for name, value in options.items()}
        latencies = {name: _seconds(name, query.pop(name)) for name in _LATENCIES & query.keys()} if slow else None
        _check_options(scheme, query)
        return cls(scheme, place, path, dict(sorted(query.items())), latencies)

    @property
    def url(self) -> str:
        """The URL that `parse` takes back."""
        path = f"/{quote(self.path)}" if self.path and self.scheme != "file" else quote(self.path)
        shown = self.options | {name: f"{seconds:g}" for name, seconds in sorted((self.latencies or {}).items())}
        query = f"?{urlencode(shown, safe=':/')}" if shown else ""
        return f"{'' if self.latencies is None else SLOW}{self.scheme}://{self.place}{path}{query}"


def default_url() -> str:
    """Return the store of this user on this machine: a directory, created when it is opened."""
    return Address.parse(Path(platformdirs.user_data_dir("burst_dask")) / "store").url


def _split(scheme: str, text: str) -> tuple[str, str, str, dict[str, str]]:
    """Return scheme, place, path and query of a URL."""
    name = _ALIASES.get(scheme, scheme)
    if name not in _OPTIONS:
        raise ConfigError(f"there is no store for {scheme}://; supported are {SUPPORTED}")
    try:
        parts = urlsplit(text)
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ConfigError(f"this {scheme}:// address is malformed; supported are {SUPPORTED}") from None
    place, path = parts.netloc, unquote(parts.path)
    if parts.fragment:
        raise ConfigError(f"a store's address has no '#': write %23 in {scheme}:// addresses")
    if name == "az" and "@" in place:
        place, _, host = place.partition("@")
        query.setdefault("account_name", host.partition(".")[0])
    if "@" in place:
        raise ConfigError(f"a {scheme}:// address must not hold credentials: {_ELSEWHERE}")
    if name == "file":
        if place not in ("", "localhost") or not path:
            raise ConfigError("a file:// address needs an absolute path: file:///directory")
        return name, "", str(Path(path)), query
    if not place:
        what = "a name" if name == "memory" else "a bucket"
        raise ConfigError(f"{scheme}:// lacks {what}: {scheme}://name/prefix")
    return name, place, path.strip("/"), query


_ELSEWHERE = "set it in the environment (AWS_ACCESS_KEY_ID, …) or in a profile (AWS_PROFILE), where workers find it too"


def _check_options(scheme: str, options: dict[str, str]) -> None:
    for name in options:
        if name in _OPTIONS[scheme]:
            continue
        if _SECRET.search(name.lower()):
            raise ConfigError(f"{name} is a secret, and a store's address is shown and stored: {_ELSEWHERE}")
        known = ", ".join(sorted(_OPTIONS[scheme])) or "none"
        raise ConfigError(f"unknown option {name!r} for a {scheme} store; known: {known}")


def _seconds(name: str, text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 3600:
        raise ConfigError(f"{name}={text!r}: the latency of a {SLOW} store is a number of seconds, as in {name}=0.04")
    return seconds
