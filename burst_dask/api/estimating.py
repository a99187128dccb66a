"""What a graph would take and cost, from some of its tasks that run here."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dask._task_spec import GraphNode
from dask.order import order
from dask.utils import key_split

from burst_dask.client.statuses import OVERHEAD
from burst_dask.clock import Clock
from burst_dask.config import Settings
from burst_dask.report.tables import _Table, duration, money, noted


@dataclass(frozen=True)
class Estimate(_Table):
    """What some tasks that ran here tell of a whole graph.

    Examples
    --------
    >>> print(Estimate(tasks=1000, sampled=20, unknown=10, work=5000.0, seconds=125.0, cost=0.12, workers=50))
    Estimate
    <BLANKLINE>
      tasks          1000, of which 20 ran here
      work           1 h 23 min of one thread
      with workers   50: 2 min 5 s
      cost           0.1200 USD
      unknown        10 tasks of kinds that did not run here: taken for as long as the others
    """

    tasks: int
    #: tasks that ran here
    sampled: int
    #: tasks of kinds that did not
    unknown: int
    #: seconds of one thread
    work: float
    #: seconds with `workers`, their start included
    seconds: float
    #: USD, without storage
    cost: float
    workers: int
    #: what is to be said of the cost; empty when it is what it says
    cost_note: str = ""

    def title(self) -> str:
        return "Estimate"

    def rows(self) -> list[tuple[str, str]]:
        """Return what the table shows."""
        rows = [
            ("tasks", f"{self.tasks}, of which {self.sampled} ran here"),
            ("work", f"{duration(self.work)} of one thread"),
            ("with workers", f"{self.workers}: {duration(self.seconds)}"),
            ("cost", noted(money(self.cost), self.cost_note)),
        ]
        if self.unknown:
            rows.append(
                ("unknown", f"{self.unknown} tasks of kinds that did not run here: taken for as long as the others")
            )
        return rows

    def records(self) -> list[dict[str, Any]]:
        """Return the row of `to_frame`."""
        return [dict(vars(self))]


def run_some(dsk: Mapping[Any, GraphNode], within: float, clock: Clock) -> tuple[dict[str, list[float]], int]:
    """Run the first tasks of a graph, as Dask orders them, for that many seconds; return what they took, by kind."""
    priorities = order(dsk)
    took: dict[str, list[float]] = defaultdict(list)
    values: dict[Any, Any] = {}
    begin = clock.monotonic()
    for key in sorted(dsk, key=priorities.__getitem__):
        start = clock.monotonic()
        if start - begin >= within:
            break
        node = dsk[key]
        if not node.dependencies <= values.keys():  # of another run
            continue
        values[key] = node({name: values[name] for name in node.dependencies})
        took[key_split(key)].append(clock.monotonic() - start)
    return took, len(values)


def estimate(
    dsk: Mapping[Any, GraphNode],
    settings: Settings,
    workers: int,
    within: float,
    clock: Clock,
    *,
    boot: float = 0.0,
    cost_note: str = "",
) -> Estimate:
    """Return what a graph takes by `workers`, after running some of it here.

    Parameters
    ----------
    within
        Seconds for which tasks are run; one that has begun is let finish.
    boot
        Seconds until a worker that is started works; they are paid for.
    cost_note
        What is to be said of the price of a worker.
    """
    took, sampled = run_some(dsk, within, clock)
    ran = [seconds for kind in took.values() for seconds in kind]
    mean = sum(ran) / len(ran) if ran else 0.0
    counts = Counter(key_split(key) for key in dsk)
    means = {kind: sum(seconds) / len(seconds) for kind, seconds in took.items()}
    work = sum(count * (means.get(kind, mean) + OVERHEAD) for kind, count in counts.items())
    useful = max(1, min(workers, len(dsk)))
    seconds = boot + max(work / (useful * settings.threads), max(means.values(), default=0.0))
    return Estimate(
        tasks=len(dsk),
        sampled=sampled,
        unknown=sum(count for kind, count in counts.items() if kind not in took),
        work=work,
        seconds=seconds,
        cost=useful * seconds / 3600 * settings.worker_price,
        workers=useful,
        cost_note=cost_note,
    )
