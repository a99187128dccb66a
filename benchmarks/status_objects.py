"""This protocol and one status object for each task, simulated: same tasks, workers, latencies and limits.

``python benchmarks/status_objects.py`` takes some minutes; it prints one table with both. One status object for
each task is what staRburst (R, github.com/scttfrdmn/starburst, version 0.3.9) keeps in its detached sessions. Modelled
after a reading of its `inst/templates/worker.R`, `R/session-api.R`, `R/session-state.R` and
`R/session-backend.R`, one request after another as there:

* Submission: each task is 2 PUTs (the task, its status: "pending"), a GET and a conditional PUT of the manifest.
  The workers are asked for when it begins; each has a bootstrap task of its own, whose status is listed too.
* Claim: LIST of all statuses, a GET of each, done or not; then, in the order of the listing, which is random as
  task ids are, a GET and, if it is still pending, a conditional PUT, until one succeeds.
* Task: GET of the task, GET and PUT of its status ("running"), the work, PUT of the result, GET and PUT of its
  status ("completed"). With the GET and the PUT of the claim: 8 requests.
* Nothing pending: wait for 1 s, doubled each time, at most 30 s. 300 s since the last task: the worker ends.
* Status: GET of the manifest, LIST and a GET of each status.

Kinder than the original: listings have all their pages (there only the first 1,000 keys, so that further tasks
never run: ``--first-page`` does as it does); a request that met 503 is repeated until it succeeds (there a task is
passed over, or its status lost); no time passes in its own code, no client waits for results, and a request carries
no bytes. This protocol is charged for a client that waits from beginning to end.

A claim that reads 10,000 statuses, 10,000 times, is too much to simulate one request at a time. While the store
cannot answer 503 its reads are independent of each other, so the GETs of one scan are drawn and added up together,
from the same distribution, and each status is seen as it was when its own GET arrived. The run fails if the
busiest second came near the limit all the same. ``--each-request`` simulates them one by one, which ``--window``
makes bearable: the simulation of the status objects then ends after so many seconds, and its figures are what
happened until then. With ``--stored`` all tasks are there when the workers are asked for, at no cost.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
from scale import Scale
from simulated import busiest, draw, ideal, share

from burst_dask.clock import Entropy
from burst_dask.errors import StoreUnavailable
from burst_dask.store import cost_of
from burst_dask.testing.bucket import GET_RATE, PAGE, PUT_RATE, READ, THERE, Bucket, Connection, Network
from burst_dask.testing.loop import VirtualLoop

T = TypeVar("T")

#: What staRburst measured with version 0.3.9 (`bench/results/sweep_naive-2026-07-21.md`).
PUBLISHED = (
    "published for staRburst: 10,000 tasks on 50 workers in 4,571.9 s, 2.2 tasks a second, after 77 s of startup; but "
    "its tasks take about 10 us, and it was measured with starburst_map, which starts a container for each: no claims"
)
#: Seconds: first and longest wait with nothing pending, and since the last task until a worker ends.
POLL, POLL_MOST, IDLE = 1.0, 30.0, 300.0
#: Share of the limit on GETs up to which reads are taken to be independent of each other.
SAFE = 0.9
VERBS = ("put", "get", "list")


class Statuses:
    """When each status was created, and when it ceased to be "pending", by its place in the listing.

    The statuses of the workers' bootstrap tasks come first; they are never pending.
    """

    def __init__(self, workers: int, tasks: int, entropy: Entropy) -> None:
        self.workers = workers
        #: number of a task -> place
        self.places = [workers + place for place in entropy.sample(range(tasks), tasks)]
        self.numbers = {place: number for number, place in enumerate(self.places)}
        self.created = np.full(workers + tasks, np.inf)
        self.claimed = np.full(workers + tasks, np.inf)
        self.created[:workers] = self.claimed[:workers] = 0.0
        self.completed: dict[int, float] = {}

    def claim(self, place: int, now: float) -> bool:
        """Write "claimed" if what was read, "pending", is still there."""
        if self.claimed[place] < np.inf:
            return False
        self.claimed[place] = now
        return True

    def listed(self, after: int, now: float) -> list[int]:
        """Return a page of the listing: the places of statuses that exist."""
        return [int(place) for place in np.flatnonzero(self.created[after + 1 :] <= now)[:PAGE] + after + 1]


class Link(Connection):
    """A connection that counts its requests and repeats those that met 503, after a random wait of up to 10 s."""

    def __init__(self, bucket: Bucket, name: str, seed: int) -> None:
        self.entropy = Entropy(f"{seed} {name}")
        super().__init__(bucket, Network(), Entropy(f"{seed} {name} network"))
        self.requests: Counter[str] = Counter()

    async def send(self, verb: str, effect: Callable[[], T]) -> T:
        attempt = 0
        while True:
            self.requests[verb] += 1
            try:
                return await self._send(verb, "", effect)
            except StoreUnavailable:
                await asyncio.sleep(self.entropy.uniform(0, min(10.0, 0.1 * 2**attempt)))
                attempt += 1

    async def skip(self, verbs: str) -> None:
        """Send requests whose effect does not matter here."""
        for verb in verbs.split():
            await self.send(verb, lambda: None)


def several(count: int, random: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return when each of so many GETs arrives, sent one after another from now, and when the last is answered."""
    spread = math.log(READ.p95 / READ.median) / 1.645
    took = READ.median * np.exp(spread * random.standard_normal(count))
    slow = random.random(count) < READ.slow
    took[slow] = random.uniform(READ.p95, READ.slowest, int(slow.sum()))
    ends = np.cumsum(took)
    return ends - took * (1 - THERE), float(ends[-1]) if count else 0.0


