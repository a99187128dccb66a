"""The state of a session: the fold of its log."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.bitmap import EMPTY, Bitmap
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

#: Seconds by which the clocks of clients and workers are taken to differ at most. They say when to ask the store
#: whether a deadline has passed; it alone decides.
CLOCKS_AGREE = 600.0


class SessionState(msgspec.Struct, frozen=True):
    """A session as folded up to some entry."""

    #: number of the entry that comes next
    next: int = 0
    #: runs in the order of their submission -> priority
    runs: dict[RunId, int] = {}
    cancelled: frozenset[RunId] = frozenset()
    #: those of them whose running tasks are not let finish
    killed: frozenset[RunId] = frozenset()
    #: run -> global numbers of tasks that were cancelled singly, of runs that go on …
    cancelled_tasks: dict[RunId, Bitmap] = {}
    #: … and those of them that are not let finish
    killed_tasks: dict[RunId, Bitmap] = {}
    closed: bool = False
    #: seconds since 1970 by the store's clock; 0 while nobody extended the session
    until: float = 0.0
    #: how many workers the fleet should have; None while nobody said so
    workers: int | None = None
    #: number of the newest entry that is a sign of a client: OPEN, RUN, ATTACH or EXTEND
    sign: int = 0
    #: when that entry and entry 0 were written by the clocks of their writers: for people, and as a hint when to
    #: ask the store, whose dates decide (`deadline`)
    sign_wrote: float = 0.0
    opened_wrote: float = 0.0

    @property
    def live_runs(self) -> list[RunId]:
        """Runs that may still have work, the more urgent first, then in submission order."""
        if self.closed:
            return []
        live = [run for run in self.runs if run not in self.cancelled]
        return sorted(live, key=lambda run: -self.runs[run])

    def deadline(
        self, opened: float, sign: float, session_timeout: float | None, absolute_timeout: float | None
    ) -> float | None:
        """Return when the session ends, in seconds since 1970; None when it has no limit.

        Parameters
        ----------
        opened, sign
            The store's dates of entry 0 and of entry `self.sign`.
        session_timeout, absolute_timeout
            As in `burst_dask.config.Settings`.

        Examples
        --------
        >>> SessionState().deadline(1000.0, 1500.0, 60.0, None)
        1560.0
        >>> SessionState(until=5000.0).deadline(1000.0, 1500.0, 60.0, 3600.0)
        4600.0
        """
        limits = []
        if session_timeout is not None:
            limits.append(max(sign + session_timeout, self.until))
        if absolute_timeout is not None:
            limits.append(opened + absolute_timeout)
        return min(limits, default=None)

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
        if isinstance(action, Open | AddRun | Attach | Extend):
            changes |= {"sign": entry.number, "sign_wrote": entry.wrote}
        if isinstance(action, AddRun):
            changes["runs"] = {**self.runs, action.run: action.priority}
        elif isinstance(action, Extend):
            changes["until"] = max(self.until, action.until)
        elif isinstance(action, Scale):
            changes["workers"] = action.workers
        elif isinstance(action, Cancel):
            changes |= self._cancel(action)
        elif isinstance(action, Close):
            changes["closed"] = True
        elif isinstance(action, Open):
            changes["opened_wrote"] = entry.wrote
        else:
            assert isinstance(action, Attach)
        return msgspec.structs.replace(self, next=self.next + 1, **changes)

    def _cancel(self, action: Cancel) -> dict[str, object]:
        """Return what a cancellation changes."""
        changes: dict[str, object] = {}
        if action.run is not None and action.tasks:
            changes["cancelled_tasks"] = _with(self.cancelled_tasks, action.run, action.tasks)
            if action.force:
                changes["killed_tasks"] = _with(self.killed_tasks, action.run, action.tasks)
            return changes
        these = set(self.runs) if action.run is None else {action.run}
        changes["cancelled"] = self.cancelled | these
        if action.force:
            changes["killed"] = self.killed | these
        return changes


def _with(known: dict[RunId, Bitmap], run: RunId, tasks: Bitmap) -> dict[RunId, Bitmap]:
    return {**known, run: known.get(run, EMPTY) | tasks}


def describe(entry: SessionEntry) -> str:
    """Return the entry in plain words, for stories."""
    action = entry.action
    if isinstance(action, AddRun):
        what = f"run {action.run} was submitted" + (f" with priority {action.priority}" if action.priority else "")
    elif isinstance(action, Attach):
        what = f"{action.client} waits"
    elif isinstance(action, Scale):
        what = f"{action.workers} workers were asked for"
    elif isinstance(action, Cancel):
        what = "all runs so far were cancelled" if action.run is None else f"run {action.run} was cancelled"
        if action.tasks:
            what = f"{len(action.tasks)} tasks of run {action.run} were cancelled"
        what += ", and its running tasks killed" if action.force else ""
    else:
        verbs = {Open: "opened", Extend: "extended", Close: "closed"}
        what = f"the session was {verbs[type(action)]}"
    return what


def fold(entries: Iterable[SessionEntry]) -> SessionState:
    """Return the state after `entries`, which begin with entry 0."""
    state = SessionState()
    for entry in entries:
        state = state.apply(entry)
    return state
