"""Graphs in shards: where they are cut, what the records say of each other, and how constants are stored."""

from __future__ import annotations

import operator
import warnings
from itertools import pairwise
from typing import Any

import dask
import numpy as np
import pandas as pd
import pytest
from dask._task_spec import Alias, DataNode, List, Task, TaskRef
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import read, run, shard, store

from burst_dask.graph import (
    LargeConstantWarning,
    cut,
)
from burst_dask.protocol.records import Plan
from burst_dask.worker.execution import open_table

# ---------------------------------------------------------------------------- shards


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[Any, Any], Any]:
    count = draw(st.integers(1, 40))
    names = draw(st.permutations([("x", i) if i % 3 else f"x{i}" for i in range(count)]))
    dsk: dict[Any, Any] = {}
    for i, name in enumerate(names):
        needs = draw(st.lists(st.sampled_from(names[:i]), max_size=4)) if i else []
        kind = draw(st.sampled_from(["task", "legacy", "alias", "data"]))
        if kind == "alias" and needs:
            dsk[name] = Alias(name, needs[0])
        elif kind == "data" or not needs:
            dsk[name] = DataNode(name, i) if draw(st.booleans()) else i
        elif kind == "task":
            dsk[name] = Task(name, sum, List(*map(TaskRef, needs), i))
        else:
            dsk[name] = (sum, [*needs, i])
    keys = draw(st.recursive(st.sampled_from(names), lambda inner: st.lists(inner, max_size=4), max_leaves=8))
    return dsk, keys


@settings(max_examples=300, deadline=None)
@given(graphs(), st.integers(1, 12))
def test_shards_of_any_graph_compute_it(case: tuple[dict[Any, Any], Any], parallelism: int) -> None:
    dsk, keys = case
    graph = shard(dsk, keys, parallelism=parallelism)
    plan, packs = store(graph)
    check(plan, packs)
    assert run(plan, packs) == dask.local.get_sync(dsk, keys)


def check(plan: Plan, packs: list[bytes]) -> None:
    """Check what the records say of each other."""
    assert plan.size == sum(map(len, packs))
    shard_of: list[int] = []
    free: list[bool] = []
    dependents: dict[int, set[int]] = {}
    found = list(read(plan, packs))
    for number, (info, (record, buffers)) in enumerate(zip(plan.shards, found, strict=True)):
        assert (record.shard, record.first, info.first) == (number, len(shard_of), len(shard_of))
        table = open_table(record, buffers)
        names, nodes, foreign = table.keys, table.nodes, table.foreign_keys
        assert len(names) == len(nodes) == len(record.dependencies) == info.count > 0
        upstream: set[int] = set()
        seen: set[int] = set()
        for i, needs in enumerate(record.dependencies):
            assert list(needs) == sorted(set(needs))
            assert all(need < info.first + i for need in needs)
            shard_of.append(number)
            free.append(all(shard_of[need] == number and free[need] for need in needs))
            for need in needs:
                if need < info.first:
                    upstream.add(shard_of[need])
                    seen.add(need)
                    dependents.setdefault(need, set()).add(number)
        assert set(info.upstream) == upstream
        assert list(info.upstream) == sorted(info.upstream)
        assert set(foreign) == seen
        assert info.free == sum(free[info.first :])
        assert info.outputs == len(record.outputs)
        assert plan.locate(info.first) == (number, 0)
    assert len(shard_of) == plan.tasks
    for record, _ in found:
        for position in range(len(record.dependencies)):
            expected = tuple(sorted(dependents.get(record.first + position, ())))
            assert record.dependents.get(position, ()) == expected


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 20), st.randoms(use_true_random=False))
def test_cuts_cover_and_keep_to_their_bounds(counts: list[int], parallelism: int, random: Any) -> None:
    dependencies = [tuple(sorted({random.randrange(i) for _ in range(n)})) if i else () for i, n in enumerate(counts)]
    bounds = cut(dependencies, parallelism=parallelism)
    assert bounds[0] == 0
    assert bounds[-1] == len(dependencies)
    assert all(start < end for start, end in pairwise(bounds))


def test_a_chain_is_not_cut() -> None:
    assert cut([(), *[(i,) for i in range(99)]], parallelism=50) == [0, 100]


