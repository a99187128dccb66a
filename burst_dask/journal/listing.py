"""The newest entry of many shard logs, by few listings, of which many are under way at once.

A listing brings 1,000 keys, the next page only after the one before, and begins behind any key.
So the logs, which lie one behind another, are cut into stretches that are listed side by side: as
many as it takes to finish soon, and no more, because each may end in a page that reaches beyond it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.store.base import Meta, Store, first_page
from burst_dask.store.requests import PAGE

#: Listings under way at once: far below what one prefix of S3 takes.
PARALLEL = 32
#: A stretch is cut no shorter than about so many pages: each costs half a page more.
_PAGES = 2


class Newest(NamedTuple):
    """The newest entry of a shard log that a listing showed."""

    number: int
    #: seconds since 1970 by the store's clock
    modified: float


def key_order(shard: ShardId) -> str:
    """Return what shards are sorted by to be in the order of their keys.

    >>> sorted([ShardId("00012"), ShardId("00012-3"), ShardId("00012-30")], key=key_order)
    ['00012-3', '00012-30', '00012']
    """
    return f"{shard}/"


def newest_of(page: Sequence[Meta]) -> dict[ShardId, Newest]:
    """Return the newest entry of each shard log that the page shows."""
    # Entry numbers are zero-padded: the last of a shard is its newest.
    return {keys.shard_of_entry(meta.key): Newest(keys.entry_number(meta.key), meta.modified) for meta in page}


async def newest_entries(store: Store, run: RunId, behind: Mapping[ShardId, str]) -> dict[ShardId, Newest]:
    """Return the newest entry of each shard that has one behind the key given for it.

    Parameters
    ----------
    behind
        For each shard, a key in its log, which need not exist: what is up to there is known. Other
        shards' entries may be found as well.

    Notes
    -----
    About one request for 1,000 entries that are not known, at most one for a shard besides, and
    a dozen or two for doing it in parallel. What lies between the shards, or is known, is skipped
    where that saves a request.
    """
    listing = _Listing(store, run, behind)
    try:
        async with asyncio.TaskGroup() as group:
            listing.begin(group)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first that failed; the others were cancelled
    return listing.found


class _Listing:
    """One call of `newest_entries`."""

    def __init__(self, store: Store, run: RunId, behind: Mapping[ShardId, str]) -> None:
        self._store = store
        self._run = run
        self._behind = behind
        self._idle = PARALLEL
        self.found: dict[ShardId, Newest] = {}

    def begin(self, group: asyncio.TaskGroup) -> None:
        self._start(group, sorted(self._behind, key=key_order))

    def _start(self, group: asyncio.TaskGroup, stretch: list[ShardId]) -> None:
        if stretch:
            self._idle -= 1
            group.create_task(self._list(group, stretch))

    async def _list(self, group: asyncio.TaskGroup, stretch: list[ShardId]) -> None:
        """List a stretch of logs, leaving parts of it to others while there are some idle."""
        whole, pages, after = len(stretch), 0, ""
        while True:
            after = max(after, self._behind[stretch[0]])
            page = await first_page(self._store, keys.run_logs(self._run), after)
            pages += 1
            self._take(page)
            if len(page) < PAGE:
                break  # there is nothing beyond either
            after = page[-1].key
            reached = key_order(keys.shard_of_entry(after))
            stretch = [shard for shard in stretch if key_order(shard) >= reached]
            if not stretch:
                break
            pages_left = len(stretch) * pages / max(1, whole - len(stretch))
            parts = max(1, min(self._idle + 1, int(pages_left) // _PAGES, len(stretch)))
            size = -(-len(stretch) // parts)
            for begin in range(size, len(stretch), size):
                self._start(group, stretch[begin : begin + size])
            whole -= max(0, len(stretch) - size)
            stretch = stretch[:size]
        self._idle += 1

    def _take(self, page: Sequence[Meta]) -> None:
        for shard, newest in newest_of(page).items():
            known = self.found.get(shard)
            if known is None or known.number < newest.number:
                self.found[shard] = newest
