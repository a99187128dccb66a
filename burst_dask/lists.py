"""What a person sees of many things: sessions of a store, events of a run. Lists that print as tables.

Nothing here reads the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from burst_dask.report import as_text, counts, flat, frame, money, when
from burst_dask.worker.memory_watch import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.table import Table


class _Grid:
    """Prints as a table of many columns."""

    def header(self) -> tuple[str, ...]:
        raise NotImplementedError

    def lines(self) -> list[tuple[str, ...]]:
        """Return the rows that are shown, each with a text for every column."""
        raise NotImplementedError

    def title(self) -> str:
        raise NotImplementedError

    def __rich__(self) -> Table:
        from rich import box  # noqa: PLC0415 - only who prints a table needs it
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(title=self.title(), title_justify="left", box=box.SIMPLE)
        for name in self.header():
            table.add_column(name, overflow="fold")
        for line in self.lines():
            table.add_row(*map(Text, line))
        return table

    def __str__(self) -> str:
        return as_text(self)

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header())
        rows = "".join("<tr>" + "".join(f"<td>{escape(its)}</td>" for its in line) + "</tr>" for line in self.lines())
        return f"<table><caption>{escape(self.title())}</caption><tr>{head}</tr>{rows}</table>"


@dataclass(frozen=True)
class StoryLine:
    """One thing that happened."""

    #: seconds since 1970, by the clock of who did it
    time: float
    #: the log that tells it: ``"session"`` or ``"shard 00012"``
    log: str
    what: str


class Story(_Grid, list[StoryLine]):
    """What happened to a run or a task, oldest first: a list that prints as a table."""

    def __init__(self, title: str, lines: Iterable[StoryLine]) -> None:
        super().__init__(lines)
        self._title = title

    def title(self) -> str:
        return self._title

    def header(self) -> tuple[str, ...]:
        return "time", "log", "what happened"

    def lines(self) -> list[tuple[str, ...]]:
        return [(when(line.time), line.log, line.what) for line in self]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return all of it as what JSON can hold."""
        return [dataclasses.asdict(line) for line in self]

    def to_frame(self) -> DataFrame:
        """Return it as a pandas DataFrame, which must be installed."""
        return frame(self.to_dicts())


@dataclass(frozen=True)
class SessionRow:
    """A session as a listing shows it; None is what was not looked into."""

    id: str
    name: str | None
    #: ``"open"``, ``"closed"`` or ``"expired"``
    state: str
    #: seconds since 1970
    created: float
    #: seconds since 1970 by the store's clock: the newest entry, or heartbeat
    last_activity: float
    host: str
    runs: int | None = None
    #: of all its runs, by state, and ``"total"``
    tasks: dict[str, int] | None = None
    #: that are alive
    workers: int | None = None
    #: USD so far
    cost: float | None = None
    #: bytes of graphs and results
    size: int | None = None


class SessionList(_Grid, list[SessionRow]):
    """Sessions of a store, the one with the newest activity first: a list that prints as a table."""

    def __init__(self, store: str, rows: Iterable[SessionRow]) -> None:
        super().__init__(rows)
        self._store = store

    def title(self) -> str:
        return f"{len(self)} sessions in {self._store}"

    def header(self) -> tuple[str, ...]:
        return "id", "name", "state", "created", "last activity", "runs", "tasks", "workers", "cost", "size"

    def lines(self) -> list[tuple[str, ...]]:
        return [
            (
                row.id,
                row.name or "",
                row.state,
                when(row.created),
                when(row.last_activity),
                *("" if its is None else str(its) for its in (row.runs, row.tasks and counts(row.tasks), row.workers)),
                "" if row.cost is None else money(row.cost),
                "" if row.size is None else format_bytes(row.size),
            )
            for row in self
        ]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return all of it as what JSON can hold."""
        return [dataclasses.asdict(row) for row in self]

    def to_frame(self) -> DataFrame:
        """Return it as a pandas DataFrame, which must be installed: one row for each session."""
        return frame([flat(record) for record in self.to_dicts()])
