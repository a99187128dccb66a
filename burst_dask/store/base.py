"""The store: what the protocol needs of an object store, and nothing more.

Every verb is a coroutine. An implementation raises only errors of the tree in
`burst_dask.errors`; the contract suite in ``tests/store/contract.py`` holds for each one.
"""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

#: Anything that can be sent: one buffer, or several that are sent one after another.
Body: TypeAlias = "bytes | bytearray | memoryview | Sequence[bytes | bytearray | memoryview]"


class Meta(NamedTuple):
    """What a listing tells of one object."""

    key: str
    #: bytes
    size: int
    #: seconds since 1970 by the store's clock
    modified: float


class Span(NamedTuple):
    """A half-open range of bytes ``[start, end)`` of one object."""

    start: int
    end: int


@runtime_checkable
class Store(Protocol):
    """An object store with create-if-absent.

    Keys are relative to the store's prefix and use ``/``. Objects appear whole or not at
    all, and a get or a listing that starts after a write was answered sees it.
    """

    @property
    def url(self) -> str:
        """The address that opens the same store elsewhere; holds no secret."""

    async def create(self, key: str, body: Body) -> bool:
        """Write `key` if it is absent, atomically.

        Returns True when this call's body is what the key now holds, False when another
        body was there first. The body must be unique to the caller (it carries a nonce), so
        that a lost answer can be settled by reading back (PROTOCOL.md rule 5).
        """

    async def put(self, key: str, body: Body) -> None:
        """Write `key`, replacing what is there."""

    async def get(self, key: str) -> bytes | None:
        """Return the object, or None when there is none."""

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        """Return the bytes of each span, or None when there is no such object.

        Near spans are read in one request (`burst_dask.store.requests.COALESCE` bytes).
        A span that reaches past the object's end raises `CorruptObject`; with `clip` it is cut there.
        """

    def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        """Yield pages of the objects below `prefix` (which ends with ``/`` or is empty), by key.

        Only keys greater than `after` are listed; it need not exist, and does not end with ``/``.
        Each page but the last has `burst_dask.store.requests.PAGE` keys; an empty listing yields none.
        """

    async def folders(self, prefix: str) -> builtins.list[str]:
        """Return the names directly below `prefix` that have objects below them, sorted.

        `prefix` ends with ``/`` or is empty; the names are without it and without a slash. One
        request brings `burst_dask.store.requests.PAGE` names, however many objects lie below.

        Examples
        --------
        >>> import asyncio
        >>> from burst_dask.store import open_store
        >>> async def example(store):
        ...     for key in ("log/00012/0", "log/00012/1", "log/00012-3/0", "log/note"):
        ...         await store.put(key, b"")
        ...     return await store.folders("log/")
        >>> asyncio.run(example(open_store("memory://folders-example")))
        ['00012', '00012-3']
        """

    async def delete(self, keys: Iterable[str]) -> None:
        """Delete the objects, in batches; absent ones are no error."""

    async def time(self, key: str) -> float:
        """Return the store's clock, in seconds since 1970, by writing `key` and reading its date."""


async def first_page(store: Store, prefix: str, after: str = "") -> Sequence[Meta]:
    """Return the first page of a listing, empty when there is none: one request."""
    async for page in store.list(prefix, after=after):
        return page
    return ()


async def listed(store: Store, prefix: str) -> AsyncIterator[Meta]:
    async for page in store.list(prefix):
        for meta in page:
            yield meta
