"""Tasks that fail are tried again, those that hang are given up, and lost workers have a budget of their own."""

from __future__ import annotations

import os
import signal
import time

import dask
import pytest
from acting import QUICK, check, start_worker

from burst_dask import Session
from burst_dask.errors import ConfigError, TaskTimeout


@pytest.fixture
def sessions(tmp_path):
    """Makes sessions on one directory, and cleans them up."""
    made = []

    def make(**arguments):
        made.append(Session(tmp_path / "store", progress=False, **{**QUICK, "retry_delay": 0.05, **arguments}))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)


def flaky(marks, name, works_at, error=ConnectionError):
    """Fail until try number `works_at`."""
    (marks.directory / f"{name}.{os.urandom(4).hex()}").touch()
    if marks.count(name) < works_at:
        raise error("not now")
    return name


def hang(marks, name):
    (marks.directory / f"{name}.{os.urandom(4).hex()}").touch()
    while True:
        time.sleep(0.01)


def test_a_task_is_tried_again_after_a_pause_that_doubles(sessions, marks):
    burst = sessions(workers=1, retry_delay=0.05)
    assert dask.delayed(flaky)(marks, "third", 3).compute(scheduler=burst, retries=2) == "third"
    with pytest.raises(ConnectionError):
        dask.delayed(flaky)(marks, "fourth", 4).compute(scheduler=burst, retries=2)
    assert marks.count("fourth") == 3


def test_only_after_the_exceptions_that_it_names(sessions, marks):
    burst = sessions(workers=1)
    with dask.annotate(retries=5, retry_on=(ConnectionError, "botocore.exceptions.ClientError")):
        transient = dask.delayed(flaky)(marks, "transient", 2)
        hopeless = dask.delayed(flaky)(marks, "hopeless", 2, error=ValueError)
    assert burst.compute(transient).result(timeout=60) == ("transient",)
    with pytest.raises(ValueError, match="not now"):
        burst.compute(hopeless).result(timeout=60)
    assert marks.count("hopeless") == 1
    with pytest.raises(ConfigError, match="retry_on=3"):
        burst.compute(transient, retry_on=3)


def test_calls_have_retries_of_their_own(sessions, marks):
    """As annotations have: after which exceptions, and how soon; the session's pause would take an hour."""
    burst = sessions(workers=1, retry_delay=3600.0)
    often = {"retries": 5, "retry_on": ConnectionError, "retry_delay": 0.01}
    (transient,) = burst.map(flaky, [marks], ["transient"], [3], **often)
    hopeless = burst.submit(flaky, marks, "hopeless", 2, ValueError, **often)
    assert transient.result(timeout=60) == "transient"
    assert isinstance(hopeless.exception(timeout=60), ValueError) and marks.count("hopeless") == 1


def test_a_task_that_hangs_is_given_up_and_the_work_goes_on(sessions, marks):
    """Its thread cannot be killed, so its worker, which has no other, hands over and is replaced."""
    burst = sessions(workers=1)
    with dask.annotate(timeout=0.3):
        stuck = dask.delayed(hang)(marks, "stuck")
    run = burst.compute(stuck, *(dask.delayed(abs)(-n) for n in range(5)))
    run.wait(timeout=60)
    with pytest.raises(TaskTimeout, match=r"ran for longer than its time limit of 0\.3 s") as caught:
        run.result()
    assert "in hang" in caught.value.__notes__[0]  # where it was
    assert run.status().completed == 5
    check(burst, run.id)


def test_each_try_has_its_time_and_the_tries_are_counted_across_workers(sessions, marks):
    burst = sessions(workers=2)
    run = burst.compute(dask.delayed(hang)(marks, "stuck"), retries=2, task_timeout=0.3)
    with pytest.raises(TaskTimeout, match="was given up in try 3"):
        run.result(timeout=120)
    assert marks.count("stuck") == 3
    check(burst, run.id)


def test_a_lost_worker_uses_up_no_retry(sessions, marks, external):
    burst = sessions(fleet=None)
    run = burst.compute(dask.delayed(dies_then_fails_then_works)(marks, dask_key_name="hard"), retries=1)
    for _ in range(2):
        start_worker(burst, external)
    assert run.result(timeout=120) == ("done",)
    assert marks.count("started") == 3
    assert run.logs("hard").text == "start 2\nstart 3\n"
    assert "workers died while this task was theirs to run" in run.logs("hard").note  # where start 1 is not


def dies_then_fails_then_works(marks):
    (marks.directory / f"started.{os.urandom(4).hex()}").touch()
    turn = marks.count("started")
    print("start", turn)
    if turn == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if turn == 2:
        raise ConnectionError("not now")
    return "done"
