"""A thousand workers and a million tasks, simulated: the production agents under S3's latencies and limits.

``python benchmarks/scale.py --workers 1000 --tasks 1000000`` takes some minutes of real time. Tasks take
``--seconds``, give or take 20 %. With ``--boot fargate`` workers arrive as RunTask and Fargate let them: 20 a
second after a burst of 100, each 30 to 60 s after its call; with ``--boot at-once`` all start in the same
instant, which is the worst for the store. Ideal is when all workers together, each from its own start, could
have done the work.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import sys
import time
from collections import Counter
from typing import Any

from simulated import busiest, draw, ideal, share

from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.graph.cutting import shard_size
from burst_dask.journal import view as views
from burst_dask.protocol.keys import RunId
from burst_dask.store import cost_of
from burst_dask.testing.bucket import GET_RATE, PUT_RATE, Bucket, Network
from burst_dask.testing.loop import VirtualLoop
from burst_dask.testing.machines import Client, Job, Worker
from burst_dask.testing.work import Graph, Work


class Scale:
    """One simulated run of many workers."""

    def __init__(self, workers: int, tasks: int, seconds: float, boot: str, seed: int, per_shard: int | None) -> None:
        self.loop = VirtualLoop()
        self.bucket = Bucket(self.loop, Entropy(f"{seed} bucket"))
        self.seed = seed
        self.starts, lengths = draw(workers, tasks, seconds, boot, seed)
        work = [Work(number, seconds=length) for number, length in enumerate(lengths)]
        bounds = [*range(0, tasks, per_shard or shard_size(tasks, workers, tasks)), tasks]
        self.graph = Graph(work, bounds, range(tasks))
        self.total = sum(each.seconds for each in work)
        self.workers: list[Worker] = []
        self.first_task: float | None = None
        self.executed: Counter[int] = Counter()
        self.mid: dict[str, float] = {}
        self.seen_complete = 0.0
        self.finished = 0.0
        #: second -> tasks begun in it
        self.begun: Counter[int] = Counter()

    def started(self, worker: str) -> Any:
        def note(work: Work) -> None:
            if self.first_task is None:
                self.first_task = self.loop.time()
            self.executed[work.number] += 1
            self.begun[int(self.loop.time())] += 1

        return note

    async def play(self) -> None:
        progress = self.loop.create_task(self.tell())
        client = Client(self.bucket, "client", self.seed, Network())
        link = await client.open(Settings.of(), len(self.starts))
        plan = await client.submit(link, self.graph)
        self.graph.work[:] = []  # the packs hold it
        self.submitted = self.loop.time()
        job = Job(link.session, link.settings, 1, self.started)
        fleet = self.loop.process("fleet").start(self._hire(job))
        watcher = self.loop.process("reattach").start(self._reattach(plan.run))
        start = self.loop.time()
        await client.wait(plan.run, range(plan.tasks))
        self.seen_complete = self.loop.time() - start
        entries = [key for key in self.bucket.objects if "/runs/" in key and "/log/" in key]
        newest = max(self.bucket.objects[key].modified for key in entries)
        self.finished = newest - self.bucket.now() + self.loop.time() - start
        await fleet
        await watcher
        progress.cancel()
        self.start = start
        self.client = client

    async def tell(self, every: float = 60.0) -> None:
        """Print how far it is each ``every`` virtual seconds: ten thousand workers take an hour of real time."""
        began = time.perf_counter()
        while True:
            await asyncio.sleep(every)
            arrived = Counter[str]()
            for second in range(int(self.loop.time() - every), int(self.loop.time())):
                arrived.update(self.bucket.arrived.get(second, {}))
            rates = ", ".join(f"{count / every:.0f} {kind}s" for kind, count in arrived.items())
            print(
                f"{self.loop.time():6.0f} s: {len(self.executed)} tasks begun, {rates} a second, "
                f"{self.bucket.throttled} 503s ({time.perf_counter() - began:.0f} s of real time)",
                file=sys.stderr,
                flush=True,
            )

    async def _hire(self, job: Job) -> None:
        begin = self.loop.time()
        for number, start in enumerate(sorted(self.starts)):
            if begin + start > self.loop.time():
                await asyncio.sleep(begin + start - self.loop.time())
            worker = Worker(self.bucket, f"w{number}", self.seed, Network(), job, lambda worker: None)
            worker.start(worker.agent.run())
            self.workers.append(worker)

    async def _reattach(self, run: RunId) -> None:
        await asyncio.sleep(ideal(self.starts, self.total) / 2)
        client = Client(self.bucket, "laptop", self.seed, Network())
        client.start(self._look(client, run))
        await client.task

    async def _look(self, client: Client, run: RunId) -> None:
        start = self.loop.time()
        link = await client.attach(run.partition(".")[0])
        view = await views.RunView.open(client.store, run)
        self.mid["attach"] = self.loop.time() - start
        seen = await link.seen()
        await view.survey()
        self.mid["status"] = self.loop.time() - start
        totals = view.totals()
        self.mid["done"] = totals.done / totals.total
        self.mid["alive"] = seen.status.alive
        self.mid |= {f"status {verb}s": count for verb, count in client.counting.requests.items() if count}


def report(scale: Scale, took: float) -> None:
    best = ideal(scale.starts, scale.total)
    requests: Counter[str] = Counter()
    for worker in scale.workers:
        requests.update(worker.counting.requests)
    steady = range(int(scale.start + max(scale.starts) + 30), int(scale.start + best * 0.9))
    arrived = scale.bucket.arrived
    middle = sum(sum(arrived.get(second, {}).values()) for second in steady)
    first = scale.first_task - scale.start
    print(f"{len(scale.workers)} workers, {len(scale.executed)} tasks, simulated in {took:.0f} s")
    print(f"ideal {best:.1f} s, all done after {scale.finished:.1f} s: {100 * best / scale.finished:.1f} % of ideal")
    print(f"the client knew {scale.seen_complete - scale.finished:.1f} s later")
    print(f"tasks run twice: {sum(count - 1 for count in scale.executed.values())}")
    print(f"first task {first:.2f} s after submission, {first - min(scale.starts):.2f} s after the first worker")
    print(f"requests of a worker-second, steady: {middle / max(1, len(steady)) / len(scale.workers):.3f}")
    for kind, limit in (("put", PUT_RATE), ("get", GET_RATE)):
        top, count = busiest(scale.bucket, kind)
        print(f"busiest second for {kind}s: {count} of {limit:.0f}, {top - scale.start:.0f} s after submission")
    print(f"503 answers: {scale.bucket.throttled}")
    print(f"requests of the workers: {dict(requests)}, {cost_of(requests):.2f} USD")
    print(f"requests of the client: {scale.client.counting.requests}")
    print(f"re-attached half-way: {scale.mid}")
    end = int(scale.start + best)
    tail = [scale.begun[second] for second in range(end - 10, int(scale.start + scale.finished) + 1)]
    print(f"tasks begun in each second from 10 s before the ideal end: {tail}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=100)
    parser.add_argument("--tasks", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--per-shard", type=int, help="default: as a graph is cut")
    parser.add_argument("--boot", choices=["fargate", "at-once"], default="fargate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    share()
    began = time.perf_counter()
    scale = Scale(
        arguments.workers, arguments.tasks, arguments.seconds, arguments.boot, arguments.seed, arguments.per_shard
    )
    gc.disable()  # the workers' objects live until the end, and looking through them took a fifth of the time or more
    scale.loop.run_until_complete(scale.play())
    report(scale, time.perf_counter() - began)
    sys.stdout.flush()
    os._exit(0)  # a thousand agents are left as they are


if __name__ == "__main__":
    main()
