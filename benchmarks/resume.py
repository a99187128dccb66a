"""What finding the tasks of an earlier run costs: ``python benchmarks/resume.py [tasks] [names|tokens|array]``.

The run is on a store with S3's latencies, and half of it is done. A second session object then resumes it, as another
process would, and submits a graph that is the same but for its last task.
"""

from __future__ import annotations

import operator
import sys
import tempfile
import time
import warnings
from hashlib import md5
from typing import Any

from burst_dask import Session
from burst_dask.client.submission import Asked


def graph(tasks: int, what: str, last: str) -> dict[Any, Any]:
    token = "-" + md5(b"x").hexdigest() if what == "tokens" else ""
    names = [("x" + token, i) for i in range(tasks - 1)]
    made: dict[Any, Any] = {name: (operator.neg, i) for i, name in enumerate(names)}
    made[last] = (sum, names)
    return made


def main() -> None:
    tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    what = sys.argv[2] if len(sys.argv) > 2 else "names"
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as place:
        url = f"slow+file://{place}?put=0.04&get=0.03&list=0.05"
        for resume, note in ((False, "submitted"), (True, "submitted by a session that may be resumed")):
            session = Session(url, name=f"{resume}", resume=resume, workers=2, fleet="local")
            started = time.perf_counter()
            run = session._submit(graph(tasks, what, "total"), "total", Asked())
            print(f"{tasks} tasks {note} in {time.perf_counter() - started:.2f} s")
        run.wait()
        for last in ("total", "other"):
            began = time.perf_counter()
            again = Session(url, name="True", resume=True, workers=2)
            opened, before = time.perf_counter(), dict(again.requests)
            run = again._submit(graph(tasks, what, last), last, Asked())
            sent = {verb: count - before.get(verb, 0) for verb, count in again.requests.items()}
            print(
                f"resumed in {opened - began:.2f} s; {last!r} submitted in {time.perf_counter() - opened:.2f} s with "
                f"{sent}, {run._view.plan.tasks} tasks and {len(run._view.plan.externals)} results of before"
            )
        for name in ("True", "False"):
            Session(url, name=name, resume=True, workers=2).cleanup(force=True)


if __name__ == "__main__":
    main()
