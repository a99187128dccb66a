"""Running one task of a run here, with the inputs that it had on its worker."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import Callable
from typing import Any

from burst_dask.errors import ConfigError, CorruptObject, ProtocolError, UnknownId
from burst_dask.journal import across, packs
from burst_dask.journal.view import RunView
from burst_dask.serialize import loads
from burst_dask.worker.execution import open_table
from burst_dask.worker.table import TaskTable


async def prepare(view: RunView, key: Any) -> Callable[[], Any]:
    """Return the call that runs a task again; of one that failed upstream, the task that is the cause.

    Raises
    ------
    UnknownId
        No task of the run has that key.
    CorruptObject
        The graph is no longer there.
    """
    await view.survey(discarded=True)
    table, position = await _find(view, key)
    number = table.first + position
    outcome = view.outcome(number)
    if outcome is not None and not outcome.done and outcome.cause != number:
        view, number = await across.culprit(view, number)
        table = await _table(view, view.plan.locate(number)[0])
    again, bodies = await _inputs(view, table, number - table.first)

    def replay() -> Any:
        values = {each: loads(body) for each, body in bodies.items()}
        for position in again:
            values[table.first + position] = _run(table, position, values)
        return _run(table, number - table.first, values)

    return replay


async def _find(view: RunView, key: Any) -> tuple[TaskTable, int]:
    """Return the table and the position of the task with that key; shards in which tasks failed are read first."""
    near: list[Any] = []
    for number in sorted(range(len(view.plan.shards)), key=lambda n: not _has_failed(view, n)):
        table = await _table(view, number)
        if key in table.keys:
            return table, table.keys.index(key)
        near += difflib.get_close_matches(str(key), map(str, table.keys), 1)
    hint = f"; did you mean {' or '.join(map(repr, near[:3]))}?" if near else ""
    raise UnknownId(f"run {view.run} has no task {key!r}{hint}")


def _has_failed(view: RunView, number: int) -> bool:
    return any(shard.index.outcomes.failed for shard in view.family(number))


async def _table(view: RunView, number: int) -> TaskTable:
    try:
        record, buffers = await packs.read_shard(view.store, view.plan, number)
    except CorruptObject as error:
        raise CorruptObject(
            f"{error}. Without the graph nothing can be replayed; was the session cleaned up?"
        ) from error
    return await asyncio.to_thread(open_table, record, buffers)


async def _inputs(view: RunView, table: TaskTable, position: int) -> tuple[list[int], dict[int, memoryview]]:
    """Return the positions of inputs that were not stored, in an order to compute them in, and what was stored."""
    stored: set[int] = set()
    again: set[int] = set()
    stack = [position]
    while stack:
        for number in table.dependencies[stack.pop()]:
            if number in stored or number - table.first in again:
                continue
            try:
                _, _, outcome = await across.settled(view, number)
            except ProtocolError as error:
                raise ConfigError(
                    f"task {table.keys[position]!r} cannot be replayed yet: "
                    f"its input {table.name(number)!r} has no outcome"
                ) from error
            if outcome.location is not None:
                stored.add(number)
            elif not 0 <= number - table.first < table.count:
                raise ConfigError(
                    f"task {table.keys[position]!r} did not fail, so {table.name(number)!r}, which it needs, was "
                    "deleted when nobody needed it any more. Inputs of tasks that failed are kept; those of all tasks "
                    "are with Session(keep_intermediates=True)"
                )
            else:  # only its own shard needed it, and had it in memory (PROTOCOL.md rule 9), or it was discarded
                again.add(number - table.first)
                stack.append(number - table.first)
    return sorted(again), await view.fetch(stored)


def _run(table: TaskTable, position: int, values: dict[int, Any]) -> Any:
    return table.nodes[position]({table.name(number): values[number] for number in table.dependencies[position]})
