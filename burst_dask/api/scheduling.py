"""The part of a session that takes graphs: what `dask.compute` calls, and what it returns at once."""

from __future__ import annotations

from typing import Any, Self

import dask
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr, unpack_collections
from dask.core import flatten
from dask.utils import shorten_traceback

from burst_dask.api.calling import Calling
from burst_dask.api.estimating import Estimate, estimate
from burst_dask.api.run import Run, check_timeout
from burst_dask.client.shapes import Repack
from burst_dask.client.submission import Asked, submit
from burst_dask.errors import ConfigError, StoreUnavailable
from burst_dask.graph import Outside, materialize


class Scheduling(Calling):
    """Base of `Session`: Dask takes it as a scheduler."""

    _entered: list[dask.config.set]

    def compute(self, *collections: Any, traverse: bool = True, optimize_graph: bool = True, **keywords: Any) -> Run:
        """Submit collections and return at once; the run's `result` is what `dask.compute` returns.

        Parameters
        ----------
        *collections
            As of `dask.compute`: collections, and lists, dicts and so on with collections in them.
        traverse, optimize_graph
            As of `dask.compute`.
        **keywords
            ``priority``, ``retries``, ``retry_on``, ``retry_delay``, ``task_timeout`` and ``resources``, as of `get`.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://compute-doctest", workers=1)
        >>> burst.compute({"a": dask.delayed(1) + 1}).result()
        ({'a': 2},)
        >>> burst.cleanup(force=True)
        """
        asked = Asked.of(keywords)
        found, repack = unpack_collections(*collections, traverse=traverse)
        if not found:
            raise ConfigError("there is nothing to compute: no argument is or holds a Dask collection")
        with shorten_traceback():
            expression = FinalizeCompute(collections_to_expr(found, optimize_graph)).optimize()
            names = list(flatten(expression.__dask_keys__()))
        return self._submit(expression, names, asked, repack)

    def estimate(
        self, *collections: Any, within: float = 10.0, workers: int | None = None, optimize_graph: bool = True
    ) -> Estimate:
        """Say what collections would take and cost, after running some of their first tasks here.

        Nothing is stored and no worker is started. What a task takes here is taken for what it takes there; the
        larger the part of the graph that was run, the better the estimate.

        Parameters
        ----------
        within
            Seconds for which tasks are run; one that has begun is let finish.
        workers
            How many there will be; by default as many as the session has been opened with.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://estimate-doctest", fleet=None)
        >>> burst.estimate([dask.delayed(pow)(number, 2) for number in range(1000)], workers=4).tasks >= 1000
        True
        >>> burst.cleanup(force=True)
        """
        check_timeout(within)
        if not (found := unpack_collections(*collections)[0]):
            raise ConfigError("there is nothing to estimate: no argument is or holds a Dask collection")
        with shorten_traceback():
            expression = collections_to_expr(found, optimize_graph).optimize()
            names = list(flatten(expression.__dask_keys__()))
        dsk, _ = materialize(expression, names, Outside(self._link.session, self._link.futures))
        link = self._link
        workers = workers or link.workers or 1
        return estimate(dsk, link.settings, workers, within, link.clock, boot=link.boot, cost_note=link.cost_note)

    def get(self, dsk: Any, keys: Any, **keywords: Any) -> Any:
        """Compute `keys` of a graph and return what Dask's own schedulers return.

        Ctrl-C detaches: it says how to come back to the run, which goes on.

        Parameters
        ----------
        dsk
            An expression, a `HighLevelGraph` or a dict.
        keys
            A key, or nested lists of keys.
        **keywords
            ``priority`` (int), ``retries`` (int), ``retry_on`` (classes of exceptions after which a task is tried
            again, or their names; any by default), ``retry_delay`` (seconds before the second try; doubles with each,
            up to a minute), ``task_timeout`` (seconds that a try of a task may take) and
            ``resources`` (dict) for all tasks of the graph that are not annotated otherwise (the annotation of a
            time limit is ``timeout``). ``num_workers``, ``pool`` and ``chunksize`` say how a
            scheduler in this process runs tasks and are without effect. All others are refused.

        Raises
        ------
        Exception
            A task's own, with the traceback of the worker. The run is cancelled then.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://get-doctest", workers=1)
        >>> burst.get({"x": 1, "y": (sum, ["x", 2])}, ["y", ["x"]])
        (3, (1,))
        >>> burst.cleanup(force=True)
        """
        run = self._submit(dsk, keys, Asked.of(keywords))
        try:
            return run.result()
        except StoreUnavailable:
            raise  # the run goes on without this client
        except Exception:
            run._abandon()
            raise

    __call__ = get

    def _submit(self, graph: Any, names: Any, asked: Asked, repack: Repack | None = None) -> Run:
        self.flush()  # futures may be part of the graph
        run, outputs = submitted = submit(self._link, graph, names, asked, repack)
        return Run(self._link, run, attached=not submitted.is_new, progress=self._progress, outputs=outputs)

    # ------------------------------------------------------------------ the default scheduler

    def __enter__(self) -> Self:
        """Make this the default scheduler, and shuffles such as workers without a common disk can do."""
        # Bags go by the dataframe's shuffle method as well.
        setting = dask.config.set({"scheduler": self, "dataframe.shuffle.method": "tasks"})
        self._entered.append(setting)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the former defaults, and make what was submitted durable; the session and its workers go on."""
        self._entered.pop().__exit__(None, None, None)
        self.flush()