class StatusObjects:
    """One simulated run of workers that claim tasks through status objects."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.loop = VirtualLoop()
        self.seed = arguments.seed
        self.bucket = Bucket(self.loop, Entropy(f"{self.seed} bucket"))
        self.starts, self.lengths = draw(
            arguments.workers, arguments.tasks, arguments.seconds, arguments.boot, self.seed
        )
        self.statuses = Statuses(arguments.workers, arguments.tasks, Entropy(f"{self.seed} statuses"))
        self.window: float | None = arguments.window
        self.each = arguments.each_request
        self.first_page = arguments.first_page
        self.stored = arguments.stored
        self.links: list[Link] = []
        self.submitted: float | None = None
        self.first_task: float | None = None
        self.scans = 0
        self.lost_claims = 0
        self.idle = 0
        self.half: asyncio.Event
        self.over: asyncio.Event
        self.status: float | None = None

    def link(self, name: str) -> Link:
        link = Link(self.bucket, name, self.seed)
        self.links.append(link)
        return link

    async def play(self) -> None:
        self.half, self.over = asyncio.Event(), asyncio.Event()
        tasks = [asyncio.create_task(self.submit()), asyncio.create_task(self.attach())]
        tasks += [asyncio.create_task(self.work(number, start)) for number, start in enumerate(self.starts)]
        tasks.append(asyncio.create_task(self._gone(tasks[2:])))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.over.wait(), self.window)

    async def _gone(self, workers: list[asyncio.Task[None]]) -> None:
        """Note that there is no worker any more, be there tasks or not."""
        await asyncio.gather(*workers)
        self.over.set()

    async def submit(self) -> None:
        link = self.link("client")
        if self.stored:
            self.statuses.created[:] = 0.0
            self.submitted = 0.0
            return
        for place in self.statuses.places:
            await link.skip("put")
            await link.send("put", lambda place=place: self.statuses.created.__setitem__(place, self.loop.time()))
            await link.skip("get put")
        self.submitted = self.loop.time()

    async def attach(self) -> None:
        """Come back when half of the tasks are done, or half of the window is over, and ask for the status."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.half.wait(), self.window and self.window / 2)
        start = self.loop.time()
        link = Link(self.bucket, "laptop", self.seed)
        await link.skip("get")
        await self.scan(link, np.random.default_rng(self.seed))
        self.status = self.loop.time() - start

    async def scan(self, link: Link, random: np.random.Generator) -> Iterable[int]:
        """List the statuses and read each; return the places of those that were pending."""
        places: list[int] = []
        after = -1
        while True:
            page = await link.send("list", lambda after=after: self.statuses.listed(after, self.loop.time()))
            places += page
            if len(page) < PAGE or self.first_page:
                break
            after = page[-1]
        claimed = self.statuses.claimed
        if self.each:
            return [place for place in places if await link.send("get", lambda place=place: claimed[place] == np.inf)]
        start = self.loop.time()
        arrives, ends = several(len(places), random)
        await asyncio.sleep(ends)
        link.requests["get"] += len(places)
        seconds, counts = np.unique((start + arrives).astype(int), return_counts=True)
        for second, count in zip(seconds.tolist(), counts.tolist(), strict=True):
            self.bucket.arrived.setdefault(second, Counter())["get"] += count
        where = np.array(places, dtype=int)
        return where[claimed[where] > start + arrives].tolist()

    async def work(self, number: int, start: float) -> None:
        await asyncio.sleep(start)
        link = self.link(f"w{number}")
        random = np.random.default_rng([self.seed, number])
        await link.skip("get")  # the bootstrap task
        last, poll = self.loop.time(), POLL
        while self.loop.time() - last <= IDLE:
            self.scans += 1
            pending = await self.scan(link, random)
            for place in pending:
                if await self.claim(link, place):
                    await self.execute(link, place)
                    last, poll = self.loop.time(), POLL
                    break
            if not pending:
                await asyncio.sleep(poll)
                poll = min(POLL_MOST, poll * 2)
        self.idle += 1

    async def claim(self, link: Link, place: int) -> bool:
        if await link.send("get", lambda: self.statuses.claimed[place] < np.inf):
            return False
        won = await link.send("put", lambda: self.statuses.claim(place, self.loop.time()))
        self.lost_claims += not won
        return won

    async def execute(self, link: Link, place: int) -> None:
        await link.skip("get get put")  # the task; its status: "running"
        if self.first_task is None:
            self.first_task = self.loop.time()
        await asyncio.sleep(self.lengths[self.statuses.numbers[place]])
        await link.skip("put get")  # the result; its status
        completed = self.statuses.completed
        await link.send("put", lambda: completed.setdefault(place, self.loop.time()))
        if len(completed) * 2 >= len(self.lengths):
            self.half.set()
        if len(completed) == len(self.lengths):
            self.over.set()


