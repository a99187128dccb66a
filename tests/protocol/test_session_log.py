"""The session log's fold."""

from __future__ import annotations

import pytest

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import decode, encode
from burst_dask.protocol.session import SessionState, describe, fold
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
    SessionAction,
    SessionEntry,
    Start,
)

R1, R2 = RunId("s.r1"), RunId("s.r2")


def log(*actions: SessionAction) -> SessionState:
    return fold(
        SessionEntry(number=n, writer="c", nonce=str(n), wrote=0.0, action=action) for n, action in enumerate(actions)
    )


def test_urgent_runs_come_first_and_others_in_order() -> None:
    assert log(Open(), AddRun(R1), AddRun(R2)).live_runs == [R1, R2]
    assert log(Open(), AddRun(R1), AddRun(R2, priority=1)).live_runs == [R2, R1]


def test_cancelling_one_or_all() -> None:
    assert log(Open(), AddRun(R1), AddRun(R2), Cancel(R1)).live_runs == [R2]
    assert log(Open(), AddRun(R1), Cancel(), AddRun(R2)).live_runs == [R2]


def test_extending_never_shortens() -> None:
    assert log(Open(), Extend(100.0), Extend(50.0)).until == 100.0


HOUR, DAY = 3600.0, 86400.0


@pytest.mark.parametrize(
    ("until", "session_timeout", "absolute_timeout", "deadline"),
    [
        (0.0, None, None, None),
        (0.0, HOUR, None, 500 + HOUR),  # after the last sign of a client
        (0.0, None, DAY, 100 + DAY),  # after the opening
        (0.0, HOUR, DAY, 500 + HOUR),
        (9000.0, HOUR, None, 9000.0),  # an extension reaches further …
        (600.0, HOUR, None, 500 + HOUR),  # … and never shortens …
        (1e9, HOUR, DAY, 100 + DAY),  # … and ends with the absolute limit
        (9000.0, None, None, None),
    ],
)
def test_the_deadline(
    until: float, session_timeout: float | None, absolute_timeout: float | None, deadline: float | None
) -> None:
    assert log(Open(), Extend(until)).deadline(100.0, 500.0, session_timeout, absolute_timeout) == deadline


def test_signs_of_a_client() -> None:
    signs = [Open(), AddRun(R1), Attach("c"), Extend(5.0)]
    others = [Scale(3), Cancel(R1), Close()]
    assert [log(*signs[: n + 1]).sign for n in range(4)] == [0, 1, 2, 3]
    assert log(*signs, *others).sign == 3


def test_a_cancellation_by_force_is_one_too() -> None:
    state = log(Open(), AddRun(R1), AddRun(R2), Cancel(R1), Cancel(R2, force=True))
    assert state.cancelled == {R1, R2}
    assert state.killed == {R2}
    assert log(Open(), AddRun(R1), Cancel(force=True), AddRun(R2)).killed == {R1}


def test_entries_in_plain_words() -> None:
    actions = [
        *(Open(), AddRun(R1), AddRun(R2, 3), Attach("client-7"), Extend(9.0), Scale(4)),
        *(Cancel(R1), Cancel(force=True), Close()),
    ]
    entries = [
        SessionEntry(number=n, writer="c", nonce="n", wrote=0.0, action=action) for n, action in enumerate(actions)
    ]
    assert [describe(entry) for entry in entries] == [
        "the session was opened",
        "run s.r1 was submitted",
        "run s.r2 was submitted with priority 3",
        "client-7 waits",
        "the session was extended",
        "4 workers were asked for",
        "run s.r1 was cancelled",
        "all runs so far were cancelled, and its running tasks killed",
        "the session was closed",
    ]


def test_a_closed_session_has_no_live_runs() -> None:
    state = log(Open(), AddRun(R1), Scale(3), Attach("c"), Close())
    assert state.closed
    assert state.workers == 3
    assert state.live_runs == []


@pytest.mark.parametrize("actions", [[AddRun(R1)], [Open(), Open()]])
def test_a_log_begins_with_one_open(actions: list[SessionAction]) -> None:
    with pytest.raises(IllegalTransition):
        log(*actions)


def test_a_gap_is_refused() -> None:
    with pytest.raises(IllegalTransition, match="entry 1 where 0"):
        SessionState().apply(SessionEntry(number=1, writer="c", nonce="n", wrote=0.0, action=Open()))


def test_single_tasks_are_cancelled() -> None:
    some, more = Bitmap.of([1, 5]), Bitmap.of([2])
    state = log(Open(), AddRun(R1), Cancel(R1, tasks=some), Cancel(R1, force=True, tasks=more))
    assert state.cancelled_tasks == {R1: some | more} and state.killed_tasks == {R1: more}
    assert state.live_runs == [R1] and not state.cancelled
    entry = SessionEntry(number=3, writer="c", nonce="n", wrote=0.0, action=Cancel(R1, tasks=some))
    assert describe(entry) == "2 tasks of run s.r1 were cancelled"
    assert decode(SessionEntry, "it", encode(entry)) == entry


def test_a_fleet_has_a_size_or_a_range() -> None:
    assert log(Open()).workers is None
    state = log(Open(), Scale(3))
    assert (state.minimum, state.workers) == (3, 3)
    state = log(Open(), Scale(3), Adapt(1, 50))
    assert (state.minimum, state.workers, state.done_by) == (1, 50, 0.0)
    assert log(Open(), Adapt(1, 50, 900.0)).done_by == 900.0
    assert log(Open(), Adapt(1, 50, 900.0), Adapt(1, 40)).done_by == 0.0
    assert log(Open(), Adapt(1, 50, 900.0), Scale(3)).done_by == 0.0


def test_starts_are_known_by_their_numbers_until_fewer_are_wanted() -> None:
    state = log(Open(), Scale(5), Start(3), Attach("c"), Start(2))
    assert state.starts == {2: (3, 0.0), 4: (2, 0.0)}
    assert log(Open(), Scale(5), Start(3), Scale(8)).starts == {2: (3, 0.0)}
    assert log(Open(), Scale(5), Start(3), Scale(2)).starts == {}
    assert log(Open(), Scale(5), Start(3), Adapt(0, 4)).starts == {}


def test_a_session_whose_money_is_spent_goes_on_when_there_is_more() -> None:
    assert log(Open()).halted is None
    assert log(Open(), Halt(4.9, 5.0)).halted == 4.9
    state = log(Open(), Halt(4.9, 5.0), Afford(10.0))
    assert (state.halted, state.max_cost) == (None, 10.0)
    assert log(Open(), Afford(10.0), Halt(4.9, 5.0)).halted is None, "its writer did not know of more"
    assert log(Open(), Afford(3.0), Halt(4.9, 5.0)).halted == 4.9
    assert log(Open(), Afford(10.0), Halt(9.9, 10.0)).halted == 9.9


def test_what_becomes_of_fleets_and_money_in_plain_words() -> None:
    def told(action: SessionAction) -> str:
        return describe(SessionEntry(number=1, writer="w1", nonce="n", wrote=0.0, action=action))

    assert told(Start(3)) == "w1 was about to start 3 workers"
    assert told(Adapt(1, 9)) == "1 to 9 workers were asked for, as the work is worth"
    assert told(Adapt(1, 9, 600.0)).endswith("as the work is worth, which should be done in 600 s")
    assert told(Afford(10.0)) == "the session may cost 10.00 USD"
    assert told(Halt(4.9, 5.0)) == "4.90 of 5.00 USD were spent: the work stops"
