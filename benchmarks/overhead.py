"""Time per tiny task: `Session.get` against `distributed.Client.get`, end to end, workers up.

    python benchmarks/overhead.py [--tasks 10000 100000] [--workers 2] [--repeat 3]

Dictionary graphs of no-op tasks with one fan-in; both run as many worker processes of one
thread. Prints the best of the repetitions, seconds a run and microseconds a task. Target: at
least 5 times sooner than distributed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any


def noop(i: int) -> int:
    return i


def fan_in(values: list[int]) -> int:
    return len(values)


def graph(count: int, salt: str) -> tuple[dict[Any, Any], Any]:
    """A fresh graph each time: distributed would otherwise find the keys computed."""
    keys = [(f"noop-{salt}", i) for i in range(count)]
    dsk: dict[Any, Any] = {key: (noop, i) for i, key in enumerate(keys)}
    dsk[f"fan-{salt}"] = (fan_in, keys)
    return dsk, f"fan-{salt}"


def best(get: Callable[[dict[Any, Any], Any], Any], count: int, repeat: int, name: str) -> float:
    times = []
    for attempt in range(repeat):
        dsk, key = graph(count, f"{name}{count}{attempt}")
        begin = time.perf_counter()
        assert get(dsk, key) == count
        times.append(time.perf_counter() - begin)
    print(
        f"{name:12} {count:8,} tasks: {min(times):7.3f} s  {min(times) / count * 1e6:7.1f} us/task  {times}", flush=True
    )
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", choices=["burst", "distributed"])
    arguments = parser.parse_args()

    burst: dict[int, float] = {}
    other: dict[int, float] = {}
    if arguments.only != "distributed":
        from burst_dask import Session

        with tempfile.TemporaryDirectory() as directory:
            session = Session(directory, workers=arguments.workers, progress=False)
            try:
                session.get(*graph(100, "warm"))
                for count in arguments.tasks:
                    burst[count] = best(session.get, count, arguments.repeat, "burst_dask")
            finally:
                session.cleanup(force=True)
    if arguments.only != "burst":
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=arguments.workers, threads_per_worker=1, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            client.get(*graph(100, "warm"))
            for count in arguments.tasks:
                other[count] = best(client.get, count, arguments.repeat, "distributed")
    for count in burst.keys() & other.keys():
        print(f"{count:8,} tasks: {other[count] / burst[count]:.1f} times sooner than distributed (target 5)")


if __name__ == "__main__":
    main()
