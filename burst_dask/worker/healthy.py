"""``python -m burst_dask.worker.healthy``: the health check of a container.

Exit code 0 while a supervisor has a worker process, 1 when there is none. A worker that is stuck is not told here: its
heartbeat ends, and others take its work over.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import psutil

#: What runs one agent; see `burst_dask.worker.supervisor`.
AGENT = "burst_dask.worker.process"


def is_healthy(processes: Iterable[psutil.Process]) -> bool:
    """Tell whether any of `processes` is a worker that runs."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if AGENT in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


if __name__ == "__main__":
    raise SystemExit(0 if is_healthy(psutil.process_iter()) else 1)
