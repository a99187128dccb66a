"""Who has a heartbeat, and who is recorded as ended: one listing tells both."""

from __future__ import annotations

from typing import NamedTuple

from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.store.base import Store


class Heartbeats(NamedTuple):
    """All workers that a session ever had."""

    #: worker -> date of its newest heartbeat, in seconds since 1970 by the store's clock
    beats: dict[WorkerId, float]
    #: in the order of the listing
    ended: tuple[WorkerId, ...]


async def heartbeats(store: Store, session: SessionId) -> Heartbeats:
    """List the workers of a session, at one request per 500 of them."""
    beats: dict[WorkerId, float] = {}
    ended: list[WorkerId] = []
    async for page in store.list(keys.workers(session)):
        for meta in page:
            worker, kind = keys.split_worker_key(meta.key)
            if kind == "ended":
                ended.append(worker)
            else:
                beats[worker] = meta.modified
    return Heartbeats(beats, tuple(ended))
