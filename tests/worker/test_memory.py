"""Values in memory, spilled to disk beyond a limit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from burst_dask.worker.memory import Memory


@pytest.mark.parametrize("limit", [None, 1, 10_000_000])
def test_values_come_back_wherever_they_are(limit: int | None, tmp_path: Path) -> None:
    memory = Memory(limit, str(tmp_path))
    one, two = memory.scope(), memory.scope()
    for number in range(10):
        one.put(number, np.full(10_000, number), 80_000)
        two.put(number, -number, 28)
    assert all((one[number] == number).all() for number in range(10))
    assert [two[number] for number in range(10)] == [-number for number in range(10)]
    assert set(one) == set(two) == set(range(10))
    del one[3]
    assert 3 not in one
    assert 3 in two
    one.clear()
    assert len(one) == 0
    memory.close()
    assert not list(tmp_path.iterdir()), "nothing is left on disk"


def test_what_is_beyond_the_limit_is_on_disk(tmp_path: Path) -> None:
    memory = Memory(200_000, str(tmp_path))
    scope = memory.scope()
    for number in range(5):
        scope.put(number, np.zeros(10_000), 80_000)
    spilled = list(tmp_path.rglob("*-*"))
    assert len([path for path in spilled if path.is_file()]) == 3
    memory.close()


def test_what_cannot_be_pickled_stays_in_memory(tmp_path: Path) -> None:
    memory = Memory(1, str(tmp_path))
    scope = memory.scope()
    lock = threading.Lock()
    scope.put(0, lock, 5000)
    assert scope[0] is lock
    scope.put(1, b"x" * 5000, 5000)
    assert scope[0] is lock
    assert scope[1] == b"x" * 5000
