"""Finding the session or run that a person means: by its id, or a session by its name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from burst_dask.client import opening
from burst_dask.client.link import Link
from burst_dask.errors import ConfigError, CorruptObject, UnknownId
from burst_dask.journal.log import Author
from burst_dask.journal.view import SURVEY_PARALLEL, RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId
from burst_dask.protocol.records import Manifest, decode
from burst_dask.report.tables import when
from burst_dask.store import Meta, Store
from burst_dask.store.base import listed

#: Sessions of one name that a message lists.
CANDIDATES = 10


class There(NamedTuple):
    """A session that a store holds."""

    session: SessionId
    #: of its manifest, in seconds since 1970 by the store's clock
    modified: float
    #: None when it cannot be read: it is damaged, or of a newer version
    manifest: Manifest | None


async def sessions_in(store: Store) -> list[There]:
    """Return all sessions of a store: a listing, and a read for each. One that cannot be read hides no other."""

    async def read(meta: Meta) -> There | None:
        data = await store.get(meta.key)
        if data is None:
            return None
        session = SessionId(meta.key.removeprefix(keys.SESSIONS))
        try:
            manifest = decode(Manifest, meta.key, data)
        except CorruptObject:
            return There(session, meta.modified, None)
        # One that somebody has put there from another session is none of this one's.
        return There(session, meta.modified, manifest if manifest.session == session else None)

    found = [meta async for meta in listed(store, keys.SESSIONS)]
    return [one for one in await in_parallel(read, found, SURVEY_PARALLEL) if one is not None]


async def find(store: Store, identifier: str, author: Author, signed: bool = False) -> Link:
    """Return the link to the session with that id or name, or to the session of the run with that id.

    Parameters
    ----------
    signed
        Whether one that is not signed is to be refused.

    Raises
    ------
    UnknownId
        There is none; the message lists what is spelled alike.
    ConfigError
        Several sessions have that name; the message lists them.
    KeyMissing, UntrustedObject
        It is signed, and its key is not here; or it is not what its key vouches for.
    """
    if keys.is_id(identifier):
        link = await opening.attach(store, keys.session_of(identifier), author, signed)
        if link is not None:
            return link
    there = await sessions_in(store)
    readable = [one.manifest for one in there if one.manifest is not None]
    named = [manifest for manifest in readable if manifest.name == identifier]
    if len(named) > 1:
        named.sort(key=lambda manifest: -manifest.created)
        lines = [f"{manifest.session}, opened {when(manifest.created)} on {manifest.host}" for manifest in named]
        more = f"\n  and {len(lines) - CANDIDATES} older ones" if len(lines) > CANDIDATES else ""
        raise ConfigError(
            f"{len(named)} sessions in {store.url} have the name {identifier!r}; give the id of the one you mean:\n  "
            + "\n  ".join(lines[:CANDIDATES])
            + more
        )
    if named and (link := await opening.attach(store, named[0].session, author, signed)) is not None:
        return link
    known = [one.session for one in there] + [manifest.name for manifest in readable if manifest.name]
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
    as_written = {one.lower(): one for one in there}  # ids are in small letters, whoever typed them
    close = [as_written[one] for one in difflib.get_close_matches(identifier.lower(), as_written, 3, 0.5)]
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "it was cleaned up, or lies in another store: pass store="
    )
    return UnknownId(f"{store.url} holds no {kind} {identifier!r}; {hint}")
