"""A session under any sequence of what people do with it; the model of what must come out is in `session_machine`.

``HYPOTHESIS_PROFILE=explore pytest tests/api/test_sessions_stateful.py`` looks at other sequences each
time, and at more.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.errors import Flaky, HypothesisException
from hypothesis.stateful import run_state_machine_as_test
from session_machine import ProcessMachine, SessionMachine

from burst_dask import Session
from burst_dask.api.following import Follower
from burst_dask.api.run import Run
from burst_dask.client import cancelling, collecting, ending, opening
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import Extend

COMMON = settings(
    deadline=None,
    stateful_step_count=25,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)
if os.environ.get("HYPOTHESIS_PROFILE") == "explore":
    SEARCH = settings(COMMON, max_examples=1000, stateful_step_count=40)
else:
    SEARCH = settings(COMMON, max_examples=40, derandomize=True, database=None)


@pytest.fixture(autouse=True)
def quick(unhurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burst_dask.api.following.FOLLOW", (0.05, 0.5))
    monkeypatch.setattr("burst_dask.client.ending.ENDING_POLL", 0.01)


def test_any_sequence() -> None:
    run_state_machine_as_test(SessionMachine, settings=SEARCH)


def test_any_sequence_with_worker_processes() -> None:
    few = settings(SEARCH, max_examples=SEARCH.max_examples // 8)
    run_state_machine_as_test(ProcessMachine, settings=few)


# ---------------------------------------------------------------------------- it can fail

Patch = pytest.MonkeyPatch
BUGS: dict[str, Callable[[Patch], None]] = {}


def bug(plant: Callable[[Patch], None]) -> Callable[[Patch], None]:
    BUGS[plant.__name__] = plant
    return plant


@bug
def collect_drops_a_key(patch: Patch) -> None:
    """Of many news the last is noted as collected, and not returned."""
    fresh = collecting.Seen.fresh
    patch.setattr(collecting.Seen, "fresh", lambda self, view, tasks: fresh(self, view, tasks)[:3])


@bug
def collect_gives_again_what_it_gave(patch: Patch) -> None:
    """The token names only what came with it."""
    patch.setattr(collecting.Seen, "of", classmethod(lambda cls, since: cls()))


@bug
def cancelling_loses_what_is_done(patch: Patch) -> None:
    """Results of a cancelled run are not looked for."""
    all_runs = Session._all_runs

    async def those_that_live(self: Session) -> list[Run]:
        return [run for run in await all_runs(self) if run.id not in self._link.state.cancelled]

    patch.setattr(Session, "_all_runs", those_that_live)


@bug
def dependents_stay_pending(patch: Patch) -> None:
    """What needs a cancelled task of another run is not told apart from what will be done."""
    patch.setattr(cancelling, "_foreign", lambda view, known, found: {})


@bug
def a_cancelled_call_is_made(patch: Patch) -> None:
    """Nobody is told that it was cancelled."""
    patch.setattr(Follower, "drop", lambda self, run, numbers, force=False: None)


@bug
def attaching_misses_the_last_run(patch: Patch) -> None:
    """The newest run is not in the state that a new client begins with."""
    find = opening.attach

    async def forgetful(*args: Any) -> Any:
        found = await find(*args)
        runs = dict(list(found.state.runs.items())[:-1])
        found.state = msgspec.structs.replace(found.state, runs=runs)
        return found

    patch.setattr(opening, "attach", forgetful)


@bug
def extending_shortens(patch: Patch) -> None:
    """The newest extension counts, though one before reaches further."""
    apply = SessionState.apply

    def last_one(self: SessionState, entry: Any) -> SessionState:
        after = apply(self, entry)
        until = entry.action.until if isinstance(entry.action, Extend) else after.until
        return msgspec.structs.replace(after, until=until)

    patch.setattr(SessionState, "apply", last_one)


@bug
def cleanup_forgets_an_error(patch: Patch) -> None:
    """A cleanup that keeps outputs deletes the logs that lead to them."""
    patch.setattr(ending, "_KEPT", tuple(part for part in ending._KEPT if part != "/plan"))


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_is_found(name: str, monkeypatch: Patch) -> None:
    BUGS[name](monkeypatch)
    monkeypatch.setattr("session_machine.LIMIT", 3.0)  # some bugs make it wait for ever
    quickly = settings(SEARCH, max_examples=200, phases=[Phase.generate], report_multiple_bugs=False)
    try:
        run_state_machine_as_test(SessionMachine, settings=quickly)
    except (
        Exception
    ) as found:  # an assertion here, or one of the product's errors; or Flaky, as workers are not replayed
        assert not isinstance(found, HypothesisException) or isinstance(found, Flaky), found
    else:
        pytest.fail(f"{BUGS[name].__doc__} Nothing was noticed in {quickly.max_examples} sequences")
