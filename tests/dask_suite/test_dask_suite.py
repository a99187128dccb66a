"""Dask's own tests for delayed, bag, threaded graphs and `dask.base` pass with a session as the scheduler.

Those that cannot are listed with the reason in ``expected_failures.toml``. A test that fails and
is not listed is an error, and so is a listed one that passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import dask
import pytest

HERE = Path(__file__).parent
#: where the package and its tests are installed
ROOT = Path(dask.__file__).parents[1]
MODULES = ("dask/tests/test_delayed.py", "dask/bag/tests/test_bag.py", "dask/tests/test_threaded.py",
           "dask/tests/test_base.py")  # fmt: skip


@pytest.mark.timeout(600)
def test_dasks_own_tests_pass(tmp_path: Path) -> None:
    expected = tomllib.loads((HERE / "expected_failures.toml").read_text())
    report = tmp_path / "report.json"
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_default_fixture_loop_scope = function\n")
    environment = {
        "BURST_SUITE_STORE": str(tmp_path / "store"),
        "BURST_SUITE_REPORT": str(report),
        "XDG_DATA_HOME": str(tmp_path / "data"),
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    options = ["-q", "--tb=short", "-p", "plugin", "-p", "no:cacheprovider", "--timeout=60"]
    command = [sys.executable, "-m", "pytest", *options, "-c", str(tmp_path / "pytest.ini"), f"--rootdir={ROOT}"]
    done = subprocess.run(
        [*command, *(str(ROOT / module) for module in MODULES)],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.exists(), done.stdout[-3000:] + done.stderr[-3000:]
    outcomes: dict[str, str] = json.loads(report.read_text())
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    unexpected = sorted(failed - expected.keys())
    assert not unexpected, f"these failed and are not listed: {unexpected}\n{done.stdout[-20000:]}"
    passed = sorted(name for name in expected if outcomes.get(name) == "passed")
    assert not passed, f"these are listed and passed: {passed}"
    assert sum(outcome == "passed" for outcome in outcomes.values()) > 8 * len(expected)
