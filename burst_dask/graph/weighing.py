"""What is known of the size of tasks before they are pickled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

from dask._task_spec import Alias, DataNode, Task, TaskRef
from dask.sizeof import sizeof

#: Smaller objects do not count: a full shard of them stays well under its bound.
WEIGHED_FROM = 16_384
#: Longer containers are weighed as a whole, by a sample.
_LONG = 1000
#: What is small, or is not pickled by value, or both.
_LIGHT = frozenset({int, float, bool, complex, type(None), slice, TaskRef, Alias, FunctionType, BuiltinFunctionType,
                    MethodType, type})  # fmt: skip


def large_objects(nodes: Iterable[Any]) -> dict[int, dict[int, int]]:
    """Return for tasks that hold large objects: position -> id of the object -> bytes.

    Finds what is an argument of a task or of a `functools.partial`, or lies in containers there;
    not what lies in a closure or in an attribute.
    """
    result: dict[int, dict[int, int]] = {}
    known: dict[int, int] = {}
    for position, node in enumerate(nodes):
        stack = [node]
        while stack:
            item = stack.pop()
            kind = type(item)
            if kind in _LIGHT:
                continue
            if isinstance(item, Task):
                stack += item.args
                if item.kwargs:
                    stack += item.kwargs.values()
                if type(item.func) is partial:
                    stack += (*item.func.args, *item.func.keywords.values())
            elif kind is DataNode:
                stack.append(item.value)
            elif kind in (list, tuple, dict) and len(item) < _LONG:
                stack += item.values() if kind is dict else item
            else:
                size = _size(item, kind, known)
                if size >= WEIGHED_FROM:
                    result.setdefault(position, {})[id(item)] = size
    return result


def _size(item: Any, kind: type, known: dict[int, int]) -> int:
    if kind in (str, bytes, bytearray):
        return len(item)
    # Objects of a graph stay alive while it is weighed: ids are not used twice.
    size = known.get(id(item))
    if size is None:
        try:
            size = int(sizeof(item))
        except Exception:  # a __sizeof__ of the user's that raises must not stop the run
            size = 0
        known[id(item)] = size
    return size
