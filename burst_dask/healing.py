"""Starting workers where work is left and nobody is there to do it, in all sessions of a store: for a schedule."""

from __future__ import annotations

from typing import NamedTuple

from burst_dask import opening, sync
from burst_dask.clock import Entropy, SystemClock
from burst_dask.errors import BurstError, CorruptObject
from burst_dask.finding import sessions_in
from burst_dask.fleet.base import Remote
from burst_dask.fleets import fleet_of
from burst_dask.journal.log import Author
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest
from burst_dask.store import Store


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
    found = [await _heal(store, there.manifest, author) for there in await sessions_in(store) if there.manifest]
    return [one for one in found if one is not None and (one.started or one.why)]


async def _heal(store: Store, manifest: Manifest, author: Author) -> Healed | None:
    if manifest.fleet.kind == "local":
        return None
    try:
        link = await opening.attach(store, manifest.session, author)
        if link is None or await link.condition() != "open":
            return None
        link.fleet = fleet_of(link)
        if not isinstance(link.fleet, Remote):
            return None
        return Healed(manifest.session, await link.start_workers())
    except (BurstError, CorruptObject) as error:  # of one session: others have work, too
        return Healed(manifest.session, 0, str(error))
