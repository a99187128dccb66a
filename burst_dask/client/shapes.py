"""The shape of a run's answer: what was asked for, with numbers of tasks in the place of keys."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import cloudpickle

from burst_dask.errors import UnpicklableTask
from burst_dask.graph.shards import numbers_in, unpack_outputs

#: Takes the results of the collections, returns what `dask.compute` returns.
Repack = Callable[[Any], Any]


class Repacked(NamedTuple):
    """What `Plan.outputs` holds for `Session.compute`: the shape of what the user gave."""

    #: as `burst_dask.graph` writes it
    outputs: bytes
    #: takes the results of the collections, returns what `dask.compute` would have returned
    repack: Repack


def unpack(outputs: bytes, values: Callable[[int], Any]) -> Any:
    """Return the answer of a run, out of the values of its outputs."""
    shape = pickle.loads(outputs)  # noqa: S301 - who may write the store may run code, see README
    if isinstance(shape, Repacked):
        return shape.repack(unpack_outputs(shape.outputs, values))
    return unpack_outputs(outputs, values)


def numbers(outputs: bytes) -> list[int]:
    """Return the global numbers of all that was asked for.

    >>> numbers(pickle.dumps([3, [1]]))
    [3, 1]
    """
    shape = pickle.loads(outputs)  # noqa: S301 - as above
    if isinstance(shape, Repacked):
        shape = pickle.loads(shape.outputs)  # noqa: S301 - as above
    return list(numbers_in(shape))


def dump(outputs: bytes, repack: Repack) -> bytes:
    """Return what `Plan.outputs` holds when the answer is to be repacked."""
    try:
        return bytes(cloudpickle.dumps(Repacked(outputs, repack)))
    except Exception as error:
        raise UnpicklableTask(
            f"what is to be computed holds an object beside the collections that cannot be pickled: {error}. "
            "Nothing was submitted"
        ) from error
