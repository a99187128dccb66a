"""The whole way on a real account: stack, image, doctor, tasks, removal. Only with `--aws`; it costs money."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import dask
import pytest

from burst_dask import Session

STACK = "burst-dask-test"
WORKERS, CPU, MEMORY = 2, 0.25, "1GB"
#: Everything ends after so long, whatever becomes of this process.
SECONDS = 1800
#: USD at list prices, rounded up: a processor and a GiB of Fargate an hour, a minute of CodeBuild; the rest.
CPU_HOUR, GIB_HOUR, BUILD_MINUTE, REQUESTS = 0.06, 0.007, 0.01, 0.05


def worst_case() -> float:
    """Return what the test costs at most."""
    workers = WORKERS * SECONDS / 3600 * (CPU * CPU_HOUR + 1 * GIB_HOUR)
    return workers + 30 * BUILD_MINUTE + REQUESTS


def burst(*arguments: str) -> str:
    command = [sys.executable, "-m", "burst_dask.cli", *arguments, "--stack", STACK]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_limit_is_above_what_it_costs():
    assert worst_case() < 0.5


def test_a_real_account(request, monkeypatch):
    if not request.config.getoption("--aws"):
        pytest.skip("needs an AWS account: --aws")
    if os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ACCESS_KEY_ID") == "testing":
        pytest.fail("the environment is that of the test servers: run this file alone")
    limit = request.config.getoption("--aws-limit")
    if worst_case() > limit:
        pytest.fail(f"this may cost {worst_case():.2f} USD, and --aws-limit is {limit:.2f}")
    try:
        stack = json.loads(burst("setup", "aws", "--yes", "--data-days", "1", "--json"))["stack"]
        burst("image", "push", "--codebuild", "--arch", "x86_64")
        burst("doctor", "aws", "--arch", "x86_64", "--workers", str(WORKERS), "--cpu", str(CPU))
        assert json.loads(burst("setup", "aws", "--yes", "--heal-every", "15", "--json"))["stack"]["schedule"]
        assert not json.loads(burst("setup", "aws", "--yes", "--json"))["changed"]
        url = f"s3://{stack['bucket']}/{stack['prefix']}?region={stack['region']}"
        monkeypatch.setenv("BURST_STACK", STACK)
        # Each has half of the workers, so that both cost what is reckoned at most.
        for isolated in (False, True):
            half = {"workers": WORKERS // 2, "absolute_timeout": SECONDS, "isolated": isolated}
            session = Session(url, cpu=CPU, memory=MEMORY, fleet="ecs", **half)
            try:
                tasks = [dask.delayed(pow)(2, number) for number in range(100)]
                assert dask.compute(*tasks, scheduler=session) == tuple(2**number for number in range(100))
            finally:
                session.cleanup(force=True)
    finally:
        burst("teardown", "aws", "--yes", "--data", "--stop-tasks")
