"""The shape of an answer, as plans keep it."""

from __future__ import annotations

import pickle
import sys
from types import ModuleType
from typing import Any, NamedTuple

import cloudpickle
import pytest

from burst_dask.client.shapes import dump, numbers, unpack

VALUES = {3: "c", 1: "a"}


def in_a_dict(results):
    return {"answer": results}


class Repacked(NamedTuple):
    """As it was when its module named it in plans."""

    outputs: bytes
    repack: Any


@pytest.fixture(params=["burst_dask.shapes", "burst_dask.submission"])
def of_before(request, monkeypatch):
    """A plan's outputs as they were written when that was in a module that is no more."""
    module = ModuleType(request.param)
    with monkeypatch.context() as then:
        then.setitem(sys.modules, request.param, module)
        then.setattr(Repacked, "__module__", request.param)
        module.Repacked = Repacked
        return cloudpickle.dumps(Repacked(pickle.dumps([3, [1]]), in_a_dict))


def test_the_shape_of_a_graph():
    outputs = pickle.dumps([3, [1]])
    assert numbers(outputs) == [3, 1]
    assert unpack(outputs, VALUES.get) == ("c", ("a",))


def test_the_shape_that_a_user_gave():
    outputs = dump(pickle.dumps([3, [1]]), in_a_dict)
    assert numbers(outputs) == [3, 1]
    assert unpack(outputs, VALUES.get) == {"answer": ("c", ("a",))}
    assert b"burst_dask" not in outputs, "modules may move, and plans stay"


def test_plans_of_before_are_read(of_before):
    assert b"burst_dask" in of_before
    assert numbers(of_before) == [3, 1]
    assert unpack(of_before, VALUES.get) == {"answer": ("c", ("a",))}
