"""Which task cannot be pickled, and which object in it is at fault."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import FunctionType, MethodType
from typing import Any

from dask._task_spec import DataNode, Dict, GraphNode, NestedContainer, Task

from burst_dask.errors import UnpicklableTask
from burst_dask.serialize import fault


def blame(nodes: Sequence[Any], error: Exception) -> UnpicklableTask:
    """Return the error that names the first task that cannot be pickled, and the object in it."""
    for node in nodes:
        reason = fault(node)
        if reason is None:
            continue
        path: list[str] = []
        culprit = node
        seen = {id(node)}
        while True:
            for name, child in _parts(culprit):
                if id(child) not in seen and (deeper := fault(child)) is not None:
                    seen.add(id(child))
                    path.append(name)
                    culprit, reason = child, deeper
                    break
            else:
                break
        kind = type(culprit)
        where = " of ".join(reversed(path)) or "the task itself"
        return UnpicklableTask(
            f"task {node.key!r}: {where} is a {kind.__module__}.{kind.__qualname__}, which cannot be pickled "
            f"({type(reason).__name__}: {reason}). Nothing was submitted. Create the object inside the task, "
            "or give its class a __reduce__"
        )
    return UnpicklableTask(f"the tasks cannot be pickled together: {type(error).__name__}: {error}")


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is pickled with `value`, and the words for it."""
    match value:
        case Dict():
            yield from ((f"item {name!r}", item) for name, item in zip(value.args[::2], value.args[1::2], strict=True))
        case NestedContainer() | list() | tuple() | set() | frozenset():
            yield from ((f"item {i}", item) for i, item in enumerate(value))
        case Task():
            yield "the function", value.func
            yield from ((f"argument {i}", item) for i, item in enumerate(value.args, 1))
            yield from ((f"argument {name}", item) for name, item in value.kwargs.items())
        case DataNode():
            yield "the value", value.value
        case dict():
            yield from ((f"key {name!r}", name) for name in value)
            yield from ((f"item {name!r}", item) for name, item in value.items())
        case functools.partial():
            yield "the function", value.func
            yield from ((f"argument {i}", item) for i, item in enumerate(value.args, 1))
            yield from ((f"argument {name}", item) for name, item in value.keywords.items())
        case MethodType():
            yield f"the object of method {value.__name__}", value.__self__
        case FunctionType():
            yield from _variables(value)
        case type() | GraphNode():
            return
        case _ if "__reduce__" in vars(type(value)):
            return  # its own method failed, and its error says why
        case _:
            names = [*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())]
            yield from ((f"attribute {name}", getattr(value, name)) for name in names if hasattr(value, name))


def _variables(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables that cloudpickle stores with a function."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"variable {name} of function {function.__name__}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for value in function.__defaults__ or ():
        yield f"a default of function {function.__name__}", value
    for name in code.co_names:
        if name in function.__globals__:
            yield f"global {name} of function {function.__name__}", function.__globals__[name]
