"""The ``burst`` command.

Exit codes: 0 done, 1 an error of `burst_dask.errors` (told in one message), 2 wrong usage, 130 Ctrl-C.
Those of some commands say more:

* ``burst watch`` ends with 0 when every task has a result, and with 1 when some failed, were cancelled, or will
  not be done because the session is over.
* ``burst worker`` has one more, see ``worker/README.md``.
* ``burst doctor`` ends with 0 when every rule holds and with 1 when one is broken, whatever garbage it finds;
  ``--json`` tells that from an error, which prints no JSON. ``burst doctor aws`` ends with 1 when something keeps
  workers from running.

Completion in a shell: ``eval "$(_BURST_COMPLETE=bash_source burst)"``, or ``zsh_source``, ``fish_source``.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from burst_dask.errors import BurstError

#: Exit code after Ctrl-C, as of shells: 128 and the number of SIGINT.
INTERRUPTED = 130

#: Where commands live. They are imported when they are called: a worker must start without what
#: only the client needs.
_COMMANDS = {
    "adapt": "burst_dask.commands.acting:adapt",
    "cancel": "burst_dask.commands.acting:cancel",
    "cleanup": "burst_dask.commands.acting:cleanup",
    "collect": "burst_dask.commands.collecting:collect",
    "demo": "burst_dask.demo:command",
    "doctor": "burst_dask.commands.looking:doctor",
    "doctor aws": "burst_dask.commands.aws:doctor_aws",
    "image": "burst_dask.commands.image:image_group",
    "extend": "burst_dask.commands.acting:extend",
    "ls": "burst_dask.commands.looking:ls",
    "heal": "burst_dask.commands.acting:heal",
    "logs": "burst_dask.commands.logs:logs",
    "setup": "burst_dask.commands.aws:setup_group",
    "teardown": "burst_dask.commands.aws:teardown_group",
    "scale": "burst_dask.commands.acting:scale",
    "status": "burst_dask.commands.looking:status",
    "story": "burst_dask.commands.looking:story",
    "watch": "burst_dask.commands.watching:watch",
    "worker": "burst_dask.worker.__main__:command",
}


class _Group(click.Group):
    """Imports commands when they are called, and tells our own errors without a traceback."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[name].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, context: click.Context, arguments: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if " ".join(arguments[:2]) in _COMMANDS:  # of two words, where the first one is a command, too
            arguments = [" ".join(arguments[:2]), *arguments[2:]]
        return super().resolve_command(context, arguments)

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except BurstError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            raise click.exceptions.Exit(INTERRUPTED) from None


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="burst_dask", prog_name="burst")
@click.option("--signed", is_flag=True, envvar="BURST_SIGNED", help="Refuse sessions that are not signed.")
def main(signed: bool) -> None:
    """Run Dask graphs on workers that need nothing but an object store."""


if __name__ == "__main__":
    main(prog_name="burst")
