"""What Dask hands a scheduler comes back, out of the records alone, as Dask would have computed it."""

from __future__ import annotations

import operator
import pickle
import threading
from collections.abc import Callable
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef, fuse_linear_task_spec
from dask.highlevelgraph import HighLevelGraph
from dask.tokenize import tokenize
from packed import RUN, compute, execute, inc, read, shard, store

from burst_dask.errors import ConfigError, GraphError, UnpicklableTask, UnsupportedGraph
from burst_dask.graph import (
    MissingKey,
    Outside,
    ShardedGraph,
    Stored,
    materialize,
    unpack_outputs,
    without,
)
from burst_dask.protocol.keys import RunId, SessionId
from burst_dask.protocol.records import Plan, ShardRecord, decode
from burst_dask.worker.execution import open_table

# ---------------------------------------------------------------------------- what Dask hands over


@pytest.mark.parametrize(
    ("graph", "keys"),
    [
        ({"a": 1, "b": (inc, "a"), "c": (sum, ["a", "b"])}, "c"),
        ({"a": 1, "b": (inc, (inc, "a"))}, ["b"]),
        ({("x", 0): 1, ("x", 1): (inc, ("x", 0)), "y": ("x", 1)}, [["y"], [("x", 0), [("x", 1)]]]),
        (
            {1: 10, 2.5: (inc, 1), b"k": Task(b"k", inc, TaskRef(2.5)), ("n", ("m", 1)): (inc, 2.5)},
            [("n", ("m", 1)), b"k"],
        ),
        ({True: 5, "b": (inc, 1)}, ["b", 1]),
        ({"a": Task("a", inc, 1), "b": Alias("b", "a"), "c": DataNode("c", "text")}, ["b", "c", "b"]),
        ({"a": 1, "b": Task("b", sum, List(TaskRef("a"), 2)), "c": ("tuple", "of", "data")}, ["b", "c"]),
        ({"a": None, "b": [1, "a", (inc, 2)]}, ["a", "b"]),
    ],
)
def test_a_dict_gives_what_dask_get_gives(graph: dict[Any, Any], keys: Any) -> None:
    assert execute(graph, keys) == dask.local.get_sync(graph, keys)


def test_arrays() -> None:
    da = pytest.importorskip("dask.array")
    x = da.from_array(np.arange(400.0).reshape(20, 20), chunks=(4, 5))
    for parallelism in (1, 3, 16):
        np.testing.assert_allclose(
            compute((x @ x.T - x.mean(axis=0)).std(), parallelism),
            (x @ x.T - x.mean(axis=0)).std().compute(scheduler="sync"),
        )


def test_bags() -> None:
    import dask.bag as db

    bag = db.range(100, npartitions=20).map(inc).filter(lambda x: x % 3)
    assert compute(bag.sum()) == bag.sum().compute(scheduler="sync")
    assert compute(bag) == bag.compute(scheduler="sync")


def test_delayed() -> None:
    lazy = [dask.delayed(inc)(i) for i in range(10)]
    assert compute({"total": dask.delayed(sum)(lazy), "parts": lazy}) == {"total": 55, "parts": list(range(1, 11))}


def test_dataframes() -> None:
    dd = pytest.importorskip("dask.dataframe")
    frame = pd.DataFrame({"key": [i % 7 for i in range(100)], "text": [str(i % 5) for i in range(100)]})
    lazy = dd.from_pandas(frame, npartitions=10)
    pd.testing.assert_frame_equal(compute(lazy), lazy.compute(scheduler="sync"))
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        shuffled = compute(lazy.shuffle("key").groupby("key").text.count())
        pd.testing.assert_series_equal(shuffled.sort_index(), frame.groupby("key").text.count())
        merged = compute(lazy.merge(lazy.drop_duplicates("key"), on="key"))
    assert len(merged) == 100


def test_a_high_level_graph() -> None:
    graph = HighLevelGraph({"a": {"x": 1}, "b": {"y": (inc, "x")}}, {"a": set(), "b": {"a"}})
    assert execute(graph, ["y"]) == (2,)


def test_what_nobody_asked_for_is_culled() -> None:
    dsk, _ = materialize({"a": 1, "b": (inc, "a"), "c": (inc, "b"), "d": (inc, "missing")}, ["b"])
    assert set(dsk) == {"a", "b"}


