"""What Dask hands a scheduler, as one culled dict of nodes; what cannot work is refused here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import dask
from dask._expr import Expr, HLGExpr
from dask._task_spec import Alias, DataNode, GraphNode, TaskRef, convert_legacy_graph
from dask.core import flatten, getcycle
from dask.highlevelgraph import HighLevelGraph
from dask.order import order

from burst_dask.errors import GraphError, UnsupportedGraph
from burst_dask.graph.stored import Stored
from burst_dask.protocol.keys import RunId, SessionId, session_of

#: Annotation name -> Dask key -> value.
Annotations = dict[str, dict[Any, Any]]
#: Dask key -> run and global number there, of results of other runs.
Externals = dict[Any, tuple[RunId, int]]


class MissingKey(GraphError, KeyError):
    """A key that was asked for, or that a task depends on, is not in the graph."""

    __str__ = Exception.__str__  # KeyError shows the repr of its message


@dataclass
class Outside:
    """What a graph may refer to beside its own tasks: results of other runs of the session."""

    session: SessionId
    #: where the futures of the session are, by their keys
    futures: Mapping[Any, tuple[RunId, int]]
    #: those that the graph does refer to
    found: Externals = field(default_factory=dict)

    def has(self, key: Any, node: Any) -> bool:
        """Tell whether `key`, with that node of the graph or without one, is a result of another run; note it."""
        if key in self.found:
            return True
        if node is None and key in self.futures:
            self.found[key] = self.futures[key]
        elif type(node) is Stored and session_of(node.run) == self.session:
            self.found[key] = node.run, node.number
        return key in self.found

    def copy_of(self, key: Any) -> Alias:
        """Return a task that copies an external which is asked for itself."""
        place = self.found.pop(key)
        inner = ("stored", *place)
        self.found[inner] = place
        return Alias(key, inner)


def materialize(graph: Any, keys: Any, outside: Outside | None = None) -> tuple[dict[Any, GraphNode], Annotations]:
    """Return the tasks that `keys` need, and their annotations.

    Parameters
    ----------
    graph
        An expression, a `HighLevelGraph`, or a dict: of tuples as of old, of nodes, or of both.
    keys
        A key, or nested lists of keys.
    outside
        Results of other runs that tasks may depend on; its `found` tells afterwards on which they do.

    Raises
    ------
    MissingKey
        A key is not in the graph.
    UnsupportedGraph
        The graph needs a disk or a scheduler that workers do not share.
    """
    wanted = list(flatten([keys]))
    if isinstance(graph, HighLevelGraph):
        graph = HLGExpr(graph, output_keys=wanted)
    if isinstance(graph, Expr):
        raw, annotations = graph.__dask_graph__(), graph.__dask_annotations__()
    elif isinstance(graph, Mapping):
        raw, annotations = graph, {}
    else:
        raise GraphError(f"a {type(graph).__name__} is no graph; give an expression, a HighLevelGraph or a dict")
    dsk = _cull(convert_legacy_graph(raw), wanted, raw, outside or Outside(SessionId(""), {}))
    _refuse(dsk)
    return dsk, _annotate(dsk, annotations, dask.get_annotations())


def _cull(
    dsk: Mapping[Any, GraphNode], wanted: Iterable[Any], raw: Mapping[Any, Any], outside: Outside
) -> dict[Any, GraphNode]:
    culled: dict[Any, GraphNode] = {}
    work = []
    for key in wanted:
        if key in culled:
            continue
        if outside.has(key, dsk.get(key)):
            culled[key] = outside.copy_of(key)
            continue
        if key not in dsk:
            raise MissingKey(f"key {key!r} was asked for and is not in the graph of {len(dsk)} tasks")
        work.append(key)
    while work:
        key = work.pop()
        if key in culled:
            continue
        node = culled[key] = dsk[key]
        for dependency in node.dependencies:
            if dependency not in culled and not outside.has(dependency, dsk.get(dependency)):
                if dependency not in dsk:
                    raise _missing(key, dependency, raw)
                work.append(dependency)
    return culled


def without(
    dsk: Mapping[Any, GraphNode], wanted: Iterable[Any], outside: Outside, stored: Callable[[Any], Stored | None]
) -> tuple[dict[Any, GraphNode], Outside]:
    """Return what is left of a graph when stored results take the place of tasks, and the results of other runs in it.

    Parameters
    ----------
    dsk, outside
        What `materialize` returned and was given.
    stored
        Returns what stands for a task, or None.
    """
    left: dict[Any, GraphNode] = {}
    kept = Outside(outside.session, outside.futures)
    work = list(dict.fromkeys(wanted))
    asked = set(work)
    while work:
        key = work.pop()
        if key in left or key in kept.found:
            continue
        if key not in dsk:
            kept.found[key] = outside.found[key]
            continue
        found = stored(key)
        if found is None:
            left[key] = dsk[key]
            work.extend(dsk[key].dependencies)
        elif not kept.has(key, found):
            left[key] = found  # of another session: a task that reads it
        elif key in asked:
            left[key] = kept.copy_of(key)
    return left, kept


def _missing(key: Any, dependency: Any, raw: Mapping[Any, Any]) -> GraphError:
    if _holds_future(raw.get(key), dependency):
        return UnsupportedGraph(
            f"task {key!r} depends on a Future of another scheduler or session ({dependency!r}), which workers cannot "
            "reach; put its result in the place of the Future: future.result()"
        )
    return MissingKey(f"task {key!r} depends on {dependency!r}, which is not in the graph")


def _holds_future(value: Any, key: Any) -> bool:
    """Tell whether a Future of `key` lies somewhere in `value`."""
    if type(value) is not TaskRef and (isinstance(value, TaskRef) or getattr(value, "__dask_future__", False)):
        return bool(value.key == key)
    if isinstance(value, GraphNode):
        parts = [*getattr(value, "args", ()), *getattr(value, "kwargs", {}).values()]
    elif isinstance(value, dict):
        parts = list(value.values())
    else:
        parts = list(value) if isinstance(value, (list, tuple, set)) else []
    return any(_holds_future(part, key) for part in parts)


def _refuse(dsk: Mapping[Any, GraphNode]) -> None:
    """Raise for tasks that need what workers do not share."""
    tasks: dict[int, tuple[Any, Callable[..., Any]]] = {}
    for key, node in dsk.items():
        function = getattr(node, "func", None)
        if function is not None:
            tasks.setdefault(id(function), (key, function))
    for key, called in tasks.values():
        function = called.func if isinstance(called, partial) else called
        module = getattr(function, "__module__", None) or type(function).__module__
        if module.partition(".")[0] == "partd" or type(function).__name__ == "maybe_buffered_partd":
            raise UnsupportedGraph(
                f"task {key!r} shuffles through a local disk (partd), which workers do not share. Before building "
                'the collection: dask.config.set({"dataframe.shuffle.method": "tasks"})'
            )
        if module.startswith("distributed.shuffle"):
            raise UnsupportedGraph(
                f"task {key!r} shuffles between workers of dask.distributed (p2p), which are not there. "
                "Before building the collection: "
                'dask.config.set({"dataframe.shuffle.method": "tasks", "array.rechunk.method": "tasks"})'
            )


def _annotate(dsk: Mapping[Any, GraphNode], by_name: Annotations, everywhere: Mapping[str, Any]) -> Annotations:
    """Return the annotations of the tasks in `dsk`: those of a layer go before those in force now."""
    result: Annotations = {}
    for name, value in everywhere.items():
        # A class is a value: `retry_on` takes those of exceptions.
        each = callable(value) and not isinstance(value, type)
        result[name] = {key: value(key) if each else value for key in dsk}
    for name, values in by_name.items():
        known = {key: value for key, value in values.items() if key in dsk and value is not None}
        result.setdefault(name, {}).update(known)
    return {name: values for name, values in result.items() if values}


def ordered(dsk: Mapping[Any, GraphNode], externals: Iterable[Any] | None = None) -> list[Any]:
    """Return the keys in `dask.order` order, which is topological.

    Parameters
    ----------
    externals
        Keys that tasks depend on and that are not in `dsk`.

    Raises
    ------
    GraphError
        There is a cycle; the message names it.
    """
    try:
        priorities = order(dsk)  # it knows what to do about externals
    except RuntimeError as error:
        cycle = getcycle({**dsk, **{key: DataNode(key, None) for key in externals or ()}}, None)
        if not cycle:
            raise
        chain = " -> ".join(map(repr, cycle))
        raise GraphError(f"the graph has a cycle, so that no task of it can run first: {chain}") from error
    return sorted(dsk, key=priorities.__getitem__)
