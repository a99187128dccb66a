"""Bytes in the store while a pipeline runs whose intermediates are far larger than what was asked for.

    python benchmarks/garbage.py

An array is rechunked from rows to columns and back again, round after round, and its sum asked for: each round
stores the whole array anew. Once as it is by default, once with ``keep_intermediates=True``.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import dask.array as da

from burst_dask import Session


class Watcher(threading.Thread):
    """Sees how large the segments below a directory are, at their largest."""

    def __init__(self, directory: str) -> None:
        super().__init__(daemon=True)
        self.directory = Path(directory)
        self.peak = 0
        self.over = threading.Event()

    def now(self) -> int:
        total = 0
        for path in self.directory.rglob("*"):
            try:
                total += path.stat().st_size if "segments" in path.parts and path.is_file() else 0
            except FileNotFoundError:
                continue  # deleted since
        return total

    def run(self) -> None:
        while not self.over.wait(0.02):
            self.peak = max(self.peak, self.now())


def pipeline(side: int, chunk: int, rounds: int) -> da.Array:
    x = da.ones((side, side), chunks=(chunk, side))
    for number in range(rounds):
        x = (x + 1).rechunk((side, chunk) if number % 2 == 0 else (chunk, side))
    return x.sum()


def measure(arguments: argparse.Namespace, keep: bool) -> None:
    array = arguments.side**2 * 8
    with tempfile.TemporaryDirectory() as directory:
        session = Session(directory, workers=arguments.workers, progress=False, keep_intermediates=keep)
        watcher = Watcher(directory)
        watcher.start()
        try:
            begin = time.perf_counter()
            run = session.compute(pipeline(arguments.side, arguments.chunk, arguments.rounds))
            (value,) = run.result()
            took = time.perf_counter() - begin
            assert value == arguments.side**2 * (1 + arguments.rounds)
            time.sleep(arguments.settle)
            status = run.status()
            session.scale(0)  # each worker tells in its last words how many requests it made
            requests = Counter(session.status().requests)
            print(
                f"keep_intermediates={keep}: {status.total} tasks, {took:.1f} s; "
                f"peak {watcher.peak / array:.2f} and in the end {watcher.now() / array:.2f} times "
                f"the array of {array / 1e6:.0f} MB; "
                f"status: {status.size / 1e6:.1f} MB stored, {status.freed / 1e6:.0f} MB freed; "
                f"{requests.total() / status.total:.4f} requests a task, {requests['delete']} of them deletes"
            )
        finally:
            watcher.over.set()
            watcher.join()
            session.cleanup(force=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=4000, help="of the square array")
    parser.add_argument("--chunk", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--settle", type=float, default=3.0, help="seconds after the end until it is looked at")
    arguments = parser.parse_args()
    for keep in (False, True):
        measure(arguments, keep)


if __name__ == "__main__":
    main()
