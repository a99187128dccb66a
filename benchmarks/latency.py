"""A store as far away as S3: 40 ms a PUT, 27 ms a GET, injected.

    python benchmarks/latency.py

1. 2,000 tasks of 100 ms on 8 workers that are up: time against the ideal 25 s. Target: 90 %.
2. A graph of one no-op task on idle workers with a waiting client. Target: 0.5 s.
3. The same right after a run in which all workers had something to do: some of them do not know yet that it is over.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

from burst_dask import Session


def nap(i: int, seconds: float) -> int:
    time.sleep(seconds)
    return i


def total(values: list[int]) -> int:
    return sum(values)


def noop() -> int:
    return 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--after", type=int, default=10, help="larger runs with a no-op task right after each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        url = f"slow+file://{directory}?put=0.04&get=0.027&list=0.04"
        session = Session(url, workers=arguments.workers, progress=False)
        try:
            warm = {f"warm-{i}": (nap, i, 0.05) for i in range(arguments.workers * 8)}
            session.get(warm, list(warm))
            trips = []
            for i in range(10):
                time.sleep(1.0)
                begin = time.perf_counter()
                assert session.get({f"one-{i}": (noop,)}, f"one-{i}") == 1
                trips.append(time.perf_counter() - begin)
            print(f"one no-op task: median {statistics.median(trips):.3f} s, worst {max(trips):.3f} s (target 0.5)")
            trips = []
            for i in range(arguments.after):
                larger = {f"larger-{i}-{j}": (nap, j, 0.1) for j in range(arguments.workers * 20)}
                session.get(larger, list(larger))
                begin = time.perf_counter()
                assert session.get({f"next-{i}": (noop,)}, f"next-{i}") == 1
                trips.append(time.perf_counter() - begin)
            if trips:
                print(f"… right after a larger run: median {statistics.median(trips):.3f} s, worst {max(trips):.3f} s")
            dsk: dict[Any, Any] = {("nap", i): (nap, i, arguments.seconds) for i in range(arguments.tasks)}
            dsk["total"] = (total, [("nap", i) for i in range(arguments.tasks)])
            begin = time.perf_counter()
            assert session.get(dsk, "total") == sum(range(arguments.tasks))
            took = time.perf_counter() - begin
            ideal = arguments.tasks * arguments.seconds / arguments.workers
            print(
                f"{arguments.tasks} tasks of {arguments.seconds} s on {arguments.workers} workers: {took:.2f} s, "
                f"ideal {ideal:.2f} s: {ideal / took:.1%} (target 90 %)"
            )
        finally:
            session.cleanup(force=True)


if __name__ == "__main__":
    main()
