"""How workers have ended, in the store: a death is told there, and an orderly end is looked at once more."""

from __future__ import annotations

from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Ended, decode, encode
from burst_dask.protocol.session_records import AddRun, Attach, Close, Extend, Scale
from burst_dask.store import open_store
from burst_dask.store.base import Store
from burst_dask.trust.trusting import trusted

#: Ends for want of work: had it known of more, it would not have ended.
_BY_ITSELF = ("idle", "expired")


class Ends:
    """The ends of one session's workers; a store given by its URL is opened when it is first needed.

    Parameters
    ----------
    key
        Where the key of a signed session is, as of `burst_dask.trust.trusting.trusted`.
    """

    def __init__(self, store: Store | str, session: SessionId, key: str = "") -> None:
        self._place = store
        self._session = session
        self._key = key

    async def tell(self, ended: Ended) -> None:
        """Record that a worker is gone, so that nobody waits for its lease."""
        store = await self._store()
        await store.create(keys.ended(self._session, ended.worker), encode(ended))

    async def missed_news(self, worker: WorkerId) -> bool:
        """Tell whether somebody has asked for workers since `worker`, which ended by itself, looked for the last time.

        Two requests. Who asks for workers writes that into the session log before counting those that are
        there; so whoever looks here after having been counted out leaves no moment in which neither sees the other.
        """
        store, key = await self._store(), keys.ended(self._session, worker)
        data = await store.get(key)
        if data is None:
            return False
        ended = decode(Ended, key, data)
        missed = [entry.action async for entry in log.read_session(store, self._session, ended.next)]
        over = ended.reason not in _BY_ITSELF or any(isinstance(action, Close) for action in missed)
        return not over and any(map(_asks_for_workers, missed))

    async def _store(self) -> Store:
        if isinstance(self._place, str):
            plain = open_store(self._place)
            found = await trusted(plain, self._session, reference=self._key)
            self._place = plain if found is None else found.store
        return self._place


def _asks_for_workers(action: object) -> bool:
    return isinstance(action, AddRun | Attach | Extend) or (isinstance(action, Scale) and action.workers > 0)
