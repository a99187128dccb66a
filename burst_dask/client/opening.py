"""The beginning of a session, and the way back to one that is there."""

from __future__ import annotations

import asyncio
import contextlib

from burst_dask.client.link import Link
from burst_dask.config import Settings
from burst_dask.errors import BurstError, ConfigError
from burst_dask.graph import stored
from burst_dask.journal import log
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId
from burst_dask.protocol.records import Manifest, decode, encode
from burst_dask.protocol.session import SessionState, fold
from burst_dask.protocol.session_records import Open, Scale, SessionEntry
from burst_dask.store import Signed, Store, probe
from burst_dask.store.base import listed
from burst_dask.trust.keyring import Keyring
from burst_dask.trust.trusting import digest, opened_for, trusted

# Results of other sessions are read within tasks, below the layer that knows keys.
stored.open_with(opened_for)


def keyed(store: Store, manifest: Manifest, author: log.Author) -> Store:
    """Make the key of a session that is to be signed; return the store that signs with it.

    Raises
    ------
    ConfigError, CloudError
        It cannot be kept; nothing was written.
    """
    return Signed(store, {manifest.session: Keyring().make(manifest.session, manifest.key, author.entropy)})


async def create(link: Link, workers: int | None, code: bytes = b"") -> None:
    """Write the session down, and the code that it brings, on a store that keeps the protocol's promises.

    What fails on the way leaves nothing behind, as far as the store allows.
    """
    manifest = encode(link.manifest)
    try:
        await probe(link.store, link.author.entropy)
        await link.append(Open(digest(manifest) if link.manifest.key else ""))
        if workers is not None:
            await link.append(Scale(workers))
        if code:
            await link.store.put(keys.code(link.session, link.manifest.environment.code), code)
        # Last: sessions are listed by their manifests, so none is listed that is not there whole.
        there = not await link.store.create(keys.manifest(link.session), manifest)
    except BaseException:
        with contextlib.suppress(BurstError):
            left = [meta.key async for meta in listed(link.store, keys.session_prefix(link.session))]
            await link.store.delete([*left, keys.manifest(link.session)])
        await forget_key(link)
        raise
    if there:
        raise ConfigError(f"there is a session {link.session} already; try again")


async def forget_key(link: Link) -> None:
    """Delete the key of a signed session that is given up; its failure does not hide why."""
    if link.manifest.key:
        with contextlib.suppress(BurstError):
            await asyncio.to_thread(Keyring().forget, link.session, link.manifest.key)


async def attach(
    store: Store, session: SessionId, author: log.Author, signed: bool = False, ring: Keyring | None = None
) -> Link | None:
    """Return the link to a session that is there, or None.

    Raises
    ------
    KeyMissing, UntrustedObject, CloudError
        As of `burst_dask.trust.trusting.trusted`; `signed` refuses a session that is not.
    """
    found = await trusted(store, session, signed=signed, ring=ring)
    if found is None:
        return None
    store, manifest = found.store, found.manifest
    state = SessionState(closed=True) if found.swept else await _read_state(store, session)
    lacks = bool(manifest.environment.code)
    return Link(store, manifest, Settings.of(**manifest.settings), author, state, lacks_code=lacks)


async def _read_state(store: Store, session: SessionId) -> SessionState:
    """Return the state of a session, reading its log in parallel."""
    names = [meta.key async for meta in listed(store, keys.session_log(session))]
    bodies = await in_parallel(store.get, names)
    entries = [decode(SessionEntry, name, body) for name, body in zip(names, bodies, strict=True) if body is not None]
    if not entries:  # somebody's cleanup was interrupted: it can only be repeated
        return SessionState(closed=True)
    return fold(entries)
