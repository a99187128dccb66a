"""The layer that signs what a session stores, and refuses what is not signed with its key.

::

    logical       │ 64 KiB │     │ 64 KiB │     │ rest │
    stored    │tag│ 64 KiB │ tag │ 64 KiB │ tag │ rest │

Before each chunk stands its HMAC-SHA256, which also covers the name of the object, the number of the chunk and whether
it is the last one (the STREAM construction, as in age and Tink). So a range of bytes is verified without reading the
rest. A chunk that was altered, moved, taken out, or taken from another object or session is refused, and so is an
object that ends too early. A tag stands first, so that a signed object is nothing to who does not verify it.
PROTOCOL.md, "Signing", is normative.
"""

from __future__ import annotations

import asyncio
import builtins
import hmac
import struct
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from burst_dask.errors import CorruptObject, UntrustedObject
from burst_dask.store.base import Body, Meta, Span, Store
from burst_dask.store.requests import flatten, size_of

T = TypeVar("T")

#: Bytes of each chunk but the last. Tags add 0.05 %, and a result of a few bytes is read with 64 KiB at most.
CHUNK = 64 << 10
TAG = 32
_STORED = CHUNK + TAG
_DOMAIN = b"burst_dask signed object 1\0"
_LENGTH = struct.Struct(">I")
_PLACE = struct.Struct(">QB")
#: Bodies of so many bytes are signed and verified in a thread: a loop that has leases to renew has no time for them.
_IN_THREAD = 2 << 20
#: Objects of a session lie below this; also `burst_dask.protocol.keys.session_prefix`, which this layer may not import.
_BELOW = "s/"


class Key:
    """The key of a session: 32 bytes that nothing prints.

    Examples
    --------
    >>> Key(bytes(32))
    Key(...)
    """

    __slots__ = ("secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) != TAG:
            raise ValueError(f"a key has {TAG} bytes, not {len(secret)}")
        self.secret = secret

    def __repr__(self) -> str:
        return "Key(...)"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Key) and hmac.compare_digest(self.secret, other.secret)

    def __hash__(self) -> int:
        return hash((type(self), self.secret))

    def __reduce__(self) -> tuple[Any, ...]:
        return Key, (self.secret,)


