"""Fingerprints of tasks: the same in each process, and others when what the task does is another."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import dask
import dask.array as da
import dask.bag as db
import pytest
from dask._expr import FinalizeCompute
from dask._task_spec import convert_legacy_graph
from dask.base import collections_to_expr, unpack_collections
from dask.core import flatten

from burst_dask.graph.prints import Kind, Prints, kind, layer
from burst_dask.graph.reading import materialize

TOKEN = "0fd99f3cbd3cad544f6ce989db4f45b3"


def prints(legacy, **keywords):
    return Prints(convert_legacy_graph(legacy), **keywords)


def written(source, name="f", **names):
    """Return a function of a script with that text."""
    scope = {"__name__": "__main__", **names}
    exec(textwrap.dedent(source), scope)
    return scope[name]


def of(function, *args):
    return prints({"x": (function, *args)}).of["x"]


@pytest.mark.parametrize(
    ("key", "expected", "name"),
    [
        (f"sum-{TOKEN}", Kind.TOKEN, "sum"),
        ((f"sum-{TOKEN}", 0, 1), Kind.TOKEN, "sum"),
        (((f"sum-{TOKEN}", 0), 1), Kind.TOKEN, "sum"),
        ("inc-02c27ca5-8b80-4e37-8fe1-1e8cae2fa0d6", Kind.RANDOM, "inc"),
        ("model-3", Kind.NAMED, "model-3"),
        (("x", 1), Kind.NAMED, "x"),
        (7, Kind.NAMED, "7"),
        (f"aggregate-finalize-hlgfinalizecompute-{TOKEN}", Kind.FINAL, "aggregate-finalize-hlgfinalizecompute"),
    ],
)
def test_what_a_key_tells(key, expected, name):
    assert (kind(key), layer(key)) == (expected, name)


def test_a_random_key_is_what_delayed_makes():
    assert kind(dask.delayed(abs)(1).key) is Kind.RANDOM
    assert kind(dask.delayed(abs, pure=True)(1).key) is Kind.TOKEN


def test_tasks_that_their_tokens_tell_need_no_fingerprint():
    found = prints({f"a-{TOKEN}": (abs, 1), f"b-{TOKEN}": (abs, f"a-{TOKEN}"), "c": (abs, f"b-{TOKEN}")})
    assert list(found.of) == ["c"]


def test_a_token_above_a_chosen_key_tells_nothing_of_that():
    one = prints({"x": (abs, 1), f"b-{TOKEN}": (abs, "x")}).of
    other = prints({"x": (abs, 2), f"b-{TOKEN}": (abs, "x")}).of
    assert one.keys() == {"x", f"b-{TOKEN}"} and not set(one.values()) & set(other.values())


def test_what_changes_the_fingerprint():
    plus = written("def f(x):\n    return x + 1")
    base = of(plus, 1)
    assert base == of(written("# a comment\n\ndef f(x):\n    return x + 1"), 1)  # where it stands does not
    others = [
        of(plus, 2),
        of(plus, [1]),
        of(written("def f(x):\n    return x + 2"), 1),
        of(written("def f(x, y=3):\n    return x + 1"), 1),
        of(written("def f(x):\n    return (lambda: x + 1)()"), 1),
        of(functools.partial(plus, 1)),
        of(abs, 1),
        of(operator.neg, 1),
    ]
    assert len({base, *others}) == len(others) + 1


@pytest.mark.parametrize(
    "source",
    [
        "def g(x):\n    return x + {n}\ndef f(x):\n    return g(x)",
        "N = {n}\ndef f(x):\n    return x + N",
        "class C:\n    def g(self):\n        return {n}\ndef f(x):\n    return C().g()",
        "def f(x, n={n}):\n    return x + n",
        "def outer(n):\n    def f(x):\n        return x + n\n    return f\nf = outer({n})",
        "def f(x):\n    return [y + {n} for y in x]",
        "def f(x):\n    return x in {{'a', 'b', 'c{n}'}}",
    ],
)
def test_what_a_function_calls_counts(source):
    one, other = of(written(source.format(n=1)), 1), of(written(source.format(n=2)), 1)
    assert one != other
    assert one == of(written(source.format(n=1)), 1)


def test_a_function_that_calls_itself():
    assert of(written("def f(x):\n    return f(x - 1) if x else 0"), 1) == of(
        written("def f(x):\n    return f(x - 1) if x else 0"), 1
    )


def test_random_keys_are_told_by_what_they_stand_for():
    def graph(key, value):
        return {key: (abs, value), "total": (sum, [key])}

    one, again, other = (
        prints(graph(f"inc-{uuid}", value)).of["total"]
        for uuid, value in (
            ("02c27ca5-8b80-4e37-8fe1-1e8cae2fa0d6", 1),
            ("4633e25d-01c7-45e6-b081-776807af1021", 1),
            ("4633e25d-01c7-45e6-b081-776807af1021", 2),
        )
    )
    assert one == again != other


def test_keys_that_this_process_has_drawn():
    assert prints({"abs-k3w9": (abs, 1)}, random={"abs-k3w9"}).kind("abs-k3w9") is Kind.RANDOM


def test_what_cannot_be_told_is_vague():
    found = prints({"x": (id, threading.Lock()), "y": (abs, "x"), "z": (abs, 1)})
    assert found.vague == {"x", "y"}
    assert found.of["x"] == prints({"x": (id, threading.Lock())}).of["x"]


def test_results_of_other_runs():
    graph = convert_legacy_graph({f"a-{TOKEN}": (abs, "x"), "x": (abs, 1)})
    del graph["x"]
    known = [Prints(graph, {"x": value}).of[f"a-{TOKEN}"] for value in (b"1", b"2")]
    assert known[0] != known[1] and not Prints(graph).of


def test_cycles_end():
    assert prints({"a": (abs, "b"), "b": (abs, "a")}).of.keys() == {"a", "b"}


def test_layers_are_known_again_under_another_token():
    def coarse(token, value, data):
        return set(
            prints({(f"load-{token}", 0): (max, value, data), (f"load-{token}", 1): (max, value, data)})
            .layers()
            .values()
        )

    one, other = TOKEN, TOKEN[::-1]
    assert len(coarse(one, 1, threading.Lock())) == 1
    assert coarse(one, 1, threading.Lock()) == coarse(other, 1, threading.Lock()) != coarse(one, 2, threading.Lock())


def collections():
    """Return graphs of collections that are the same in each process."""
    yield (da.arange(10, chunks=5) ** 2).sum()
    yield da.arange(10, chunks=5) ** 2
    yield db.from_sequence(["a", "b", "c"], npartitions=2).map(str.upper).frequencies()
    yield dask.delayed(sum)([dask.delayed(abs)(n) for n in (-1, -2)], dask_key_name="named")


def finished(collection):
    found, _ = unpack_collections(collection)
    expression = FinalizeCompute(collections_to_expr(found, True)).optimize()
    names = list(flatten(expression.__dask_keys__()))
    found = Prints(materialize(expression, names)[0])
    return [found.of[name].hex() for name in names]


def test_what_dask_makes_of_arrays_and_bags_is_known_in_another_process():
    command = "import test_prints as t; print([t.finished(c) for c in t.collections()])"

    def elsewhere(seed):
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed}
        return subprocess.run(
            [sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert elsewhere("1") == elsewhere("2")
    different = finished(da.arange(11, chunks=5) ** 2), finished((da.arange(11, chunks=5) ** 2).sum())
    assert not any(print in elsewhere("1") for prints in different for print in prints)
