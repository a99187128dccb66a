"""What the workers of a session have spent, by what they say of themselves."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

from burst_dask.journal.view import SURVEY_PARALLEL, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Beat, Ended, decode
from burst_dask.store.base import Store
from burst_dask.store.wrappers import cost_of


class Spent(NamedTuple):
    """What one worker has spent so far."""

    #: by verb
    requests: dict[str, int]
    #: since its start
    seconds: float
    threads: int

    def cost(self, price: float) -> float:
        """Return what it is in USD, at that price of a worker an hour.

        >>> Spent({}, 7200.0, 1).cost(0.5)
        1.0
        """
        return cost_of(self.requests) + self.seconds / 3600 * price


class Spending:
    """Adds up what workers have spent; of those that have ended it is read once more, and never again."""

    def __init__(self, store: Store, session: SessionId) -> None:
        self._store = store
        self._session = session
        self._over: dict[WorkerId, Spent] = {}
        #: of workers that may be alive: what was read, and the date of the heartbeat then
        self._alive: dict[WorkerId, tuple[Spent, float]] = {}

    async def look(
        self, beats: Mapping[WorkerId, float], ended: Collection[WorkerId], fresh: bool = True
    ) -> dict[WorkerId, Spent]:
        """Return what each worker has spent, at a read or two for each whose end was not seen before.

        Parameters
        ----------
        beats, ended
            As of `burst_dask.journal.heartbeats.heartbeats`.
        fresh
            Whether to read anew how many requests those have sent who are alive; else only their time goes on.
        """
        over = set(ended)
        new = [worker for worker in beats.keys() | over if worker not in self._over]
        if not fresh:
            known = {worker: self._alive[worker] for worker in new if worker in self._alive and worker not in over}
            new = [worker for worker in new if worker not in known]
        found = dict(
            zip(new, await in_parallel(lambda one: self._one(one, beats, over), new, SURVEY_PARALLEL), strict=True)
        )
        # One whose heartbeat only stopped may be back: a machine that slept.
        self._over.update({worker: spent for worker, spent in found.items() if worker in over})
        self._alive |= {worker: (spent, beats[worker]) for worker, spent in found.items() if worker not in over}
        if not fresh:
            found |= {
                worker: spent._replace(seconds=spent.seconds + beats[worker] - then)
                for worker, (spent, then) in known.items()
            }
        return self._over | found

    async def _one(self, worker: WorkerId, beats: Mapping[WorkerId, float], over: Collection[WorkerId]) -> Spent:
        """Return what one worker has spent: by its last words, or by its heartbeat."""
        beat_key, ended_key = keys.beat(self._session, worker), keys.ended(self._session, worker)
        asked = [beat_key, ended_key] if worker in over else [beat_key]
        first, *last = await in_parallel(self._store.get, asked)
        if first is None:  # it refused the session
            return Spent({}, 0.0, 0)
        beat = decode(Beat, beat_key, first)
        requests, until = beat.requests, beats.get(worker) or beat.started
        for data in filter(None, last):
            ended = decode(Ended, ended_key, data)
            requests, until = ended.requests or requests, ended.wrote
        return Spent(requests, max(0.0, until - beat.started), beat.threads)
