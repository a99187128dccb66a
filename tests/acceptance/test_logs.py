"""What tasks print is kept with them, on every store, and is there when their workers are not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys

import dask
import pytest
from acting import QUICK

from burst_dask import Session, attach


@pytest.fixture(scope="module")
def burst(any_store):
    session = Session(any_store, workers=2, progress=False, **QUICK)
    yield session
    session.cleanup(force=True)


def simulate(number):
    print(f"simulating {number}")
    print("this goes to stderr", file=sys.stderr)
    logging.getLogger("lab").info("step %d of 3", number)
    return number


def unstable(number):
    print(f"trying {number}")
    raise OSError("the instrument is busy")


def test_the_output_of_each_task_is_kept_with_it(burst):
    run = burst.compute(*(dask.delayed(simulate)(n, dask_key_name=f"simulate-{n}") for n in range(6)))
    run.wait(timeout=60)

    log = run.logs("simulate-2")
    assert str(log) == "simulating 2\nthis goes to stderr\nlab: step 2 of 3\n"
    assert [(record.stream, record.text) for record in log.records] == [
        ("stdout", "simulating 2\n"),
        ("stderr", "this goes to stderr\n"),
        ("INFO", "lab: step 2 of 3\n"),
    ]


def test_of_each_try_of_a_task_that_fails(burst):
    run = burst.compute(dask.delayed(unstable)(7, dask_key_name="unstable"), retries=2)
    run.wait(timeout=60)
    assert run.logs("unstable").text == "trying 7\n" * 3
    assert [record.attempt for record in run.logs("unstable").records] == [1, 2, 3]


def test_logs_survive_the_workers_and_the_client(burst):
    """All workers are killed; another process, or person, reads what the tasks had printed."""
    run = burst.compute(*(dask.delayed(simulate)(n, dask_key_name=f"late-{n}") for n in range(4)))
    run.wait(timeout=60)
    workers = {worker for n in range(4) for worker in run.logs(f"late-{n}").workers}
    for process in burst._link.fleet.processes():
        os.kill(process.pid, signal.SIGKILL)

    later = attach(run.id, store=burst.store)
    assert later.logs("late-3").text.startswith("simulating 3\n")

    # All that one worker has printed, in whatever run.
    for worker in workers:
        mine = [log for log in burst.logs(worker=worker) if log.run == run.id]
        assert mine and all(log.workers == (worker,) for log in mine)


def test_at_the_command_line_while_the_run_goes_on(tmp_path, marks, external):
    # Two threads: with one, the task that waits for the gate might be the first to run.
    burst = Session(tmp_path / "store", workers=1, threads=2, progress=False, **QUICK)
    try:
        run = burst.compute([dask.delayed(report)(marks, "first"), dask.delayed(report)(marks, "last", gate="gate")])
        command = [sys.executable, "-m", "burst_dask.cli", "logs", run.id, "--follow", "--store", burst.store]
        shown = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        external.append(shown)
        assert shown.stdout.readline().endswith("| this is first\n")
        marks.open("gate")  # only now can the last one end, and with it the run
        assert shown.stdout.readline().endswith("| this is last\n")
        assert shown.wait(timeout=60) == 0
    finally:
        burst.cleanup(force=True)


def report(marks, word, gate=None):
    if gate is not None:
        marks.wait_for(gate)
    print("this is", word)
