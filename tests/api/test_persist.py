"""Collections whose data stays in the store."""

import operator
import pickle

import dask
import dask.array as da
import dask.bag as db
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pytest
from acting import plans

from burst_dask import Session
from burst_dask.errors import ConfigError, RunCancelled, UnknownId
from burst_dask.graph import Stored


def nodes(collection):
    return list(dict(collection.__dask_graph__()).values())


def test_array(burst):
    x = da.arange(100, chunks=10) ** 2
    kept = burst.persist(x)
    assert type(kept) is da.Array and kept.chunks == x.chunks and kept.dtype == x.dtype
    assert all(type(node) is Stored for node in nodes(kept))
    expected = x.compute(scheduler="sync")
    for build in (lambda a: a.sum(), lambda a: a[::7] + 1, lambda a: a.reshape(10, 10).T @ a[:10], lambda a: a):
        np.testing.assert_array_equal(build(kept).compute(scheduler=burst), build(expected))


def test_bag_item_and_delayed(burst):
    bag = burst.persist(db.from_sequence(range(20), npartitions=4).map(operator.neg))
    assert bag.sum().compute(scheduler=burst) == -190
    assert bag.filter(lambda n: n % 2).map(abs).compute(scheduler=burst) == list(range(1, 20, 2))
    item = burst.persist(bag.max())
    assert item.compute(scheduler=burst) == 0
    value = burst.persist(dask.delayed(sum)([1, 2]))
    assert value.compute(scheduler=burst) == 3 and (value + 1).compute(scheduler=burst) == 4


def test_frame(burst):
    frame = pd.DataFrame({"a": range(40), "b": [n % 3 for n in range(40)]})
    df = dd.from_pandas(frame, npartitions=4)
    kept = burst.persist(df[df.a > 5])
    assert type(kept) is type(df) and kept.npartitions == 4 and list(kept.columns) == ["a", "b"]
    expected = frame[frame.a > 5]
    assert kept.a.sum().compute(scheduler=burst) == expected.a.sum()
    pd.testing.assert_series_equal(kept.groupby("b").a.mean().compute(scheduler=burst), expected.groupby("b").a.mean())
    pd.testing.assert_frame_equal(kept.compute(scheduler=burst), expected)
    assert kept.a.max().compute(scheduler="sync") == 39


def test_several_at_once_and_through_dask(burst):
    x = da.arange(6, chunks=3)
    one, two = burst.persist([x, x + 1])
    assert (one + two).sum().compute(scheduler=burst) == 36
    assert len(plans(burst)) == 2
    three, rest = dask.persist(x, {"y": [x * 2]}, scheduler=burst)
    assert (three + rest["y"][0]).sum().compute(scheduler=burst) == 45
    with burst:
        assert x.persist().sum().compute() == 15
        assert dask.compute(x.persist().max(), one.min()) == (5, 0)
    assert burst.persist([]) == []


@pytest.mark.filterwarnings("ignore:Computing mixed collections")
def test_collections_of_different_kinds_at_once(burst):
    frame = pd.DataFrame({"a": range(40)})
    df = dd.from_pandas(frame, npartitions=4)
    given = [
        da.arange(6, chunks=3) + 1,
        df[df.a > 5],
        df.a.max(),
        db.from_sequence(range(9)),
        dask.delayed(sum)([1, 2]),
    ]
    kept = burst.persist(given)
    assert [type(one) for one in kept] == [type(one) for one in given]
    array, some, most, bag, value = kept
    answer = burst.compute(array.sum(), some.a.sum(), most + 1, bag.sum(), value + 1).result(timeout=60)
    assert answer == (21, frame[frame.a > 5].a.sum(), 40, 36, 4)
    assert len(plans(burst)) == 2


