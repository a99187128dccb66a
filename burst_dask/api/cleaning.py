"""Removing a session: its workers and what it has stored, also when what it has stored cannot be read."""

from __future__ import annotations

import warnings

from burst_dask import sync
from burst_dask.api.fleets import fleet_of, release
from burst_dask.client.ending import delete
from burst_dask.client.link import Link
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.environment.versions import own_versions
from burst_dask.errors import CloudError, ConfigError, CorruptObject, UnknownId
from burst_dask.fleet.base import Fleet
from burst_dask.journal.log import Author
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest
from burst_dask.protocol.session import SessionState
from burst_dask.store import Store
from burst_dask.trust.keyring import Keyring
from burst_dask.trust.trusting import trusted


def remove(link: Link, fleet: Fleet, everything: bool) -> None:
    """Stop the workers of a session that is closed, and delete what it has stored."""
    try:
        fleet.remove()
        release(fleet)
    except (CloudError, ConfigError) as error:  # they see that the session is closed, if nobody may stop them
        warnings.warn(f"workers of session {link.session} end by themselves, within a minute: {error}", stacklevel=3)
        sync.run(delete(link, everything))
        release(fleet)  # not before they have ended
    else:
        sync.run(delete(link, everything))


def sweep(store: Store, session: SessionId) -> None:
    """Remove a session whose log cannot be read: it is damaged, or somebody without its key has written to it.

    Nothing that cannot be verified is believed. When that is the manifest, workers on this machine are stopped, and
    others end when they find the session gone.

    Raises
    ------
    UnknownId
        The store has nothing of that id.
    """
    link = sync.run(_unread(store, session))
    remove(link, fleet_of(link), everything=True)


async def _unread(store: Store, session: SessionId) -> Link:
    clock, entropy = SystemClock(), Entropy()
    author = Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy)
    try:
        found = await trusted(store, session)
    except CorruptObject:
        # Of such a manifest nothing is believed, not even where the key is: it might name that of another session.
        manifest = Manifest(
            session=session,
            name=None,
            created=clock.wall(),
            host="",
            versions=own_versions(),
            settings={},
            key=Keyring().known(session),
        )
    else:
        if found is None:
            raise UnknownId(f"there is no session {session} in {store.url}; nothing was deleted")
        store, manifest = found.store, found.manifest
    return Link(store, manifest, Settings.of(**manifest.settings), author, SessionState(closed=True))
