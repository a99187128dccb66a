"""The session log's fold."""

from __future__ import annotations

import pytest

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
    SessionAction,
    SessionEntry,
)
from burst_dask.protocol.session import SessionState, fold

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
