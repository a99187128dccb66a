"""Compare ways to turn results into bytes and back: ``python benchmarks/serialize.py``.

Microseconds to dump and to load. "load" is out of one read-only buffer, as a store returns it.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pyarrow as pa
from distributed.protocol import deserialize_bytes, serialize_bytelist

from burst_dask import serialize

ROWS = 1_000_000
VALUES = {
    "int": 12345,
    "text of 20": "a" * 20,
    "dict of 5": {f"k{i}": i for i in range(5)},
    "numpy scalar": np.float64(2.5),
    "array of 100 B": np.arange(12.0),
    "array of 8 MB": np.arange(float(ROWS)),
    "frame of 10 rows": pd.DataFrame({"a": range(10), "b": ["x"] * 10}),
    "frame of 24 MB": pd.DataFrame({"a": np.arange(ROWS), "b": [f"{i:08}" for i in range(ROWS)]}),
    "Arrow table of 20 MB": pa.table({"a": np.arange(ROWS), "b": [f"{i:08}" for i in range(ROWS)]}),
}
WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "pickle": (lambda value: [pickle.dumps(value, 5)], pickle.loads),
    "cloudpickle": (lambda value: [cloudpickle.dumps(value, 5)], pickle.loads),
    "distributed": (serialize_bytelist, deserialize_bytes),
    "burst_dask": (serialize.dumps, serialize.loads),
}


def microseconds(function: Callable[[], Any]) -> float:
    """Return the best of several runs."""
    best = float("inf")
    until = time.perf_counter() + 0.4
    while time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(5):
            function()
        best = min(best, (time.perf_counter() - start) / 5)
    return best * 1e6


def main() -> None:
    print(f"{'dump / load, microseconds':24}" + "".join(f"{way:>22}" for way in WAYS))
    for name, value in VALUES.items():
        row = f"{name:24}"
        for dump, load in WAYS.values():
            body = b"".join(dump(value))
            took = microseconds(lambda d=dump, v=value: d(v)), microseconds(lambda d=load, b=body: d(b))
            row += f"{took[0]:>12.1f} /{took[1]:>8.1f}"
        print(row)


if __name__ == "__main__":
    main()
