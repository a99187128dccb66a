"""How well many workers share few long tasks: each that is idle finds who has some to spare."""

from __future__ import annotations

import pytest

from burst_dask.config import Settings
from burst_dask.protocol.session_records import Scale
from burst_dask.testing.fleet import Recovery
from burst_dask.worker import finder


def takes() -> float:
    """Return the seconds in which a hundred workers do 600 tasks of 20 s: 120 s of work, and up to 65 s to boot."""
    world = Recovery(0, [20.0] * 600, Scale(100), Settings.of(), {})
    world.run(patience=1000.0)
    assert world.done is not None
    return world.done


def test_a_hundred_workers_are_hardly_ever_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    assert takes() < 205
    monkeypatch.setattr(finder, "READ_AT_ONCE", 4)
    assert takes() > 205, "most of what they read has nothing to spare"
