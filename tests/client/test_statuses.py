"""What is told of runs and sessions, and what telling it costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import dask
import msgspec
import pytest

from burst_dask import Run, Session, sync
from burst_dask.client import statuses
from burst_dask.client.link import Link, WorkersSeen
from burst_dask.client.statuses import OVERHEAD, Workers, survey_workers
from burst_dask.client.submission import Asked
from burst_dask.clock import Entropy, SystemClock
from burst_dask.commands import watching
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.journal import log
from burst_dask.journal.outcomes import Totals
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Beat, Claim, Ended, FleetChoice, encode
from burst_dask.protocol.session_records import Cancel, Close
from burst_dask.protocol.shard import Shard
from burst_dask.report.tables import WorkersStatus
from burst_dask.store import cost_of


@pytest.fixture
def alone() -> Session:
    """A session without workers."""
    return Session(f"memory://{Entropy().token()}", fleet=None, progress=False, worker_price=3.6)


def beat(session: Session, name: str, *, started: float, requests: dict[str, int], threads: int = 1) -> None:
    record = Beat(worker=WorkerId(name), host="h", pid=1, threads=threads, started=started, requests=requests)
    sync.run(session._link.store.put(keys.beat(session._link.session, record.worker), encode(record)))


def end(session: Session, name: str, *, wrote: float, requests: dict[str, int]) -> None:
    record = Ended(worker=WorkerId(name), reason="idle", wrote=wrote, requests=requests)
    sync.run(session._link.store.put(keys.ended(session._link.session, record.worker), encode(record)))


def surveyed(session: Session) -> Workers:
    return sync.run(survey_workers(session._link, own=False))


def test_the_cost_of_workers(alone: Session) -> None:
    now = alone._link.clock.wall()
    beat(alone, "gone", started=now - 1000, requests={"put": 5})
    end(alone, "gone", wrote=now - 400, requests={"put": 100, "get": 1000})
    beat(alone, "killed", started=now - 200, requests={"put": 10})
    end(alone, "killed", wrote=now - 100, requests={})  # by its supervisor, which knows nothing of requests
    beat(alone, "works", started=now - 50, requests={"list": 2}, threads=4)
    seen = surveyed(alone)
    assert (seen.seen.status.alive, seen.threads) == (1, 4)
    assert seen.requests == {"put": 110, "get": 1000, "list": 2}
    seconds = 600 + 100 + 50
    assert seen.cost == pytest.approx(cost_of(seen.requests) + seconds / 3600 * 3.6, rel=0.01)


def test_what_ended_workers_have_spent_is_read_once(alone: Session) -> None:
    now = alone._link.clock.wall()
    for number in range(50):
        beat(alone, f"w{number}", started=now - 10, requests={"put": 1})
        end(alone, f"w{number}", wrote=now, requests={"put": 2})
    beat(alone, "works", started=now, requests={"put": 1})
    assert surveyed(alone).requests == {"put": 101}
    before = alone.requests
    assert surveyed(alone).requests == {"put": 101}
    assert sum(alone.requests.values()) - sum(before.values()) == 2  # the listing, and the one that lives


def test_a_worker_that_was_paused_and_goes_on_counts_in_full(alone: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    now = alone._link.clock.wall()
    beat(alone, "sleeper", started=now - 100, requests={"put": 1})
    beat(alone, "other", started=now - 100, requests={})

    async def later() -> WorkersSeen:
        seen = await Link.seen(alone._link)
        return seen._replace(alive=(WorkerId("other"),))  # as when the lease of the sleeper has run out

    with monkeypatch.context() as patch:
        patch.setattr(alone._link, "seen", later)
        assert surveyed(alone).requests == {"put": 1}
    beat(alone, "sleeper", started=now - 100, requests={"put": 7})
    assert surveyed(alone).requests == {"put": 7}


def test_a_worker_that_refused_has_no_heartbeat(alone: Session) -> None:
    end(alone, "other", wrote=5.0, requests={})
    assert surveyed(alone).cost == 0


def test_what_this_client_has_sent_counts(alone: Session) -> None:
    alone.compute(dask.delayed(1))
    status = alone.status()
    assert status.requests["put"] >= 2 and status.cost > 0


def test_what_is_to_be_said_of_the_price_is_said(alone: Session) -> None:
    assert "USD, " not in str(alone.status())
    fleet = FleetChoice(options={"price_note": "at most: less on Spot"})
    alone._link.manifest = msgspec.structs.replace(alone._link.manifest, fleet=fleet)
    assert " USD, at most: less on Spot" in str(alone.status())


def test_of_10_000_tasks_and_100_runs_each_takes_few_requests(alone: Session) -> None:
    for _ in range(100):
        alone._submit({("x", n): (abs, n) for n in range(100)}, [("x", 0)], Asked())
    before = alone.requests
    status = alone.status()
    assert {name: count for name, count in status.totals.items() if count} == {"total": 100, "pending": 100}
    assert sum(alone.requests.values()) - sum(before.values()) < 100 * 4 + 10
    assert "100, the last 20 of them:" in str(status)
    assert len(status.to_frame()) == 100


def test_states_of_a_run(alone: Session) -> None:
    run = alone._submit({"x": (abs, 1), "y": (abs, 2)}, ["x", "y"], Asked())
    assert run.status().state == "pending"
    sync.run(alone._link.append(Cancel(run.id)))
    status = run.status()
    assert (status.state, status.cancelled, status.pending, status.left) == ("cancelled", 2, 0, 0)
    other = alone._submit({"x": (abs, 1)}, ["x"], Asked())
    fleet = InProcessFleet(alone._link.session, alone._link.store)
    fleet.ensure(1)
    other.wait(timeout=30)
    fleet.stop()
    assert other.status().state == "done"
    left = alone._submit({"x": (abs, 1)}, ["x"], Asked())
    sync.run(alone._link.append(Close()))
    assert left.status().state == "stopped"
    assert other.status().state == "done"


def test_what_a_dead_worker_had_reserved_does_not_run(alone: Session) -> None:
    run = alone._submit({("x", n): (abs, n) for n in range(4)}, [("x", n) for n in range(4)], Asked())
    store, view = alone._link.store, run._view

    async def claim(worker: str) -> None:
        author = log.Author(WorkerId(worker), SystemClock(), Entropy())
        shard = view.shard(keys.root_shard(0))
        assert await log.append(store, run.id, log.prepare(shard, author, Claim(shard.index.pending))) is not None

    now = alone._link.clock.wall()
    beat(alone, "holder", started=now, requests={})
    beat(alone, "other", started=now, requests={})
    sync.run(claim("holder"))
    reserved = len(sync.run(read_shard(run)).index.reserved)
    status = run.status()
    assert (status.state, status.running, status.pending) == ("running", reserved, 4 - reserved) and reserved
    end(alone, "holder", wrote=now, requests={})
    status = run.status()
    assert (status.workers.alive, status.running, status.pending) == (1, 0, 4)
    assert run.cancel()  # nobody takes the shard over any more, and nobody waits for what was reserved
    status = run.status()
    assert (status.state, status.running, status.cancelled) == ("cancelled", 0, 4)
    assert watching._is_over(status)


async def read_shard(run: Run) -> Shard:
    await run._view.survey()
    return run._view.shard(keys.root_shard(0))


def test_the_rest_takes_as_long_as_what_was() -> None:
    workers = Workers(WorkersStatus(2, 1.0), 4, {}, 0.0)
    nobody = Workers(WorkersStatus(0, None), 0, {}, 0.0)
    totals = Totals(total=100, done=20, failed=0, cancelled=0, reserved=4, seconds=40.0)

    shard = SimpleNamespace(index=SimpleNamespace(outcomes=SimpleNamespace(ran=20)))
    view = cast(RunView, SimpleNamespace(shards={"00000": shard}))
    assert statuses._remaining(view, totals, 80, workers) == pytest.approx(80 * (2.0 + OVERHEAD) / 4)
    assert statuses._remaining(view, totals, 80, nobody) is None
    untouched = cast(RunView, SimpleNamespace(shards={}))
    assert statuses._remaining(untouched, totals, 80, workers) is None
