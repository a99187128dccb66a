"""What a person sees of runs and sessions: tables and progress bars, out of plain facts.

Nothing here reads the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from burst_dask.aws.secrets import place_of
from burst_dask.config import Settings
from burst_dask.errors import ConfigError
from burst_dask.worker.memory_watch import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

#: What becomes of a task, in the order in which people read it.
TASK_STATES = ("pending", "running", "completed", "failed", "cancelled")
#: Characters of a line of a table printed as text.
TEXT_WIDTH = 140
#: Runs of a session that its table shows at most.
SHOWN_RUNS = 20
#: Settings that the table shows always; others when they differ from their default.
_SHOWN_SETTINGS = {"threads", "memory_limit", "session_timeout", "absolute_timeout", "idle_timeout"}

#: Takes tasks done, tasks failed and all tasks.
Update = Callable[[int, int, int], None]


class _Table:
    """Prints as a table of two columns."""

    def rows(self) -> list[tuple[str, str]]:
        """Return what the table shows."""
        raise NotImplementedError

    def title(self) -> str:
        raise NotImplementedError

    def records(self) -> list[dict[str, Any]]:
        """Return the rows of `to_frame`."""
        raise NotImplementedError

    def to_frame(self) -> DataFrame:
        """Return it as a pandas DataFrame, which must be installed: one row for each run."""
        return frame(self.records())

    def __rich__(self) -> Table:
        table = Table(title=self.title(), title_justify="left", show_header=False, box=box.SIMPLE)
        for name, value in self.rows():
            table.add_row(name, Text(value))  # as text: brackets in it are not markup
        return table

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in self.rows())
        return f"<table><caption>{escape(self.title())}</caption>{rows}</table>"


@dataclass(frozen=True)
class WorkersStatus:
    """Who works for a session, as its heartbeats tell."""

    #: not ended, and with a heartbeat younger than the lease
    alive: int
    #: seconds since the oldest heartbeat of those; None without any
    oldest_heartbeat: float | None

    def __str__(self) -> str:
        if self.oldest_heartbeat is None:
            return "none alive"
        return f"{self.alive} alive, oldest heartbeat {duration(self.oldest_heartbeat)} ago"


@dataclass(frozen=True)
class RunStatus(_Table):
    """How far a run is.

    Each task counts once: ``total`` is the sum of pending, running, completed, failed and cancelled.

    Examples
    --------
    >>> status = RunStatus("k3w9x2mq.7gfh2y", "running", 200, 50, 0, 8, 0, 3.5, WorkersStatus(4, 1.0), 12.0, 0.0021)
    >>> status.pending, status.left, status.progress
    (142, 150, 25.0)
    >>> print(status)
    Run k3w9x2mq.7gfh2y
    <BLANKLINE>
      state          running
      tasks          200
      pending        142
      running        8
      completed      50
      failed         0
      cancelled      0
      progress       25.0 %
      workers        4 alive, oldest heartbeat 1 s ago
      elapsed        4 s
      probably yet   12 s
      cost so far    0.0021 USD, of the whole session
      stored         0 B
    """

    id: str
    #: ``"pending"``, ``"running"``, ``"done"``, ``"failed"`` (all have an outcome, some an error), ``"cancelled"``, or
    #: ``"stopped"``: the session is closed or past its deadline, and nobody works on what is pending
    state: str
    total: int
    #: tasks with a result
    completed: int
    #: tasks with an error as their outcome, those among them that failed because another did
    failed: int
    #: reserved by workers: they run, or are next
    running: int
    #: tasks without an outcome that nobody will start any more, since the run was cancelled
    cancelled: int
    #: seconds since the run was submitted, until its last entry when nobody works on it any more
    elapsed: float
    workers: WorkersStatus
    #: seconds that the rest takes, if its tasks are like those so far and the workers stay as they are; None when
    #: nobody can tell
    remaining: float | None = None
    #: USD that the whole session has cost so far: requests of its workers and of this client, and the time of its
    #: workers at `Settings.worker_price`
    cost: float = 0.0
    #: bytes of the graph and of the results that are stored
    size: int = 0
    #: bytes of intermediate results that were stored and have been deleted since, because nobody needs them any more
    freed: int = 0

    @property
    def pending(self) -> int:
        """Tasks that are yet to be started."""
        return self.total - self.completed - self.failed - self.running - self.cancelled

    @property
    def left(self) -> int:
        """Tasks that will get an outcome yet: those pending and running."""
        return self.pending + self.running

    @property
    def progress(self) -> float:
        """Per cent of the tasks that have an outcome."""
        return 100.0 * (self.completed + self.failed) / self.total if self.total else 100.0

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        return dataclasses.asdict(self) | {"pending": self.pending, "progress": self.progress}

    def records(self) -> list[dict[str, Any]]:
        return [flat(self.to_dict())]

    def title(self) -> str:
        return f"Run {self.id}"

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("state", self.state),
            ("tasks", str(self.total)),
            *((name, str(getattr(self, name))) for name in TASK_STATES),
            ("progress", f"{self.progress:.1f} %"),
            ("workers", str(self.workers)),
            ("elapsed", duration(self.elapsed)),
            *([] if self.remaining is None else [("probably yet", duration(self.remaining))]),
            ("cost so far", f"{money(self.cost)}, of the whole session"),
            ("stored", stored(self.size, self.freed)),
        ]


@dataclass(frozen=True)
class SessionStatus(_Table):
    """A session, its workers and its runs."""

    id: str
    name: str | None
    store: str
    host: str
    #: ``"open"``, ``"closed"``, or ``"expired"``: past its deadline
    state: str
    #: seconds since 1970
    created: float
    #: seconds until the deadline, by the store's clock; None when there is none
    time_left: float | None
    workers: WorkersStatus
    #: in the order of their submission
    runs: tuple[RunStatus, ...]
    settings: dict[str, Any]
    #: USD so far, as of `RunStatus.cost`
    cost: float
    #: store requests so far by verb, of its workers and of this client
    requests: dict[str, int]
    #: what is amiss with its workers, and what will be, in words
    notes: tuple[str, ...] = ()
    #: what is to be said of the cost; empty when it is what it says
    cost_note: str = ""
    #: where the key is by which what it stores is signed; empty when it is not
    key: str = ""

    @property
    def size(self) -> int:
        """Bytes of graphs and results that are stored."""
        return sum(run.size for run in self.runs)

    @property
    def freed(self) -> int:
        """Bytes of intermediate results that have been deleted since nobody needs them."""
        return sum(run.freed for run in self.runs)

    @property
    def totals(self) -> dict[str, int]:
        """Tasks of all runs by state, and ``"total"``."""
        return add_up(self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        runs = [run.to_dict() for run in self.runs]
        more = {"runs": runs, "totals": self.totals, "size": self.size, "freed": self.freed}
        return dataclasses.asdict(self) | more

    def records(self) -> list[dict[str, Any]]:
        return [record for run in self.runs for record in run.records()]

    def title(self) -> str:
        return f"Session {self.id}" + (f" ({self.name})" if self.name else "")

    def rows(self) -> list[tuple[str, str]]:
        left = "no limit" if self.time_left is None else f"ends in {duration(self.time_left)}"
        runs = self.runs[-SHOWN_RUNS:]
        return [
            ("state", f"{self.state}, {left}" if self.state == "open" else self.state),
            ("store", self.store),
            ("opened", f"{when(self.created)} on {self.host}"),
            *([("signed", f"with the key in {_place(self.key, self.id)}")] if self.key else []),
            ("workers", str(self.workers)),
            *(("note", note) for note in self.notes),
            ("tasks", counts(self.totals)),
            ("cost so far", noted(money(self.cost), self.cost_note)),
            ("stored", stored(self.size, self.freed)),
            (
                "settings",
                ", ".join(f"{name}={value}" for name, value in self.settings.items() if _matters(name, value)),
            ),
            ("runs", str(len(self.runs)) + (f", the last {len(runs)} of them:" if len(runs) < len(self.runs) else "")),
            *((run.id, f"{run.state}, {run.completed} of {run.total} completed, {run.failed} failed") for run in runs),
        ]


def _place(key: str, session: str) -> str:
    """Return in words where the key of a session is.

    >>> _place("file", "k3w9x2mq"), _place("secretsmanager:eu-west-1:burst-dask/session/k3w9x2mq", "k3w9x2mq")
    ('a file of who opened it', 'the secret burst-dask/session/k3w9x2mq in eu-west-1')
    """
    secret = place_of(key, session)
    return "a file of who opened it" if secret is None else f"the secret {secret[1]} in {secret[0]}"


def stored(size: int, freed: int) -> str:
    """Return sizes as people read them.

    >>> stored(3 << 20, 0), stored(3 << 20, 2 << 30)
    ('3.0 MiB', '3.0 MiB, and 2.0 GiB of intermediates freed')
    """
    return format_bytes(size) + (f", and {format_bytes(freed)} of intermediates freed" if freed else "")


def counts(totals: dict[str, int]) -> str:
    """Return counts of tasks as people read them.

    >>> counts({"total": 5, "pending": 0, "running": 0, "completed": 4, "failed": 1, "cancelled": 0})
    '5: 4 completed, 1 failed'
    """
    parts = ", ".join(f"{totals[name]} {name}" for name in TASK_STATES if totals[name])
    return f"{totals['total']}" + (f": {parts}" if parts else "")


def add_up(runs: Iterable[RunStatus]) -> dict[str, int]:
    """Return the tasks of all runs by state, and ``"total"``."""
    runs = list(runs)
    return {name: sum(getattr(run, name) for run in runs) for name in ("total", *TASK_STATES)}


def as_text(table: Any) -> str:
    """Return what rich prints of a table, without colours."""
    text = StringIO()
    Console(file=text, width=TEXT_WIDTH).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")


def _matters(name: str, value: Any) -> bool:
    """Tell whether a setting is shown to people: what they asked for, and what limits them."""
    fields = {field.name: field.default for field in msgspec.structs.fields(Settings)}
    return name in _SHOWN_SETTINGS or (value != fields.get(name) and value not in ({}, None))


def flat(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with its dicts taken apart, as columns of a frame.

    >>> flat({"id": "a", "workers": {"alive": 2}})
    {'id': 'a', 'workers_alive': 2}
    """
    taken: dict[str, Any] = {}
    for name, value in record.items():
        taken |= {f"{name}_{part}": its for part, its in value.items()} if isinstance(value, dict) else {name: value}
    return taken


