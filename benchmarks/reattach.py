"""Coming back to a million-task run, simulated: seconds at S3's latencies until its status is known.

The run lies in the store as a fleet of 1,000 would have left it half-way: 4,000 shards of 250 tasks, half of them
complete with 55 entries each, 1,000 begun. A client that knows nothing attaches, lists the heartbeats and surveys.
"""

from __future__ import annotations

import statistics

from simulated import share

from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.journal import log
from burst_dask.journal import view as views
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Beat, Claim, Commit, Location, Outcomes, encode
from burst_dask.protocol.shard import Shard
from burst_dask.testing.bucket import Bucket, Network
from burst_dask.testing.loop import VirtualLoop
from burst_dask.testing.machines import Client
from burst_dask.testing.work import Graph, Work

SHARDS, TASKS, ENTRIES, WORKERS = 4000, 250, 55, 1000
TIMES = 20


def grow(bucket: Bucket, run: keys.RunId, number: int, entries: int, author: log.Author) -> None:
    """Write a shard's log, straight into the bucket."""
    shard = Shard.untouched(keys.root_shard(number), Bitmap.full(TASKS))
    step = -(-TASKS // (ENTRIES - 1))
    for entry in range(entries):
        if entry == 0:
            action = Claim(Bitmap.full(TASKS))
        else:
            done = [task for task in range((entry - 1) * step, min(entry * step, TASKS))]
            stored = {task: Location(entry - 1, 0, 40) for task in done}
            outcomes = Outcomes(done=Bitmap.of(done), stored=stored, seconds=float(len(done)), ran=len(done))
            action = Commit(outcomes, EMPTY, (f"@{entry}",))
        attempt = log.prepare(shard, author, action)
        bucket.create(keys.entry(keys.shard_log(run, shard.id), entry), encode(attempt.entry))
        shard = attempt.shard
        if shard.index.complete:
            return


def main() -> None:
    share()
    loop = VirtualLoop()
    bucket = Bucket(loop, Entropy("bucket"))
    client = Client(bucket, "client", 0, Network())
    graph = Graph([Work(n) for n in range(SHARDS * TASKS)], range(0, SHARDS * TASKS + 1, TASKS), range(SHARDS * TASKS))

    async def prepare() -> tuple[keys.SessionId, keys.RunId]:
        link = await client.open(Settings.of(), WORKERS)
        return link.session, (await client.submit(link, graph)).run

    session, run = loop.run_until_complete(prepare())
    for number in range(3 * SHARDS // 4):
        author = log.Author(WorkerId(f"w{number % WORKERS}"), client.clock, client.entropy)
        grow(bucket, run, number, ENTRIES if number < SHARDS // 2 else ENTRIES // 2, author)
    for number in range(WORKERS):
        worker = WorkerId(f"w{number}")
        bucket.put(keys.beat(session, worker), encode(Beat(worker=worker, host="", pid=0, threads=1, started=0.0)))

    async def look(time: int) -> tuple[float, float, dict[str, int]]:
        laptop = Client(bucket, f"laptop-{time}", time, Network())
        start = loop.time()
        link = await laptop.attach(session)
        view = await views.RunView.open(laptop.store, run)
        attached = loop.time() - start
        await link.seen()
        await view.survey()
        assert view.totals().done > SHARDS * TASKS // 2
        return attached, loop.time() - start, laptop.counting.requests

    looks = [loop.run_until_complete(look(time)) for time in range(TIMES)]
    for what, place in (("attached", 0), ("status known", 1)):
        seconds = sorted(one[place] for one in looks)
        print(f"{what}: median {statistics.median(seconds):.2f} s, slowest of {TIMES} {seconds[-1]:.2f} s (target 3)")
    print(f"requests: { ({verb: count for verb, count in looks[0][2].items() if count}) }")


if __name__ == "__main__":
    main()
