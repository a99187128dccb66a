"""Commands that look and change nothing: ls, status, story."""

from __future__ import annotations

import click

from burst_dask.api.overview import list_sessions
from burst_dask.commands import options


@click.command()
@options.store
@click.option("--details", type=click.IntRange(min=0), default=100, show_default=True, help="Runs to look into.")
@options.as_json
def ls(store: str | None, details: int, as_json: bool) -> None:
    """List the sessions of a store, the newest activity first."""
    found = list_sessions(store, details=details)
    options.show(found.to_dicts(), found, as_json)


@click.command()
@options.identifier
@options.store
@options.as_json
def status(identifier: str, store: str | None, as_json: bool) -> None:
    """Show how far a run or a session is."""
    found = options.attached(identifier, store).status()
    options.show(found.to_dict(), found, as_json)


@click.command()
@options.identifier
@click.argument("key", required=False)
@options.store
@options.as_json
def story(identifier: str, key: str | None, store: str | None, as_json: bool) -> None:
    """Tell what happened to a run, or to the task KEY of it."""
    found = options.run_of(identifier, store, "a story is told of a run").story(key)
    options.show(found.to_dicts(), found, as_json)
