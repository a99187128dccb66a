"""Layers over a store: counting requests with their price, latency, and faults for tests."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from enum import Enum
from typing import Any

from burst_dask.clock import Clock
from burst_dask.errors import StoreError, StoreUnavailable
from burst_dask.store.base import Body, Meta, Span, Store
from burst_dask.store.requests import DELETE_BATCH, pages, plan

VERBS = ("put", "create", "get", "list", "delete")
#: USD a request: S3 Standard in us-east-1. A failed conditional write is billed like any other.
PRICES = {"put": 5e-6, "create": 5e-6, "list": 5e-6, "get": 0.4e-6, "delete": 0.0}
#: USD for a gigabyte a month: S3 Standard in us-east-1.
STORAGE = 0.023
_MONTH = 30 * 86_400
#: Seconds a request: the median of S3 for small objects.
LATENCIES = {"put": 0.040, "create": 0.040, "get": 0.027, "list": 0.040, "delete": 0.040}


class Counting:
    """Count requests by verb, failed ones too; a page of a listing is one request.

    Attributes
    ----------
    requests : dict of str to int
        By verb: put, create, get, list, delete.
    """

    def __init__(self, inner: Store) -> None:
        self.inner = inner
        self.requests: dict[str, int] = dict.fromkeys(VERBS, 0)

    @property
    def url(self) -> str:
        return self.inner.url

    def cost(self) -> float:
        """Return what the requests cost on S3 Standard in us-east-1, in USD."""
        return cost_of(self.requests)

    async def create(self, key: str, body: Body) -> bool:
        self.requests["create"] += 1
        return await self.inner.create(key, body)

    async def put(self, key: str, body: Body) -> None:
        self.requests["put"] += 1
        await self.inner.put(key, body)

    async def get(self, key: str) -> bytes | None:
        self.requests["get"] += 1
        return await self.inner.get(key)

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        self.requests["get"] += max(1, len(plan(spans)))
        return await self.inner.get_ranges(key, spans, clip=clip)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        self.requests["list"] += 1
        uncounted = 0  # the first page is that request
        try:
            async for page in self.inner.list(prefix, after=after):
                self.requests["list"] += uncounted
                uncounted = 1
                yield page
        except StoreError:
            self.requests["list"] += uncounted
            raise

    async def folders(self, prefix: str) -> builtins.list[str]:
        self.requests["list"] += 1
        names = await self.inner.folders(prefix)
        self.requests["list"] += pages(len(names)) - 1
        return names

    async def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self.requests["delete"] += -(-len(keys) // DELETE_BATCH)
        await self.inner.delete(keys)

    async def time(self, key: str) -> float:
        self.requests["put"] += 1
        self.requests["get"] += 1
        return await self.inner.time(key)


def cost_of(requests: dict[str, int]) -> float:
    """Return what `requests` cost in USD.

    >>> round(cost_of({"put": 1_000_000, "get": 1_000_000}), 2)
    5.4
    """
    return sum(PRICES[verb] * count for verb, count in requests.items())


def storage_cost(size: int, seconds: float) -> float:
    """Return what it costs to keep `size` bytes for so long, in USD.

    >>> storage_cost(10**12, 86_400)
    0.7666666666666667
    """
    return size / 1e9 * STORAGE * seconds / _MONTH


def counting_of(store: Store) -> Counting | None:
    """Return the counting layer of `store`, or None when it has none."""
    layer: Any = store
    while layer is not None and not isinstance(layer, Counting):
        layer = getattr(layer, "inner", None)
    return layer


def requests_of(store: Store) -> dict[str, int]:
    """Return the requests sent to `store` so far, by verb; zeros when nothing counts them."""
    counting = counting_of(store)
    return dict(counting.requests if counting else dict.fromkeys(VERBS, 0))


class Delayed:
    """Add latency to each request, to see in a local store what a remote one would do.

    Parameters
    ----------
    latencies
        Seconds by verb; verbs that are not named take those of `LATENCIES`, and a create
        takes that of a put.
    """

    def __init__(self, inner: Store, clock: Clock, latencies: dict[str, float] | None = None) -> None:
        self.inner = inner
        self._clock = clock
        given = dict(latencies or {})
        if "put" in given:
            given.setdefault("create", given["put"])
        self.latencies = LATENCIES | given

    @property
    def url(self) -> str:
        return self.inner.url

    async def create(self, key: str, body: Body) -> bool:
        await self._clock.sleep(self.latencies["create"])
        return await self.inner.create(key, body)

    async def put(self, key: str, body: Body) -> None:
        await self._clock.sleep(self.latencies["put"])
        await self.inner.put(key, body)

    async def get(self, key: str) -> bytes | None:
        await self._clock.sleep(self.latencies["get"])
        return await self.inner.get(key)

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        await self._clock.sleep(self.latencies["get"])  # its requests are sent side by side
        return await self.inner.get_ranges(key, spans, clip=clip)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        await self._clock.sleep(self.latencies["list"])
        first = True
        async for page in self.inner.list(prefix, after=after):
            if not first:
                await self._clock.sleep(self.latencies["list"])
            first = False
            yield page

    async def folders(self, prefix: str) -> builtins.list[str]:
        await self._clock.sleep(self.latencies["list"])
        names = await self.inner.folders(prefix)
        if (more := pages(len(names)) - 1) > 0:
            await self._clock.sleep(self.latencies["list"] * more)
        return names

    async def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        await self._clock.sleep(self.latencies["delete"] * -(-len(keys) // DELETE_BATCH))
        await self.inner.delete(keys)

    async def time(self, key: str) -> float:
        await self._clock.sleep(self.latencies["put"] + self.latencies["get"])
        return await self.inner.time(key)


class Fault(Enum):
    """What goes wrong with one request."""

    #: it never reaches the store
    BEFORE = "before"
    #: it is carried out, and the answer is lost
    LOST = "lost"


#: Told the verb and key (the prefix of a listing, the first key of a delete), says what goes wrong.
Script = Callable[[str, str], Fault | None]


class Faulty:
    """Fail requests as `script` says, with `StoreUnavailable`. For tests."""

    def __init__(self, inner: Store, script: Script) -> None:
        self.inner = inner
        self._script = script

    @property
    def url(self) -> str:
        return self.inner.url

    async def create(self, key: str, body: Body) -> bool:
        lost = self._sent("create", key)
        created = await self.inner.create(key, body)
        lost()
        return created

    async def put(self, key: str, body: Body) -> None:
        lost = self._sent("put", key)
        await self.inner.put(key, body)
        lost()

    async def get(self, key: str) -> bytes | None:
        lost = self._sent("get", key)
        data = await self.inner.get(key)
        lost()
        return data

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        lost = self._sent("get", key)
        data = await self.inner.get_ranges(key, spans, clip=clip)
        lost()
        return data

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        empty = True
        async for page in self.inner.list(prefix, after=after):
            self._sent("list", prefix)()
            empty = False
            yield page
        if empty:
            self._sent("list", prefix)()

    async def folders(self, prefix: str) -> builtins.list[str]:
        lost = self._sent("list", prefix)
        names = await self.inner.folders(prefix)
        lost()
        return names

    async def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        lost = self._sent("delete", keys[0] if keys else "")
        await self.inner.delete(keys)
        lost()

    async def time(self, key: str) -> float:
        lost = self._sent("put", key)
        now = await self.inner.time(key)
        lost()
        return now

    def _sent(self, verb: str, key: str) -> Callable[[], None]:
        """Fail before the request, or return what fails after it when its answer shall be lost."""
        fault = self._script(verb, key)
        if fault is Fault.BEFORE:
            raise StoreUnavailable(f"injected: {verb} {key} was not sent")

        def lost() -> None:
            if fault is Fault.LOST:
                raise StoreUnavailable(f"injected: the answer to {verb} {key} was lost")

        return lost
