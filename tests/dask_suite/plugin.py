"""A pytest plugin: every scheduler that Dask's tests name is one session of burst_dask.

Loaded by ``pytest -p plugin`` in a process of its own, before any of Dask's test modules is
imported. Writes what became of each test as JSON to the path in ``BURST_SUITE_REPORT``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import dask
import dask.local
import dask.multiprocessing
import dask.threaded
import pytest
from dask.base import named_schedulers

from burst_dask import Session

outcomes: dict[str, str] = {}
sessions: list[Session] = []


def get(dsk, keys, **kwargs):
    """Stand in for Dask's own schedulers."""
    return sessions[0].get(dsk, keys, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    # Workers are processes: what a task changes in its own process is not seen here, as in real use.
    sessions.append(Session(os.environ["BURST_SUITE_STORE"], workers=2, progress=False, wait_poll_min=0.005))
    for name in named_schedulers:
        named_schedulers[name] = get
    for module in (dask.threaded, dask.multiprocessing):
        module.get = get
    dask.local.get_sync = get
    dask.config.set({"scheduler": get, "dataframe.shuffle.method": "tasks"})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        outcomes[report.nodeid] = "failed"
    elif report.when == "call":
        outcomes.setdefault(report.nodeid, report.outcome)


def pytest_unconfigure(config: pytest.Config) -> None:
    for session in sessions:
        session.cleanup(force=True)
    Path(os.environ["BURST_SUITE_REPORT"]).write_text(json.dumps(outcomes))