def test_an_empty_request() -> None:
    plan, packs = store(shard({"a": 1}, []))
    assert (plan.tasks, plan.shards, packs) == (0, (), [])
    assert unpack_outputs(plan.outputs, {}.__getitem__) == ()


# ---------------------------------------------------------------------------- what is refused


def test_a_key_that_is_not_there() -> None:
    with pytest.raises(MissingKey, match="'z' was asked for") as caught:
        materialize({"a": 1}, ["a", "z"])
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, GraphError)


def test_a_dependency_that_is_not_there() -> None:
    with pytest.raises(MissingKey, match="task 'b' depends on 'a', which is not in the graph"):
        materialize({"b": Task("b", inc, TaskRef("a"))}, "b")


def test_a_cycle_is_named() -> None:
    with pytest.raises(GraphError, match=r"'(a|b|c)' -> '(a|b|c)' -> '(a|b|c)' -> '(a|b|c)'"):
        shard({"a": (inc, "c"), "b": (inc, "a"), "c": (inc, "b"), "d": (inc, "c")}, "d")


def test_a_future_of_another_scheduler() -> None:
    class Future(TaskRef):
        pass

    with pytest.raises(UnsupportedGraph, match="Future of another scheduler"):
        materialize({"b": (sum, [Future("elsewhere")])}, "b")


def test_something_else() -> None:
    with pytest.raises(GraphError, match="a list is no graph"):
        materialize([1], "a")


def _disk_frame() -> Any:
    dd = pytest.importorskip("dask.dataframe")
    return dd.from_pandas(pd.DataFrame({"a": range(20)}), npartitions=4).shuffle("a")


def _disk_bag() -> Any:
    import dask.bag as db

    return db.range(20, npartitions=4).groupby(lambda x: x % 3).map(lambda pair: (pair[0], sorted(pair[1])))


@pytest.mark.parametrize("build", [_disk_frame, _disk_bag])
def test_a_shuffle_through_a_local_disk_is_refused_with_the_line_that_fixes_it(build: Callable[[], Any]) -> None:
    with (
        dask.config.set({"dataframe.shuffle.method": None}),
        pytest.raises(UnsupportedGraph, match=r'dask.config.set\(\{"dataframe.shuffle.method": "tasks"\}\)'),
    ):
        compute(build())
    with dask.config.set({"dataframe.shuffle.method": "tasks"}):
        assert len(compute(build())) == len(build().compute(scheduler="sync"))


def _p2p_array() -> Any:
    da = pytest.importorskip("dask.array")
    return da.ones((20, 20), chunks=(5, 20)).rechunk((20, 5))


@pytest.mark.parametrize(
    ("build", "option"), [(_disk_frame, "dataframe.shuffle.method"), (_p2p_array, "array.rechunk.method")]
)
def test_a_shuffle_between_workers_of_distributed_is_refused(build: Callable[[], Any], option: str) -> None:
    pytest.importorskip("distributed")
    with (
        dask.config.set({option: "p2p"}),
        pytest.raises(UnsupportedGraph, match=f"between workers of dask.distributed.*{option}.: .tasks"),
    ):
        compute(build())


def test_an_unpicklable_object_is_named_with_the_key() -> None:
    lock = threading.Lock()

    def hold(x: int) -> int:
        with lock:
            return x

    cases: list[tuple[Any, str]] = [
        ((operator.getitem, {"a": [1, lock]}, "a"), r"item 1 of item 'a' of argument 1 is a _thread.lock"),
        ((hold, 1), r"variable lock of function hold of the function is a _thread.lock"),
        (DataNode(("x", 3), lock), r"the value is a _thread.lock"),
        (Task(("x", 3), inc, x=(i for i in range(3))), r"argument x is a builtins.generator"),
    ]
    for task, text in cases:
        graph = shard({("x", 2): 1, ("x", 3): task}, [("x", 2), ("x", 3)], parallelism=1)
        with pytest.raises(UnpicklableTask, match=rf"task \('x', 3\): {text}"):
            list(graph.packs())
        with pytest.raises(RuntimeError):
            graph.plan(created=0.0)


# ---------------------------------------------------------------------------- annotations


def notes(plan: Plan, packs: list[bytes]) -> dict[Any, dict[str, Any]]:
    result = {}
    for record, buffers in read(plan, packs):
        names = open_table(record, buffers).keys
        result.update({names[position]: note for position, note in record.annotations.items()})
    return result


