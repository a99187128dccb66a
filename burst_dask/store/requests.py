"""How a call becomes requests: spans read together or in parts, batches, and buffers to send.

Pure, because layers must agree: the adapter sends the requests, `Counting` counts them and
`Retrying` repeats them.
"""

from __future__ import annotations

from collections.abc import Sequence

from burst_dask.store.base import Body, Span

#: Keys of one page of a listing, and of one delete request, on S3.
PAGE = 1000
DELETE_BATCH = 1000
#: Spans no further apart are read in one request: a MiB takes 11 ms at 90 MB/s, a request 27 ms. Bytes.
COALESCE = 1 << 20
#: No request reads more: S3 gives 85 to 90 MB/s a connection, so large reads gain from several. Bytes.
PART = 16 << 20


def pages(count: int) -> int:
    """Return the requests that list `count` things: one also when there are none.

    >>> pages(0), pages(1000), pages(1001)
    (1, 1, 2)
    """
    return max(1, -(-count // PAGE))


def plan(spans: Sequence[Span]) -> list[Span]:
    """Return the requests that read `spans`, in order and without overlap.

    >>> plan([Span(0, 10), Span(100, 200)])
    [Span(start=0, end=200)]
    >>> [part.end - part.start for part in plan([Span(0, 20 << 20)])] == [10 << 20] * 2
    True
    """
    merged: list[Span] = []
    for span in sorted(span for span in spans if span.end > span.start):
        if merged and span.start - merged[-1].end <= COALESCE:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(Span(*span))
    return [part for span in merged for part in _split(span)]


def _split(span: Span) -> list[Span]:
    """Cut `span` into equal parts of at most `PART` bytes."""
    count = -(-(span.end - span.start) // PART)
    size = -(-(span.end - span.start) // count)
    return [Span(start, min(start + size, span.end)) for start in range(span.start, span.end, size)]


def cut(span: Span, parts: Sequence[Span], data: Sequence[memoryview]) -> memoryview:
    """Return the bytes of `span` out of what the requests `parts` gave; copies only across parts."""
    pieces = [
        view[max(span.start - part.start, 0) : span.end - part.start]
        for part, view in zip(parts, data, strict=True)
        if part.start < span.end and part.end > span.start
    ]
    return pieces[0] if len(pieces) == 1 else memoryview(b"".join(pieces))


def flatten(body: Body) -> list[bytes | bytearray | memoryview]:
    """Return the buffers of `body` as obstore takes them: flat and of bytes."""
    parts = [body] if isinstance(body, bytes | bytearray | memoryview) else body
    return [part.cast("B") if isinstance(part, memoryview) and part.format != "B" else part for part in parts]


def size_of(buffers: Sequence[bytes | bytearray | memoryview]) -> int:
    """Return the bytes of all buffers together."""
    return sum(map(len, buffers))