def test_chains_side_by_side_are_cut_between_them() -> None:
    chains = [() if i % 10 == 0 else (i - 1,) for i in range(40)]
    assert cut(chains, parallelism=4) == [0, 10, 20, 30, 40]


def test_tasks_without_dependencies_are_shared_evenly() -> None:
    assert cut([()] * 8, parallelism=8) == list(range(9))
    assert cut([()] * 320, parallelism=10)[:3] == [0, 8, 16]


def test_shards_are_bounded_in_tasks_and_in_bytes() -> None:
    assert max(b - a for a, b in pairwise(cut([(i - 1,) if i else () for i in range(5000)], parallelism=1))) == 1024
    own = {i: {i: 6 << 20} for i in range(10)}
    assert cut([()] * 10, parallelism=1, sizes=own)[1] == 2
    common = {i: {0: 100 << 20} for i in range(8)}
    assert cut([()] * 8, parallelism=2, sizes=common) == cut([()] * 8, parallelism=2)


def test_a_hundred_thousand_tasks_take_few_puts() -> None:
    dsk: dict[Any, Any] = {("x", i): Task(("x", i), operator.neg, i) for i in range(100_000)}
    dsk["total"] = Task("total", sum, List(*(TaskRef(key) for key in dsk)))
    plan, packs = store(shard(dsk, "total", parallelism=16))
    assert len(packs) + 1 <= 60
    assert plan.tasks == 100_001
    assert run(plan, packs) == -sum(range(100_000))


# ---------------------------------------------------------------------------- constants


def second(_: Any, y: Any) -> Any:
    return y


CONSTANTS = {
    "array": np.arange(200_000),
    "frame": pd.DataFrame({"a": np.arange(100_000), "b": ["text"] * 100_000}),
    "objects": pd.DataFrame({"a": [str(i) for i in range(50_000)]}, dtype=object),
    "bytes": np.random.default_rng(0).bytes(1_000_000),
    "list": list(range(500_000)),
}


@pytest.mark.filterwarnings("ignore::burst_dask.graph.LargeConstantWarning")
@pytest.mark.parametrize("kind", CONSTANTS)
def test_a_constant_of_many_tasks_is_stored_once(kind: str) -> None:
    value = CONSTANTS[kind]
    alone = sum(map(len, store(shard({"x": Task("x", second, 0, value)}, ["x"]))[1]))
    dsk = {("x", i): Task(("x", i), second, i, value) for i in range(40)}
    plan, packs = store(shard(dsk, list(dsk), parallelism=4))
    assert len(plan.shards) > 4
    assert sum(map(len, packs)) < alone + 60_000
    for result in run(plan, packs):
        assert type(result) is type(value)
        assert np.array_equal(np.asarray(result), np.asarray(value))


def test_equal_arrays_are_stored_once_and_stay_writeable() -> None:
    dsk = {("x", i): Task(("x", i), second, i, np.ones(100_000)) for i in range(8)}
    plan, packs = store(shard(dsk, list(dsk), parallelism=8))
    assert sum(map(len, packs)) < 900_000
    for result in run(plan, packs):
        result[0] = 5


def test_a_large_constant_is_warned_of_by_name() -> None:
    dsk = {"small": Task("small", len, np.ones(10)), "big": Task("big", len, np.ones(2_000_000))}
    with pytest.warns(LargeConstantWarning, match=r"task 'big' holds a constant of 16.0 MB"):
        shard(dsk, ["small", "big"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shard(dsk, ["small", "big"], large=20_000_000)


def test_packs_are_made_one_at_a_time() -> None:
    """Nothing of a pack is held when the next is asked for, and each is of a good size."""
    made: list[int] = []

    class Chunk:
        def __init__(self, number: int) -> None:
            self.number = number

        def __reduce__(self) -> Any:
            made.append(self.number)
            return bytearray, (np.random.default_rng(self.number).bytes(3 << 20),)

    dsk = {("x", i): DataNode(("x", i), Chunk(i)) for i in range(12)}
    sizes = []
    for number, body in shard(dsk, list(dsk), parallelism=12).packs():
        sizes.append(sum(map(len, body)))
        assert len(made) <= 3 * (number + 1)
    assert made == list(dict.fromkeys(made))
    assert max(sizes) <= 16 << 20
    assert len(sizes) == 4