class Signed:
    """Sign the objects of some sessions, and verify all that is read of them; others pass as they are.

    Sizes and spans are those of what was signed. Of objects that `time` writes nothing is read, so they are not signed.

    Parameters
    ----------
    inner
        The store to call; retries and the settling of lost answers lie below, where the same bytes are sent again.
    keys
        Session -> its key.

    Examples
    --------
    >>> import asyncio
    >>> from burst_dask.store import open_store
    >>> plain = open_store("memory://signing-doctest")
    >>> signed = Signed(plain, {"k3w9x2mq": Key(bytes(32))})
    >>> asyncio.run(signed.put("s/k3w9x2mq/runs/a/plan", b"the plan"))
    >>> asyncio.run(plain.put("s/k3w9x2mq/runs/b/plan", asyncio.run(plain.get("s/k3w9x2mq/runs/a/plan"))))
    >>> asyncio.run(signed.get("s/k3w9x2mq/runs/a/plan"))
    b'the plan'
    >>> asyncio.run(signed.get("s/k3w9x2mq/runs/b/plan"))
    Traceback (most recent call last):
    ...
    burst_dask.errors.UntrustedObject: s/k3w9x2mq/runs/b/plan is not signed with the key of session k3w9x2mq: it was \
altered, moved or cut, or written by somebody without the key. Nothing of it was used, and trying again does not help. \
Find out who may write to memory://signing-doctest; for new work open a new session
    """

    def __init__(self, inner: Store, keys: Mapping[str, Key]) -> None:
        self.inner = inner
        self.keys = dict(keys)

    def __repr__(self) -> str:
        return f"<Signed {self.inner.url} {', '.join(self.keys)}>"

    @property
    def url(self) -> str:
        return self.inner.url

    async def create(self, key: str, body: Body) -> bool:
        return await self.inner.create(key, await self._sign(key, body))

    async def put(self, key: str, body: Body) -> None:
        await self.inner.put(key, await self._sign(key, body))

    async def get(self, key: str) -> bytes | None:
        data = await self.inner.get(key)
        seal = self._seal(key)
        if data is None or seal is None:
            return data
        pieces = await _work(len(data), lambda: list(seal.verified(0, memoryview(data), ends=True)))
        # One chunk, as nearly all records are, is copied once, too.
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        seal = self._seal(key)
        if seal is None:
            return await self.inner.get_ranges(key, spans, clip=clip)
        areas = _areas(spans)
        stored = [Span(area.start * _STORED, area.end * _STORED) for area in areas]
        # Where the last chunk ends is not known before it is read.
        views = await self.inner.get_ranges(key, stored or spans, clip=True)
        if views is None:
            return None
        size = sum(map(len, views))
        opened = await _work(size, lambda: [seal.area(*one) for one in zip(areas, views[: len(areas)], strict=True)])
        return [_cut(self._told(key), span, areas, opened, clip) for span in spans]

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        async for page in self.inner.list(prefix, after=after):
            yield [meta._replace(size=signed_size(meta.size)) if self._key_of(meta.key) else meta for meta in page]

    async def folders(self, prefix: str) -> builtins.list[str]:
        return await self.inner.folders(prefix)

    async def delete(self, keys: Iterable[str]) -> None:
        await self.inner.delete(keys)

    async def time(self, key: str) -> float:
        return await self.inner.time(key)

    def _key_of(self, key: str) -> Key | None:
        return self.keys.get(_session(key)) if key.startswith(_BELOW) else None

    def _seal(self, key: str) -> _Seal | None:
        secret = self._key_of(key)
        return None if secret is None else _Seal(secret, key, self.url)

    def _told(self, key: str) -> str:
        return f"{self.url}: {key}"

    async def _sign(self, key: str, body: Body) -> Body:
        seal = self._seal(key)
        if seal is None:
            return body
        buffers = flatten(body)
        return await _work(size_of(buffers), lambda: list(seal.signed(buffers)))


def key_in(store: Store, session: str) -> Key | None:
    """Return the key by which `store` signs what belongs to a session; None when it does not."""
    layer: Any = store
    while layer is not None:
        if isinstance(layer, Signed) and session in layer.keys:
            return layer.keys[session]
        layer = getattr(layer, "inner", None)
    return None


