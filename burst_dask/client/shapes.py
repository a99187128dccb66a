"""The shape of a run's answer: what was asked for, with numbers of tasks in the place of keys."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from burst_dask.errors import UnpicklableTask
from burst_dask.graph.shards import numbers_in, unpack_outputs

#: Takes the results of the collections, returns what `dask.compute` returns.
Repack = Callable[[Any], Any]


class Repacked(NamedTuple):
    """What `Plan.outputs` holds for `Session.compute`: the shape of what the user gave; stored as a plain tuple."""

    #: as `burst_dask.graph` writes it
    outputs: bytes
    #: takes the results of the collections, returns what `dask.compute` would have returned
    repack: Repack


class _Unpickler(pickle.Unpickler):
    """Reads plans, also those of before, which name `Repacked` by a module that is no more."""

    def find_class(self, module: str, name: str) -> Any:
        return Repacked if module.startswith("burst_dask.") and name == "Repacked" else super().find_class(module, name)


def _load(outputs: bytes) -> Any:
    """Return a shape as `burst_dask.graph` writes it, or what `dump` has put around it."""
    shape = _Unpickler(io.BytesIO(outputs)).load()
    return Repacked(*shape) if isinstance(shape, tuple) else shape


def unpack(outputs: bytes, values: Callable[[int], Any]) -> Any:
    """Return the answer of a run, out of the values of its outputs."""
    shape = _load(outputs)
    if isinstance(shape, Repacked):
        return shape.repack(unpack_outputs(shape.outputs, values))
    return unpack_outputs(outputs, values)


def numbers(outputs: bytes) -> list[int]:
    """Return the global numbers of all that was asked for.

    >>> numbers(pickle.dumps([3, [1]]))
    [3, 1]
    """
    shape = _load(outputs)
    if isinstance(shape, Repacked):
        shape = _load(shape.outputs)
    return list(numbers_in(shape))


def dump(outputs: bytes, repack: Repack) -> bytes:
    """Return what `Plan.outputs` holds when the answer is to be repacked."""
    try:
        return bytes(cloudpickle.dumps((outputs, repack)))
    except Exception as error:
        raise UnpicklableTask(
            f"what is to be computed holds an object beside the collections that cannot be pickled: {error}. "
            "Nothing was submitted"
        ) from error
