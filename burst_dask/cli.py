"""The ``burst`` command.

Exit codes: 0 done, 1 an error of `burst_dask.errors` (told in one message), 2 wrong usage, 130 Ctrl-C;
``burst worker`` has one more, see ``worker/README.md``. ``burst doctor`` ends with 0 when every rule holds and with 1
when one is broken, whatever garbage it finds; ``--json`` tells that from an error, which prints no JSON.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import click

from burst_dask.errors import BurstError, ConfigError
from burst_dask.protocol.keys import session_of

#: commands that live elsewhere and are imported when they are called: a worker must start
#: without what only the client needs
_ELSEWHERE = {
    "demo": "burst_dask.demo:command",
    "doctor": "burst_dask.doctor:command",
    "logs": "burst_dask.commands_logs:command",
    "worker": "burst_dask.worker.__main__:command",
}


class _Group(click.Group):
    """Imports commands when they are called, and tells our own errors without a traceback."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted([*super().list_commands(context), *_ELSEWHERE])

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _ELSEWHERE:
            return super().get_command(context, name)
        module, attribute = _ELSEWHERE[name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BurstError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="burst_dask", prog_name="burst")
def main() -> None:
    """Run Dask graphs on workers that need nothing but an object store."""


_id = click.argument("identifier", metavar="ID")
_store = click.option(
    "--store", envvar="BURST_STORE", help="URL of the store, such as s3://bucket/prefix; by default the local one."
)


@main.command()
@_id
@_store
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def status(identifier: str, store: str | None, as_json: bool) -> None:
    """Show how far a run is."""
    from burst_dask import attach  # noqa: PLC0415 - imports Dask

    found = attach(identifier, store=store).status()
    click.echo(json.dumps(found.to_dict()) if as_json else str(found))


@main.command()
@_id
@_store
@click.option("--force", is_flag=True, help="Also stop running work, and delete results.")
def cleanup(identifier: str, store: str | None, force: bool) -> None:
    """Stop a session's workers and delete what it has stored."""
    from burst_dask import attach  # noqa: PLC0415 - imports Dask

    if (session := session_of(identifier)) != identifier:
        raise ConfigError(f"{identifier} is a run; a session is cleaned up as a whole: burst cleanup {session}")
    attach(identifier, store=store).cleanup(force=force)
    click.echo(f"{identifier} is cleaned up")


if __name__ == "__main__":
    main(prog_name="burst")