def stored_size(size: int) -> int:
    """Return the bytes that a body of `size` bytes takes when it is signed.

    >>> stored_size(0), stored_size(CHUNK), stored_size(CHUNK + 1)
    (32, 65568, 65601)
    """
    return size + TAG * max(1, -(-size // CHUNK))


def signed_size(stored: int) -> int:
    """Return the bytes that were signed, of an object of `stored` bytes; 0 of one that cannot be signed.

    >>> [signed_size(stored_size(size)) for size in (0, 1, CHUNK, CHUNK + 1)], signed_size(7)
    ([0, 1, 65536, 65537], 0)
    """
    return max(0, stored - TAG * -(-stored // _STORED))


def _session(key: str) -> str:
    return key[len(_BELOW) :].partition("/")[0]


class _Seal:
    """Signs and verifies the chunks of one object."""

    def __init__(self, key: Key, name: str, url: str) -> None:
        encoded = name.encode()
        self._name, self._url = name, url
        self._begun = hmac.new(key.secret, _DOMAIN + _LENGTH.pack(len(encoded)) + encoded, "sha256")

    def _tag(self, number: int, last: bool, parts: Iterable[bytes | bytearray | memoryview]) -> bytes:
        tag = self._begun.copy()
        tag.update(_PLACE.pack(number, last))
        for part in parts:
            tag.update(part)
        return tag.digest()

    def signed(self, buffers: Sequence[bytes | bytearray | memoryview]) -> Iterator[bytes | bytearray | memoryview]:
        """Yield what is stored: tags, and the buffers in parts, none of them copied."""
        left, number = size_of(buffers), 0
        parts: list[memoryview] = []
        room = CHUNK
        for each in buffers:
            buffer, start = memoryview(each), 0
            while start < len(buffer):
                part = buffer[start : start + room]
                parts.append(part)
                start, room, left = start + len(part), room - len(part), left - len(part)
                if not room and left:
                    yield self._tag(number, False, parts)
                    yield from parts
                    number, parts, room = number + 1, [], CHUNK
        yield self._tag(number, True, parts)
        yield from parts

    def verified(self, first: int, data: memoryview, *, ends: bool) -> Iterator[memoryview]:
        """Yield the chunks in `data`, which begins with chunk number `first`.

        Parameters
        ----------
        ends
            Whether the object is known to end where `data` does; else it may.

        Raises
        ------
        UntrustedObject
            One of them is not what was signed.
        """
        for start in range(0, max(1, len(data)), _STORED):
            piece, number = data[start : start + _STORED], first + start // _STORED
            tag, body = piece[:TAG], piece[TAG:]
            more = start + _STORED < len(data)
            # A whole chunk at the end of what was asked for may be the last one, or not.
            may_be_last = [False] if more else [True] if ends or len(piece) < _STORED else [False, True]
            empty = not len(body) and number > 0  # only an object without any bytes has an empty chunk
            if len(tag) < TAG or empty or not any(self._fits(number, last, body, tag) for last in may_be_last):
                raise self._refused()
            yield body

    def _fits(self, number: int, last: bool, body: memoryview, tag: memoryview) -> bool:
        return hmac.compare_digest(self._tag(number, last, (body,)), tag)

    def area(self, area: Span, data: memoryview) -> memoryview:
        """Return what was signed of the chunks of `area`, in one piece; less, when the object ends there."""
        if not len(data):
            return data  # it ends before
        pieces = list(self.verified(area.start, data, ends=len(data) < (area.end - area.start) * _STORED))
        if len(pieces) == 1:
            return pieces[0]
        whole = bytearray(sum(map(len, pieces)))
        start = 0
        for piece in pieces:
            whole[start : start + len(piece)] = piece
            start += len(piece)
        return memoryview(whole)

    def _refused(self) -> UntrustedObject:
        session = _session(self._name)
        return UntrustedObject(
            f"{self._name} is not signed with the key of session {session}: it was altered, moved or cut, or written "
            "by somebody without the key. Nothing of it was used, and trying again does not help. Find out who may "
            f"write to {self._url}; for new work open a new session"
        )


def _areas(spans: Sequence[Span]) -> list[Span]:
    """Return the chunks that hold `spans`, as ranges of their numbers, in order and apart.

    >>> _areas([Span(0, 10), Span(CHUNK - 1, CHUNK + 1), Span(5 * CHUNK, 6 * CHUNK), Span(7, 7)])
    [Span(start=0, end=2), Span(start=5, end=6)]
    """
    areas: list[Span] = []
    for start, end in sorted(span for span in spans if span.end > span.start):
        area = Span(start // CHUNK, -(-end // CHUNK))
        if areas and area.start <= areas[-1].end:
            areas[-1] = Span(areas[-1].start, max(areas[-1].end, area.end))
        else:
            areas.append(area)
    return areas


def _cut(told: str, span: Span, areas: Sequence[Span], opened: Sequence[memoryview], clip: bool) -> memoryview:
    """Return the bytes of `span` out of what was verified."""
    if span.end <= span.start:
        return memoryview(b"")
    number = bisect_right(areas, span.start // CHUNK, key=lambda area: area.start) - 1
    offset = areas[number].start * CHUNK
    found = opened[number][span.start - offset : span.end - offset]
    if len(found) < span.end - span.start and not clip:
        raise CorruptObject(f"{told} ends before byte {span.end}: it is truncated")
    return found


async def _work(size: int, work: Callable[[], T]) -> T:
    """Return what `work` returns, which goes through `size` bytes."""
    return await asyncio.to_thread(work) if size >= _IN_THREAD else work()
