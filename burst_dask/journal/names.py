"""Finding the task that a person means: by its Dask key, or by the text of that."""

from __future__ import annotations

import difflib
import pickle
from typing import Any

from burst_dask.errors import UnknownId
from burst_dask.journal.view import PARALLEL, RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.records import ShardRecord, decode
from burst_dask.store.base import Span

#: Keys among which near misses are looked for: among 20,000 that takes 0.6 s, among 200,000 it takes 3 s.
_COMPARED = 20_000


async def find_task(view: RunView, key: Any) -> tuple[int, Any] | None:
    """Return the global number of a task and its key, or None when a cleanup has taken the graph away.

    One request for each plan shard, many at once, until it is found.

    Raises
    ------
    UnknownId
        The run has no such task; the message lists what is spelled alike.
    """
    text = str(key)
    compared: list[str] = []
    shards = view.plan.shards
    for begin in range(0, len(shards), PARALLEL):
        portion = range(begin, min(begin + PARALLEL, len(shards)))
        for number, names in zip(portion, await in_parallel(lambda n: _names(view, n), portion), strict=True):
            if names is None:
                return None
            texts = [str(name) for name in names]
            if text in texts:
                position = names.index(key) if key in names else texts.index(text)
                return shards[number].first + position, names[position]
            compared += texts[: _COMPARED - len(compared)]
    near = difflib.get_close_matches(text, compared, 3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "its keys are those of the graph as submitted"
    raise UnknownId(f"run {view.run} has no task {key!r}; {hint}")


async def _names(view: RunView, number: int) -> list[Any] | None:
    """Return the Dask keys of a plan shard, or None when it is gone."""
    place = view.plan.shards[number].place
    pack = keys.pack(view.run, place.pack)
    found = await view.store.get_ranges(pack, [Span(place.start, place.end)])
    if found is None:
        return None
    names: list[Any] = pickle.loads(decode(ShardRecord, pack, found[0]).keys)  # noqa: S301 - see README, Security
    return names
