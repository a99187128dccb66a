"""What a person sees of runs and sessions: tables and progress bars, out of plain facts.

Nothing here reads the store.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

#: Takes tasks done, tasks failed and all tasks.
Update = Callable[[int, int, int], None]


class _Table:
    """Prints as a table of two columns."""

    def rows(self) -> list[tuple[str, str]]:
        """Return what the table shows."""
        raise NotImplementedError

    def title(self) -> str:
        raise NotImplementedError

    def __rich__(self) -> Table:
        from rich import box  # noqa: PLC0415 - only who prints a table needs it
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(title=self.title(), title_justify="left", show_header=False, box=box.SIMPLE)
        for name, value in self.rows():
            table.add_row(name, Text(value))  # as text: brackets in it are not markup
        return table

    def __str__(self) -> str:
        from rich.console import Console  # noqa: PLC0415

        text = StringIO()
        Console(file=text, width=110).print(self)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()).strip("\n")

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

    Examples
    --------
    >>> status = RunStatus("k3w9x2mq.7gfh2y", "running", 200, 50, 0, 8, 3.5, WorkersStatus(4, 1.0))
    >>> status.pending, status.progress
    (150, 25.0)
    >>> print(status)
    Run k3w9x2mq.7gfh2y
    <BLANKLINE>
      state     running
      tasks     200
      done      50 (25.0 %)
      failed    0
      pending   150, of which 8 run or are next
      workers   4 alive, oldest heartbeat 1 s ago
      elapsed   4 s
    """

    id: str
    #: ``"pending"``, ``"running"``, ``"done"``, ``"failed"`` or ``"cancelled"``
    state: str
    total: int
    done: int
    failed: int
    #: reserved by workers: they run, or are next
    running: int
    #: seconds since the run was submitted, until its last entry when it is complete
    elapsed: float
    workers: WorkersStatus

    @property
    def pending(self) -> int:
        """Tasks without an outcome, those that run among them."""
        return self.total - self.done - self.failed

    @property
    def progress(self) -> float:
        """Per cent of the tasks that have an outcome."""
        return 100.0 * (self.total - self.pending) / self.total if self.total else 100.0

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        return dataclasses.asdict(self) | {"pending": self.pending, "progress": self.progress}

    def title(self) -> str:
        return f"Run {self.id}"

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("state", self.state),
            ("tasks", str(self.total)),
            ("done", f"{self.done} ({self.progress:.1f} %)"),
            ("failed", str(self.failed)),
            ("pending", f"{self.pending}, of which {self.running} run or are next" if self.pending else "0"),
            ("workers", str(self.workers)),
            ("elapsed", duration(self.elapsed)),
        ]


@dataclass(frozen=True)
class SessionStatus(_Table):
    """A session, its workers and its runs."""

    id: str
    name: str | None
    store: str
    host: str
    closed: bool
    workers: WorkersStatus
    #: in the order of their submission
    runs: tuple[RunStatus, ...]
    settings: dict[str, Any]
    #: what is amiss with its workers, in words
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as what JSON can hold."""
        return dataclasses.asdict(self) | {"runs": [run.to_dict() for run in self.runs]}

    def title(self) -> str:
        return f"Session {self.id}" + (f" ({self.name})" if self.name else "")

    def rows(self) -> list[tuple[str, str]]:
        return [
            ("state", "closed" if self.closed else "open"),
            ("store", self.store),
            ("opened on", self.host),
            ("workers", str(self.workers)),
            *(("note", note) for note in self.notes),
            ("runs", str(len(self.runs))),
            *((run.id, f"{run.state}, {run.done} of {run.total} done, {run.failed} failed") for run in self.runs),
        ]


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
    from rich.console import Console  # noqa: PLC0415 - imported by who shows a bar
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: PLC0415

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
