"""Finding the session or run that a person means: by its id, or a session by its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from burst_dask import link as links
from burst_dask.errors import ConfigError, UnknownId
from burst_dask.journal.log import Author
from burst_dask.journal.view import SURVEY_PARALLEL, RunView, in_parallel
from burst_dask.link import Link, listed
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId
from burst_dask.protocol.records import Manifest, decode
from burst_dask.report import when
from burst_dask.store import Store

#: Sessions of one name that a message lists.
CANDIDATES = 10


async def manifests(store: Store) -> list[Manifest]:
    """Return the manifests of all sessions in a store: a listing, and a read for each."""
    names = [meta.key async for meta in listed(store, keys.SESSIONS)]
    bodies = await in_parallel(store.get, names, SURVEY_PARALLEL)
    return [decode(Manifest, name, body) for name, body in zip(names, bodies, strict=True) if body is not None]


async def find(store: Store, identifier: str, author: Author) -> Link:
    """Return the link to the session with that id or name, or to the session of the run with that id.

    Raises
    ------
    UnknownId
        There is none; the message lists what is spelled alike.
    ConfigError
        Several sessions have that name; the message lists them.
    """
    if keys.is_id(identifier):
        link = await links.attach(store, keys.session_of(identifier), author)
        if link is not None:
            return link
    there = await manifests(store)
    named = [manifest for manifest in there if manifest.name == identifier]
    if len(named) > 1:
        named.sort(key=lambda manifest: -manifest.created)
        lines = [f"{manifest.session}, opened {when(manifest.created)} on {manifest.host}" for manifest in named]
        more = f"\n  and {len(lines) - CANDIDATES} older ones" if len(lines) > CANDIDATES else ""
        raise ConfigError(
            f"{len(named)} sessions in {store.url} have the name {identifier!r}; give the id of the one you mean:\n  "
            + "\n  ".join(lines[:CANDIDATES])
            + more
        )
    if named and (link := await links.attach(store, named[0].session, author)) is not None:
        return link
    known = [manifest.session for manifest in there] + [manifest.name for manifest in there if manifest.name]
    session = keys.session_of(identifier) if keys.is_id(identifier) else identifier
    raise unknown(store, "session", session, known)


async def open_run(link: Link, run: RunId) -> RunView:
    """Return the view of a run.

    Raises
    ------
    UnknownId
        The session has no such run.
    """
    view = await RunView.open(link.store, run)
    if view is None:
        raise unknown(link.store, "run", run, link.state.runs)
    return view


def unknown(store: Store, kind: str, identifier: str | SessionId, there: Iterable[str]) -> UnknownId:
    """Return the error that says that there is no such session or run, and what is spelled alike."""
    close = difflib.get_close_matches(identifier, list(there), 3, 0.5)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "it was cleaned up, or lies in another store: pass store="
    )
    return UnknownId(f"{store.url} holds no {kind} {identifier!r}; {hint}")
