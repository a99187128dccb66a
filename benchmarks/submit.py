"""What submitting costs the client, by step: ``python benchmarks/submit.py [tasks]``."""

from __future__ import annotations

import operator
import sys
import time
from itertools import pairwise
from typing import Any

from dask._task_spec import convert_legacy_graph

from burst_dask.graph import ShardedGraph, cutting, materialize, reading, weighing
from burst_dask.protocol.keys import RunId


def main() -> None:
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    names = [("x", i) for i in range(tasks - 1)]
    legacy: dict[Any, Any] = {name: (operator.neg, 1) for name in names}
    legacy["total"] = (sum, names)
    marks = [("", time.perf_counter())]

    def mark(name: str) -> None:
        marks.append((name, time.perf_counter()))

    nodes = convert_legacy_graph(legacy)
    mark("convert (Dask)")
    dsk, annotations = materialize(nodes, "total")
    mark("cull and check")
    order = reading.ordered(dsk)
    mark("order (Dask)")
    number = {key: i for i, key in enumerate(order)}
    dependencies = [tuple(sorted(number[key] for key in dsk[key].dependencies)) for key in order]
    mark("number")
    weighing.large_objects(dsk.values())
    mark("weigh")
    cutting.cut(dependencies, parallelism=16)
    mark("cut")
    graph = ShardedGraph.of(dsk, "total", annotations, run=RunId("session.run"), parallelism=16)
    mark("of (order, number, weigh, cut and connect)")
    puts = sum(1 for _ in graph.packs())
    mark("pickle and pack")
    plan = graph.plan(created=0.0)
    mark("plan")
    for (_, start), (name, end) in pairwise(marks):
        print(f"{name:44}{(end - start) / tasks * 1e6:8.2f} us a task")
    print(f"{len(plan.shards)} shards, {plan.size / 1e6:.1f} MB in {puts} packs, and 1 plan")


if __name__ == "__main__":
    main()
