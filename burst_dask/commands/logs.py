"""``burst logs``: what tasks have printed, and what workers have written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime

import click

from burst_dask import sync
from burst_dask.api.run import Run
from burst_dask.api.session import Session
from burst_dask.client.tasklogs import Follower, LogRecord, TaskLog
from burst_dask.commands import options
from burst_dask.protocol.keys import RunId


@click.command()
@options.identifier
@options.store
@click.option("--key", help="Only of the task with this key; ID is that of a run then.")
@click.option("--worker", help="Only what was printed on the worker with this id.")
@click.option("--processes", is_flag=True, help="What worker processes have written themselves, from their starts on.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the runs, or the session, have ended.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line for scripts.")
def logs(
    identifier: str,
    store: str | None,
    key: str | None,
    worker: str | None,
    processes: bool,
    follow: bool,
    as_json: bool,
) -> None:
    """Show what the tasks of a run or session have printed, and their logging records.

    Of each try of a task the last 64 KB are kept. They are shown once its worker has committed them.
    """
    if processes:
        if key is not None or follow:
            raise click.UsageError("--processes goes with neither --key nor --follow")
        _show_processes(
            options.session_of(identifier, store, "workers work for a session: burst logs"), worker, as_json
        )
        return
    found = options.attached(identifier, store)
    if key is not None:
        if not isinstance(found, Run):
            raise click.UsageError(f"--key needs the id of a run, and {identifier} is a session")
        log = found.logs(key)
        if not follow:
            _show([log.on(worker)], as_json)
            if log.note and not as_json:
                click.echo(f"({log.note})", err=True)
            return
    runs = [RunId(identifier)] if isinstance(found, Run) else None
    follower = Follower(found._link, runs, worker)
    if not follow:
        _show(sync.run(follower.news()), as_json)
        return
    while (news := sync.run(follower.more())) is not None:
        _show((log for log in news if key is None or str(log.key) == key), as_json)


def _show_processes(session: Session, worker: str | None, as_json: bool) -> None:
    """Print what the processes of workers have written, one after another."""
    for log in session.worker_logs(worker):
        click.echo(json.dumps(log._asdict()) if as_json else f"==> {log.name} <==\n{log.text}")


def _show(logs: Iterable[TaskLog], as_json: bool) -> None:
    """Print the logs, line by line in order of time."""
    logs = list(logs)
    for log in logs:
        if log.dropped and not as_json:
            click.echo(f"({log.key}: {log.dropped:,} characters before the last ones were not kept)", err=True)
    if as_json:
        found = [(record, log) for log in logs for record in log.records]
    else:
        found = [(line, log) for log in logs for line in log.lines()]
    for record, log in sorted(found, key=lambda pair: pair[0].time):
        click.echo(_as_json(record, log) if as_json else _as_text(record, log))


def _as_json(record: LogRecord, log: TaskLog) -> str:
    return json.dumps({"run": log.run, "key": str(log.key), **record._asdict()})


def _as_text(line: LogRecord, log: TaskLog) -> str:
    time = datetime.fromtimestamp(line.time, UTC).astimezone()
    stream = "" if line.stream == "stdout" else f" {line.stream}"
    attempt = f" (try {line.attempt})" if line.attempt > 1 else ""
    return f"{time:%H:%M:%S} {log.key}{attempt}{stream} | {line.text}"
