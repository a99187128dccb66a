"""What a run costs in entries: few, and none for nothing."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

from burst_dask.client.link import Link
from burst_dask.client.watching import Watch
from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.journal.view import RunView
from burst_dask.protocol.records import Entry, decode_with_end
from burst_dask.testing.bucket import Bucket, Network
from burst_dask.testing.loop import VirtualLoop
from burst_dask.testing.machines import Client, Job, Worker
from burst_dask.testing.work import Graph, Work


def entries(workers: int, tasks: int, seconds: float) -> Counter[str]:
    """Let each worker have a shard's worth of tasks; return how many entries of each kind they write."""
    loop = VirtualLoop()  # type: ignore[abstract]
    bucket = Bucket(loop, Entropy("economy"))
    entropy = Entropy("lengths")
    work = [Work(number, seconds=seconds * entropy.uniform(0.8, 1.2)) for number in range(workers * tasks)]
    graph = Graph(work, range(0, len(work) + 1, tasks), range(len(work)))

    async def play() -> None:
        client = Client(bucket, "client", 0, Network())
        link = await client.open(Settings.of(), workers)
        plan = await client.submit(link, graph)
        job = Job(link.session, link.settings, 1, lambda name: lambda work: None)
        for number in range(workers):
            worker = Worker(bucket, f"w{number}", 0, Network(), job, lambda worker: None)
            worker.start(worker.agent.run())
        await client.wait(plan.run, range(plan.tasks))

    try:
        loop.run_until_complete(loop.process("world").start(play()))
    finally:
        bucket.closed = True
        loop.finish()
    found: Counter[str] = Counter()
    for key, stored in bucket.objects.items():
        if "/runs/" in key and "/log/" in key:
            entry, _ = decode_with_end(Entry, key, stored.body)
            found[type(entry.action).__name__] += 1
    return found


@pytest.mark.parametrize("seconds", [1.0, 10.0, 100.0])
def test_who_has_work_takes_no_other_shard(seconds: float) -> None:
    """Also when each task is longer than what is reserved ahead, so that none is ready when one ends."""
    workers, tasks = 8, 30
    found = entries(workers, tasks, seconds)
    assert found["Claim"] <= workers + found["Split"] + 1
    assert found["Split"] <= 2 * workers, "towards the end only"
    assert found["Commit"] <= 2.5 * workers * tasks


def next_run(workers: int, seed: int) -> float:
    """Let workers finish a run of many small shards; return how long another of one task takes, right after it."""
    loop = VirtualLoop()  # type: ignore[abstract]
    bucket = Bucket(loop, Entropy(f"next {seed}"))

    async def wait(client: Client, link: Link, graph: Graph) -> float:
        began = loop.time()
        plan = await client.submit(link, graph)
        view = await RunView.open(client.store, plan.run)
        assert view is not None
        await Watch(link, view, range(plan.tasks)).wait(to_first_failure=False, update=None, known=False)
        return loop.time() - began

    async def play() -> float:
        client = Client(bucket, "client", seed, Network())
        link = await client.open(Settings.of(), workers)
        job = Job(link.session, link.settings, 1, lambda name: lambda work: None)
        for number in range(workers):
            worker = Worker(bucket, f"w{number}", seed, Network(), job, lambda worker: None)
            worker.start(worker.agent.run())
        many = workers * 20
        await wait(client, link, Graph([Work(n, seconds=0.1) for n in range(many)], range(0, many + 1, 5), range(many)))
        return await wait(client, link, Graph([Work(0)], range(2), range(1)))

    try:
        return loop.run_until_complete(loop.process("world").start(play()))  # type: ignore[no-any-return]
    finally:
        bucket.closed = True
        loop.finish()


def test_a_task_right_after_a_larger_run_does_not_wait_for_workers_that_think_it_goes_on() -> None:
    """They looked once a second, and into the old run first: that made 0.65 s of virtual time, and now it is 0.41 s."""
    assert statistics.median(next_run(8, seed) for seed in range(12)) < 0.5
