"""``python -m burst_dask.worker``, which is also ``burst worker``: workers for one session."""

from __future__ import annotations

import click

from burst_dask.errors import BurstError, ConfigError
from burst_dask.protocol.keys import SessionId, is_id
from burst_dask.worker.memory_watch import parse_bytes, processes_and_threads, processors, system_memory
from burst_dask.worker.supervisor import Options, supervise


def shape(processes: int | None, threads: int | None, memory_limit: str | None) -> tuple[int, int, int]:
    """Return processes, threads of each and bytes for each, where what is None suits this machine.

    Examples
    --------
    >>> shape(3, 2, "8GB")
    (3, 2, 8000000000)
    """
    cpus = processors()
    if processes is None:
        processes = max(1, cpus // threads) if threads else processes_and_threads(cpus)[0]
    threads = threads or max(1, cpus // processes)
    limit = system_memory() // processes if memory_limit in (None, "auto") else parse_bytes(memory_limit or "")
    return processes, threads, limit


def _is_reference(key: str) -> bool:
    from burst_dask.trust.keyring import is_reference  # noqa: PLC0415 - knows stores, which a supervisor seldom needs

    return is_reference(key)


@click.command(name="worker")
@click.option("--session", required=True, envvar="BURST_SESSION", help="Id of the session to work for.")
@click.option("--store", required=True, envvar="BURST_STORE", help="URL of its store, such as s3://bucket/prefix.")
@click.option("--processes", type=click.IntRange(min=1), envvar="BURST_PROCESSES", help="Worker processes.")
@click.option("--threads", type=click.IntRange(min=1), envvar="BURST_THREADS", help="Threads of each process.")
@click.option(
    "--memory-limit",
    envvar="BURST_MEMORY_LIMIT",
    help="For each process, such as 8GB; 0 watches nothing. By default an equal part of what there is.",
)
@click.option("--spill-directory", type=click.Path(file_okay=False), help="Where results that do not fit are kept.")
@click.option(
    "--key",
    default="",
    envvar="BURST_KEY",
    help="Where the key of a signed session is: file, a path, or secretsmanager:REGION:NAME. With it, a session that "
    "is not signed is refused.",
)
def command(
    session: str,
    store: str,
    processes: int | None,
    threads: int | None,
    memory_limit: str | None,
    spill_directory: str | None,
    key: str,
) -> None:
    """Run workers for one session until it ends or they have been idle for long.

    Without --processes and --threads they are as many as suit this machine. SIGTERM hands the
    work over. Exit codes: 0 ended in order, 1 kept dying, 2 wrong usage, 3 refused the session.
    """
    try:
        if not is_id(session):
            raise ConfigError(f"{session!r} is not a session id")
        if key and not _is_reference(key):  # which is not repeated: it may be the key itself
            raise ConfigError(
                "--key takes where the key is, never the key: file, a path, or secretsmanager:REGION:NAME"
            )
        processes, threads, limit = shape(processes, threads, memory_limit)
    except BurstError as error:
        raise click.UsageError(str(error)) from None
    options = Options(
        session=SessionId(session),
        store=store,
        processes=processes,
        threads=threads,
        memory_limit=limit,
        spill_directory=spill_directory,
        key=key,
    )
    raise SystemExit(supervise(options))


if __name__ == "__main__":
    command(prog_name="burst worker")
