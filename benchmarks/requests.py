"""Store requests a task, all told: from submission to collection, client and workers together.

    python benchmarks/requests.py

10,000 tasks of 10 ms on 4 workers. The workers are started for the run, and each tells in its
`ended` record how many requests it made in its whole life. Target: 0.03 a task.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections import Counter

from burst_dask import Session
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId
from burst_dask.protocol.records import Ended, decode
from burst_dask.store import Store, cost_of, open_store


def nap(i: int) -> int:
    time.sleep(0.01)
    return i


async def ends(store: Store, session: SessionId) -> list[Ended]:
    found = []
    async for page in store.list(keys.workers(session)):
        for meta in page:
            if keys.split_worker_key(meta.key)[1] == "ended":
                data = await store.get(meta.key)
                assert data is not None
                found.append(decode(Ended, meta.key, data))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--store", help="default: a new local directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        session = Session(arguments.store or directory, workers=arguments.workers, progress=False)
        try:
            before = Counter(session.requests)
            dsk = {("nap", i): (nap, i) for i in range(arguments.tasks)}
            begin = time.perf_counter()
            results = session.get(dsk, list(dsk))
            took = time.perf_counter() - begin
            assert list(results) == list(range(arguments.tasks))
            client = Counter(session.requests) - before
            session.scale(0)
            ended = asyncio.run(ends(open_store(session.store), SessionId(session.id)))
            workers = [one.requests for one in ended]
            # One that was killed, or died and was replaced, cannot say what it did.
            how = [(one.worker, one.reason, one.message) for one in ended]
            assert len(workers) == arguments.workers and all(workers), f"not all workers told what they did: {how}"
            print(f"{took:.1f} s; client {dict(client)}")
            for one in workers:
                print(f"  worker {one}")
            total = sum(workers and map(Counter, workers), client)
            print(
                f"{dict(total)}: {total.total()} requests, {total.total() / arguments.tasks:.4f} a task (target 0.03); "
                f"{cost_of(dict(total)) / arguments.tasks * 1e6:.2f} USD a million tasks at S3's prices"
            )
        finally:
            session.cleanup(force=True)


if __name__ == "__main__":
    main()
