"""Object stores behind one small protocol, with retries, latency, faults and counting around them."""

from __future__ import annotations

import os

from burst_dask.clock import Clock, Entropy, SystemClock
from burst_dask.store.address import Address, default_url
from burst_dask.store.backends import connect
from burst_dask.store.base import Body, Meta, Span, Store
from burst_dask.store.hedging import Hedging
from burst_dask.store.probe import probe
from burst_dask.store.retrying import Retrying
from burst_dask.store.signing import Key, Signed
from burst_dask.store.wrappers import Counting, Delayed, Fault, Faulty, cost_of, requests_of, storage_cost

__all__ = [
    "Body",
    "Counting",
    "Delayed",
    "Fault",
    "Faulty",
    "Hedging",
    "Key",
    "Meta",
    "Retrying",
    "Signed",
    "Span",
    "Store",
    "cost_of",
    "default_url",
    "open_store",
    "probe",
    "requests_of",
    "storage_cost",
]


def open_store(
    url: str | os.PathLike[str] | None = None,
    *,
    clock: Clock | None = None,
    entropy: Entropy | None = None,
    **options: str,
) -> Store:
    """Open a store; nothing is sent to it yet.

    Parameters
    ----------
    url
        ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``file:///directory``, a path, or
        ``memory://name``; None is `default_url`. See `burst_dask.store.address`.
    clock, entropy
        For waits between retries; by default the machine's own.
    **options
        Such as ``region`` and ``endpoint_url``. They become part of the store's URL, so
        secrets are refused: they come from the environment or a profile.

    Returns
    -------
    Store
        Its ``url`` opens the same store in another process or on another machine.

    Raises
    ------
    ConfigError
        The URL or an option is wrong.
    StoreAccessDenied
        There are no credentials.

    Examples
    --------
    >>> open_store("memory://example").url
    'memory://example'
    """
    clock = clock or SystemClock()
    address = Address.parse(default_url() if url is None else url, **options)
    store: Store = connect(address)
    if address.latencies is not None:
        store = Delayed(store, clock, address.latencies)
    return Retrying(Counting(store), clock, entropy or Entropy())
