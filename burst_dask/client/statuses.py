"""Finding out how far runs and sessions are: a few requests each, and never one for each task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from burst_dask.client import cancelling, outlook
from burst_dask.client.cancelling import Undone
from burst_dask.client.guard import notes
from burst_dask.client.link import Link, WorkersSeen
from burst_dask.journal.outcomes import Totals
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol.keys import RunId
from burst_dask.report.tables import RunStatus, SessionStatus
from burst_dask.store import cost_of, requests_of, storage_cost

#: Seconds of a worker's time that each task costs besides its own, for what the rest of a run will take
#: (benchmarks/overhead.py: 100,000 no-op tasks take two workers 8 s).
OVERHEAD = 160e-6


class Workers(NamedTuple):
    """Who works for a session, and what all its workers ever had have spent."""

    seen: WorkersSeen
    #: of those that are alive
    threads: int
    #: store requests by verb
    requests: dict[str, int]
    #: USD
    cost: float


async def survey_workers(link: Link, own: bool = True) -> Workers:
    """Look at all workers: a listing, and a read or two for each whose life's end was not seen before.

    Parameters
    ----------
    own
        Whether the requests of this client count.
    """
    seen = await link.seen()
    everybody = await link.spending.look(seen.beats, seen.ended)
    requests: Counter[str] = Counter(requests_of(link.store) if own else {})
    for spent in everybody.values():
        requests.update(spent.requests)
    seconds = sum(spent.seconds for spent in everybody.values())
    return Workers(
        seen=seen,
        threads=sum(everybody[worker].threads for worker in seen.alive),
        requests=dict(requests),
        cost=cost_of(dict(requests)) + seconds / 3600 * link.settings.worker_price,
    )


async def run_status(
    link: Link, view: RunView, workers: Workers, condition: str | None = None, undone: Undone | None = None
) -> RunStatus:
    """Return how far the run of `view` is.

    Parameters
    ----------
    condition
        Of the session, as of `Link.condition`; None finds it out.
    undone
        What cancelling leaves undone of the run.
    """
    await view.survey(discarded=not link.settings.keep_intermediates)
    totals = view.totals()
    condition = condition or await link.condition()
    running = 0
    if totals.pending and condition == "open":
        running = undone.running() if undone else cancelling.running(view, workers.seen.alive)
    is_cancelled = view.run in link.state.cancelled
    gone = totals.pending - running if is_cancelled else undone.count if undone else 0
    counts = _Counts(totals.done + totals.failed + totals.reserved, totals.pending - gone, totals.cancelled + gone)
    state = _state(counts, is_cancelled, totals.failed, condition)
    ended = link.clock.wall()
    if state not in ("pending", "running") and not running:
        ended = await view.last_change() or view.plan.created
    return RunStatus(
        id=view.run,
        state=state,
        total=totals.total,
        completed=totals.done,
        failed=totals.failed,
        running=running,
        cancelled=counts.cancelled,
        elapsed=max(0.0, ended - view.plan.created),
        workers=workers.seen.status,
        remaining=_remaining(view, totals, counts.left, workers) if state in ("pending", "running") else None,
        cost=workers.cost,
        size=view.plan.size + _stored(view),
        freed=sum(shard.index.freed for shard in view.shards.values()),
    )


class _Counts(NamedTuple):
    begun: int
    #: that will have an outcome yet
    left: int
    cancelled: int


def _state(counts: _Counts, is_cancelled: bool, failed: int, condition: str) -> str:
    if is_cancelled and (counts.left or counts.cancelled):
        return "cancelled"
    if not counts.left:
        return "cancelled" if counts.cancelled else "failed" if failed else "done"
    if condition != "open":
        return "stopped"
    return "running" if counts.begun else "pending"


def _remaining(view: RunView, totals: Totals, left: int, workers: Workers) -> float | None:
    """Return the seconds that the rest takes if it is like what was, None when nothing was or nobody works."""
    ran = sum(shard.index.outcomes.ran for shard in view.shards.values())
    if not ran or not workers.threads:
        return None
    return left * (totals.seconds / ran + OVERHEAD) / workers.threads


def _stored(view: RunView) -> int:
    """Return the bytes of stored results and errors, which the newest entries tell."""
    places = (place for shard in view.shards.values() for place in shard.index.outcomes.stored.values())
    return sum(place.end - place.start for place in places)


async def _undone(link: Link, workers: Workers) -> Mapping[RunId, Undone]:
    """Return what cancelling leaves undone of all runs; nothing is read while nothing is cancelled."""
    if not link.state.cancelled and not link.state.cancelled_tasks:
        return {}
    views = await in_parallel(link.view, link.state.runs)
    return await cancelling.undone(link, [view for view in views if view is not None], workers.seen.alive)


async def session_status(link: Link, own: bool = True) -> SessionStatus:
    """Return the state of a session and of all its runs; `own` as of `survey_workers`."""
    await link.follow()
    workers = await survey_workers(link, own)
    condition = await link.condition()

    undone = await _undone(link, workers)

    async def one(run: RunId) -> RunStatus | None:
        view = await link.view(run)
        return None if view is None else await run_status(link, view, workers, condition, undone.get(run))

    runs = [run for run in await in_parallel(one, link.state.runs) if run is not None]
    ahead: tuple[str, ...] = ()
    if condition == "open":
        views = [view for view in await in_parallel(link.view, link.state.live_runs) if view is not None]
        ahead = await outlook.notes(link, views, workers.seen.status.alive, workers.cost)
    # As if what is there had been there from the beginning: what was deleted since made up for what came late.
    kept = max(0.0, link.wall() - link.manifest.created)
    cost = workers.cost + storage_cost(sum(run.size for run in runs), kept)
    deadline = await link.deadline()
    return SessionStatus(
        id=link.session,
        name=link.manifest.name,
        store=link.store.url,
        host=link.manifest.host,
        state=condition,
        created=link.manifest.created,
        time_left=None if deadline is None else max(0.0, deadline - link.wall()),
        workers=workers.seen.status,
        runs=tuple(runs),
        settings=link.manifest.settings,
        cost=cost,
        requests=workers.requests,
        notes=await notes(link, workers.seen) + ahead,
        cost_note=link.cost_note,
        key=link.manifest.key,
    )
