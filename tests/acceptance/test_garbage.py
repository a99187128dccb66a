"""Intermediate results are deleted when nobody needs them any more; outputs, and inputs of what failed, stay."""

from __future__ import annotations

import os
import time

import dask
import dask.array as da
import numpy as np
import pytest
from acting import QUICK, agent_of, check, start_worker

from burst_dask import Session
from burst_dask.errors import ConfigError

#: bytes of one large intermediate result
LARGE = 1_000_000


@pytest.fixture
def sessions(tmp_path):
    """Makes sessions on one directory, and cleans them up."""
    made = []

    def make(**arguments):
        quick = {**QUICK, "discard_interval": 0.2}
        made.append(Session(tmp_path / "store", progress=False, **{**quick, **arguments}))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)


def segments(tmp_path):
    """Return the bytes of large results that are in the store."""
    return sum(path.stat().st_size for path in (tmp_path / "store").rglob("segments/**/*") if path.is_file())


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rounds(count, side=1000, chunk=100):
    """Return the sum of an array that is rechunked again and again: each time all of it is stored anew."""
    x = da.ones((side, side), chunks=(chunk, side))
    for number in range(count):
        x = (x + 1).rechunk((side, chunk) if number % 2 == 0 else (chunk, side))
    return x.sum(), side * side * (1 + count), side * side * 8


def test_the_store_does_not_grow_with_all_that_a_run_ever_stored(sessions, tmp_path):
    burst = sessions(workers=2)
    total, expected, array = rounds(6)
    run = burst.compute(total)
    assert run.result(timeout=120) == (expected,)
    wait_until(lambda: segments(tmp_path) == 0)
    status = run.status()
    assert status.freed > 4 * array and status.size < array / 10
    assert "of intermediates freed" in str(status) and "of intermediates freed" in str(burst.status())
    check(burst, run.id)


def test_a_worker_may_die_on_the_way(sessions, tmp_path, marks, external):
    """Others compute again what it had in memory: the inputs of that are kept for as long as that may be."""
    burst = sessions(fleet=None)
    first, _ = start_worker(burst, external), start_worker(burst, external)

    def mark(block):
        (marks.directory / f"block.{os.urandom(4).hex()}").touch()
        return block + 1

    x = da.ones((1000, 1000), chunks=(100, 1000))
    for number in range(6):
        x = x.map_blocks(mark, dtype=float, meta=np.empty((0, 0)))
        x = x.rechunk((1000, 100) if number % 2 == 0 else (100, 1000))
    run = burst.compute(x.sum())
    marks.wait("block", 25)
    agent_of(first).kill()
    assert run.result(timeout=120) == (7e6,)
    wait_until(lambda: segments(tmp_path) == 0)
    check(burst, run.id)


def make(number):
    return np.full(LARGE // 8, number)


def fails(block):
    raise ValueError(f"cannot take {block[0]}")


def test_the_inputs_of_a_task_that_failed_are_there_for_its_replay(sessions, tmp_path):
    burst = sessions(workers=1)
    good = dask.delayed(np.sum)(dask.delayed(make)(1, dask_key_name="input of good"), dask_key_name="good")
    bad = dask.delayed(fails)(dask.delayed(make)(7, dask_key_name="input of bad"), dask_key_name="bad")
    run = burst.compute(good, bad)
    run.wait(timeout=60)
    with pytest.raises(ValueError, match="cannot take 7"):
        run.replay("bad")
    check(burst, run.id)


def test_collections_that_stay_in_the_store_and_outputs_are_never_deleted(sessions, tmp_path):
    burst = sessions(workers=2)
    x = burst.persist(da.ones((1000, 1000), chunks=(100, 1000)) + 1)
    assert burst.compute(x.sum()).result(timeout=60) == (2e6,)
    assert burst.compute((x.rechunk((1000, 100)) + 1).sum()).result(timeout=60) == (3e6,)
    wait_until(lambda: segments(tmp_path) < 1.1 * x.nbytes)
    assert burst.compute(x.max()).result(timeout=60) == (2.0,)
    assert segments(tmp_path) >= x.nbytes


def test_intermediates_stay_if_they_are_to(sessions, tmp_path):
    burst = sessions(workers=2, keep_intermediates=True)
    total, expected, array = rounds(3)
    run = burst.compute(total)
    assert run.result(timeout=120) == (expected,)
    assert segments(tmp_path) > 2.5 * array
    assert run.status().freed == 0 and run.status().size > 2.5 * array
    assert burst.status().settings["keep_intermediates"] is True
    burst.cleanup()  # deletes them
    assert segments(tmp_path) == 0
    with pytest.raises(ConfigError):
        sessions(keep_intermediates="yes")
