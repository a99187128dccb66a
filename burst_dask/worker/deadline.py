"""When the session ends: by the store's clock alone, which is asked only when the end may be near.

Clocks of machines say when to ask, and never decide: one that is wrong makes a worker ask too
early, or notice the end up to `ASK_EVERY` too late.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial

from burst_dask.journal import log
from burst_dask.protocol import keys
from burst_dask.protocol.session import CLOCKS_AGREE, SessionState
from burst_dask.worker.context import Context

#: Seconds after which the store is asked in any case: two requests.
ASK_EVERY = 3600.0


class Deadline:
    """Tells one worker whether its session's deadline has passed.

    Parameters
    ----------
    renew
        Writes the worker's heartbeat, whose date is the store's time.
    """

    def __init__(self, context: Context, renew: Callable[[], Awaitable[None]]) -> None:
        self._context = context
        self._renew = renew
        #: number of the sign of a client that was dated, and the deadline that it leads to
        self._dated: tuple[int, float | None] = (-1, None)
        #: by how much the store's clock is ahead of the monotonic one; None while it was not read
        self._ahead: float | None = None
        self._asked = context.clock.monotonic()

    async def passed(self, state: SessionState) -> bool:
        """Tell whether the deadline of `state` has passed; mostly without a request."""
        left = self._left(state)
        if left is None:
            return False
        overdue = self._context.clock.monotonic() - self._asked >= ASK_EVERY
        if left > CLOCKS_AGREE and not overdue:
            return False
        if self._dated[0] != state.sign:
            await self._date(state)
        if self._ahead is None or overdue or self._is_over(state):
            await self._read()
        return self._is_over(state)

    async def now(self) -> float:
        """Return the store's time in seconds since 1970: a heartbeat and a listing, once an hour."""
        clock = self._context.clock
        if self._ahead is None or clock.monotonic() - self._asked >= ASK_EVERY:
            await self._read()
        return clock.wall() if self._ahead is None else self._ahead + clock.monotonic()

    def _is_over(self, state: SessionState) -> bool:
        left = self._left(state)
        return left is not None and left <= 0

    def _left(self, state: SessionState) -> float | None:
        """Return the seconds left: by the store's clock as far as it is known, else by this machine's."""
        clock = self._context.clock
        sign, deadline = self._dated
        if sign == state.sign and self._ahead is not None:
            return None if deadline is None else deadline - self._ahead - clock.monotonic()
        hint = self._of(state, state.opened_wrote, state.sign_wrote)
        return None if hint is None else hint - clock.wall()

    def _of(self, state: SessionState, opened: float, sign: float) -> float | None:
        settings = self._context.settings
        return state.deadline(opened, sign, settings.session_timeout, settings.absolute_timeout)

    async def _date(self, state: SessionState) -> None:
        context = self._context
        dates = await context.insist(partial(log.session_dates, context.store, context.session, state.sign))
        # Without dates the log was deleted by a cleanup: that the session is closed is learned elsewhere.
        self._dated = (state.sign, None if dates is None else self._of(state, *dates))

    async def _read(self) -> None:
        """Read the store's clock: the date of a heartbeat that was just written."""
        context = self._context
        await self._renew()
        now = context.clock.monotonic()

        async def modified() -> float | None:
            own = keys.worker_prefix(context.session, context.worker)
            key = keys.beat(context.session, context.worker)
            found = [meta.modified async for page in context.store.list(own) for meta in page if meta.key == key]
            return found[0] if found else None

        date = await context.insist(modified)
        if date is not None:
            self._ahead, self._asked = date - now, now