class Pair:
    """A collection that Dask sees as several expressions, as that of another library may be."""

    def __init__(self, *parts):
        self.parts = parts

    def __dask_exprs__(self):
        return [part.expr for part in self.parts]

    def __dask_graph__(self):
        return {**dict(self.parts[0].__dask_graph__()), **dict(self.parts[1].__dask_graph__())}

    def __dask_keys__(self):
        return [part.__dask_keys__() for part in self.parts]

    def __dask_postcompute__(self):
        return (lambda parts: parts), ()

    def __dask_postpersist__(self):
        return (lambda parts: Pair(*parts)), ()

    def __dask_rebuild_from_exprs__(self, exprs):
        return Pair(*map(dask._collections.new_collection, exprs))


@pytest.mark.skipif(not hasattr(dask._expr, "CompositeExpr"), reason="this Dask has no such collections")
def test_a_collection_of_several_expressions(burst):
    df = dd.from_pandas(pd.DataFrame({"a": range(8)}), npartitions=2)
    pair = burst.persist([Pair(df.a, df.a + 1), df])[0]
    assert isinstance(pair, Pair)
    left, right = pair.parts
    assert burst.compute(left.sum(), right.sum()).result(timeout=60) == (28, 36)


def test_persisted_collections_build_on_each_other(burst):
    x = burst.persist(da.arange(20, chunks=5))
    for _ in range(4):
        x = burst.persist(x + 1)
    assert x.sum().compute(scheduler=burst) == 190 + 80
    assert [len(plan.externals) for plan in plans(burst)] == [0, 4, 4, 4, 4, 4]


def test_it_returns_at_once_and_later_runs_wait(alone):
    x = alone.persist(da.arange(20, chunks=5))
    run = alone.compute(x.sum())
    assert not run.done()
    alone.scale(1)
    assert run.result(timeout=60) == (190,)


def test_the_data_never_passes_through_this_process(burst):
    x = burst.persist(da.ones(4_000_000, chunks=1_000_000))
    before = burst._link.store
    total = burst.compute((x + 1).sum()).result(timeout=60)
    assert total == (8_000_000.0,)
    *_, plan = plans(burst)
    assert len(plan.externals) == 4 and plan.size < 10_000
    assert before is burst._link.store


def test_a_failure_is_told_by_what_depends_on_it(burst):
    bad = burst.persist(dask.delayed(operator.truediv)(1, 0, dask_key_name="bad"))
    with pytest.raises(ZeroDivisionError) as caught:
        dask.delayed(str)(bad).compute(scheduler=burst)
    assert "task 'bad', which it depends on, failed" in caught.value.__notes__[0]
    with pytest.raises(ZeroDivisionError):
        bad.compute(scheduler="sync")


def test_other_schedulers_and_sessions_read_the_store(burst, tmp_path):
    x = burst.persist(da.arange(20, chunks=5))
    x.sum().compute(scheduler=burst)
    assert x.sum().compute(scheduler="sync") == 190
    again = pickle.loads(pickle.dumps(x))
    assert again.max().compute(scheduler="threads") == 19
    other = Session(f"memory://{tmp_path.name}", workers=1, progress=False)
    try:
        assert (x + 1).sum().compute(scheduler=other) == 210
        assert not plans(other)[0].externals
    finally:
        other.cleanup(force=True)


def test_what_is_not_there_yet_or_no_more(alone):
    x = alone.persist(dask.delayed(abs)(-1))
    with pytest.raises(RunCancelled, match="has no outcome yet"):
        x.compute(scheduler="sync")
    alone.cleanup(force=True)
    with pytest.raises(UnknownId, match="holds no such run any more"):
        x.compute(scheduler="sync")


def test_bad_arguments(alone):
    for argument in (3, [1], [da.ones(3), 1]):
        with pytest.raises(ConfigError, match="persist takes a Dask collection"):
            alone.persist(argument)
    with pytest.raises(ConfigError, match="bogus"):
        alone.persist(da.ones(3), bogus=1)


def test_futures_in_what_is_persisted(burst):
    future = burst.submit(np.arange, 6)
    x = burst.persist(da.from_delayed(dask.delayed(future), (6,), dtype=int) + 1)
    assert x.sum().compute(scheduler=burst) == 21
    assert burst.submit(sum, [future, future]).result(60).tolist() == [0, 2, 4, 6, 8, 10]
