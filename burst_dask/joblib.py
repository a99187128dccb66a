"""A session as a backend of joblib, and so of scikit-learn's searches.

::

    import joblib
    import burst_dask.joblib  # makes the backend known

    with burst, joblib.parallel_config("burst"):
        GridSearchCV(model, parameters).fit(x, y)

    with joblib.parallel_config("burst", session=burst):
        joblib.Parallel()(joblib.delayed(work)(i) for i in range(100))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask
from joblib import register_parallel_backend
from joblib._parallel_backends import ParallelBackendBase, SequentialBackend  # as distributed.joblib did

from burst_dask.api.executor import SessionExecutor
from burst_dask.api.futures import Future
from burst_dask.api.session import Session
from burst_dask.client.submission import UNKNOWN_THREADS
from burst_dask.errors import ConfigError


class BurstBackend(ParallelBackendBase):  # type: ignore[misc]
    """Has joblib's tasks made by the workers of a session.

    Parameters
    ----------
    session
        By default the one whose ``with`` block this is in.
    **keywords
        ``retries``, ``priority``, ``timeout`` and ``resources`` for each task, as of `Session.submit`.

    Raises
    ------
    ConfigError
        There is no session.
    """

    default_n_jobs = -1
    supports_retrieve_callback = True
    supports_inner_max_num_threads = False

    def __init__(self, session: Session | None = None, nesting_level: int | None = None, **keywords: Any) -> None:
        super().__init__(nesting_level=nesting_level or 0)
        found = session or dask.config.get("scheduler", None)
        if not isinstance(found, Session):
            raise ConfigError(
                "there is no session for joblib: use joblib.parallel_config('burst', session=…), "
                "or that within the session's own with block"
            )
        self._session = found
        self._keywords = {name: value for name, value in keywords.items() if value is not None}
        self._executor: SessionExecutor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # Tasks carry the backend for what they run in parallel themselves: on a worker, one after another.
        return SequentialBackend, ()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many tasks run at once: all threads of the workers, whatever `n_jobs`, unless it is 1."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs == 1:
            return 1
        link = self._session._link
        return (link.workers or UNKNOWN_THREADS) * link.settings.threads

    def configure(self, n_jobs: int = 1, parallel: Any = None, **keywords: Any) -> int:
        """Begin; all tasks are submitted at once, because a task's way to its worker takes a while."""
        if parallel is not None:
            parallel.pre_dispatch = "all"
        self.parallel = parallel
        self._executor = self._session.get_executor(**self._keywords)
        return self.effective_n_jobs(n_jobs)

    def submit(self, func: Callable[[], Any], callback: Callable[[Any], object] | None = None) -> Future:
        if self._executor is None:
            self._executor = self._session.get_executor(**self._keywords)
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def retrieve_result_callback(self, out: Future) -> Any:
        return out.result()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        self._stop(cancel=True)
        if ensure_ready:
            self._executor = self._session.get_executor(**self._keywords)

    def terminate(self) -> None:
        self._stop(cancel=False)

    def _stop(self, *, cancel: bool) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=cancel)
            self._executor = None

    def get_nested_backend(self) -> tuple[Any, None]:
        return SequentialBackend(nesting_level=(self.nesting_level or 0) + 1), None


register_parallel_backend("burst", BurstBackend)
