"""How long listing sessions takes: ``python benchmarks/list_sessions.py [sessions] [store]``.

By default 2,500 sessions in a directory; with a store such as ``slow+memory://x?put=0.04&get=0.027&list=0.04`` each
request takes as long as one to S3. A fifth of the sessions are open, each with a run of 100 tasks, a few of them done.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import time

from burst_dask import list_sessions, sync
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.environment.versions import own_versions
from burst_dask.journal import log
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Beat, Claim, Commit, Manifest, Outcomes, Place, Plan, ShardInfo, encode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import AddRun, Close, Open, Scale
from burst_dask.protocol.shard import Shard
from burst_dask.store import Store, open_store, requests_of

TASKS, DONE, WORKERS = 100, 40, 4


async def write(store: Store, number: int) -> None:
    """Write down a session with one run, as `Session` and its workers do."""
    session = SessionId(f"s{number:06d}")
    author = log.Author(WorkerId("c"), SystemClock(), Entropy())
    run = RunId(f"{session}.r")
    info = ShardInfo(0, TASKS, Place(0, 0, 1000), (), TASKS, TASKS)
    plan = Plan(run=run, tasks=TASKS, shards=(info,), outputs=pickle.dumps([0]), created=author.clock.wall(), size=1000)
    await store.put(keys.plan(run), encode(plan))
    shard = Shard.untouched(keys.root_shard(0), Bitmap.full(TASKS))
    for action in (
        Claim(Bitmap.full(TASKS)),
        Commit(outcomes=Outcomes(done=Bitmap.full(DONE)), reserved=Bitmap.full(TASKS) - Bitmap.full(DONE)),
    ):
        after = await log.append(store, run, log.prepare(shard, author, action))
        assert after is not None
        shard = after
    for worker in range(WORKERS):
        name = WorkerId(f"w{worker}")
        await store.put(
            keys.beat(session, name), encode(Beat(worker=name, host="h", pid=1, threads=1, started=author.clock.wall()))
        )
    state = SessionState()
    closing = [Close()] if number % 5 else []
    for entry in (Open(), Scale(WORKERS), AddRun(run), *closing):
        state = await log.append_session(store, session, state, author, entry)
    manifest = Manifest(
        session=session,
        name=f"nightly-{number}",
        created=author.clock.wall(),
        host="h",
        versions=own_versions(),
        settings=Settings().to_dict(),
    )
    await store.create(keys.manifest(session), encode(manifest))


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 2500
    with tempfile.TemporaryDirectory() as directory:
        url = sys.argv[2] if len(sys.argv) > 2 else directory
        # What is listed through a slow store is written through the fast one below.
        fast = open_store(url.removeprefix("slow+").partition("?")[0] if url.startswith("slow+") else url)
        sync.run(in_parallel(lambda number: write(fast, number), range(count), 64))
        for details in (0, 100, None) if count <= 2500 else (0, 100):
            store = open_store(url)
            started = time.perf_counter()
            rows = list_sessions(store, details=details)
            seconds = time.perf_counter() - started
            looked = sum(row.tasks is not None for row in rows)
            sent = sum(requests_of(store).values())
            print(f"{len(rows)} sessions, {looked} looked into: {seconds:6.2f} s, {sent} requests")


if __name__ == "__main__":
    main()
