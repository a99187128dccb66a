"""The command that says whether a run's objects keep the rules: by its output and exit code."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dask
import pytest
from click.testing import CliRunner, Result

from burst_dask import Session, cli, sync
from burst_dask.clock import Entropy
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Action, Beat, Claim, Commit, Location, Outcomes, encode
from burst_dask.protocol.session_records import AddRun, Cancel
from burst_dask.protocol.shard import Shard
from burst_dask.store import Store, open_store

sys.path.insert(0, str(Path(__file__).parent / "worker"))
from stage import Stage


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, ["doctor", *arguments])


@pytest.fixture
def burst() -> Iterator[Session]:
    session = Session(f"memory://{Entropy().token()}", workers=1, progress=False)
    yield session
    session.cleanup(force=True)


def finished(burst: Session) -> RunId:
    """Return a run that is over."""
    values = [dask.delayed(pow)(number, 2) for number in range(5)]
    run = burst.compute(dask.delayed(sum)(values), dask.delayed(bytes)(100_000))
    assert run.result(timeout=60) == (30, bytes(100_000))
    return RunId(run.id)


def lose_the_segment(store: Store, run: RunId) -> None:
    async def lose() -> None:
        names = [meta.key async for page in store.list(keys.run_prefix(run)) for meta in page]
        segments = [name for name in names if "/segments/" in name]
        assert segments
        await store.delete(segments)

    sync.run(lose())


def test_a_healthy_run(burst: Session) -> None:
    run = finished(burst)
    shown = doctor(run, "--store", burst.store)
    assert shown.exit_code == 0, shown.output
    assert f"run {run}: 7 tasks, 7 done, 0 failed" in shown.output
    assert "1 workers alive" in shown.output
    assert shown.output.endswith("healthy: every rule holds\n")


def test_a_broken_run(burst: Session) -> None:
    run = finished(burst)
    lose_the_segment(open_store(burst.store), run)
    shown = doctor(run, "--store", burst.store)
    assert shown.exit_code == 1
    assert "broken: rule 2: the stored outcome of task" in shown.output
    assert "is not there" in shown.output and "claimed, reserving" in shown.output, "the story of the shard"
    assert "1 broken: this is a bug" in shown.output


def test_json(burst: Session) -> None:
    run = finished(burst)
    shown = doctor(run, "--store", burst.store, "--json")
    found = json.loads(shown.output)
    assert (shown.exit_code, found["healthy"], found["id"]) == (0, True, run)
    assert found["runs"][0]["tasks"] == found["runs"][0]["done"] == 7
    assert found["runs"][0]["violations"] == found["runs"][0]["garbage"] == found["session"]["violations"] == []
    lose_the_segment(open_store(burst.store), run)
    shown = doctor(run, "--store", burst.store, "--json")
    found = json.loads(shown.output)
    assert (shown.exit_code, found["healthy"]) == (1, False)
    (violation,) = found["runs"][0]["violations"]
    assert violation["rule"] == "2" and "claimed" in violation["story"][1]


def test_a_story_is_told_once() -> None:
    it = Abandoned()
    lost = Outcomes(done=Bitmap.full(2), stored={0: Location(0, 0, 8), 1: Location(1, 0, 8)})
    it.append("gone", Commit(lost, EMPTY, segments=("here", "there")))
    shown = doctor(it.run, "--store", it.url)
    assert shown.output.count("broken: rule 2") == 2 and shown.output.count("0: gone claimed") == 1
    found = json.loads(doctor(it.run, "--store", it.url, "--json").output)
    assert all(violation["story"] for violation in found["runs"][0]["violations"])


def test_a_session_means_all_its_runs(burst: Session) -> None:
    first, second = finished(burst), finished(burst)
    shown = doctor(burst.id, "--store", burst.store)
    assert shown.exit_code == 0 and f"run {first}: 7" in shown.output and f"run {second}: 7" in shown.output
    lose_the_segment(open_store(burst.store), second)
    assert doctor(first, "--store", burst.store).exit_code == 0
    assert doctor(burst.id, "--store", burst.store).exit_code == 1


def test_a_damaged_session_log_is_told_once(burst: Session) -> None:
    finished(burst), finished(burst)
    store, key = open_store(burst.store), keys.entry(keys.session_log(burst.id), 1)
    data = bytearray(sync.run(store.get(key)) or b"")
    data[-1] ^= 1
    sync.run(store.put(key, bytes(data)))
    shown = doctor(burst.id, "--store", burst.store, "--json")
    found = json.loads(shown.output)
    assert shown.exit_code == 1
    rules = [violation["rule"] for violation in found["session"]["violations"]]
    assert rules == ["objects", "session log"], "the entry, and the gap that it leaves"
    assert all(run["violations"] == [] for run in found["runs"])


def test_what_a_cleanup_has_kept_is_healthy(burst: Session) -> None:
    run = finished(burst)
    burst.cleanup()
    shown = doctor(run, "--store", burst.store)
    assert shown.exit_code == 0, shown.output
    assert "closed" in shown.output
    assert "note: its graph was deleted by a cleanup" in shown.output and "garbage" not in shown.output


@pytest.mark.parametrize("identifier", ["k3w9x2mq", "k3w9x2mq.7gfh2y"])
def test_an_unknown_id(identifier: str) -> None:
    shown = doctor(identifier, "--store", "memory://empty")
    assert shown.exit_code == 1
    assert shown.output.startswith(f"Error: memory://empty holds nothing of '{identifier}'; ")


def test_an_unknown_run_of_a_known_session(burst: Session) -> None:
    shown = doctor(f"{burst.id}.nosuch", "--store", burst.store)
    assert shown.exit_code == 1 and "holds nothing of" in shown.output


def test_what_is_no_id() -> None:
    shown = doctor("a/b", "--store", "memory://empty")
    assert shown.exit_code == 1 and "'a/b' is not the id of a run or session" in shown.output


def test_the_installed_command(tmp_path: Path) -> None:
    """As a person calls it, on a directory, with an entry that somebody has cut short."""
    burst = Session(tmp_path, workers=1, progress=False)
    try:
        run = finished(burst)
        command = [sys.executable, "-m", "burst_dask.cli", "doctor", run, "--store", str(tmp_path)]
        assert subprocess.run(command, capture_output=True, check=False).returncode == 0
        entry = tmp_path / keys.entry(keys.shard_log(run, keys.root_shard(0)), 0)
        entry.write_bytes(entry.read_bytes()[:-1])
        shown = subprocess.run(command, capture_output=True, text=True, check=False)
        assert shown.returncode == 1
        assert "rule objects" in shown.stdout and "truncated" in shown.stdout
    finally:
        burst.cleanup(force=True)


# ---------------------------------------------------------------------------- notes


class Abandoned:
    """A run of two tasks whose holder is no more."""

    def __init__(self) -> None:
        self.url = f"memory://{Entropy().token()}"
        self.stage = asyncio.run(Stage(open_store(self.url)).open())
        self.view = asyncio.run(self.stage.submit([(lambda: 1, []), (lambda: 2, [])], outputs=[]))
        self.run = self.view.run
        self.append("gone", Claim(Bitmap.full(2)))

    def append(self, writer: str, action: Action) -> None:
        author = log.Author(WorkerId(writer), self.stage.clock, self.stage.entropy)
        attempt = log.prepare(self.view.shard(keys.root_shard(0)), author, action)
        after = asyncio.run(log.append(self.stage.store, self.run, attempt))
        assert isinstance(after, Shard)
        self.view.learn(after)


def test_a_shard_of_a_dead_worker_is_no_violation() -> None:
    it = Abandoned()
    shown = doctor(it.run, "--store", it.url)
    assert shown.exit_code == 0
    assert "shard 00000 is held by gone, which has no heartbeat: the next idle worker takes it over" in shown.output
    assert f"2 tasks left and no worker is alive; start some: burst worker --session {it.stage.session}" in shown.output


def test_an_old_heartbeat_is_judged_by_a_newer_one() -> None:
    it = Abandoned()
    asyncio.run(it.stage.beat("gone"))
    shown = doctor(it.run, "--store", it.url)
    assert "1 workers alive" in shown.output and "note" not in shown.output
    record = Beat(worker=WorkerId("gone"), host="h", pid=1, threads=1, started=0.0)
    asyncio.run(it.stage.store.create(keys.ended(it.stage.session, WorkerId("gone")), encode(record)))
    shown = doctor(it.run, "--store", it.url)
    assert "0 workers alive" in shown.output and "held by gone, which has ended" in shown.output


def test_a_cancelled_run_needs_no_worker() -> None:
    it = Abandoned()
    asyncio.run(it.stage.append(Cancel(it.run)))
    shown = doctor(it.run, "--store", it.url)
    assert shown.exit_code == 0
    assert "it was cancelled with 2 tasks left" in shown.output and "start some" not in shown.output


def test_a_run_that_is_over_needs_no_worker() -> None:
    it = Abandoned()
    it.append("gone", Commit(Outcomes(done=Bitmap.full(2)), EMPTY))
    shown = doctor(it.run, "--store", it.url)
    assert shown.exit_code == 0 and "note" not in shown.output


def test_garbage_is_told_and_breaks_no_rule() -> None:
    it = Abandoned()
    half = keys.run_in(it.stage.session, "half")
    asyncio.run(it.stage.store.put(keys.pack(half, 0), b"half"))
    asyncio.run(it.stage.store.put(keys.segment(it.run, keys.root_shard(0), "lost"), b"lost"))
    for identifier in (it.stage.session, half):
        shown = doctor(identifier, "--store", it.url)
        assert shown.exit_code == 0
        assert f"garbage: 1 objects of run {half}, whose submission ended before its plan was written" in shown.output
    assert "segments/00000/lost (4 bytes): nothing names it" in doctor(it.run, "--store", it.url).output


def test_a_segment_that_nobody_needs_any_more_is_told() -> None:
    it = Abandoned()
    body = b"".join(seal([b"x"]))
    asyncio.run(it.stage.store.put(keys.segment(it.run, keys.root_shard(0), "00001-a"), body))
    stored = Outcomes(done=Bitmap.full(2), stored={0: Location(0, 0, len(body))})
    it.append("gone", Commit(stored, EMPTY, ("00001-a",)))
    shown = doctor(it.run, "--store", it.url)
    assert shown.exit_code == 0
    assert f"00001-a ({len(body)} bytes): nobody needs its results any more" in shown.output


def test_a_named_run_without_a_plan_is_broken() -> None:
    it = Abandoned()
    lost = keys.run_in(it.stage.session, "lost")
    asyncio.run(it.stage.append(AddRun(lost)))
    shown = doctor(it.stage.session, "--store", it.url)
    assert shown.exit_code == 1 and f"rule 7: run {lost} has no plan" in shown.output