def test_annotations_of_layers_and_of_the_moment() -> None:
    with dask.annotate(retries=3, resources={"GPU": 1}):
        first = dask.delayed(inc)(1, dask_key_name="first")
    with dask.annotate(priority=len):
        second = dask.delayed(inc)(first, dask_key_name="second")
    found: dict[Any, dict[str, Any]] = {}

    def get(graph: Any, keys: Any, **_: Any) -> Any:
        found.update(notes(*store(shard(graph, keys))))
        return execute(graph, keys)

    with dask.annotate(retries=1, color="red"):
        assert dask.compute(second, scheduler=get, optimize_graph=False) == (3,)
    assert found == {
        "first": {"retries": 3, "resources": {"GPU": 1.0}},
        "second": {"retries": 1, "priority": 6},
    }


def test_time_limits_and_exceptions_to_retry_on() -> None:
    graph = HighLevelGraph.from_collections("a", {"x": (inc, 1)}, [])
    graph.layers["a"].annotations = {"timeout": 5, "retry_on": OSError}
    assert notes(*store(shard(graph, ["x"]))) == {"x": {"timeout": 5.0, "retry_on": ["builtins.OSError"]}}
    with dask.annotate(retry_on=[ConnectionError, "mylib.Busy"]):  # names, so that workers need not import it
        found = notes(*store(shard({"x": (inc, 1)}, ["x"])))
    assert found == {"x": {"retry_on": ["builtins.ConnectionError", "mylib.Busy"]}}
    with dask.annotate(retry_on=ConnectionError):
        assert notes(*store(shard({"x": (inc, 1)}, ["x"]))) == {"x": {"retry_on": ["builtins.ConnectionError"]}}


@pytest.mark.parametrize(
    "bad", [{"timeout": 0}, {"timeout": "5"}, {"timeout": True}, {"retry_on": 3}, {"retry_on": int}]
)
def test_annotations_that_cannot_be_heeded_are_refused(bad: dict[str, Any]) -> None:
    with dask.annotate(**bad), pytest.raises(ConfigError, match=f"{next(iter(bad))}="):
        shard({"x": (inc, 1)}, ["x"])


def test_annotations_of_a_high_level_graph() -> None:
    graph = HighLevelGraph.from_collections("a", {"x": (inc, 1)}, [])
    graph.layers["a"].annotations = {"retries": lambda key: 7}
    assert notes(*store(shard(graph, ["x"]))) == {"x": {"retries": 7}}


# ---------------------------------------------------------------------------- results of other runs


OTHER = RunId("session.other")


def test_results_of_other_runs_get_the_numbers_behind_the_tasks() -> None:
    outside = Outside(SessionId("session"), {"f": (OTHER, 7)})
    graph = {
        "s": Stored("s", OTHER, 3, "memory://x"),
        "unused": Stored("unused", OTHER, 4, "memory://x"),
        "a": Task("a", inc, TaskRef("s")),
        "b": Task("b", operator.add, TaskRef("a"), TaskRef("f")),
        "c": Task("c", inc, 1),
    }
    dsk, annotations = materialize(graph, ["b", "c"], outside)
    assert set(dsk) == {"a", "b", "c"} and outside.found == {"s": (OTHER, 3), "f": (OTHER, 7)}
    sharded = ShardedGraph.of(dsk, ["b", "c"], annotations, run=RUN, parallelism=1, externals=outside.found)
    plan, packs = store(sharded)
    assert sorted(plan.externals) == [(OTHER, 3), (OTHER, 7)]
    place = {where: plan.tasks + i for i, where in enumerate(plan.externals)}
    ((record, _),) = read(plan, packs)
    table = open_table(record, [])
    needs = dict(zip(table.keys, table.dependencies, strict=True))
    assert needs["a"] == (place[OTHER, 3],) and place[OTHER, 7] in needs["b"] and needs["c"] == ()
    assert {table.name(number) for number in needs["b"]} == {"a", "f"}
    (info,) = plan.shards
    assert info.externals == (0, 1) and info.upstream == () and info.free == 1
    assert pickle.loads(plan.names) == ["b", "c"]


