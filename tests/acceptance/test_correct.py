"""The same answers as Dask's threaded scheduler, on each kind of store, by real worker processes."""

from __future__ import annotations

import operator
from pathlib import Path

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest

from burst_dask import Session, attach


@pytest.fixture(scope="module")
def burst(any_store):
    session = Session(any_store, workers=2, progress=False)
    yield session
    session.cleanup(force=True)


def array_arithmetic(_):
    x = da.arange(600, chunks=70).reshape(20, 30)
    return [(x @ x.T).sum(axis=0), x.rechunk((7, 7)).T[::2], (x - x.mean()).std(), da.linalg.svd(x.rechunk((5, 30)))[1]]


def large_chunks(_):
    x = da.ones((1000, 2000), chunks=(500, 500))
    return [x, (x + x.T[:1000, :1000].sum()).max()]


def array_of_records(_):
    x = np.arange(1000).astype([("a", "i8")])
    return [da.from_array(x, chunks=100)[::7], da.from_array(np.arange(5_000_000), chunks=1_000_000).sum()]


def bag_of_words(_):
    words = db.from_sequence(["the quick brown fox", "jumps over", "the lazy dog"] * 20, npartitions=6).str.split()
    return [
        words.flatten().frequencies(sort=True),
        words.map(len).fold(operator.add),
        words.flatten().foldby(len, lambda total, _: total + 1, 0, operator.add),
    ]


def bag_groupby(_):
    return [db.from_sequence(range(100), npartitions=5).groupby(lambda i: i % 7).map(lambda g: (g[0], sorted(g[1])))]


def delayed_tree(_):
    level = [dask.delayed(n) for n in range(64)]
    while len(level) > 1:
        level = [dask.delayed(operator.add)(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    return [{"sum": level[0], "many": [dask.delayed(str)(n) for n in range(50)]}]


def frame():
    generator = np.random.default_rng(1)
    data = {
        "a": generator.integers(0, 20, 2000),
        "b": generator.normal(size=2000),
        "c": pd.Categorical.from_codes(generator.integers(0, 3, 2000), ["x", "y", "z"]),
        "d": pd.date_range("2020", periods=2000, freq="h"),
        "e": [f"name-{n % 37}" for n in range(2000)],
    }
    return dd.from_pandas(pd.DataFrame(data), npartitions=8)


def frame_groupby(_):
    df = frame()
    return [df.groupby("a").b.mean(), df.groupby(["a", "e"]).agg({"b": ["sum", "max"]}), df.c.value_counts()]


def frame_merge(_):
    df = frame()
    other = dd.from_pandas(pd.DataFrame({"a": range(20), "w": [n**2 for n in range(20)]}), npartitions=3)
    return [df.merge(other, on="a", shuffle_method="tasks"), df.merge(df[["a"]].drop_duplicates(), on="a").b.sum()]


def frame_shuffle(_):
    return [frame().shuffle("e", shuffle_method="tasks"), frame().drop_duplicates("e")]


def frame_set_index(_):
    return [frame().set_index("b", shuffle_method="tasks"), frame().set_index("d", sorted=True).b.rolling("5h").sum()]


def frame_parquet(directory: Path):
    frame().to_parquet(directory / "in")
    return [dd.read_parquet(directory / "in")[["a", "b"]].groupby("a").b.sum(), dd.read_parquet(directory / "in").e]


PIPELINES = [array_arithmetic, large_chunks, array_of_records, bag_of_words, bag_groupby, delayed_tree, frame_groupby,
             frame_merge, frame_shuffle, frame_set_index, frame_parquet]  # fmt: skip


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.__name__)
def test_same_answer(burst, pipeline, tmp_path):
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        collections = pipeline(tmp_path)
        expected = dask.compute(*collections, scheduler="threads")
        found = dask.compute(*collections, scheduler=burst)
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


def test_parquet_out(burst, tmp_path):
    df = frame()
    with burst:
        df.to_parquet(tmp_path / "out")
    assert_same(dd.read_parquet(tmp_path / "out").compute(scheduler="sync"), df.compute(scheduler="sync"))


def test_detached_and_collected_by_somebody_else(burst):
    df = frame()
    with burst:
        run = burst.compute(df.groupby("a").b.mean(), {"sum": df.b.sum()})
    mean, rest = attach(run.id, store=burst.store).result(timeout=120)
    assert_same(mean, df.groupby("a").b.mean().compute(scheduler="sync"))
    assert rest["sum"] == pytest.approx(df.b.sum().compute(scheduler="sync"))


def assert_same(mine, theirs):
    assert type(mine) is type(theirs)
    if isinstance(mine, pd.DataFrame | pd.Series):
        check = pd.testing.assert_frame_equal if isinstance(mine, pd.DataFrame) else pd.testing.assert_series_equal
        # A shuffle says nothing of the order within a partition; floats are added in another order.
        check(in_order(mine), in_order(theirs))
    elif isinstance(mine, np.ndarray) and mine.dtype.names is None:
        np.testing.assert_allclose(mine, theirs)
    elif isinstance(mine, np.ndarray):
        assert (mine == theirs).all()
    elif isinstance(mine, list):
        assert sorted(mine, key=repr) == sorted(theirs, key=repr)
    elif isinstance(mine, float):
        assert mine == pytest.approx(theirs)
    else:
        assert mine == theirs


def in_order(frame):
    if isinstance(frame, pd.Series):
        return frame.sort_index(kind="stable") if frame.index.is_unique else frame.sort_values(kind="stable")
    columns = [name for name in frame.columns if frame[name].dtype != "category"]
    return frame.sort_values(columns, kind="stable").reset_index(drop=frame.index.name is None)
