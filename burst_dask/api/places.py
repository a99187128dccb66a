"""The store that a client means, by its URL, its path or as it is open already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from burst_dask.errors import ConfigError
from burst_dask.store import Hedging, Store, default_url, open_store
from burst_dask.store.address import Address


def opened(store: str | os.PathLike[str] | Store | None, options: Mapping[str, Any]) -> Store:
    """Return the store that a client means."""
    if isinstance(store, str | os.PathLike) or store is None:
        new = open_store(store, **options)
        # A person waits here, and of many reads of a remote store some are slow.
        return Hedging(new) if _is_remote(new.url) else new
    if options:
        raise ConfigError(f"{', '.join(options)}: an open store takes no options")
    return store


def address_of(store: str | os.PathLike[str] | Store | None, options: Mapping[str, str]) -> Address:
    """Return the address of what `opened` opens; nothing is opened or created."""
    if isinstance(store, str | os.PathLike) or store is None:
        return Address.parse(default_url() if store is None else store, **options)
    return Address.parse(store.url)


def _is_remote(url: str) -> bool:
    """Tell whether reads go over a network.

    >>> _is_remote("s3://bucket/prefix"), _is_remote("file:///data"), _is_remote("slow+file:///data")
    (True, False, True)
    """
    return not url.startswith(("file://", "memory://"))
