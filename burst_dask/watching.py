"""Waiting for the outcomes of what was asked for in a run, with few requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from burst_dask import report
from burst_dask.errors import RunCancelled, StoreUnavailable
from burst_dask.journal import packs
from burst_dask.journal.view import RunView
from burst_dask.link import Link
from burst_dask.protocol import policy
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.shard import Phase

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
        self, link: Link, view: RunView, outputs: Iterable[int], settled: Callable[[int], object] | None = None
    ) -> None:
        self._link = link
        self._view = view
        #: called with each output whose outcome has become known: somebody wants each as soon as it is there
        self._settled = settled
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
        self, *, to_first_failure: bool, update: report.Update | None, known: bool, to_news: bool = False
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
        await self._view.survey()
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
            if self.pending and (other := await cancelled_input(self._link, self._view)) is not None:
                raise RunCancelled(
                    f"run {self._view.run} cannot be completed: run {other}, of which it needs a result, was cancelled "
                    "without it. What does not need it goes on, and collect() returns what is done"
                )
        if self.pending and self._view.run in self._link.state.cancelled:
            raise _cancelled(self._view)


def _cancelled(view: RunView) -> RunCancelled:
    totals = view.totals()
    return RunCancelled(
        f"run {view.run} was cancelled with at least {totals.done} of its {totals.total} tasks done. "
        "What was committed is kept until the session is cleaned up"
    )


async def cancelled_input(link: Link, view: RunView) -> RunId | None:
    """Return a cancelled run of which a run needs a result that nobody computes any more, if there is one.

    The run may need it by way of tasks of other runs. No request while no run of the session is cancelled.
    """
    cancelled = link.state.cancelled
    if not cancelled or not view.plan.externals:
        return None
    alive = frozenset((await link.seen()).alive)
    views: dict[RunId, RunView | None] = {}
    dependencies: dict[tuple[RunId, int], tuple[tuple[int, ...], ...]] = {}
    stack = list(view.plan.externals)
    seen = set(stack)
    while stack:
        run, task = stack.pop()
        if run not in views:
            views[run] = other = await link.view(run)
            if other is not None:
                await other.survey()
        other = views[run]
        if other is None or other.outcome(task) is not None:
            continue
        if run in cancelled:
            if other.owner(task)[0].index.holder in alive:
                continue  # tasks that run are let finish
            return run
        plan = other.plan
        shard, position = plan.locate(task)
        if (run, shard) not in dependencies:
            record = await packs.read_record(link.store.get_ranges, run, plan.shards[shard].place)
            dependencies[run, shard] = record.dependencies
        needs = dependencies[run, shard][position]
        new = {(run, need) if need < plan.tasks else plan.externals[need - plan.tasks] for need in needs} - seen
        seen |= new
        stack += new
    return None
