"""Calls submitted one by one in a loop: ``python benchmarks/futures.py [calls]``.

On a store with 40 ms a PUT and 27 ms a GET, as S3 has. Targets: 1,000 calls submitted and durable in 2 s.
"""

from __future__ import annotations

import operator
import sys
import tempfile
import time
from collections import Counter

from burst_dask import Session


def measure(session: Session, calls: int, name: str, function: object, chained: bool) -> None:
    before = Counter(session.requests)
    start = time.perf_counter()
    future = session.submit(int, 0)
    futures = []
    for n in range(calls):
        future = session.submit(function, future if chained else n, 1)
        futures.append(future)
    loop = time.perf_counter()
    session.flush()
    flushed = time.perf_counter()
    runs = len({one.view.run for one in futures})
    requests = dict(Counter(session.requests) - before)
    print(
        f"{name}: {calls} calls in {loop - start:.2f} s, durable after {flushed - start:.2f} s (target 2 s for 1,000), "
        f"{runs} runs; requests until then {requests}"
    )
    results = session.gather(futures)
    assert results == [n + 1 for n in range(calls)]
    print(f"  all results here after {time.perf_counter() - start:.2f} s")


def main() -> None:
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as directory:
        session = Session(f"slow+file://{directory}?put=0.04&get=0.027", workers=2, progress=False)
        try:
            session.submit(abs, 1).result()  # workers are up
            measure(session, calls, "a function of a module", operator.add, chained=False)
            measure(session, calls, "a function defined here", lambda a, b: a + b, chained=False)
            measure(session, calls, "each the argument of the next", operator.add, chained=True)
            alone = time.perf_counter()
            session.submit(abs, 1).result()
            print(f"one call and its result, workers idle: {time.perf_counter() - alone:.2f} s")
        finally:
            session.cleanup(force=True)


if __name__ == "__main__":
    main()
