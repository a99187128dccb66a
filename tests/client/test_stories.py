"""What is told of a run and of its tasks, from logs written by hand and by workers."""

from __future__ import annotations

import dask
import pytest

from burst_dask import Session, sync
from burst_dask.api.run import Run
from burst_dask.client.submission import Asked
from burst_dask.clock import Entropy
from burst_dask.errors import ConfigError, UnknownId
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import Action, Claim, Commit, Outcomes, Release, Split, Takeover
from burst_dask.protocol.session_records import Cancel
from burst_dask.protocol.shard import Shard


class Hand:
    """Writes a shard log by hand, each entry by a worker whose clock is its own."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.store = run._link.store
        self.states: dict[str, Shard] = {}

    def write(self, worker: str, wrote: float, action: Action, shard: str = "00000") -> None:
        class Clock:
            def monotonic(self) -> float:
                return 0.0

            def wall(self) -> float:
                return wrote

            async def sleep(self, seconds: float) -> None:
                raise AssertionError

        state = self.states.get(shard) or self.run._view.shard(ShardId(shard))
        author = log.Author(WorkerId(worker), Clock(), Entropy(worker))
        after = sync.run(log.append(self.store, self.run.id, log.prepare(state, author, action)))
        assert after is not None
        self.states[shard] = after
        self.run._view.learn(after)


@pytest.fixture
def hand() -> Hand:
    session = Session(f"memory://{Entropy().token()}", fleet=None, progress=False)
    value = -5
    for number in range(4):  # a chain lies in one shard, in order
        value = dask.delayed(abs)(value, dask_key_name=f"x-{number}")
    return Hand(session.compute(value))


def told(run: Run, key: object) -> list[str]:
    """Return the lines of shard logs."""
    return [f"{line.log}: {line.what}" for line in run.story(key) if line.log != "session"]


def done(*positions: int) -> Outcomes:
    return Outcomes(done=Bitmap.of(positions))


def test_a_task_whose_worker_died(hand: Hand) -> None:
    hand.write("w1", 100.0, Claim(Bitmap.of([0, 1])))
    hand.write("w1", 101.0, Commit(outcomes=done(1), reserved=Bitmap.of([0])))
    hand.write("w2", 150.0, Takeover(lost=WorkerId("w1"), cause="worker w1: killed by SIGKILL", reserved=EMPTY))
    hand.write("w2", 151.0, Commit(outcomes=Outcomes(), reserved=Bitmap.of([0])))
    hand.write("w2", 152.0, Commit(outcomes=done(0), reserved=EMPTY))
    assert told(hand.run, "x-0") == [
        "shard 00000: was reserved by w1: runs there, or is next",
        "shard 00000: was given back by w1 (worker w1: killed by SIGKILL)",
        "shard 00000: was reserved by w2: runs there, or is next",
        "shard 00000: was completed by w2",
    ]


def test_a_task_that_was_split_off(hand: Hand) -> None:
    hand.write("w1", 100.0, Claim(Bitmap.of([0])))
    hand.write("w2", 101.0, Split(child=keys.child_shard(ShardId("00000"), 1), tasks=Bitmap.of([3])))
    hand.write("w2", 102.0, Claim(Bitmap.of([3])), shard="00000-1")
    hand.write("w2", 103.0, Release(outcomes=Outcomes(), reason="stopped"), shard="00000-1")
    hand.write("w3", 104.0, Claim(Bitmap.of([3])), shard="00000-1")
    hand.write("w3", 105.0, Commit(outcomes=Outcomes(failed=Bitmap.of([3])), reserved=EMPTY), shard="00000-1")
    assert told(hand.run, "x-3") == [
        "shard 00000: was split off to shard 00000-1 by w2",
        "shard 00000-1: was reserved by w2: runs there, or is next",
        "shard 00000-1: was given back by w2 (stopped)",
        "shard 00000-1: was reserved by w3: runs there, or is next",
        "shard 00000-1: failed on w3",
    ]


def test_times_of_one_log_never_go_back(hand: Hand) -> None:
    hand.write("w1", 1e10, Claim(EMPTY))  # its clock is ahead
    hand.write("w1", 1e10 + 1, Release(outcomes=Outcomes(), reason="nothing ready"))
    hand.write("w2", 5.0, Claim(EMPTY))
    lines = [line for line in hand.run.story() if line.log != "session"]
    assert [line.time for line in lines] == [1e10, 1e10 + 1, 1e10 + 1]
    assert [line.what.split(":")[0] for line in lines] == ["0", "1", "2"]


def test_what_clients_did_to_this_run_is_part_of_it(hand: Hand) -> None:
    run, link = hand.run, hand.run._link
    other = keys.RunId(f"{link.session}.other")
    sync.run(link.append(Cancel(other)))
    sync.run(link.append(Cancel(run.id, force=True)))
    said = [line.what for line in run.story()]
    assert said == [
        "the session was opened",
        f"run {run.id} was submitted",
        f"run {run.id} was cancelled, and its running tasks killed",
    ]


def test_it_prints_and_becomes_a_frame(hand: Hand) -> None:
    story = hand.run.story()
    assert "what happened" in str(story) and "the session was opened" in str(story)
    assert "<td>the session was opened</td>" in story._repr_html_()
    assert list(story.to_frame().columns) == ["time", "log", "what"]
    assert story.to_dicts()[0]["log"] == "session"


def test_keys_that_are_not_strings_and_their_text() -> None:
    session = Session(f"memory://{Entropy().token()}", fleet=None, progress=False)
    run = session._submit({("x", 0): (abs, 1)}, [("x", 0)], Asked())
    for key in (("x", 0), "('x', 0)"):
        assert run.story(key).title() == f"Story of task {key!r} of run {run.id}"
    with pytest.raises(UnknownId, match=r"no task \('x', 1\); did you mean \"\('x', 0\)\""):
        run.story(("x", 1))


def test_after_a_cleanup_a_task_cannot_be_found_and_the_run_can() -> None:
    session = Session(f"memory://{Entropy().token()}", fleet=None, progress=False)
    run = session.compute(dask.delayed(abs)(1, dask_key_name="one"))
    fleet = InProcessFleet(session._link.session, session._link.store)
    fleet.ensure(1)
    run.wait(timeout=30)
    fleet.stop()
    session.cleanup()
    assert [line.what for line in run.story()][-1] == "the session was closed"
    with pytest.raises(ConfigError, match=r"was deleted by a cleanup.*story\(\) without a key"):
        run.story("one")
