"""Commands that look and change nothing: ls, status, story, doctor."""

from __future__ import annotations

import click

from burst_dask import sync
from burst_dask.api.overview import list_sessions
from burst_dask.clock import SystemClock
from burst_dask.commands import options
from burst_dask.doctor import diagnose
from burst_dask.errors import ConfigError
from burst_dask.protocol import keys
from burst_dask.store import open_store


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


@click.command()
@options.identifier
@options.store
@options.as_json
@click.pass_context
def doctor(context: click.Context, identifier: str, store: str | None, as_json: bool) -> None:
    """Check what a run has stored against the protocol's rules; of a session, all its runs.

    Reads every object once, and changes nothing. Exit code 0: every rule holds; 1: one is broken.
    """
    if not keys.is_id(identifier):
        raise ConfigError(f"{identifier!r} is not the id of a run or session, such as 'k3w9x2mq.7gfh2y' or 'k3w9x2mq'")
    found = sync.run(diagnose(open_store(store), identifier, SystemClock(), options.only_signed()))
    options.show(found.to_dict(), found, as_json)
    context.exit(0 if found.healthy else 1)
