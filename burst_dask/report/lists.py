"""What a person sees of many things: sessions of a store, events of a run. Lists that print as tables.

Nothing here reads the store.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any, ClassVar

from rich import box
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from burst_dask.report.tables import as_text, counts, flat, frame, money, when
from burst_dask.worker.memory_watch import format_bytes

if TYPE_CHECKING:
    from pandas import DataFrame

#: Characters between columns.
_GAP = 3


class _Grid:
    """Prints as a table of many columns."""

    #: columns whose texts are broken into lines where there is little room, and how narrow they become; others are
    #: never broken, so that an id can be copied
    wrapped: ClassVar[Mapping[str, int]] = {}
    #: columns that are left out, in this order, where there is less room than that
    expendable: ClassVar[tuple[str, ...]] = ()

    def header(self) -> tuple[str, ...]:
        raise NotImplementedError

    def lines(self) -> list[tuple[str, ...]]:
        """Return the rows that are shown, each with a text for every column."""
        raise NotImplementedError

    def title(self) -> str:
        raise NotImplementedError

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        table = Table(title=self.title(), title_justify="left", box=box.SIMPLE)
        lines = self.lines()
        shown = self._fitting(lines, options.max_width)
        for name in (self.header()[column] for column in shown):
            table.add_column(name, overflow="fold", no_wrap=name not in self.wrapped)
        for line in lines:
            table.add_row(*(Text(line[column]) for column in shown))
        yield table

    def _fitting(self, lines: list[tuple[str, ...]], width: int) -> list[int]:
        """Return the columns that are shown in so many characters."""
        header = self.header()
        wide = [max(map(len, cells)) for cells in zip(header, *lines, strict=True)]
        needed = {name: min(size, self.wrapped.get(name, size)) + _GAP for name, size in zip(header, wide, strict=True)}
        for name in self.expendable:
            if sum(needed.values()) <= width:
                break
            del needed[name]
        return [column for column, name in enumerate(header) if name in needed]

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

    wrapped: ClassVar = {"what happened": 20}

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
    #: ``"open"``, ``"closed"`` or ``"expired"``; ``"unreadable"`` when it is damaged or of a newer version; of one that
    #: is signed ``"no key"`` when its key is not here, and ``"untrusted"`` when it is not what its key vouches for
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
    #: whether what it stores is signed
    signed: bool = False


class SessionList(_Grid, list[SessionRow]):
    """Sessions of a store, the one with the newest activity first: a list that prints as a table.

    Where the terminal is narrow some columns are left out; `to_dicts` and `to_frame` have all.
    """

    wrapped: ClassVar = {"name": 8, "tasks": 12}
    expendable = ("created", "size", "runs", "cost", "workers", "last activity")

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
                row.state + (", signed" if row.signed else ""),
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
