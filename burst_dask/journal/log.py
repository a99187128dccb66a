"""Appending to a shard log and to the session log.

Creating the next slot is the compare-and-swap of the whole protocol: of all that try, one
wins (PROTOCOL.md rule 1).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from burst_dask.clock import Clock, Entropy
from burst_dask.errors import TornObject
from burst_dask.protocol import keys
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Action, Entry, Record, decode_with_end, encode
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import SessionAction, SessionEntry
from burst_dask.protocol.shard import Shard
from burst_dask.store.base import Store, first_page

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Author:
    """Who writes entries: stamps each with its name, a nonce of its own and the time."""

    name: WorkerId
    clock: Clock
    entropy: Entropy


@dataclass(frozen=True)
class Attempt:
    """An entry ready to be written to a certain slot; trying it again writes the same bytes.

    So an attempt whose answer was lost can be repeated at any time: if it had landed, its
    nonce is found in the slot (rule 5).
    """

    shard: Shard
    entry: Entry
    blobs: Sequence[Buffer]


def prepare(shard: Shard, author: Author, action: Action, blobs: Sequence[Buffer] = ()) -> Attempt:
    """Return the attempt to append `action` to `shard` as it is known.

    Raises
    ------
    IllegalTransition
        The known state does not allow the action; nothing is written.
    """
    after = shard.apply(author.name, action)
    entry = Entry(
        number=shard.next,
        writer=author.name,
        nonce=author.entropy.token(),
        wrote=author.clock.wall(),
        action=action,
        index=after.index,
    )
    return Attempt(after, entry, blobs)


async def append(store: Store, run: RunId, attempt: Attempt) -> Shard | None:
    """Write the attempt; return the state after it, or None when its slot is another's."""
    entry = attempt.entry
    key = keys.entry(keys.shard_log(run, attempt.shard.id), entry.number)
    if await store.create(key, [encode(entry), *attempt.blobs]):
        return attempt.shard
    # A loser must read the slot in any case; here it also settles an answer lost long ago.
    there = await read(store, run, attempt.shard.id, entry.number)
    if there is not None and there[0].nonce == entry.nonce:
        return attempt.shard
    return None


async def read(store: Store, run: RunId, shard: keys.ShardId, number: int) -> tuple[Entry, memoryview] | None:
    """Return an entry and the blobs that follow it, or None while the slot is empty."""
    key = keys.entry(keys.shard_log(run, shard), number)
    data = await store.get(key)
    if data is None:
        return None
    entry, end = _decoded(Entry, key, data)
    return entry, memoryview(data)[end:]


def _decoded(kind: type[R], key: str, data: bytes) -> tuple[R, int]:
    """Decode an entry. One that is torn keeps everybody from its log, so it is said what to do."""
    try:
        return decode_with_end(kind, key, data)
    except TornObject as error:
        raise TornObject(
            f"{error}. So a power loss leaves what a directory store had not synced (durable=false, or burst_dask "
            "before it synced). If no worker of the session runs any more and this is the newest object of its folder, "
            "delete it: what it told of is done again, all else is kept. Otherwise cancel the run, and submit it again"
        ) from None


async def read_session(store: Store, session: SessionId, first: int) -> AsyncIterator[SessionEntry]:
    """Yield the entries of a session log from number `first` up to the newest."""
    log = keys.session_log(session)
    number = first
    while (data := await store.get(keys.entry(log, number))) is not None:
        yield _decoded(SessionEntry, keys.entry(log, number), data)[0]
        number += 1


async def follow(store: Store, session: SessionId, state: SessionState) -> SessionState:
    """Return the state after all that others have appended to a session log behind `state`."""
    async for entry in read_session(store, session, state.next):
        state = state.apply(entry)
    return state


async def session_dates(store: Store, session: SessionId, sign: int) -> tuple[float, float] | None:
    """Return the store's dates of entries 0 and `sign` of a session log; None when one is not there.

    In seconds since 1970. One request while `sign` is among the first 1,000 entries, else two.
    """
    log = keys.session_log(session)
    wanted = (keys.entry(log, 0), keys.entry(log, sign))
    dates: dict[str, float] = {}
    for after in ("", keys.entry(log, sign - 1) if sign else ""):
        page = await first_page(store, log, after)
        dates.update((meta.key, meta.modified) for meta in page if meta.key in wanted)
        if len(dates) == len(set(wanted)):
            return dates[wanted[0]], dates[wanted[1]]
    return None


async def try_append_session(
    store: Store, session: SessionId, state: SessionState, author: Author, action: SessionAction
) -> SessionState | None:
    """Append `action` right behind `state`, or not at all: None when others have appended meanwhile.

    For what was decided by that state and may be wrong by a newer one.
    """
    entry = _session_entry(state, author, author.entropy.token(), action)
    key = keys.entry(keys.session_log(session), entry.number)
    if await store.create(key, encode(entry)):
        return state.apply(entry)
    data = await store.get(key)
    landed = data is not None and _decoded(SessionEntry, key, data)[0].nonce == entry.nonce
    return state.apply(entry) if landed else None


def _session_entry(state: SessionState, author: Author, nonce: str, action: SessionAction) -> SessionEntry:
    return SessionEntry(number=state.next, writer=author.name, nonce=nonce, wrote=author.clock.wall(), action=action)


async def append_session(
    store: Store, session: SessionId, state: SessionState, author: Author, action: SessionAction
) -> SessionState:
    """Append `action` to the session log, behind whatever others append meanwhile.

    Session entries commute (PROTOCOL.md), so losing a slot only means to try the next one.
    """
    log = keys.session_log(session)
    nonce = author.entropy.token()
    while True:
        entry = _session_entry(state, author, nonce, action)
        after = state.apply(entry)
        if await store.create(keys.entry(log, entry.number), encode(entry)):
            return after
        async for other in read_session(store, session, state.next):
            state = state.apply(other)
            if other.nonce == nonce:
                return state
