"""The one retrier: throttling, time-outs, conflicts and lost answers are dealt with here."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from typing import TypeVar

from burst_dask.clock import Clock, Entropy
from burst_dask.errors import StoreUnavailable
from burst_dask.store.base import Body, Meta, Span, Store
from burst_dask.store.requests import DELETE_BATCH, flatten

T = TypeVar("T")


class Retrying:
    """Repeat what failed with `StoreUnavailable`, after full-jitter exponential backoff.

    All verbs may be repeated; a create is settled by reading back, because the attempt that
    seemed to fail may have landed (PROTOCOL.md rule 5).

    Parameters
    ----------
    inner
        The store to call.
    attempts
        How often, at most, a request is sent.
    base, cap
        The n-th wait is drawn from 0 to ``min(cap, base * 2**n)`` seconds.
    total
        No new attempt begins after this many seconds.
    """

    def __init__(
        self,
        inner: Store,
        clock: Clock,
        entropy: Entropy,
        *,
        attempts: int = 10,
        base: float = 0.1,
        cap: float = 10.0,
        total: float = 90.0,
    ) -> None:
        self.inner = inner
        self._clock = clock
        self._entropy = entropy
        self._attempts = attempts
        self._base = base
        self._cap = cap
        self._total = total

    @property
    def url(self) -> str:
        return self.inner.url

    async def create(self, key: str, body: Body) -> bool:
        first = True

        async def attempt() -> bool:
            nonlocal first
            alone, first = first, False
            if await self.inner.create(key, body):
                return True
            # The first answer is about this very request. A later "exists" may be our own lost write.
            return not alone and await self._is_ours(key, body)

        return await self._repeat(attempt)

    async def _is_ours(self, key: str, body: Body) -> bool:
        """Tell whether `key` holds `body`, which no other writer has: it carries a nonce."""
        return await self.inner.get(key) == b"".join(flatten(body))

    async def put(self, key: str, body: Body) -> None:
        await self._repeat(lambda: self.inner.put(key, body))

    async def get(self, key: str) -> bytes | None:
        return await self._repeat(lambda: self.inner.get(key))

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        return await self._repeat(lambda: self.inner.get_ranges(key, spans, clip=clip))

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        pages = self.inner.list(prefix, after=after)

        async def following() -> Sequence[Meta] | None:
            nonlocal pages
            try:
                return await anext(pages, None)
            except StoreUnavailable:
                pages = self.inner.list(prefix, after=after)  # go on behind the last page that came
                raise

        while page := await self._repeat(following):
            after = page[-1].key
            yield page

    async def folders(self, prefix: str) -> builtins.list[str]:
        return await self._repeat(lambda: self.inner.folders(prefix))

    async def delete(self, keys: Iterable[str]) -> None:
        waiting = list(keys)
        for start in range(0, len(waiting), DELETE_BATCH):
            batch = waiting[start : start + DELETE_BATCH]
            await self._repeat(lambda batch=batch: self.inner.delete(batch))  # type: ignore[misc]

    async def time(self, key: str) -> float:
        return await self._repeat(lambda: self.inner.time(key))

    async def _repeat(self, request: Callable[[], Awaitable[T]]) -> T:
        """Return what `request` returns, trying again while the store is unavailable."""
        deadline = self._clock.monotonic() + self._total
        for number in range(self._attempts):
            try:
                return await request()
            except StoreUnavailable as error:
                wait = self._entropy.uniform(0, min(self._cap, self._base * 2**number))
                last = number + 1 == self._attempts or self._clock.monotonic() + wait > deadline
                if last:
                    raise StoreUnavailable(f"{error} (tried {number + 1} times)") from error.__cause__
            await self._clock.sleep(wait)
        raise AssertionError("unreachable: attempts is at least 1")
