"""Waiting for the outcomes of what was asked for in a run, with few requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from burst_dask.client.cancelling import undone
from burst_dask.client.link import Link
from burst_dask.errors import RunCancelled, StoreUnavailable
from burst_dask.journal.view import PARALLEL, RunView
from burst_dask.protocol import policy
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.shard import Phase
from burst_dask.report import tables

#: Seconds between surveys for a progress bar; each costs as much as a dozen looks or more.
SURVEY_EVERY = 2.5
#: Shards looked at without a pause, each of them because the one before was complete.
LOOKS_AT_ONCE = 8
#: Seconds between surveys while all shards looked at turn out complete.
SURVEY_AGAIN = 5.0
#: Seconds between surveys at most, while somebody wants each output as soon as it is there.
SURVEY_AT_LEAST = 30.0
#: A failed output is noticed within so many seconds, or in three times the time it took to fail.
FAILED_WITHIN = 10.0


class Watch:
    """Looks for the outcomes of what was asked for, until all of them are known.

    Attributes
    ----------
    pending : dict of int to list of int
        Plan shard -> outputs in it without a known outcome.
    failed : int or None
        The first output that is known to have failed.
    """

    def __init__(
        self,
        link: Link,
        view: RunView,
        outputs: Iterable[int],
        settled: Callable[[int], object] | None = None,
        *,
        leave: bool = False,
    ) -> None:
        self._link = link
        self._view = view
        #: called with each output whose outcome has become known: somebody wants each as soon as it is there
        self._settled = settled
        #: whether outputs that nobody will make, because of what was cancelled, are not waited for
        self._leave = leave
        self.pending: dict[int, list[int]] = {}
        for output in sorted(set(outputs)):
            self.pending.setdefault(view.plan.locate(output)[0], []).append(output)
        self.failed: int | None = None
        self._surveyed = 0.0
        self._followed = 0.0
        #: shard -> how many of its entries were taken into account
        self._taken: dict[ShardId, int] = {}
        if view.shards:  # what is known already is not looked for again
            self._take_all()

    async def wait(
        self, *, to_first_failure: bool, update: tables.Update | None, known: bool, to_news: bool = False
    ) -> None:
        """Return when every output has an outcome, or, if asked, when one has failed or more have one than before.

        Parameters
        ----------
        known
            Whether something may have happened already, so that a survey pays first.
        """
        before = self.left
        link, clock = self._link, self._link.clock
        guard = link.guard
        started = away_since = clock.monotonic()
        if known:
            await self._survey()
            await self._heed()
        while self.pending and not (to_first_failure and self.failed is not None):
            if to_news and self.left < before:
                break
            waited = clock.monotonic() - started
            await clock.sleep(policy.patience(waited, link.settings.wait_poll_min, link.settings.wait_poll_max))
            try:
                if await self.look(waited):
                    guard.news()
                await guard.check()
                await self.survey_if_due(waited, shown=update is not None)
                if update is not None:
                    totals = self._view.totals()
                    update(totals.done, totals.failed, totals.total)
                await self._follow(waited)
                away_since = clock.monotonic()
            except StoreUnavailable:
                # A laptop that slept, a network that is gone for a while: the run goes on.
                if clock.monotonic() - away_since > link.settings.idle_timeout:
                    raise

    @property
    def left(self) -> int:
        """How many outputs have no known outcome."""
        return sum(map(len, self.pending.values()))

    async def look(self, waited: float) -> bool:
        """Look into the log of one shard that holds pending outputs, and the next if that is complete; tell of news."""
        view = self._view
        news = last = False
        for _ in range(LOOKS_AT_ONCE):
            if not self.pending:
                break
            # The last one: shards are claimed in order, so when it is complete most are, and few looks found
            # something that did not end the wait.
            number = max(self.pending) if self._settled is None or last else min(self.pending)
            state = view.owner(self.pending[number][-1])[0]
            shard = state.id
            # Others who use this view may have learned something of the shard meanwhile.
            if state.next == self._taken.get(shard, 0) and not await view.poll(shard):
                if self._settled is None or last or len(self.pending) == 1:
                    break
                last = True  # where each counts, the first may be done, or the last
                continue
            news = True
            self._taken[shard] = view.shard(shard).next
            self._advance([number])
            if view.shard(shard).phase is not Phase.COMPLETE:
                break
            # Where one shard is complete, others often are: one listing is less than a look at each.
            if self.pending and waited - self._surveyed >= waited / 10:
                self._surveyed = waited
                await self._survey()
        else:
            if self.pending and waited - self._surveyed >= SURVEY_AGAIN:  # so many at once: the end is near
                self._surveyed = waited
                await self._survey()
        return news

    async def survey_if_due(self, waited: float, *, shown: bool = False) -> None:
        """Look at all shards, if it is time to."""
        if self._survey_due(waited, shown=shown):
            self._surveyed = waited
            await self._survey()

    def _survey_due(self, waited: float, *, shown: bool) -> bool:
        """Tell whether to look at all shards: for a progress bar, and for outputs that failed elsewhere."""
        if shown:
            return waited - self._surveyed >= SURVEY_EVERY
        if self._settled is not None:
            pause = min(SURVEY_AT_LEAST, max(SURVEY_EVERY, waited / 4))
            return len(self.pending) > 2 and waited - self._surveyed >= pause
        return len(self.pending) > 1 and waited >= max(FAILED_WITHIN, 3 * self._surveyed)

    async def _survey(self) -> None:
        await self._view.survey(parallel=PARALLEL)  # workers need the store, too: of a large run, seconds later will do
        self._take_all()

    def _take_all(self) -> None:
        self._taken = {id: shard.next for id, shard in self._view.shards.items()}
        self._advance(list(self.pending))

    def _advance(self, numbers: Iterable[int]) -> None:
        """Strike off the outputs of these plan shards that have an outcome."""
        for number in numbers:
            left = []
            for output in self.pending[number]:
                outcome = self._view.outcome(output)
                if outcome is None:
                    left.append(output)
                    continue
                if not outcome.done and self.failed is None:
                    self.failed = output
                if self._settled is not None:
                    self._settled(output)
            if left:
                self.pending[number] = left
            else:
                del self.pending[number]

    async def _follow(self, waited: float) -> None:
        """Look into the session log now and then: somebody may have cancelled the run, or one that it needs."""
        if waited - self._followed >= policy.patience(waited, 5.0, 30.0):
            self._followed = waited
            await self._link.follow()
            await self._heed()
        if self.pending and not self._leave and self._view.run in self._link.state.cancelled:
            raise _cancelled(self._view)

    async def _heed(self) -> None:
        """Raise if an output will never be there, because of what was cancelled; or wait for the others only."""
        view = self._view
        gone = (await undone(self._link, [view])).get(view.run) if self.pending else None
        if gone is None:
            return
        self._advance(list(self.pending))
        left = {number: [one for one in outputs if one not in gone] for number, outputs in self.pending.items()}
        if self._leave:
            self.pending = {number: outputs for number, outputs in left.items() if outputs}
        elif view.run not in self._link.state.cancelled and sum(map(len, left.values())) < self.left:
            what = "some of its own tasks were"
            if gone.cause != view.run:
                what = f"run {gone.cause}, of which it needs a result, was"
            raise RunCancelled(
                f"run {view.run} cannot be completed: {what} cancelled. "
                "What does not need that goes on, and collect() returns what is done"
            )


def _cancelled(view: RunView) -> RunCancelled:
    totals = view.totals()
    return RunCancelled(
        f"run {view.run} was cancelled with at least {totals.done} of its {totals.total} tasks done. "
        "What was committed is kept until the session is cleaned up"
    )
