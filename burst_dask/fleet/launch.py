"""``python -m burst_dask.fleet.launch RECORD OPTIONS``: the supervisor that a local fleet starts.

It differs from ``burst worker`` in keeping its record true, and in ending at once when there is
none: then the fleet was stopped before it came up.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import msgspec

from burst_dask.fleet import records
from burst_dask.worker.supervisor import Options, Supervisor, supervise

log = logging.getLogger("burst_dask.supervisor")


def main(path: Path, options: Options) -> int:
    """Keep the agents of `options` alive, and the record `path` true."""
    if not records.update(path, records.SupervisorRecord(options.processes, os.getpid())):
        return 0

    def changed(supervisor: Supervisor) -> None:
        agents = {str(worker): child.process.pid for worker, child in supervisor.children.items()}
        try:
            there = records.update(path, records.SupervisorRecord(supervisor.slots, os.getpid(), agents))
        except OSError as error:  # such as a full disk: the work goes on
            log.warning("%s could not be written: %s", path, error)
            return
        if not there:
            supervisor.stop()

    return supervise(options, changed=changed)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=Options)))
