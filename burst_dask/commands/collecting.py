"""The command that brings results home: collect."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click
import cloudpickle

from burst_dask.client.collecting import Collected, TaskError
from burst_dask.commands import options
from burst_dask.errors import BurstError, ConfigError, FleetError, RunCancelled, SessionEnded, WaitTimeout

#: Exit code when some tasks failed or have no outcome yet; what is done is written all the same.
INCOMPLETE = 1

Writer = Callable[[Path, Collected], None]


@click.command()
@options.identifier
@options.store
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="results.pkl or results.parquet")
@click.option("--wait", is_flag=True, help="Wait until all is done.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), help="Seconds that --wait takes at most.")
@options.as_json
def collect(
    identifier: str, store: str | None, output: Path | None, wait: bool, timeout: float | None, as_json: bool
) -> None:
    """Write the results of a run or of a session to a file, what is done so far or, with --wait, all.

    A .pkl holds a dict, Dask key -> result, with a TaskError for what failed; of a key that several runs of a
    session have, the result of the last one. A .parquet holds the rows of all dataframes, or a row for each
    result, without what failed. Ends with 1 when something failed, was cancelled or is not done; what is done is
    written all the same, also when the time is over or nobody works on the rest.
    """
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for --wait")
    write = None if output is None else _writer(output)
    found, over = _collected(identifier, store, wait, timeout)
    if output is not None and write is not None:
        _replace(output, write, found)
    summary = {
        "results": len(found) - len(found.errors),
        "errors": {str(key): error.message for key, error in found.errors.items()},
        "pending": found.pending,
        "cancelled": found.cancelled,
        "output": None if output is None else str(output),
    }
    text = f"{summary['results']} results, {len(found.errors)} failed, {found.pending} pending"
    text += f", {found.cancelled} cancelled" if found.cancelled else ""
    text += "" if output is None else f"; written to {output}"
    lines = [text, *(f"  {key}: {error.message}" for key, error in found.errors.items())]
    options.show(summary, "\n".join(lines), as_json)
    if over is not None:
        click.echo(f"Error: {over}", err=True)
    if over is not None or found.errors or found.pending or found.cancelled:
        raise SystemExit(INCOMPLETE)


def _collected(
    identifier: str, store: str | None, wait: bool, timeout: float | None
) -> tuple[Collected, BurstError | None]:
    """Return what is done, and why no more of it was waited for."""
    there = options.attached(identifier, store)
    try:
        return there.collect(wait=wait, timeout=timeout), None
    except WaitTimeout as error:
        return error.results, error
    except (RunCancelled, SessionEnded, FleetError) as error:
        return there.collect(), error


def _writer(output: Path) -> Writer:
    """Return what writes such a file; what will not do is told before anybody waits."""
    writers: dict[str, Writer] = {".pkl": _write_pickle, ".parquet": _write_parquet}
    if output.suffix not in writers:
        raise ConfigError(f"{output}: the name must end with {' or '.join(writers)}. Nothing was collected")
    if not output.parent.is_dir():
        raise ConfigError(f"{output}: there is no directory {output.parent}. Nothing was collected")
    if output.suffix == ".parquet" and not (find_spec("pandas") and find_spec("pyarrow")):
        raise ConfigError("results as .parquet need pandas and pyarrow; .pkl needs neither. Nothing was collected")
    return writers[output.suffix]


def _replace(output: Path, write: Writer, found: Collected) -> None:
    """Write beside, then rename: what is there is never half a file."""
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        write(part, found)
        part.replace(output)
    except OSError as error:
        raise ConfigError(f"{output} could not be written: {error}. All results are kept in the store") from error
    finally:
        part.unlink(missing_ok=True)


def _write_pickle(path: Path, found: Collected) -> None:
    with path.open("wb") as file:
        # Results may be of classes that a script defines, which plain pickle cannot write.
        cloudpickle.dump(dict(found), file, protocol=5)


def _write_parquet(path: Path, found: Collected) -> None:
    import pandas  # noqa: PLC0415 - optional

    done = {key: value for key, value in found.items() if not isinstance(value, TaskError)}
    frames = [value for value in done.values() if isinstance(value, pandas.DataFrame)]
    if len(frames) == len(done) and frames:
        table = pandas.concat(frames)
    else:
        table = pandas.DataFrame({"key": [str(key) for key in done], "result": list(done.values())})
    try:
        table.to_parquet(path)
    except OSError:
        raise
    except Exception as error:  # what pyarrow cannot hold
        raise ConfigError(f"these results do not fit into a table ({error}); write a .pkl") from error
