"""Reading logs: of a task, of a run, of a session, as they come, and when parts are gone."""

from __future__ import annotations

import logging
import threading

import dask
import pytest

from burst_dask import Session, sync
from burst_dask.client.submission import Asked
from burst_dask.client.tasklogs import Follower, LogRecord, TaskLog
from burst_dask.errors import UnknownId
from burst_dask.protocol.session_records import Close

GATES: dict[str, threading.Event] = {}


def speak(word: str, *inputs: object) -> str:
    print(f"I say {word}")
    return word


def speak_when(gate: str, word: str) -> str:
    GATES[gate].wait(60)
    return speak(word)


def fail(word: str) -> None:
    logging.getLogger("lab").warning("about to fail")
    raise ValueError(word)


def delayed(function, *inputs, key):
    return dask.delayed(function)(*inputs, dask_key_name=key)


@pytest.fixture
def burst(request):
    session = Session(f"memory://{request.node.name}", workers=2, progress=False, commit_interval=0.1, retry_delay=0.01)
    yield session
    for gate in GATES.values():
        gate.set()
    session.cleanup(force=True)


def test_the_log_of_one_task(burst):
    run = burst.compute(*(delayed(speak, n, key=f"speak-{n}") for n in range(5)))
    run.wait(60)
    log = run.logs("speak-3")
    assert (log.run, log.key, log.text, str(log), log.note) == (run.id, "speak-3", "I say 3\n", "I say 3\n", "")
    (record,) = log.records
    assert (record.stream, record.attempt, (record.worker,)) == ("stdout", 1, log.workers)


def test_keys_that_are_tuples_are_found_by_their_text_too(burst):
    dsk = {("say", 0): (speak, "zero"), ("say", 1): (speak, "one", ("say", 0))}
    run = burst._submit(dsk, [("say", 1)], Asked())
    run.wait(60)
    assert run.logs(("say", 1)).text == run.logs("('say', 1)").text == "I say one\n"
    assert run.logs(("say", 1)).key == ("say", 1)


def test_a_failed_task_and_each_of_its_tries(burst):
    with dask.annotate(retries=1):
        run = burst.compute(delayed(fail, "no", key="fail"))
    run.wait(60)
    log = run.logs("fail")
    assert log.text == "lab: about to fail\n" * 2
    assert [(record.attempt, record.stream) for record in log.records] == [(1, "WARNING"), (2, "WARNING")]


def test_tasks_without_output_have_an_empty_log(burst):
    run = burst.compute(delayed(len, "abc", key="silent"))
    run.wait(60)
    assert run.logs("silent") == TaskLog(run.id, "silent")


def test_a_task_without_an_outcome_says_so(burst):
    GATES["later"] = threading.Event()
    run = burst.compute(delayed(speak_when, "later", "now", key="later"))
    assert (run.logs("later").text, run.logs("later").note.partition(";")[0]) == ("", "it has no outcome yet")
    GATES["later"].set()
    run.wait(60)
    assert (run.logs("later").text, run.logs("later").note) == ("I say now\n", "")


def test_unknown_keys_list_what_is_spelled_alike(burst):
    run = burst.compute(delayed(speak, "a", key="speak-a"))
    with pytest.raises(UnknownId, match=r"has no task 'speak-b'; did you mean 'speak-a'\?"):
        run.logs("speak-b")


def test_all_logs_of_a_session_and_of_one_worker(burst):
    runs = [burst.compute(*(delayed(speak, n, key=f"say-{turn}-{n}") for n in range(8))) for turn in range(2)]
    for run in runs:
        run.wait(60)
    logs = burst.logs()
    assert {(log.run, log.key) for log in logs} == {
        (run.id, f"say-{turn}-{n}") for turn, run in enumerate(runs) for n in range(8)
    }
    assert [log.records[0].time for log in logs] == sorted(log.records[0].time for log in logs)
    by_worker = {worker: burst.logs(worker=worker) for log in logs for worker in log.workers}
    assert sum(map(len, by_worker.values())) == 16
    assert all(log.workers == (worker,) for worker, its in by_worker.items() for log in its)
    assert burst.logs(worker="nosuch") == []


def test_logs_stay_when_a_session_is_cleaned_up_without_force(burst):
    run = burst.compute(delayed(speak, "x", key="speak-x"))
    run.wait(60)
    burst.cleanup()
    assert run.logs("speak-x").text == "I say x\n"
    assert [log.key for log in burst.logs()] == ["speak-x"]
    with pytest.raises(UnknownId, match="since its graph was cleaned up"):
        run.logs("speak-y")
    burst.cleanup(force=True)
    assert sync.run(_keys_left(burst)) == []


async def _keys_left(burst):
    return [meta.key async for page in burst._link.store.list(f"s/{burst.id}/") for meta in page]


def test_following_ends_with_the_run_and_tells_all_of_it_once(burst):
    names = ["first", "second"]
    for name in names:
        GATES[name] = threading.Event()
    run = burst.compute(*(delayed(speak_when, name, name, key=name) for name in names))
    follower = Follower(burst._link, [run.id])
    told = []
    for name in names:
        GATES[name].set()
        told += [log.key for log in sync.run(follower.more())]
    assert told == names
    assert sync.run(follower.more()) is None


def test_following_a_session_goes_on_with_runs_submitted_meanwhile(burst):
    GATES["one"] = threading.Event()
    first = burst.compute(delayed(speak_when, "one", 1, key="one"))
    follower = Follower(burst._link, None)
    second = burst.compute(delayed(speak, 2, key="two"))
    assert [log.run for log in sync.run(follower.more())] == [second.id]
    GATES["one"].set()
    assert [log.run for log in sync.run(follower.more())] == [first.id]
    assert sync.run(follower.more()) is None


def test_following_ends_when_the_run_is_cancelled(burst):
    GATES["never"] = threading.Event()
    run = burst.compute(delayed(speak_when, "never", 1, key="never"))
    run.cancel()
    assert sync.run(Follower(burst._link, [run.id]).more()) is None


@pytest.mark.parametrize("end", ["closed", "expired"])
def test_following_ends_with_the_session(end):
    session = Session("memory://ends", fleet=None, progress=False, session_timeout=0.3)
    run = session.compute(delayed(speak, 1, key="never"))
    if end == "closed":
        sync.run(session._link.append(Close()))
    assert sync.run(Follower(session._link, [run.id]).more()) is None
    assert session.status().state == end
    session.cleanup(force=True)


def test_records_are_cut_into_lines():
    log = TaskLog("r", "k", (LogRecord(1.0, "stdout", "a\nb\n", 1, "w"), LogRecord(2.0, "INFO", "c", 1, "v")))
    assert [(line.time, line.text) for line in log.lines()] == [(1.0, "a"), (1.0, "b"), (2.0, "c")]
    assert log.on("v").text == "c" and log.on(None) is log and log.workers == ("w", "v")
