"""The store as the key of a session vouches for it: before anything of a signed session is read, its key is found here.

The manifest is not signed, so that sessions are listed without keys. The first entry of the session log is, and has the
manifest's digest: so a manifest is believed when the log vouches for it.
"""

from __future__ import annotations

import asyncio
import hashlib
from typing import NamedTuple

import msgspec

from burst_dask.aws.secrets import SCHEME
from burst_dask.clock import Entropy
from burst_dask.errors import KeyMissing, UnknownId, UntrustedObject
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId
from burst_dask.protocol.records import Environment, FleetChoice, Manifest, decode
from burst_dask.protocol.session_records import Open, SessionEntry
from burst_dask.store import Key, Signed, Store, open_store
from burst_dask.store.signing import key_in
from burst_dask.trust.keyring import FILE, Keyring


class Trusted(NamedTuple):
    """A session, as far as it is to be believed."""

    #: that verifies what it reads, if the session is signed
    store: Store
    manifest: Manifest
    #: whether the session is signed and has no log that vouches for anything: a cleanup was interrupted. Its objects
    #: can be listed and deleted, and none is believed
    swept: bool = False


def digest(manifest: bytes) -> str:
    """Return what the first entry of a signed session's log says of the manifest."""
    return hashlib.sha256(manifest).hexdigest()


async def trusted(
    store: Store, session: SessionId, *, reference: str = "", signed: bool = False, ring: Keyring | None = None
) -> Trusted | None:
    """Return a session and the store that verifies what it has written; None when there is no such session.

    Of a session that is not signed nothing is verified, and no request is sent besides that for the manifest.

    Parameters
    ----------
    reference
        Where the key is, by somebody who is to be believed; else this machine says, and else the manifest.
    signed
        Whether a session that is not signed is to be refused.

    Raises
    ------
    KeyMissing
        It is signed, and its key is not here.
    UntrustedObject
        Its manifest is not the one that it was opened with, or it is not signed and should be.
    CloudError
        The key is with AWS, which does not answer.
    """
    name = keys.manifest(session)
    data = await store.get(name)
    if data is None:
        return None
    manifest = decode(Manifest, name, data)
    if manifest.session != session:  # a cleanup would delete that other session, and stop its workers
        raise UntrustedObject(
            f"{name} is not the manifest of session {session} but that of {manifest.session}: somebody has put it "
            f"there. Nothing of it was used. Find out who may write to {store.url}; for new work open a new session"
        )
    ring, key = ring or Keyring(), key_in(store, session)
    where = reference or ("" if key else ring.known(session))
    if not manifest.key:
        if where or key or signed:
            raise _not_signed(store, session, known=bool(where or key))
        return Trusted(store, manifest)
    first = keys.entry(keys.session_log(session), 0)
    if key is None:
        said = manifest.key if manifest.key.startswith(SCHEME) else FILE  # a store names no files of this machine
        try:
            key = await asyncio.to_thread(ring.read, session, where or said)
        except KeyMissing:
            if await store.get(first) is None:  # the cleanup that was interrupted may have deleted the key already
                return _swept(store, manifest)
            raise
        store = Signed(store, {session: key})
    entry = await store.get(first)
    if entry is None:
        return _swept(store, manifest)
    action = decode(SessionEntry, first, entry).action
    if not isinstance(action, Open) or action.manifest != digest(data):
        raise UntrustedObject(
            f"{name} is not the manifest that session {session} was opened with: somebody has changed it. Nothing of "
            f"the session was used. Find out who may write to {store.url}; for new work open a new session"
        )
    return Trusted(store, manifest)


async def opened_for(url: str, session: SessionId) -> Store:
    """Open a store for what a session has left in it; takes the key from where the session has it."""
    store = open_store(url)
    found = await trusted(store, session)
    if found is None or found.swept:
        raise UnknownId(f"{url} holds no session {session} any more: it was cleaned up")
    return found.store


def _not_signed(store: Store, session: SessionId, known: bool) -> UntrustedObject:
    why = "and here is the key by which it was" if known else "and only signed ones are wanted"
    return UntrustedObject(
        f"session {session} is not signed, {why}: somebody has replaced it, or it was opened without signed=True. "
        f"Nothing of it was used. Find out who may write to {store.url}; for new work open a new session"
    )


def _swept(store: Store, manifest: Manifest) -> Trusted:
    """Return a session of which nothing is to be believed but that it is to be deleted."""
    nobody = Key(Entropy().secret())
    manifest = msgspec.structs.replace(manifest, host="", settings={}, environment=Environment(), fleet=FleetChoice())
    return Trusted(Signed(store, {manifest.session: nobody}), manifest, swept=True)
