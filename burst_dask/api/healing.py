"""Starting workers where work is left and nobody is there to do it, in all sessions of a store: for a schedule.

A schedule looks every few minutes, and most sessions of a store are over. Each is read once, and marked then
(`keys.over`): later looks cost two listings, and what the sessions cost that are open.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from burst_dask import sync
from burst_dask.api.fleets import fleet_of
from burst_dask.aws.secrets import SCHEME
from burst_dask.client import opening
from burst_dask.client.link import Link
from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import BurstError, CorruptObject, KeyMissing, StoreAccessDenied, UntrustedObject
from burst_dask.fleet.base import Remote
from burst_dask.journal.log import Author
from burst_dask.journal.view import SURVEY_PARALLEL, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.store import Store
from burst_dask.store.base import listed

#: Seconds after its deadline from which a session is taken for expired, whatever a client's clock says.
SURELY = 3600.0


class Healed(NamedTuple):
    """What was done for a session."""

    session: SessionId
    #: workers that were started
    started: int
    #: why there were not more; empty when there was no need
    why: str = ""


def heal_all(store: Store) -> list[Healed]:
    """Look after the fleets of all open sessions whose workers run elsewhere; return those for which there was cause.

    Sessions whose own workers are there look after themselves; what they miss is started here as well, and none twice.
    """
    return sync.run(_heal_all(store))


async def _heal_all(store: Store) -> list[Healed]:
    entropy = Entropy()
    author = Author(WorkerId(f"healer-{entropy.token(6)}"), SystemClock(), entropy)
    over = {meta.key.removeprefix(keys.OVER) async for meta in listed(store, keys.OVER)}
    there = [meta.key.removeprefix(keys.SESSIONS) async for meta in listed(store, keys.SESSIONS)]

    async def look(session: str) -> Link | Healed | None:
        return await _open_link(store, SessionId(session), author)

    links = await in_parallel(look, [session for session in there if session not in over], SURVEY_PARALLEL)
    found = [await _heal(link) if isinstance(link, Link) else link for link in links]
    return [one for one in found if one is not None and (one.started or one.why)]


async def _open_link(store: Store, session: SessionId, author: Author) -> Link | Healed | None:
    """Return the link to a session that may need workers; of any other, see to it that it is not read again."""
    try:
        link = await opening.attach(store, session, author)
        if link is None:  # cleaned up meanwhile
            return None
        condition = "local" if link.manifest.fleet.kind == "local" else await link.condition()
        if condition == "open":
            return link
        if condition == "expired" and await link.now() < (await link.deadline() or 0.0) + SURELY:
            return None
        with contextlib.suppress(StoreAccessDenied):  # whoever may not is as right, and slower
            await _mark(link)
    except BurstError as error:  # of one session: others have work, too
        return None if _is_for_others(error) else Healed(session, 0, str(error))
    return None


def _is_for_others(error: BurstError) -> bool:
    """Tell whether somebody else sees to it that a session cannot be read."""
    if isinstance(error, KeyMissing):  # in a file of whoever opened it, whose workers are not started from here
        return not error.reference.startswith(SCHEME)
    # Damaged, or of a newer version: `burst doctor` tells.
    return isinstance(error, CorruptObject) and not isinstance(error, UntrustedObject)


async def _mark(link: Link) -> None:
    """Mark a session as over, unless somebody lets it go on at this moment (PROTOCOL.md)."""
    known = link.state.next
    await link.store.put(keys.over(link.session), b"")
    await link.follow()
    if link.state.next != known:
        await link.store.delete([keys.over(link.session)])


async def _heal(link: Link) -> Healed | None:
    try:
        link.fleet = fleet_of(link)
        if not isinstance(link.fleet, Remote):
            return None
        return Healed(link.session, await link.start_workers())
    except BurstError as error:
        return Healed(link.session, 0, str(error))
