"""What happened to a run, or to one task of it, in plain words: its logs, in the order of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from burst_dask.client.link import Link
from burst_dask.errors import ConfigError
from burst_dask.journal import log
from burst_dask.journal.names import find_task
from burst_dask.journal.view import SURVEY_PARALLEL, RunView, in_parallel
from burst_dask.protocol import session, shard
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import Entry, Outcomes, Split
from burst_dask.protocol.session_records import AddRun, Attach, Cancel, SessionEntry
from burst_dask.report.lists import Story, StoryLine


async def tell_run(link: Link, view: RunView) -> Story:
    """Return the story of a run: what clients did, and every entry of its shard logs.

    One request for each entry: they grow with the time that workers work, not with the tasks.
    """
    await view.survey()
    lines = await _of_session(link, view)
    entries = await _entries(view, list(view.shards))
    for id, its in entries.items():
        lines += _timed((entry.wrote, f"shard {id}", shard.describe(entry)) for entry in its)
    return _story(f"Story of run {view.run}", lines)


async def tell_task(link: Link, view: RunView, key: Any) -> Story:
    """Return the story of one task: who reserved it, who lost it, and what became of it.

    Raises
    ------
    UnknownId
        The run has no such task.
    ConfigError
        The graph was deleted, so nothing tells which task has that key.
    """
    await view.survey()
    found = await find_task(view, key)
    if found is None:
        raise ConfigError(
            f"the graph of run {view.run} was deleted by a cleanup, so nothing tells which task is {key!r}; "
            "story() without a key tells of the whole run"
        )
    number, position = view.plan.locate(found[0])
    names = [each.id for each in view.family(number)]
    entries = await _entries(view, names)
    lines = await _of_session(link, view)
    for id, its in entries.items():
        lines += _timed(_of_task(view, id, its, position))
    return _story(f"Story of task {key!r} of run {view.run}", lines)


def _of_task(view: RunView, id: ShardId, entries: Sequence[Entry], position: int) -> list[tuple[float, str, str]]:
    """Return what entries of a shard log tell of the task at `position`."""
    told: list[tuple[float, str, str]] = []
    was_reserved, holder, before = False, None, Outcomes()
    for entry in entries:
        index, action = entry.index, entry.action
        is_reserved = position in index.reserved
        if isinstance(action, Split) and position in action.tasks:
            told.append((entry.wrote, f"shard {id}", f"was split off to shard {action.child} by {entry.writer}"))
            break
        if position not in index.tasks:
            break
        if position in index.outcomes.all and position not in before.all:
            told.append((entry.wrote, f"shard {id}", _outcome(view, index.outcomes, position, entry.writer)))
        elif was_reserved and (index.holder != holder or not is_reserved) and position not in index.outcomes.all:
            why = f" ({index.cause})" if index.cause and index.holder != holder else ""
            told.append((entry.wrote, f"shard {id}", f"was given back by {holder}{why}"))
            was_reserved = False
        if is_reserved and position not in index.outcomes.all and not was_reserved:
            told.append((entry.wrote, f"shard {id}", f"was reserved by {index.holder}: runs there, or is next"))
        was_reserved, holder, before = is_reserved, index.holder, index.outcomes
    return told


def _outcome(view: RunView, outcomes: Outcomes, position: int, writer: str) -> str:
    if position in outcomes.done:
        return f"was completed by {writer}"
    cancelled = position in outcomes.cancelled
    for cause, tasks in outcomes.upstream.items():
        if position in tasks:
            why = "was cancelled" if cancelled else "had failed"
            return f"did not run, because task {cause} of {view.plan.tasks} {why}"
    return f"was cancelled, as {writer} noted" if cancelled else f"failed on {writer}"


async def _entries(view: RunView, shards: Iterable[ShardId]) -> dict[ShardId, list[Entry]]:
    """Return all entries of shard logs, in order."""
    places = [(id, number) for id in shards for number in range(view.shard(id).next)]

    async def read(place: tuple[ShardId, int]) -> Entry | None:
        found = await log.read(view.store, view.run, *place)
        return None if found is None else found[0]

    entries: dict[ShardId, list[Entry]] = {}
    for (id, _), entry in zip(places, await in_parallel(read, places, SURVEY_PARALLEL), strict=True):
        if entry is not None:
            entries.setdefault(id, []).append(entry)
    return entries


async def _of_session(link: Link, view: RunView) -> list[StoryLine]:
    """Return what the session log tells of this run: its own entries, and those about all runs."""

    def concerns(entry: SessionEntry) -> bool:
        action = entry.action
        if isinstance(action, Attach):
            return False
        if isinstance(action, AddRun | Cancel):
            return action.run in (None, view.run)
        return True

    entries = [entry async for entry in log.read_session(link.store, link.session, 0)]
    return _timed((entry.wrote, "session", session.describe(entry)) for entry in entries if concerns(entry))


def _timed(told: Iterable[tuple[float, str, str]]) -> list[StoryLine]:
    """Return lines of one log: never earlier than the line before, whatever the clock of the writer said."""
    lines: list[StoryLine] = []
    newest = 0.0
    for time, place, what in told:
        newest = max(newest, time)
        lines.append(StoryLine(newest, place, what))
    return lines


def _story(title: str, lines: list[StoryLine]) -> Story:
    return Story(title, sorted(lines, key=lambda line: line.time))
