"""A result that lies in the store already, as a node of a graph: what `Session.persist` leaves in a collection."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from dask._task_spec import GraphNode, TaskRef

from burst_dask import sync
from burst_dask.errors import RunCancelled, UnknownId
from burst_dask.journal import across
from burst_dask.journal.view import RunView
from burst_dask.protocol.keys import RunId, SessionId, session_of
from burst_dask.serialize import load_failure, loads
from burst_dask.store import Store, open_store


class Captured(TaskRef):  # type: ignore[misc]
    """What a pickled `Future` is elsewhere. Where Dask looks for arguments its result takes its place; else it is none.

    A function that has captured a future, or an object with one as an attribute, finds this.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return Captured, (self.key,)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name}: future {self.key!r} was pickled as part of a function or of an object, where it does not stand "
            "for its result: give it to the task as an argument, by itself or in lists, tuples, sets and dicts"
        )


class Stored(GraphNode):  # type: ignore[misc]
    """Stands for the result of a task of some run.

    A session that submits a graph with such a node makes it an external of the new run: workers read it
    when they need it. Any other scheduler calls it, and it reads the result by itself, for which it waits.

    Parameters
    ----------
    key
        The Dask key in the graph.
    run, number
        The run, and the global number of the task there.
    store
        The URL of the store.
    """

    _dependencies: frozenset[Any] = frozenset()

    def __init__(self, key: Any, run: RunId, number: int, store: str) -> None:
        self.key: Any = key
        self.run, self.number, self.store = run, number, store

    @property
    def data_producer(self) -> bool:
        return True

    @property
    def block_fusion(self) -> bool:
        """A task that it were fused into would have to read the result by itself."""
        return True

    def copy(self) -> Stored:
        return Stored(self.key, self.run, self.number, self.store)

    def substitute(self, subs: Mapping[Any, Any], key: Any = None) -> Stored:
        return self if key is None or key == self.key else Stored(key, self.run, self.number, self.store)

    def __call__(self, values: Any = ()) -> Any:
        return sync.run(_read(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return Stored, (self.key, self.run, self.number, self.store)

    def __dask_tokenize__(self) -> tuple[Any, ...]:
        return type(self).__name__, self.run, self.number

    def __repr__(self) -> str:
        return f"Stored({self.key!r} of run {self.run})"


#: Runs of which others are read, too: a plan and what it leads to is read once for many results.
_KEPT = 8
_views: dict[tuple[str, RunId], RunView] = {}


async def _open(url: str, session: SessionId) -> Store:
    return open_store(url)


#: Opens a store for what a session has left in it; `burst_dask.trust.trusting` brings one that knows keys of signed
#: sessions.
_opener: Callable[[str, SessionId], Awaitable[Store]] = _open


def open_with(opener: Callable[[str, SessionId], Awaitable[Store]]) -> None:
    """Have stores opened by `opener`, which takes a URL and a session."""
    global _opener  # noqa: PLW0603 - one for the process
    _opener = opener


async def _read(node: Stored) -> Any:
    """Return the result, or raise the task's error; wait for it if need be."""
    view = _views.get((node.store, node.run))
    if view is None:
        with contextlib.suppress(UnknownId):  # the session is gone, and with it the run
            view = await RunView.open(await _opener(node.store, session_of(node.run)), node.run)
    if view is None:
        raise UnknownId(f"{node!r} lies in {node.store}, which holds no such run any more: it was cleaned up")
    outcome = view.outcome(node.number)
    if outcome is None or outcome.location is None:
        await view.survey()
        outcome = view.outcome(node.number)
    if outcome is None:
        raise RunCancelled(
            f"{node!r} has no outcome yet. Only the workers of its session wait for it: "
            "compute with that session, or wait for the run before"
        )
    _views[node.store, node.run] = view
    while len(_views) > _KEPT:
        del _views[next(iter(_views))]
    if not outcome.done:
        load_failure(await across.error(view, node.number)).reraise()
    return loads((await view.fetch([node.number]))[node.number])
