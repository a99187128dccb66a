"""A second try of a straggler's task, by a worker that has nothing else to do: the first commit wins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import WorkerId
from burst_dask.protocol.records import Backup, ShardIndex
from burst_dask.protocol.shard import Phase, Shard
from burst_dask.worker.context import Context
from burst_dask.worker.holding import Holding
from burst_dask.worker.outgoing import Outgoing
from burst_dask.worker.tender import Tender
from burst_dask.worker.waiting import wait_for
from burst_dask.worker.wary import WaryView


def stand_in(shard: Shard, tasks: Bitmap, worker: WorkerId) -> Shard:
    """Return a shard of `tasks` alone, as if `worker` held it: what a `Holding` goes by, never written."""
    return Shard(shard.id, ShardIndex(tasks=tasks, holder=worker, reserved=tasks), shard.next)


class BackupTender(Tender):
    """Runs tasks of a shard that another worker holds, and appends a BACKUP if it is first."""

    may_discard = False

    def __init__(self, context: Context, view: WaryView, holding: Holding, announce: Callable[[RunView], None]) -> None:
        super().__init__(context, view, holding, announce)
        self._tasks = holding.shard.index.tasks

    def cancel(self, numbers: Bitmap) -> None:
        """Do nothing: that is the holder's to decide, as an error is."""

    async def run(self) -> None:
        """Return when the tasks have outcomes, whoever gave them."""
        async with asyncio.TaskGroup() as group:
            loading = group.create_task(self._load_loop())
            await self._race()
            loading.cancel()

    async def _race(self) -> None:
        context, settings, holding = self.context, self.context.settings, self.holding
        started = context.clock.monotonic()
        while self.letting_go is None and self._open():
            if len(holding.finished):
                await self._append_backup()
                return
            waited = context.clock.monotonic() - started
            pause = policy.patience(waited, settings.commit_interval, settings.idle_poll_max)
            if not await wait_for(self.changed, pause):
                await context.insist(partial(self.view.poll, holding.shard.id))

    def _open(self) -> bool:
        """Tell whether the tasks still need an outcome, and a holder has them."""
        shard = self.view.shard(self.holding.shard.id)
        return shard.phase is Phase.HELD and bool(self._tasks & shard.index.pending)

    async def _append_backup(self) -> None:
        """Commit what has succeeded; an error is the holder's to decide."""
        context, holding = self.context, self.holding
        finished = holding.collect()
        finished.upstream.clear()
        finished.tries.clear()
        finished.ran = {position: ran for position, ran in finished.ran.items() if not ran.failed}
        outgoing = Outgoing.of(finished, {}, context.settings, outputs=holding.table.outputs)
        await self._put_beside(outgoing)
        while self._open() and len(finished):
            shard = self.view.shard(holding.shard.id)
            outcomes, names = outgoing.outcomes(shard)
            attempt = log.prepare(shard, context.author, Backup(outcomes, names), outgoing.blobs)
            after = await context.insist(partial(log.append, context.store, self.view.run, attempt))
            if after is not None:
                self.view.learn(after)
                self.announce(self.view)
                return
            await context.insist(partial(self.view.poll, shard.id, once=True))
