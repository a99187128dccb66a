"""The demo's pipeline, and the whole demo with real processes."""

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
