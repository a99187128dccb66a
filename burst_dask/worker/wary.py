"""What a worker knows of a run, some of which may have been written by somebody without the session's key.

An entry that is not signed occupies its slot for good, and nobody can tell what it hides: so its shard gets no further,
by design. A worker leaves that shard alone, says so, and goes on with others.
"""

from __future__ import annotations

from burst_dask.errors import UntrustedObject
from burst_dask.journal.view import RunView
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import Plan
from burst_dask.store.base import Store
from burst_dask.worker.waiting import logger


class WaryView(RunView):
    """A view that goes on without shards of which an entry is not signed; to a client that is an error."""

    def __init__(self, store: Store, plan: Plan) -> None:
        super().__init__(store, plan)
        #: shard -> what was said of its entry
        self.untrusted: dict[ShardId, str] = {}

    def distrust(self, shard: ShardId, error: UntrustedObject) -> None:
        """Leave a shard alone from here on."""
        if shard not in self.untrusted:
            logger.error("shard %s of run %s is left alone: %s", shard, self.run, error)
            self.untrusted[shard] = str(error)
            self._touched.add(shard)  # to claim it, as untouched, would be to write where that entry lies

    async def poll(self, shard: ShardId, *, once: bool = False) -> bool:
        if shard in self.untrusted:
            return False
        before = self._next(shard)
        try:
            return await super().poll(shard, once=once)
        except UntrustedObject as error:
            self.distrust(shard, error)
            return self._next(shard) > before

    async def _jump(self, shard: ShardId) -> None:
        if shard in self.untrusted:
            return
        try:
            await super()._jump(shard)
        except UntrustedObject as error:
            self.distrust(shard, error)

    def _behind(self) -> list[ShardId]:
        return [shard for shard in super()._behind() if shard not in self.untrusted]

    def open_shards(self) -> list[ShardId]:
        return [shard for shard in super().open_shards() if shard not in self.untrusted]
