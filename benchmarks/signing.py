"""How fast objects are signed and verified, and what that adds to a put and a get of a local store.

Target: more than a connection to S3 gives, 90 MB/s, by far.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time

from burst_dask.clock import Entropy
from burst_dask.store import Key, Signed, Span, Store, open_store
from burst_dask.store.signing import CHUNK, _Seal

MB = 1_000_000
TRIES = 9


def median(work) -> float:
    """Return the seconds that `work` takes."""
    taken = []
    for _ in range(TRIES):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def by_itself(size: int, key: Key) -> str:
    """Tell how long it takes to sign and verify a body, without a store."""
    seal = _Seal(key, "s/k3w9x2mq/runs/a/segments/00000/x", "memory://x")
    body = [memoryview(Entropy(1).secret(min(size, MB)) * -(-size // MB))[:size]]
    repeat = max(1, MB // 5 // size)
    stored = memoryview(b"".join(seal.signed(body)))
    signing = median(lambda: [list(seal.signed(body)) for _ in range(repeat)]) / repeat
    verifying = median(lambda: [list(seal.verified(0, stored, ends=True)) for _ in range(repeat)]) / repeat
    return f"{size:>11,} bytes: signed in {_told(signing, size)}, verified in {_told(verifying, size)}"


def in_a_store(store: Store, body: bytes) -> str:
    """Tell how fast a body is put and read whole and in parts."""
    at, spans = f"s/k3w9x2mq/{type(store).__name__}", [Span(0, 60 * MB), Span(70 * MB, 71 * MB)]
    putting = median(lambda: asyncio.run(store.put(at, body)))
    getting = median(lambda: asyncio.run(store.get(at)))
    ranging = median(lambda: asyncio.run(store.get_ranges(at, spans)))
    return f"put {100 / putting:,.0f} MB/s, get {100 / getting:,.0f} MB/s, ranges {61 / ranging:,.0f} MB/s"


def main() -> None:
    key = Key(Entropy().secret())
    for size in (200, CHUNK, 100 * MB):
        print(by_itself(size, key))
    with tempfile.TemporaryDirectory() as folder:
        plain, body = open_store(folder), Entropy(1).secret(MB) * 100
        print("100 MB in a directory:", in_a_store(plain, body))
        print("        … and signed:", in_a_store(Signed(plain, {"k3w9x2mq": key}), body))


def _told(seconds: float, size: int) -> str:
    return f"{seconds * 1e6:,.0f} µs ({size / MB / seconds:,.0f} MB/s)"


if __name__ == "__main__":
    main()
