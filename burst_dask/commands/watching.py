"""``burst watch``: a live view until the work is over, on a terminal or as lines."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.live import Live

from burst_dask import sync
from burst_dask.clock import Clock, SystemClock
from burst_dask.commands import options
from burst_dask.errors import StoreUnavailable

#: Seconds between looks.
INTERVAL = 2.0
#: States of runs that nobody works on any more.
_OVER = {"done", "failed", "cancelled", "stopped"}


@click.command()
@options.identifier
@options.store
@click.option("--interval", type=click.FloatRange(min=0.1), default=INTERVAL, show_default=True, help="Seconds.")
@options.as_json
def watch(identifier: str, store: str | None, interval: float, as_json: bool) -> None:
    """Watch a run, or the runs of a session, until they are over.

    On a terminal the view is kept up to date in place; elsewhere each change is a line. With --json
    each change is a JSON object. Exit codes: 0 all tasks have results, 1 some failed, were cancelled,
    or will not be done.
    """
    watched = options.attached(identifier, store)
    last = None
    with _view(as_json) as update:
        for status in _statuses(watched, SystemClock(), interval):
            update(status)
            last = status
    raise SystemExit(0 if last is not None and _went_well(last) else 1)


def _statuses(watched: Any, clock: Clock, interval: float) -> Iterator[Any]:
    """Yield how far it is, again and again until it is over; a network that is away for a while is waited for."""
    while True:
        with contextlib.suppress(StoreUnavailable):
            status = watched.status()
            yield status
            if _is_over(status):
                return
        sync.run(clock.sleep(interval))


def _states(status: Any) -> list[str]:
    return [run.state for run in getattr(status, "runs", (status,))]


def _is_over(status: Any) -> bool:
    """Tell whether nothing is left to watch; a session without a run is waited for unless it has ended."""
    states = _states(status)
    if not states:
        return bool(status.state != "open")
    return all(state in _OVER for state in states) and not getattr(status, "running", 0)


def _went_well(status: Any) -> bool:
    return all(state == "done" for state in _states(status))


@contextlib.contextmanager
def _view(as_json: bool) -> Iterator[Any]:
    """Show what it is given: in place on a terminal, else when it has changed."""
    console = Console()
    if console.is_terminal and not as_json:
        # No second screen and no own thread: it works over any ssh, and what was last seen stays there.
        with Live(console=console, auto_refresh=False) as live:
            yield lambda status: live.update(status, refresh=True)
        return
    shown: list[str] = []

    def line(status: Any) -> None:
        text = line_of(status)
        if text not in shown[-1:]:
            shown.append(text)
            click.echo(json.dumps(status.to_dict()) if as_json else text)

    yield line


def line_of(status: Any) -> str:
    """Return a status in one line, without what changes by itself."""
    totals = getattr(status, "totals", None) or {name: getattr(status, name) for name in _COUNTS}
    counts = ", ".join(f"{totals[name]} {name}" for name in _COUNTS[1:] if totals[name])
    return f"{status.id} {status.state}: {counts or 'no tasks'} of {totals['total']}; {status.workers.alive} workers"


_COUNTS = ("total", "pending", "running", "completed", "failed", "cancelled")