def figures(
    starts: list[float], lengths: list[float], done: int, worked: float, end: float, requests: Counter[str]
) -> dict[str, str]:
    """Return what is computed alike of both: `done` tasks, `worked` seconds of work, by second `end`."""
    requests = Counter({verb: requests[verb] + (requests["create"] if verb == "put" else 0) for verb in VERBS})
    if done == len(lengths):
        share = ideal(starts, sum(lengths)) / end
    else:
        share = worked / sum(max(0.0, end - start) for start in starts)
    per = {verb: f"{count / done:,.3f}" if done else f"- ({count:,} in all)" for verb, count in requests.items()}
    return {
        "tasks done": f"{done:,} of {len(lengths):,}",
        "seconds, from the beginning of the submission": f"{end:,.1f}",
        "% of ideal (not finished: of the time of the workers)": f"{100 * share:.2f}",
        "tasks a second": f"{done / end:,.3f}",
        **{f"{verb.upper()}s a task": text for verb, text in per.items()},
        "cost of the requests, USD": f"{cost_of(requests):,.4f}",
    }


def rates(bucket: Bucket) -> dict[str, str]:
    return {
        f"busiest second, {kind.upper()}s (limit {limit:,.0f})": f"{busiest(bucket, kind)[1]:,}"
        for kind, limit in (("put", PUT_RATE), ("get", GET_RATE))
    } | {"503 answers": f"{bucket.throttled:,}"}


