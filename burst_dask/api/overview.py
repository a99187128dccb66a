"""All sessions of a store: thousands of them in seconds."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from typing import Any

from burst_dask import sync
from burst_dask.api.finding import There, sessions_in
from burst_dask.api.places import opened
from burst_dask.client import opening
from burst_dask.client.link import Link
from burst_dask.client.statuses import session_status
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.errors import CloudError, ConfigError, CorruptObject, KeyMissing, UntrustedObject
from burst_dask.journal.heartbeats import heartbeats
from burst_dask.journal.log import Author
from burst_dask.journal.view import SURVEY_PARALLEL, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest, decode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import Close, SessionEntry
from burst_dask.report.lists import SessionList, SessionRow
from burst_dask.store import Store
from burst_dask.trust.keyring import Keyring
from burst_dask.trust.trusting import trusted

#: Sessions looked into at once; each may send dozens of requests at a time.
_AT_ONCE = 25
#: State of a session whose manifest or log is damaged, or written by a newer version.
UNREADABLE = "unreadable"
#: State of a signed session whose key is not here, and of one that is not what its key vouches for.
NO_KEY, UNTRUSTED = "no key", "untrusted"
_CLOSED_BOOKS = {UNREADABLE, NO_KEY, UNTRUSTED}


def list_sessions(
    store: str | os.PathLike[str] | Store | None = None, *, details: int | None = 100, **options: Any
) -> SessionList:
    """Return the sessions of a store, the one with the newest activity first.

    Parameters
    ----------
    store, **options
        As of `Session`.
    details
        How many runs are looked into, in the sessions with the newest activity: these have numbers of tasks
        and workers, cost and size. Each takes a few requests. None looks into all.

    Returns
    -------
    SessionList
        A list that prints as a table; `SessionList.to_frame` makes a DataFrame of it.

    Examples
    --------
    >>> from burst_dask import Session
    >>> burst = Session("memory://list-doctest", fleet=None, name="nightly")
    >>> [(row.name, row.state, row.runs) for row in list_sessions("memory://list-doctest")]
    [('nightly', 'open', 0)]
    >>> burst.cleanup(force=True)
    """
    if details is not None and (isinstance(details, bool) or not isinstance(details, int) or details < 0):
        raise ConfigError(f"details={details!r}: must be a whole number of runs, or None for all")
    return sync.run(_list(opened(store, options), details))


async def _list(store: Store, details: int | None) -> SessionList:
    clock, entropy = SystemClock(), Entropy()
    author = Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy)
    there = await sessions_in(store)
    ring = Keyring()
    rows = await in_parallel(lambda one: _row(store, one, author, ring), there, SURVEY_PARALLEL)
    rows.sort(key=lambda row: -row.last_activity)
    left = float("inf") if details is None else details
    readable = [number for number, row in enumerate(rows) if row.state not in _CLOSED_BOOKS]
    for start in range(0, len(readable), _AT_ONCE):
        if left <= 0:
            break
        numbers = readable[start : start + _AT_ONCE]
        links_here = await in_parallel(lambda number: _attach(store, rows[number], author, ring), numbers)
        chosen: dict[int, Link] = {}
        for number, link in zip(numbers, links_here, strict=True):
            if link is not None and len(link.state.runs) <= left:
                chosen[number] = link
                left -= max(1, len(link.state.runs))
        looked = await in_parallel(_look_into, [(rows[number], link) for number, link in chosen.items()])
        for number, row in zip(chosen, looked, strict=True):
            rows[number] = row
    return SessionList(store.url, sorted(rows, key=lambda row: -row.last_activity))


async def _row(store: Store, one: There, author: Author, ring: Keyring) -> SessionRow:
    """Look at a session; one that cannot be read is listed as such, so that somebody can see to it."""
    state = UNREADABLE
    if one.manifest is not None:
        try:
            Settings.of(**one.manifest.settings)
            return await _glance(store, one.manifest, author, ring)
        except UntrustedObject:
            state = UNTRUSTED
        except (KeyMissing, CloudError):
            state = NO_KEY
        except (CorruptObject, ConfigError):  # damaged, or with settings of a newer version
            pass
    name, host = (one.manifest.name, one.manifest.host) if one.manifest is not None else (None, "")
    signed = one.manifest is not None and bool(one.manifest.key)
    when = one.modified
    return SessionRow(one.session, name, state, created=when, last_activity=when, host=host, signed=signed)


async def _glance(store: Store, manifest: Manifest, author: Author, ring: Keyring) -> SessionRow:
    """Look at a session: two requests, and a few more where those leave it open whether it has expired."""
    session = manifest.session
    if manifest.key or ring.known(session):
        found = await trusted(store, session, ring=ring)
        if found is not None:
            store, manifest = found.store, found.manifest
    dates = {meta.key: meta.modified async for page in store.list(keys.session_log(session)) for meta in page}
    state, newest = "closed", manifest.created  # without a log, somebody's cleanup was interrupted
    if dates:
        key = max(dates)
        newest = dates[key]
        data = await store.get(key)
        if data is None or not isinstance(decode(SessionEntry, key, data).action, Close):
            state = "open"
    if state == "open" and _may_be_over(manifest, min(dates.values()), newest, author):
        link = await opening.attach(store, session, author, ring=ring)
        state = "closed" if link is None else await link.condition()
    return SessionRow(
        id=session,
        name=manifest.name,
        state=state,
        created=manifest.created,
        last_activity=newest,
        host=manifest.host,
        signed=bool(manifest.key),
    )


def _may_be_over(manifest: Manifest, opened: float, newest: float, author: Author) -> bool:
    """Tell whether a session may be past its deadline: whether it is if its newest entry is a sign of a client."""
    settings = Settings.of(**manifest.settings)
    deadline = SessionState().deadline(opened, newest, settings.session_timeout, settings.absolute_timeout)
    return deadline is not None and author.clock.wall() >= deadline


async def _attach(store: Store, row: SessionRow, author: Author, ring: Keyring) -> Link | None:
    """Return the link to a session, None when it is gone or an entry of its log is damaged."""
    with contextlib.suppress(CorruptObject):
        return await opening.attach(store, SessionId(row.id), author, ring=ring)
    return None


async def _look_into(one: tuple[SessionRow, Link]) -> SessionRow:
    """Return the row with all that a status tells; as it is, if an object that tells it is damaged."""
    row, link = one
    try:
        status = await session_status(link, own=False)
    except CorruptObject:
        return row
    beats = await heartbeats(link.store, link.session)
    return dataclasses.replace(
        row,
        state=status.state,
        last_activity=max([row.last_activity, *beats.beats.values()]),
        runs=len(status.runs),
        tasks=status.totals,
        workers=status.workers.alive,
        cost=status.cost,
        size=status.size,
    )
