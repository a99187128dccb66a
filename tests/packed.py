"""Graphs as their records alone: stored in memory, read, and run as workers would."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dask

from burst_dask.graph import (
    ShardedGraph,
    materialize,
    unpack_outputs,
)
from burst_dask.protocol import frames, records
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan, ShardRecord
from burst_dask.worker.execution import open_table

RUN = RunId("session.run")


def shard(graph: Any, keys: Any, parallelism: int = 2, **options: Any) -> ShardedGraph:
    dsk, annotations = materialize(graph, keys)
    return ShardedGraph.of(dsk, keys, annotations, run=RUN, parallelism=parallelism, **options)


def store(graph: ShardedGraph) -> tuple[Plan, list[bytes]]:
    packs: list[bytes] = []
    for number, body in graph.packs():
        assert number == len(packs)
        packs.append(b"".join(body))
    return records.decode(Plan, "plan", records.encode(graph.plan(created=1.0))), packs


def read(plan: Plan, packs: list[bytes]) -> Iterator[tuple[ShardRecord, list[memoryview]]]:
    def at(place: records.Place) -> memoryview:
        return memoryview(packs[place.pack])[place.start : place.end]

    for info in plan.shards:
        record = records.decode(ShardRecord, "shard", at(info.place))
        yield record, [frames.unseal("constant", at(place)) for place in record.buffers]


def run(plan: Plan, packs: list[bytes]) -> Any:
    """Run the shards one after another, as workers that share only the records would."""
    stored: dict[int, Any] = {}
    for record, buffers in read(plan, packs):
        table = open_table(record, buffers)
        names, nodes, foreign = table.keys, table.nodes, table.foreign_keys
        mine: dict[int, Any] = {}
        key_of = {**foreign, **{record.first + i: key for i, key in enumerate(names)}}
        for position, (node, needs) in enumerate(zip(nodes, record.dependencies, strict=True)):
            values = {key_of[n]: mine[n] if n >= record.first else stored[n] for n in needs}
            mine[record.first + position] = node(values)
        stored.update({record.first + position: mine[record.first + position] for position in record.wanted})
    return unpack_outputs(plan.outputs, stored.__getitem__)


def execute(graph: Any, keys: Any, **options: Any) -> Any:
    return run(*store(shard(graph, keys, **options)))


def compute(collection: Any, parallelism: int = 2) -> Any:
    return dask.compute(collection, scheduler=lambda graph, keys, **_: execute(graph, keys, parallelism=parallelism))[0]


def inc(x: int) -> int:
    return x + 1
