"""A Dask scheduler backend with no scheduler process: all state lives in an object store.

Examples
--------
>>> import dask
>>> from burst_dask import Session
>>> burst = Session("memory://doctest", workers=1)
>>> dask.compute(dask.delayed(sum)([1, 2]), scheduler=burst)
(3,)
>>> burst.cleanup(force=True)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from burst_dask import errors as errors
    from burst_dask.api.futures import Future as Future
    from burst_dask.api.futures import as_completed as as_completed
    from burst_dask.api.futures import wait as wait
    from burst_dask.api.overview import list_sessions as list_sessions
    from burst_dask.api.run import Run as Run
    from burst_dask.api.session import Session as Session
    from burst_dask.api.session import attach as attach
    from burst_dask.client.collecting import TaskError as TaskError
    from burst_dask.client.resuming import ResumeWarning as ResumeWarning

__version__ = "0.1.0"

__all__ = [
    "Future",
    "ResumeWarning",
    "Run",
    "Session",
    "TaskError",
    "__version__",
    "as_completed",
    "attach",
    "errors",
    "list_sessions",
    "wait",
]

#: Imported when first used: workers import this package too, and need none of these.
_MODULES = {
    "Future": "burst_dask.api.futures",
    "ResumeWarning": "burst_dask.client.resuming",
    "Run": "burst_dask.api.run",
    "Session": "burst_dask.api.session",
    "TaskError": "burst_dask.client.collecting",
    "as_completed": "burst_dask.api.futures",
    "attach": "burst_dask.api.session",
    "list_sessions": "burst_dask.api.overview",
    "wait": "burst_dask.api.futures",
}


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module("burst_dask.errors")
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
