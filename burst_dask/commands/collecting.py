"""The command that brings results home: collect."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from burst_dask.commands import options
from burst_dask.errors import ConfigError

#: Exit code when some tasks failed or have no outcome yet; what is done is written all the same.
INCOMPLETE = 1


@click.command()
@options.identifier
@options.store
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="results.pkl or results.parquet")
@click.option("--wait", is_flag=True, help="Wait until all is done.")
@click.option("--timeout", type=float, help="Seconds to wait at most.")
@options.as_json
def collect(
    identifier: str, store: str | None, output: Path | None, wait: bool, timeout: float | None, as_json: bool
) -> None:
    """Write the results of a run or of a session to a file, what is done so far or, with --wait, all.

    A .pkl holds a dict, Dask key -> result, with a TaskError for what failed. A .parquet holds the rows of all
    dataframes, or a row for each result. Ends with 1 when something failed or is not done.
    """
    from burst_dask import attach  # noqa: PLC0415 - imports Dask

    write = None if output is None else _writer(output)
    found = attach(identifier, store=store).collect(wait=wait, timeout=timeout)
    if output is not None and write is not None:
        _replace(output, write, found)
    summary = {
        "results": len(found) - len(found.errors),
        "errors": {str(key): error.message for key, error in found.errors.items()},
        "pending": found.pending,
        "output": None if output is None else str(output),
    }
    text = f"{summary['results']} results, {len(found.errors)} failed, {found.pending} pending"
    text += "" if output is None else f"; written to {output}"
    lines = [text, *(f"  {key}: {error.message}" for key, error in found.errors.items())]
    options.show(summary, "\n".join(lines), as_json)
    if found.errors or found.pending:
        raise SystemExit(INCOMPLETE)


def _writer(output: Path) -> Any:
    writers = {".pkl": _write_pickle, ".parquet": _write_parquet}
    if output.suffix not in writers:
        raise ConfigError(f"{output}: the name must end with {' or '.join(writers)}. Nothing was collected")
    return writers[output.suffix]


def _replace(output: Path, write: Any, found: Mapping[Any, Any]) -> None:
    """Write beside, then rename: what is there is never half a file."""
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        write(part, found)
        part.replace(output)
    finally:
        part.unlink(missing_ok=True)


def _write_pickle(path: Path, found: Mapping[Any, Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(dict(found), file, protocol=5)


def _write_parquet(path: Path, found: Mapping[Any, Any]) -> None:
    try:
        import pandas  # noqa: PLC0415 - optional
    except ImportError as error:
        raise ConfigError("results as .parquet need pandas and pyarrow; .pkl needs neither") from error
    from burst_dask.collecting import TaskError  # noqa: PLC0415 - imports Dask

    done = {key: value for key, value in found.items() if not isinstance(value, TaskError)}
    frames = [value for value in done.values() if isinstance(value, pandas.DataFrame)]
    if len(frames) == len(done) and frames:
        table = pandas.concat(frames)
    else:
        table = pandas.DataFrame({"key": [str(key) for key in done], "result": list(done.values())})
    try:
        table.to_parquet(path)
    except Exception as error:  # what pyarrow cannot hold
        raise ConfigError(f"these results do not fit into a table ({error}); write a .pkl") from error
