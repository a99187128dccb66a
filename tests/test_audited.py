"""What `.ci/run` says of known holes: a hole fails it, and that nobody could look does not."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

verdict = runpy.run_path(str(Path(__file__).parents[1] / ".ci" / "audited.py"))["verdict"]
CLEAN = {"name": "dask", "version": "1", "vulns": []}
HOLE = {"name": "x", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
SKIPPED = {"name": "y", "skip_reason": "not found on PyPI"}


@pytest.mark.parametrize(
    ("found", "line", "fails"),
    [
        ([CLEAN], "no known hole in 1 packages", False),
        ([CLEAN, HOLE, SKIPPED], "1 known holes: x 2: CVE-1 (fixed in 3)", True),
        ([CLEAN, SKIPPED], "NOT AUDITED: 1 of 2, of which PyPI's advisories cannot be reached here", False),
    ],
)
def test_verdicts(found, line, fails):
    assert verdict(json.dumps({"dependencies": found}), "") == (line, fails)


def test_no_report():
    assert verdict("", "warning\nConnectionError: no route\n") == ("NOT AUDITED: ConnectionError: no route", False)
    assert verdict("", "") == ("NOT AUDITED: it said nothing", False)
