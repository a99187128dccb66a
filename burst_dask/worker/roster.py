"""The other workers of a session: who is dead, and what those who live have to spare.

A heartbeat says what its worker holds and how much of that could be split off. So a worker with
nothing to do looks at a few heartbeats, drawn at random, instead of at the logs of thousands of
shards: the best of a few is nearly as good as the best of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

from burst_dask.errors import UntrustedObject
from burst_dask.journal.heartbeats import heartbeats
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.keys import RunId, WorkerId
from burst_dask.protocol.records import Beat, Ended, Held, decode, encode
from burst_dask.worker.context import Context

#: Heartbeats read in one search: two choices beat one by far, and more add little.
SAMPLE = 4


class Liveness(NamedTuple):
    """Which workers of the session are dead, by one listing of heartbeats."""

    #: worker -> why it may be taken over
    dead: dict[WorkerId, str]
    alive: frozenset[WorkerId]


class Roster:
    """What one worker knows of the others.

    Parameters
    ----------
    beat
        Makes the worker's own heartbeat: the judge's, by which others are judged.

    Attributes
    ----------
    workers : int
        How many there are, about.
    """

    def __init__(self, context: Context, beat: Callable[[], Beat]) -> None:
        self._context = context
        self._beat = beat
        self.workers = 1
        self._judged = -float("inf")
        #: how many heartbeats the last look read, and how many of these held nothing
        self._looked = self._idle = 0
        self._liveness = Liveness({}, frozenset())
        #: dead workers whose last heartbeat was read
        self._mourned: set[WorkerId] = set()

    async def liveness(self) -> Liveness:
        """Judge all workers by one listing of heartbeats, the own one just renewed (rule 6)."""
        context = self._context
        me = self._beat()
        await context.insist(lambda: context.store.put(keys.beat(context.session, context.worker), encode(me)))
        beats, ended = await heartbeats(context.store, context.session)
        now = max(beats.values())
        dead: dict[WorkerId, str] = {}
        for worker in beats.keys() | set(ended):
            if policy.lease_is_dead(now, beats.get(worker), worker in ended, context.settings.lease):
                dead[worker] = "ended" if worker in ended else "its heartbeat stopped"
        return Liveness(dead, frozenset(beats.keys() - dead.keys()))

    async def judge(self) -> tuple[Liveness, bool]:
        """Return who is dead and who lives, and whether that is of now; it may be a few heartbeats old."""
        now = self._context.clock.monotonic()
        heartbeat = self._context.settings.heartbeat
        if now - self._judged < policy.between_judgements(heartbeat, self.workers, self._looked, self._idle):
            return self._liveness, False
        self._judged = now
        self._liveness = await self._context.insist(self.liveness)
        self.workers = max(len(self._liveness.alive), 1)
        return self._liveness, True

    async def spare(self, run: RunId) -> list[Held]:
        """Return shards of `run` with work to spare, the most first, of a few workers drawn at random."""
        others = sorted(self._liveness.alive - {self._context.worker})
        beats = await self._read(self._context.entropy.sample(others, SAMPLE))
        self._looked, self._idle = len(beats), sum(not beat.holds for beat in beats)
        held = [held for beat in beats for held in beat.holds if held.run == run]
        return sorted(held, key=lambda held: -held.spare)

    async def left_behind(self, run: RunId) -> list[Held]:
        """Return shards of `run` that a worker which has died since held last, as far as its last heartbeat tells."""
        dead = sorted(self._liveness.dead.keys() - self._mourned)
        if not dead:
            return []
        some = self._context.entropy.sample(dead, SAMPLE)
        self._mourned.update(some)
        return [held for beat in await self._read(some) for held in beat.holds if held.run == run]

    async def cause(self, worker: WorkerId, cause: str) -> str:
        """Return in words why a worker is gone."""
        if cause != "ended":
            return f"worker {worker}: {cause}"
        key = keys.ended(self._context.session, worker)
        try:
            data = await self._context.insist(lambda: self._context.store.get(key))
        except UntrustedObject as error:
            self._context.distrust(key, error)
            data = None
        record = None if data is None else decode(Ended, key, data)
        return f"worker {worker}: " + (record.message or record.reason if record else cause)

    async def _read(self, workers: Iterable[WorkerId]) -> list[Beat]:
        return [beat for beat in await in_parallel(self._read_one, workers) if beat is not None]

    async def _read_one(self, worker: WorkerId) -> Beat | None:
        context = self._context
        key = keys.beat(context.session, worker)
        try:
            data = await context.insist(partial(context.store.get, key))
        except UntrustedObject as error:
            context.distrust(key, error)
            return None
        return None if data is None else decode(Beat, key, data)
