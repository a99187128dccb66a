"""Commands that change what goes on: cancel, extend, scale, cleanup."""

from __future__ import annotations

import click
from dask.utils import parse_timedelta

from burst_dask.api.healing import heal_all
from burst_dask.api.places import opened
from burst_dask.commands import options
from burst_dask.errors import ConfigError
from burst_dask.report.tables import duration


@click.command()
@options.identifier
@options.store
@click.option("--force", is_flag=True, help="Also end the tasks that run, instead of letting them finish.")
@options.as_json
def cancel(identifier: str, store: str | None, force: bool, as_json: bool) -> None:
    """Cancel a run, or all runs of a session."""
    # None: a session, of which nobody looks whether anything was left to cancel
    was_left = options.attached(identifier, store).cancel(force=force)
    said = f"{identifier} had nothing left to cancel" if was_left is False else f"{identifier} is cancelled"
    options.show({"id": identifier, "cancelled": was_left is not False}, said, as_json)


@click.command()
@options.identifier
@click.argument("duration", required=False)
@options.store
@click.option("--max-cost", type=click.FloatRange(min=0, min_open=True), help="USD that it may cost in all.")
@options.as_json
def extend(identifier: str, duration: str | None, store: str | None, max_cost: float | None, as_json: bool) -> None:
    """Let a session last DURATION from now at least, such as 90m, 2h, 3d or 7200 (seconds), or cost more.

    An hour if neither is given.
    """
    seconds = _seconds(duration)
    session = options.session_of(identifier, store, "a session is extended as a whole: burst extend")
    until = session.extend(seconds, max_cost=max_cost)
    data = {"id": identifier, "deadline": until and until.timestamp(), "max_cost": max_cost}
    said = "has no limit" if until is None else f"lasts until {until.astimezone():%Y-%m-%d %H:%M:%S %Z}"
    said += "" if max_cost is None else f", and may cost {max_cost:g} USD"
    options.show(data, f"{identifier} {said}", as_json)


def _seconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(parse_timedelta(text))
    except (ValueError, KeyError):
        raise ConfigError(f"{text!r} is not a duration; write it as 90m, 2h, 3d or 7200 (seconds)") from None


@click.command()
@options.identifier
@click.argument("minimum", type=click.IntRange(min=0))
@click.argument("maximum", type=click.IntRange(min=1))
@click.option("--within", metavar="DURATION", help="In which what waits should be done, such as 90m or 2h.")
@options.store
@options.as_json
def adapt(identifier: str, minimum: int, maximum: int, within: str | None, store: str | None, as_json: bool) -> None:
    """Have MINIMUM to MAXIMUM workers of a session, as many as the work is worth."""
    seconds = _seconds(within)
    session = options.session_of(identifier, store, "workers work for a session: burst adapt")
    session.adapt(minimum, maximum, within=seconds)
    data = {"id": identifier, "minimum": minimum, "maximum": maximum, "within": seconds}
    said = "" if seconds is None else f", for what waits to be done in {duration(seconds)}"
    options.show(data, f"{identifier} has {minimum} to {maximum} workers{said}", as_json)


@click.command()
@options.identifier
@click.argument("workers", type=click.IntRange(min=0))
@options.store
@options.as_json
def scale(identifier: str, workers: int, store: str | None, as_json: bool) -> None:
    """Have WORKERS workers, on this machine or where the session has them; 0 stops them, and the work waits."""
    options.session_of(identifier, store, "workers work for a session: burst scale").scale(workers)
    options.show({"id": identifier, "workers": workers}, f"{identifier} has {workers} workers", as_json)


@click.command()
@options.identifier
@options.store
@click.option("--force", is_flag=True, help="Also stop running work, and delete results.")
@options.as_json
def cleanup(identifier: str, store: str | None, force: bool, as_json: bool) -> None:
    """Stop a session's workers and delete what it has stored, but for results."""
    options.session_of(identifier, store, "a session is cleaned up as a whole: burst cleanup").cleanup(force=force)
    options.show({"id": identifier, "force": force}, f"{identifier} is cleaned up", as_json)


@click.command()
@options.store
@options.as_json
def heal(store: str | None, as_json: bool) -> None:
    """Start workers in all sessions of a store whose work waits with nobody there to do it; for a schedule.

    Workers on ECS look after their fleets themselves, as long as one is alive. Exit code 1: some could not be started.
    """
    found = heal_all(opened(store, {}))
    lines = [f"{one.session}: " + (one.why or f"{one.started} workers started") for one in found]
    options.show([one._asdict() for one in found], "\n".join(lines) or "nobody is missed", as_json)
    if any(one.why for one in found):
        raise SystemExit(1)
