"""Reads that a person waits for: what takes long is asked for once more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from burst_dask.store.base import Body, Meta, Span, Store, first_page
from burst_dask.store.requests import PAGE

T = TypeVar("T")

#: Seconds after which a read is sent again: five times what 95 of 100 take.
HEDGE_AFTER = 0.35


class Hedging:
    """Send a read once more when it takes long, and take whichever answer comes first.

    Of thousands of requests to S3 some take seconds; a second one seldom does (AWS advises to retry
    slow reads). A survey of a large run would otherwise take as long as the slowest of its reads.
    """

    def __init__(self, inner: Store, after: float = HEDGE_AFTER) -> None:
        self.inner = inner
        self._after = after

    @property
    def url(self) -> str:
        return self.inner.url

    async def create(self, key: str, body: Body) -> bool:
        return await self.inner.create(key, body)

    async def put(self, key: str, body: Body) -> None:
        await self.inner.put(key, body)

    async def get(self, key: str) -> bytes | None:
        return await self._hedged(lambda: self.inner.get(key))

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        return await self.inner.get_ranges(key, spans, clip=clip)  # it may be large: twice would make it slower

    async def folders(self, prefix: str) -> list[str]:
        return await self._hedged(lambda: self.inner.folders(prefix))

    async def delete(self, keys: Iterable[str]) -> None:
        await self.inner.delete(keys)

    async def time(self, key: str) -> float:
        return await self.inner.time(key)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        while True:
            start = after
            page = await self._hedged(lambda start=start: first_page(self.inner, prefix, start))  # type: ignore[misc]
            if page:
                yield page
            if len(page) < PAGE:
                return
            after = page[-1].key

    async def _hedged(self, read: Callable[[], Awaitable[T]]) -> T:
        tries = [asyncio.ensure_future(read())]
        try:
            done, _ = await asyncio.wait(tries, timeout=self._after)
            if not done:
                tries.append(asyncio.ensure_future(read()))
                done, _ = await asyncio.wait(tries, return_when=asyncio.FIRST_COMPLETED)
            # Of two that end at once, the first.
            return next(one for one in tries if one in done).result()
        finally:
            for one in tries:
                one.cancel()
            # Awaited, so that nothing of them is left, neither a request under way nor an error that nobody looks at.
            await asyncio.gather(*tries, return_exceptions=True)
