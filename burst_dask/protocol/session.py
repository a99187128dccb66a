"""The state of a session: the fold of its log."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import (
    AddRun,
    Attach,
    Cancel,
    Close,
    Extend,
    Open,
    Scale,
    SessionEntry,
)


class SessionState(msgspec.Struct, frozen=True):
    """A session as folded up to some entry."""

    #: number of the entry that comes next
    next: int = 0
    #: runs in the order of their submission -> priority
    runs: dict[RunId, int] = {}
    cancelled: frozenset[RunId] = frozenset()
    closed: bool = False
    #: seconds since 1970 by the store's clock; 0 while nobody extended the session
    until: float = 0.0
    #: how many workers the fleet should have; None while nobody said so
    workers: int | None = None

    @property
    def live_runs(self) -> list[RunId]:
        """Runs that may still have work, the more urgent first, then in submission order."""
        if self.closed:
            return []
        live = [run for run in self.runs if run not in self.cancelled]
        return sorted(live, key=lambda run: -self.runs[run])

    def apply(self, entry: SessionEntry) -> SessionState:
        """Return the state after `entry`.

        Raises
        ------
        IllegalTransition
            The entry is out of sequence, or the log does not begin with OPEN.
        """
        if entry.number != self.next:
            raise IllegalTransition(f"session log: entry {entry.number} where {self.next} comes next")
        action = entry.action
        if isinstance(action, Open) != (self.next == 0):
            raise IllegalTransition(f"session log: {type(action).__name__} as entry {entry.number}")
        changes: dict[str, object] = {}
        if isinstance(action, AddRun):
            changes["runs"] = {**self.runs, action.run: action.priority}
        elif isinstance(action, Extend):
            changes["until"] = max(self.until, action.until)
        elif isinstance(action, Scale):
            changes["workers"] = action.workers
        elif isinstance(action, Cancel):
            changes["cancelled"] = self.cancelled | (set(self.runs) if action.run is None else {action.run})
        elif isinstance(action, Close):
            changes["closed"] = True
        else:
            assert isinstance(action, Open | Attach)
        return msgspec.structs.replace(self, next=self.next + 1, **changes)


def fold(entries: Iterable[SessionEntry]) -> SessionState:
    """Return the state after `entries`, which begin with entry 0."""
    state = SessionState()
    for entry in entries:
        state = state.apply(entry)
    return state