def test_a_result_of_another_run_that_is_asked_for_is_copied_by_a_task() -> None:
    outside = Outside(SessionId("session"), {"f": (OTHER, 7)})
    dsk, _ = materialize({"s": Stored("s", OTHER, 3, "memory://x"), "t": (inc, "s")}, ["s", "t", "f"], outside)
    assert {key: set(node.dependencies) for key, node in dsk.items()} == {
        "s": {("stored", OTHER, 3)},
        "t": {"s"},
        "f": {("stored", OTHER, 7)},
    }
    assert outside.found == {("stored", OTHER, 3): (OTHER, 3), ("stored", OTHER, 7): (OTHER, 7)}


def test_a_result_of_another_session_is_read_by_a_task() -> None:
    stored = Stored("s", RunId("elsewhere.run"), 3, "memory://x")
    dsk, _ = materialize({"s": stored, "t": (inc, "s")}, "t", Outside(SessionId("session"), {}))
    assert dsk["s"] is stored


def test_a_stored_node_is_a_node() -> None:
    stored = Stored("s", OTHER, 3, "memory://x")
    again = pickle.loads(pickle.dumps(stored))
    assert (again.key, again.run, again.number, again.store) == ("s", OTHER, 3, "memory://x")
    assert tokenize(stored) == tokenize(again) != tokenize(Stored("s", OTHER, 4, "memory://x"))
    assert stored.substitute({}, key="other").key == "other" and stored.substitute({}) is stored
    assert not stored.dependencies and stored.copy() == stored


def test_a_stored_node_is_not_fused_into_what_reads_it() -> None:
    graph = {
        "s": Stored("s", OTHER, 3, "memory://x"),
        "a": Task("a", inc, TaskRef("s")),
        "b": Task("b", inc, TaskRef("a")),
    }
    fused = fuse_linear_task_spec(graph, {"b"})
    assert type(fused["s"]) is Stored and len(fused) < len(graph) + 1


# ---------------------------------------------------------------------------- what is stored already


def test_stored_results_take_the_place_of_tasks() -> None:
    run, other = RunId("session.before"), RunId("elsewhere.before")
    dsk, _ = materialize(
        {"a": (abs, 1), "b": (abs, "a"), "c": (abs, "b"), "d": (abs, "c"), "e": (abs, "d")}, ["e", "c"]
    )
    places = {"c": Stored("c", run, 7, ""), "a": Stored("a", run, 3, "")}
    left, outside = without(dsk, ["e", "c"], Outside(SessionId("session"), {}), places.get)
    # What is asked for itself is copied; what only it needs is left out.
    assert left.keys() == {"e", "d", "c"} and outside.found == {("stored", run, 7): (run, 7)}
    left, outside = without(dsk, ["e"], Outside(SessionId("session"), {}), places.get)
    assert left.keys() == {"e", "d"} and outside.found == {"c": (run, 7)}
    left, outside = without(dsk, ["e"], Outside(SessionId("session"), {}), {"c": Stored("c", other, 7, "")}.get)
    assert left.keys() == {"e", "d", "c"} and type(left["c"]) is Stored and not outside.found


def test_results_of_other_runs_stay_when_nothing_is_stored() -> None:
    outside = Outside(SessionId("session"), {"x": (RunId("session.before"), 1), "y": (RunId("session.before"), 2)})
    dsk, _ = materialize({"a": (abs, TaskRef("x")), "b": (max, "a", TaskRef("y"))}, "b", outside)
    left, kept = without(dsk, ["b"], outside, lambda key: None)
    assert left.keys() == dsk.keys() and kept.found == outside.found
    left, kept = without(dsk, ["b"], outside, {"a": Stored("a", RunId("session.before"), 5, "")}.get)
    assert left.keys() == {"b"} and kept.found.keys() == {"a", "y"}


def test_fingerprints_lie_beside_the_keys() -> None:
    sharded = shard({f"n-{n}": (abs, n) for n in range(5)}, [f"n-{n}" for n in range(5)], 2)
    sharded.prints = {"n-1": b"one", "n-4": b"four", "gone": b""}
    bodies = {number: b"".join(body) for number, body in sharded.packs()}
    found = {}
    for info in sharded.plan(created=0.0).shards:
        place = info.place
        record = decode(ShardRecord, "record", bodies[place.pack][place.start : place.end])
        names = pickle.loads(record.keys)
        found.update({names[position]: its for position, its in record.prints.items()})
    assert found == {"n-1": b"one", "n-4": b"four"}