def frame(records: list[dict[str, Any]]) -> DataFrame:
    """Return records as a DataFrame, if pandas is there."""
    try:
        import pandas  # noqa: PLC0415 - optional, and only who wants a frame needs it
    except ImportError as error:
        raise ConfigError("to_frame() needs pandas: pip install pandas; to_dict() gives the same without") from error
    return pandas.DataFrame(records)


def money(dollars: float) -> str:
    """Return an amount as people read it.

    >>> money(0), money(0.00001), money(0.00213), money(12.3456)
    ('0 USD', 'under 0.0001 USD', '0.0021 USD', '12.35 USD')
    """
    if 0 < dollars < 1e-4:
        return "under 0.0001 USD"
    if not dollars:
        return "0 USD"
    return f"{dollars:.2f} USD" if dollars >= 1 else f"{dollars:.4f} USD"


def noted(text: str, note: str) -> str:
    """Return a text with what is to be said of it.

    >>> noted("1.00 USD", ""), noted("1.00 USD", "at most")
    ('1.00 USD', '1.00 USD, at most')
    """
    return f"{text}, {note}" if note else text


def when(seconds: float) -> str:
    """Return a time, in seconds since 1970, as this machine's people write it."""
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def duration(seconds: float) -> str:
    """Return seconds as people say them.

    >>> duration(0.4), duration(75), duration(4000), duration(200_000)
    ('0 s', '1 min 15 s', '1 h 6 min', '2 d 7 h')
    """
    whole = round(seconds)
    for size, name, smaller, its_name in ((86_400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {its_name}"
    return f"{whole} s"


@contextlib.contextmanager
def progress(show: bool | None, title: str) -> Iterator[Update | None]:
    """Show a progress bar while the context lasts.

    Parameters
    ----------
    show
        None shows one on a terminal and in a notebook, and nowhere else.

    Yields
    ------
    callable or None
        Takes the news, from any thread; None when nothing is shown.
    """
    notebook = _in_notebook()
    if show is False or (show is None and not notebook and not sys.stderr.isatty()):
        yield None
    elif notebook:
        yield _in_cell(title)
    else:
        with _on_terminal(title) as update:
            yield update


@contextlib.contextmanager
def _on_terminal(title: str) -> Iterator[Update]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def update(done: int, failed: int, total: int) -> None:
            text = f"{title} ({failed} failed)" if failed else title
            bar.update(task, completed=done + failed, total=total, description=text)

        yield update


def _in_cell(title: str) -> Update:
    """Return what keeps a bar of HTML below the notebook's cell up to date."""
    ipython: Any = importlib.import_module("IPython.display")

    def html(done: int, failed: int, total: int) -> Any:
        failures = f", {failed} failed" if failed else ""
        bar = f'<progress value="{done + failed}" max="{max(total, 1)}"></progress>'
        return ipython.HTML(f"{escape(title)} {bar} {done} of {total}{failures}")

    handle = ipython.display(html(0, 0, 0), display_id=True)
    return lambda done, failed, total: handle.update(html(done, failed, total))


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"
