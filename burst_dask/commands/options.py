"""What several commands have in common: arguments, and how they print."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click
from rich.console import Console

from burst_dask.api.run import Run
from burst_dask.api.session import Session, attach
from burst_dask.errors import ConfigError
from burst_dask.protocol import keys

F = TypeVar("F", bound=Callable[..., Any])


def identifier(function: F) -> F:
    """Add the argument ID: a run, a session, or the name of a session."""
    return click.argument("identifier", metavar="ID")(function)


def store(function: F) -> F:
    """Add the option of the store."""
    return click.option(
        "--store", envvar="BURST_STORE", help="URL of the store, such as s3://bucket/prefix; by default the local one."
    )(function)


def as_json(function: F) -> F:
    """Add the option that prints for scripts."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")(function)


def show(data: Any, table: Any, as_json: bool) -> None:
    """Print `data` as JSON, or `table` for people: as wide as their terminal, or as plain text."""
    if as_json:
        click.echo(json.dumps(data))
        return
    console = Console()
    if console.is_terminal:
        console.print(table)
    else:
        click.echo(str(table))


def only_signed() -> bool:
    """Tell whether ``burst --signed`` was said, which refuses sessions that are not."""
    return bool(click.get_current_context().find_root().params.get("signed", False))


def attached(identifier: str, store: str | None) -> Any:
    """Return what is meant: a run or a session."""
    return attach(identifier, store=store, signed=only_signed())


def session_of(identifier: str, store: str | None, what: str) -> Session:
    """Return the session that is meant; refuse a run, of which `what` says why."""
    found: Run | Session = attached(identifier, store)
    if isinstance(found, Run):  # which the id alone does not tell: a name may have a dot in it
        raise ConfigError(f"{identifier} is a run; {what} {keys.session_of(identifier)}")
    return found


def run_of(identifier: str, store: str | None, what: str) -> Run:
    """Return the run that is meant; refuse a session, of which `what` says why."""
    found: Run | Session = attached(identifier, store)
    if isinstance(found, Session):
        runs = [run.id for run in found.status().runs]
        which = f"its runs are {', '.join(runs[-10:])}" if runs else "it has no run"
        raise ConfigError(f"{identifier} is a session; {what}, and {which}")
    return found
