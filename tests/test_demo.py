"""The demo's pipeline, and the whole demo with real processes."""

import os
import signal
import subprocess
import sys

import pandas as pd
import pytest

from burst_dask import demo


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "POINTS", 3)
    monkeypatch.setattr(demo, "PARTITIONS", 8)


def test_dask_and_pandas_give_the_same_answer(quick):
    answer = demo.with_dask().compute(scheduler="sync")
    assert demo.same(answer, demo.with_pandas())
    assert answer["flight"].sum() == 336_776


def test_the_sun_stands_where_it_should():
    """At noon in June all is light; at midnight in December over New York all is dark."""
    flights = pd.DataFrame(
        {
            "time_hour": ["2013-06-21T17:00:00Z", "2013-12-21T05:00:00Z", "2013-12-21T05:00:00Z"],
            "minute": [0, 0, 0],
            "dep_delay": [0.0, 0.0, float("nan")],
            "air_time": [60.0, 60.0, 60.0],
            "year": 2013,
            "built": 2000.0,
            **{"origin_lat": 40.6, "origin_lon": -73.8, "dest_lat": 42.4, "dest_lon": -71.0},
        }
    )
    shares = demo.add_daylight(flights)["daylight"]
    assert list(shares[:2]) == [1.0, 0.0] and pd.isna(shares[2])


def test_a_wrong_answer_is_noticed(capsys):
    right = pd.DataFrame({"carrier": ["AA", "UA"], "daylight": [0.5, 0.6]})
    assert demo.same(right[::-1], right)
    assert not demo.same(right.assign(daylight=[0.5, 0.61]), right)
    assert "The answers differ." in capsys.readouterr().out


def start(directory):
    """Start the demo as a shell would, in a process group of its own, with its fleet's records in `directory`."""
    command = [sys.executable, "-m", "burst_dask.cli", "demo"]
    environment = os.environ | {"XDG_DATA_HOME": str(directory), "COLUMNS": "200"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, process_group=0)


def test_the_whole_demo(tmp_path):
    with start(tmp_path) as process:
        said = process.stdout.read()
    assert process.returncode == 0
    assert "SIGKILL sent to worker" in said and "The answers are the same." in said
    assert list(tmp_path.glob("burst_dask/fleet/*")) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_demo_cleans_up(tmp_path, number):
    with start(tmp_path) as process:
        while "SIGKILL" not in process.stdout.readline():
            assert process.poll() is None
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == 130 and said.endswith("Interrupted.\n") and "Detached" not in said
    assert list(tmp_path.glob("burst_dask/fleet/*")) == []
