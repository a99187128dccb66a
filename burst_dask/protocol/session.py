"""The state of a session: the fold of its log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.session_records import (
    Adapt,
    AddRun,
    Afford,
    Attach,
    Cancel,
    Close,
    Extend,
    Halt,
    Open,
    Scale,
    SessionEntry,
    Start,
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
    #: how many workers the fleet should have, at most; None while nobody said so
    workers: int | None = None
    #: how many of them it should have at least, while there is work; the same unless it adapts to the work
    minimum: int = 0
    #: when what waits should be done, in seconds since 1970 by the store's clock; 0 while nobody said so
    done_by: float = 0.0
    #: starts of workers: number of the entry -> how many, and when that was by the clock of who started them
    starts: dict[int, tuple[int, float]] = {}
    #: USD that the session may cost in all, if that was changed since its opening
    max_cost: float | None = None
    #: what had been spent when it was found to be all; None while the session goes on
    halted: float | None = None
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

    @property
    def expected(self) -> int:
        """How many workers there may be, at least one: of a range, as many as were started, which may be a few of many.

        Examples
        --------
        >>> SessionState(minimum=50, workers=50).expected, SessionState(workers=400, starts={3: (8, 0.0)}).expected
        (50, 8)
        """
        most = self.workers or 1
        started = sum(workers for workers, _ in self.starts.values())
        return most if self.minimum == self.workers or not started else min(most, started)

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
        changes = _CHANGES[type(action)](self, entry, action)
        if isinstance(action, Open | AddRun | Attach | Extend):
            changes |= {"sign": entry.number, "sign_wrote": entry.wrote}
        return msgspec.structs.replace(self, next=self.next + 1, **changes)


def _with(known: dict[RunId, Bitmap], run: RunId, tasks: Bitmap) -> dict[RunId, Bitmap]:
    return {**known, run: known.get(run, EMPTY) | tasks}


def _size(state: SessionState, minimum: int, maximum: int, done_by: float = 0.0) -> dict[str, Any]:
    # Whoever makes a fleet smaller ends what is too much of it: earlier starts tell nothing any more.
    starts = {} if maximum < (state.workers or 0) else state.starts
    return {"minimum": minimum, "workers": maximum, "starts": starts, "done_by": done_by}


def _cancel(state: SessionState, entry: SessionEntry, action: Cancel) -> dict[str, Any]:
    if action.run is not None and action.tasks:
        cancelled = {"cancelled_tasks": _with(state.cancelled_tasks, action.run, action.tasks)}
        killed = {"killed_tasks": _with(state.killed_tasks, action.run, action.tasks)} if action.force else {}
        return cancelled | killed
    these = set(state.runs) if action.run is None else {action.run}
    return {"cancelled": state.cancelled | these} | ({"killed": state.killed | these} if action.force else {})


def _halt(state: SessionState, entry: SessionEntry, action: Halt) -> dict[str, Any]:
    # Whoever wrote it may not have known yet that more may be spent.
    known = state.max_cost is None or action.max_cost >= state.max_cost
    return {"halted": action.spent} if known else {}


#: what each action changes
_CHANGES: dict[type, Callable[[SessionState, SessionEntry, Any], dict[str, Any]]] = {
    Open: lambda state, entry, action: {"opened_wrote": entry.wrote},
    AddRun: lambda state, entry, action: {"runs": {**state.runs, action.run: action.priority}},
    Attach: lambda state, entry, action: {},
    Extend: lambda state, entry, action: {"until": max(state.until, action.until)},
    Scale: lambda state, entry, action: _size(state, action.workers, action.workers),
    Adapt: lambda state, entry, action: _size(state, action.minimum, action.maximum, action.done_by),
    Start: lambda state, entry, action: {"starts": {**state.starts, entry.number: (action.workers, entry.wrote)}},
    Afford: lambda state, entry, action: {"max_cost": action.max_cost, "halted": None},
    Halt: _halt,
    Cancel: _cancel,
    Close: lambda state, entry, action: {"closed": True},
}


def describe(entry: SessionEntry) -> str:
    """Return the entry in plain words, for stories."""
    action = entry.action
    if isinstance(action, AddRun):
        what = f"run {action.run} was submitted" + (f" with priority {action.priority}" if action.priority else "")
    elif isinstance(action, Attach):
        what = f"{action.client} waits"
    elif isinstance(action, Scale):
        what = f"{action.workers} workers were asked for"
    elif isinstance(action, Adapt):
        what = f"{action.minimum} to {action.maximum} workers were asked for, as the work is worth"
        what += f", which should be done in {action.done_by - entry.wrote:.0f} s" if action.done_by else ""
    elif isinstance(action, Start):
        what = f"{entry.writer} was about to start {action.workers} workers"
    elif isinstance(action, Afford):
        what = f"the session may cost {action.max_cost:.2f} USD"
    elif isinstance(action, Halt):
        what = f"{action.spent:.2f} of {action.max_cost:.2f} USD were spent: the work stops"
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
