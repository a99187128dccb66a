"""How a session ends, or goes on: its deadline moved, its log closed, its objects deleted."""

from __future__ import annotations

import asyncio
import contextlib

from burst_dask.client.cancelling import undone
from burst_dask.client.link import Link
from burst_dask.client.shapes import numbers
from burst_dask.errors import ConfigError, StoreAccessDenied
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.session_records import Afford, Close, Extend
from burst_dask.protocol.shard import object_key_name
from burst_dask.store.base import listed
from burst_dask.trust.keyring import Keyring

#: Seconds between looks at workers that have been told to end.
ENDING_POLL = 0.5
#: What a cleanup that keeps the outputs keeps besides segments that hold them: logs and plans lead to them, what
#: workers wrote of themselves tells the cost, and what tasks have printed belongs to their outcomes.
_KEPT = ("/log/", "/logs/", "/plan", "/names", "/workers/")


async def extend(link: Link, seconds: float) -> float | None:
    """Let the session last `seconds` from now at least; return its deadline, None when it has none.

    Raises
    ------
    ConfigError
        The session is closed, or would last beyond its absolute timeout; nothing was changed.
    """
    await link.follow()
    if link.state.closed:
        await link.check_open()
    if await link.deadline() is None:
        return None
    now, last = await link.now(), link.last_possible()
    if last is not None and now + seconds > last:
        left = int(max(0.0, last - now))
        raise ConfigError(
            f"extend(seconds={seconds:g}) reaches beyond the session's absolute_timeout of "
            f"{link.settings.absolute_timeout:g} s after its opening, which nothing moves. Nothing was changed. "
            + (f"extend(seconds={left}) would do" if left else "For new work open a new session with Session(…)")
        )
    await link.append(Extend(now + seconds))
    await _goes_on(link)
    return await link.deadline()


async def afford(link: Link, max_cost: float) -> None:
    """Let the session cost that much in all.

    Raises
    ------
    ConfigError
        The session is closed.
    """
    await link.follow()
    if link.state.closed:
        await link.check_open()
    await link.append(Afford(max_cost))
    await _goes_on(link)


async def _goes_on(link: Link) -> None:
    """Have `burst heal` look at a session again; it may have passed it by since it was over."""
    with contextlib.suppress(StoreAccessDenied):  # whoever reads it later sees what was appended
        await link.store.delete([keys.over(link.session)])


async def incomplete(link: Link) -> list[RunId]:
    """Return the runs that workers may still work on."""
    await link.follow()
    if await link.condition() != "open":
        return []

    async def pending(run: RunId) -> RunView | None:
        view = await link.view(run)
        if view is None:
            return None
        await view.survey()
        return view if view.totals().pending else None

    left = [view for view in await in_parallel(pending, link.state.live_runs) if view is not None]
    gone = await undone(link, left)
    # Counted now: that look may have found them done.
    return [view.run for view in left if view.totals().pending > (gone[view.run].count if view.run in gone else 0)]


async def close(link: Link) -> None:
    await link.follow()
    if not link.state.closed and await link.store.get(keys.manifest(link.session)) is not None:
        await link.append(Close())


async def delete(link: Link, everything: bool) -> None:
    """Delete the session's objects when its workers, wherever they run, have ended; with the last of them, its key.

    Raises
    ------
    CloudError
        Only the key could not be deleted, and the manifest, by which that can be tried again.
    """
    # What is deleted under a worker, its heartbeat would bring back. It is dead, or stopped, if it is there after this.
    began = link.clock.monotonic()
    while (alive := (await link.seen()).status.alive) and link.clock.monotonic() - began < _gone_within(link, alive):
        await link.clock.sleep(ENDING_POLL)
    log = keys.session_log(link.session)
    segments = set() if everything else await _segments_to_keep(link)
    async for page in link.store.list(keys.session_prefix(link.session)):
        doomed = [meta.key for meta in page if everything or not _is_kept(meta.key, segments)]
        await link.store.delete(key for key in doomed if not key.startswith(log))
    if everything:
        await link.store.delete([meta.key async for meta in listed(link.store, log)])
        # Without a log, nobody needs the key to come back and clean up what an interruption has left.
        if link.manifest.key:
            await asyncio.to_thread(Keyring().forget, link.session, link.manifest.key)
        await link.store.delete([keys.manifest(link.session), keys.over(link.session)])


def _gone_within(link: Link, workers: int) -> float:
    """Return the seconds within which workers have looked into the session log and let go."""
    settings = link.settings
    # Idle ones look most seldom, and each a little sooner or later than it should (`Agent`).
    longest = 1.2 * max(settings.session_poll, policy.in_turn(settings.idle_poll_max, workers))
    return longest + settings.release_grace + settings.heartbeat


def _is_kept(key: str, segments: set[str]) -> bool:
    return key in segments or any(part in key for part in _KEPT)


async def _segments_to_keep(link: Link) -> set[str]:
    """Return the keys of the segments that hold an output of a run, or an error; others hold intermediates."""
    found: set[str] = set()
    await link.bring_code()  # what was asked for is told with the function that puts it together

    async def of_run(run: RunId) -> None:
        view = await link.view(run)
        if view is None:
            return
        await view.survey()
        outputs = Bitmap.of(numbers(view.plan.outputs))
        for shard in view.shards.values():
            outcomes, first = shard.index.outcomes, view.plan.shards[keys.root_number(shard.id)].first
            for position, place in outcomes.stored.items():
                if first + position in outputs or position in outcomes.failed:
                    number, name = object_key_name(place, shard.index)
                    if number is None:
                        found.add(keys.segment(run, shard.id, name))

    await in_parallel(of_run, link.state.runs)
    return found