def seconds(value: float | None) -> str:
    return "not yet" if value is None else f"{value:,.1f}"


#: simulations that are over: their agents would protest against being collected
left: list[Scale] = []


def ours(arguments: argparse.Namespace) -> dict[str, str]:
    scale = Scale(
        arguments.workers, arguments.tasks, arguments.seconds, arguments.boot, arguments.seed, arguments.per_shard
    )
    left.append(scale)
    lengths = draw(arguments.workers, arguments.tasks, arguments.seconds, arguments.boot, arguments.seed)[1]
    scale.loop.run_until_complete(scale.play())
    requests = Counter(scale.client.counting.requests)
    for worker in scale.workers:
        requests.update(worker.counting.requests)
    assert len(scale.executed) == len(lengths)
    end = scale.start + scale.finished
    return {
        **figures(scale.starts, lengths, len(lengths), scale.total, end, requests),
        **rates(scale.bucket),
        "all tasks submitted after, s": seconds(scale.submitted),
        "first task begins after, s": seconds(scale.first_task),
        "attached half-way: status known after, s": seconds(scale.mid["status"]),
    }


def theirs(arguments: argparse.Namespace) -> dict[str, str]:
    run = StatusObjects(arguments)
    run.loop.run_until_complete(run.play())
    completed = run.statuses.completed
    done = len(completed)
    whole = done == len(run.lengths)
    end = max(completed.values()) if whole else run.loop.time()
    requests: Counter[str] = Counter()
    for link in run.links:
        requests.update(link.requests)
    top = busiest(run.bucket, "get")[1]
    if not run.each and top > SAFE * GET_RATE:
        sys.exit(f"{top} GETs in one second: the store would answer 503; use --each-request")
    worked = sum(run.lengths[run.statuses.numbers[place]] for place in completed)
    print(f"status objects: {run.scans:,} scans begun, {run.lost_claims:,} claims lost, {run.idle} workers gone idle")
    if not whole:
        print(f"status objects: not finished after {end:,.1f} s; the figures are what was measured until then")
    return {
        **figures(run.starts, run.lengths, done, worked, end, requests),
        **rates(run.bucket),
        "all tasks submitted after, s": seconds(run.submitted)
        if run.submitted is not None
        else f"{int((run.statuses.created <= end).sum()) - run.statuses.workers:,} submitted",
        "first task begins after, s": seconds(run.first_task),
        "attached half-way: status known after, s": seconds(run.status),
    }


def table(columns: dict[str, dict[str, str]]) -> None:
    """Print a Markdown table."""
    print("| | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for row in next(iter(columns.values())):
        print(f"| {row} | " + " | ".join(column[row] for column in columns.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=50)
    parser.add_argument("--tasks", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--window", type=float, help="end the status objects after so many simulated seconds")
    parser.add_argument("--each-request", action="store_true", help="simulate each GET of a scan, and 503s, by itself")
    parser.add_argument("--first-page", action="store_true", help="list the first 1,000 statuses only, as staRburst")
    parser.add_argument("--stored", action="store_true", help="status objects: all tasks are submitted beforehand")
    parser.add_argument("--only", choices=["shard logs", "status objects"], help="simulate one of the two")
    parser.add_argument("--per-shard", type=int, help="default: as a graph is cut")
    parser.add_argument("--boot", choices=["fargate", "at-once"], default="fargate")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    share()
    columns: dict[str, Any] = {}
    for name, simulate in (("shard logs", ours), ("status objects", theirs)):
        if arguments.only not in (None, name):
            continue
        began = time.perf_counter()
        columns[name] = simulate(arguments)
        print(f"{name}: simulated in {time.perf_counter() - began:.0f} s", flush=True)
    print(f"\n{arguments.tasks:,} tasks of {arguments.seconds} s on {arguments.workers:,} workers\n")
    table(columns)
    print(f"\n{PUBLISHED}")
    sys.stdout.flush()
    os._exit(0)  # the agents are left as they are


if __name__ == "__main__":
    main()
