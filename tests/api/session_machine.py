"""A session under any sequence of what people do with it, against a plain Python model of what must come out.

The model knows each call: its value or its error, which need no worker to be told, and whether it may have been
cancelled. What it cannot know is what workers get done in time, so it says what is allowed:

* A call that nobody cancelled ends with its value or error. One that was may end so, too, or be cancelled; it is never
  lost.
* What was seen once stays as it was, for every client, until the cleanup.
* Totals add up; while nobody works, they are exactly known.

`test_sessions_stateful` runs it.
"""

from __future__ import annotations

import concurrent.futures as cf
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import dask
import pytest
from acting import QUICK
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from burst_dask import Future, Session, TaskError, attach, list_sessions, sync
from burst_dask.api.run import Run
from burst_dask.client import collecting
from burst_dask.clock import Entropy
from burst_dask.errors import ConfigError, UnknownId
from burst_dask.fleet import records
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Ended, encode
from burst_dask.testing.invariants import assert_run_invariants

#: Seconds that anything may take at most: far more than it does.
LIMIT = 120.0

# ---------------------------------------------------------------------------- the model


def add(*numbers: int) -> int:
    return sum(numbers) + 1


def fail(*numbers: int) -> int:
    raise LookupError("as it was made to")


def slow(*numbers: int) -> int:
    time.sleep(0.02)  # so that workers are killed, and calls cancelled, while they run
    return add(*numbers)


FUNCTIONS = (add, add, slow, fail)
#: Which of those that there are then: what is drawn must not depend on how quick workers are.
PICK = st.integers(0, 999)
PICKS = st.lists(PICK, max_size=3)


@dataclass
class Call:
    """What the model knows of a task."""

    key: str
    needs: tuple[str, ...]
    #: None when it must fail
    value: int | None
    #: keys of tasks of which the error may be
    causes: frozenset[str]
    #: it is in the store
    written: bool = False
    #: somebody asked for it not to be done
    cancelled: bool = False
    future: Future | None = None
    run: str | None = None


@dataclass
class Model:
    calls: dict[str, Call] = field(default_factory=dict)
    #: key -> value, None for an error, of all that any client has collected
    seen: dict[str, int | None] = field(default_factory=dict)

    def add(self, key: str, function: Callable[..., int], needs: Iterable[str]) -> Call:
        needs = tuple(needs)
        inputs = [self.calls[need] for need in needs]
        bad = frozenset(cause for one in inputs for cause in one.causes) or frozenset({key} if function is fail else ())
        value = None if bad else add(*(one.value or 0 for one in inputs))
        self.calls[key] = Call(key, needs, value, bad)
        return self.calls[key]

    @property
    def written(self) -> list[Call]:
        return [call for call in self.calls.values() if call.written]

    def write(self) -> None:
        """Everything is in the store now, but for what was cancelled before."""
        for call in self.calls.values():
            future = call.future
            call.written = call.written or future is None or future.view is not None
            if call.run is None and future is not None and future.view is not None:
                call.run = future.view.run

    def may_be_cancelled(self, call: Call) -> bool:
        return call.cancelled or any(self.may_be_cancelled(self.calls[need]) for need in call.needs)

    def undone(self, done: Iterable[str], given_up: bool = False) -> set[str]:
        """Return what will have no outcome, if nobody works and `done` have theirs.

        Parameters
        ----------
        given_up
            Whether all futures that were cancelled count: one may have been given up because of an input that a
            worker has made after all.
        """
        done, lost = set(done), set[str]()
        for call in self.written:
            cancelled = call.cancelled or (given_up and call.future is not None and call.future.cancelled())
            if call.key not in done and (cancelled or not lost.isdisjoint(call.needs)):
                lost.add(call.key)
        return lost

    def check(self, key: str, found: Any) -> None:
        """See that an outcome is what it must be, and what it was."""
        call = self.calls[key]
        if isinstance(found, TaskError):
            assert call.value is None and found.key == key and found.cause in call.causes, (call, found)
            assert type(found.exception) is LookupError
            found = None
        assert found == call.value, call
        assert self.seen.setdefault(key, found) == found


# ---------------------------------------------------------------------------- what people do


class SessionMachine(RuleBasedStateMachine):
    """Workers are threads, the store is memory."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.runs: list[Run] = []
        self.number = 0
        self.working = False
        #: token and what had been collected by then
        self.token: str | None = None
        self.collected: set[str] = set()
        self.deadline = 0.0
        #: what the current handle may refer to: key -> future, or collection
        self.usable: dict[str, Any] = {}
        self.futures: list[Future] = []
        self.handles: list[Session] = []

    def open(self) -> Session:
        return Session(f"memory://{Entropy().token()}", fleet=None, name="it", progress=False, **self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            **QUICK,
            "heartbeat": 0.2,
            "lease": 0.8,
            "wait_poll_min": 0.002,
            "wait_poll_max": 0.05,
            "lost_workers": 100,
            "session_timeout": 3600,
        }

    @initialize(workers=st.integers(0, 2), calls=st.integers(0, 6))
    def begin(self, workers: int, calls: int) -> None:
        self.session = self.open()
        self.handles.append(self.session)
        self.store = self.session._link.store
        self.scale(workers)
        if calls:
            self.map(calls, slow)

    # ------------------------------------------------------------------ submitting

    def name(self) -> str:
        self.number += 1
        return f"t-{self.number}"

    def some(self, picks: list[int]) -> list[str]:
        """Return what a call needs."""
        there = list(self.usable)
        return list(dict.fromkeys(there[pick % len(there)] for pick in picks)) if there else []

    @rule(picks=PICKS, function=st.sampled_from(FUNCTIONS))
    def submit(self, picks: list[int], function: Any) -> None:
        needs = [key for key in self.some(picks) if isinstance(self.usable[key], Future)]
        call = self.model.add(self.name(), function, needs)
        self.take(call, self.session.submit(function, *(self.usable[key] for key in needs), key=call.key))

    @rule(count=st.integers(1, 12), function=st.sampled_from(FUNCTIONS))
    def map(self, count: int, function: Any) -> None:
        calls = [self.model.add(self.name(), function, ()) for _ in range(count)]
        for call, future in zip(
            calls, self.session.map(function, [0] * count, key=[c.key for c in calls]), strict=True
        ):
            self.take(call, future)

    def take(self, call: Call, future: Future) -> None:
        assert future.key == call.key
        call.future = self.usable[call.key] = future
        self.futures.append(future)
        if future.cancelled():  # what it needs is
            assert any(self.model.may_be_cancelled(self.model.calls[need]) for need in call.needs)
            call.cancelled = True

    @rule(picks=PICKS, functions=st.lists(st.sampled_from(FUNCTIONS), min_size=1, max_size=4), keep=st.booleans())
    def compute(self, picks: list[int], functions: Any, keep: bool) -> None:
        """Submit a chain as a graph, or keep it in the store."""
        needs = self.written_ones(self.some(picks))
        inputs = [self.usable[key] for key in needs]
        chain: list[Any] = []
        for function in functions:
            call = self.model.add(self.name(), function, needs)
            chain.append(dask.delayed(function)(*inputs, dask_key_name=call.key))
            inputs, needs = [chain[-1]], [call.key]
        if keep:
            kept = self.session.persist(chain)
            run = attach(self.runs_now()[-1], store=self.store)
            self.usable |= {one.key: one for one in kept}
        else:
            run = self.session.compute(*chain)
        self.runs.append(run)
        self.model.write()
        for one in chain:
            self.model.calls[one.key].run = run.id

    def written_ones(self, names: list[str]) -> list[str]:
        """Futures that were cancelled before they were written cannot be part of a graph."""
        self.flush()
        return [key for key in names if self.model.calls[key].written]

    def runs_now(self) -> list[RunId]:
        sync.run(self.session._link.follow())
        return list(self.session._link.state.runs)

    @rule()
    def flush(self) -> None:
        self.session.flush()
        self.model.write()

    # ------------------------------------------------------------------ workers

    @rule(workers=st.integers(0, 2))
    def scale(self, workers: int) -> None:
        self.session.scale(workers)
        self.working = workers > 0

    @precondition(lambda self: self.working)
    @rule(noticed=st.booleans())
    def kill(self, noticed: bool) -> None:
        """Kill all workers; a supervisor writes that down, or only their leases tell it. Others come."""
        fleet = self.session._link.fleet
        for worker in fleet.kill():
            if noticed:
                record = Ended(worker=worker, reason="died", message="killed")
                sync.run(self.store.create(keys.ended(self.session._link.session, worker), encode(record)))
        fleet.ensure(1)

    # ------------------------------------------------------------------ cancelling

    @precondition(lambda self: self.futures)
    @rule(pick=PICK, force=st.booleans())
    def cancel_a_call(self, pick: int, force: bool) -> None:
        future = self.futures[pick % len(self.futures)]
        before = {one.key: one.status for one in self.futures}
        assert future.cancel(force=force) == (future.status == "cancelled")
        assert before[future.key] in ("pending", future.status)
        concerned = {future.key}  # what depends on a cancelled future is cancelled with it
        for call in self.model.calls.values():
            if call.future is not None and (call.key == future.key or not concerned.isdisjoint(call.needs)):
                concerned.add(call.key)
                call.cancelled = call.cancelled or (call.future.cancelled() and before[call.key] == "pending")

    @rule(pick=PICK, force=st.booleans())
    def cancel_a_run(self, pick: int, force: bool) -> None:
        if not self.runs:
            return
        run = self.runs[pick % len(self.runs)]
        mine = [call for call in self.model.calls.values() if call.run == run.id]
        if run.cancel(force=force):
            for call in mine:
                call.cancelled = True
        else:
            assert run.status().left == 0

    @precondition(lambda self: self.number > 15)  # not too often: what is cancelled shows little
    @rule(force=st.booleans())
    def cancel_all(self, force: bool) -> None:
        self.session.cancel(force=force)
        self.model.write()
        for call in self.model.written:
            call.cancelled = True

    # ------------------------------------------------------------------ looking

    @rule(since=st.booleans(), elsewhere=st.booleans())
    def collect(self, since: bool, elsewhere: bool) -> None:
        """Collect what is there, from here or from a new process."""
        self.flush()
        there = self.elsewhere() if elsewhere else self.session
        if since:
            self.take_news(there.collect(since=self.token))
        else:
            self.take_all(there.collect())

    @precondition(lambda self: self.working)
    @rule(elsewhere=st.booleans())
    def collect_and_wait(self, elsewhere: bool) -> None:
        self.settle()
        found = (self.elsewhere() if elsewhere else self.session).collect(wait=True, timeout=LIMIT)
        self.take_all(found)
        for call in self.model.written:
            assert call.key in found or self.model.may_be_cancelled(call), call

    def take_all(self, found: collecting.Collected) -> None:
        asked = [call.key for call in self.model.written]
        for key, value in found.items():
            self.model.check(key, value)
        assert list(found) == sorted(found, key=lambda key: int(key[2:])), "not in the order of submission"
        assert not self.model.seen.keys() - found.keys(), "what was collected once is lost"
        assert len(found) + found.pending + found.cancelled == len(asked)
        certain = [call for call in self.model.written if not self.model.may_be_cancelled(call)]
        assert found.cancelled <= len(asked) - len(certain)

    def take_news(self, found: collecting.Collected) -> None:
        assert self.collected.isdisjoint(found), "collected twice"
        for key, value in found.items():
            self.model.check(key, value)
        self.collected |= set(found)
        assert not self.model.seen.keys() - self.collected, "what was collected once is lost"
        self.token = found.token

    @rule(elsewhere=st.booleans())
    def status(self, elsewhere: bool) -> None:
        self.flush()
        totals = (self.elsewhere() if elsewhere else self.session).status().totals
        self.check_totals(totals)

    def check_totals(self, totals: dict[str, int]) -> None:
        written = self.model.written
        states = ("pending", "running", "completed", "failed", "cancelled")
        assert totals["total"] == len(written) == sum(totals[name] for name in states), totals
        good = {call.key for call in written if call.value is not None}
        assert len(good & self.model.seen.keys()) <= totals["completed"] <= len(good)
        assert len(self.model.seen.keys() - good) <= totals["failed"] <= len(written) - len(good)
        assert totals["cancelled"] <= sum(map(self.model.may_be_cancelled, written))

    @rule()
    def listed(self) -> None:
        self.flush()
        (row,) = list_sessions(self.store)
        assert (row.id, row.name, row.state) == (self.session.id, "it", "open")
        self.check_totals(row.tasks)

    @rule()
    def at_rest(self) -> None:
        """While nobody works all is known exactly, and every client sees the same."""
        self.settle()
        self.session.scale(0)
        self.working = False
        if sync.run(self.session._link.seen()).status.alive:
            return  # one that was killed, and whose lease goes on, may work as far as anybody can tell
        found, totals = self.session.collect(), self.session.status().totals
        self.take_all(found)
        least, most = self.model.undone(found), self.model.undone(found, given_up=True)
        assert len(least) <= found.cancelled == totals["cancelled"] <= len(most), (least, most, found, totals)
        assert (totals["running"], totals["pending"]) == (0, found.pending)
        there = self.elsewhere()
        assert dict(there.status().totals) == dict(totals) and there.collect().keys() == found.keys()

    def settle(self) -> None:
        """Wait until what was submitted, and what futures have cancelled, is in the store."""
        self.flush()
        for handle in self.handles:
            if "_futures" in vars(handle):
                _, left = cf.wait(set(handle._futures.follower._cancelling), LIMIT)
                assert not left

    # ------------------------------------------------------------------ coming back, and the deadline

    def elsewhere(self, by_name: bool = False) -> Session:
        return attach("it" if by_name else self.session.id, store=self.store)

    @rule(by_name=st.booleans())
    def go_on_elsewhere(self, by_name: bool) -> None:
        """Go on from a new process, where futures of the old one cannot be used."""
        assert self.session.detach() == self.session.id
        self.model.write()
        fleet, self.session = self.session._link.fleet, self.elsewhere(by_name)
        self.session._link.fleet = fleet
        self.handles.append(self.session)
        self.usable = {}
        self.runs = [attach(run, store=self.store) for run in self.session._link.state.runs]

    @rule(seconds=st.sampled_from([10.0, 3600.0, 9000.0, 20_000.0]))
    def extend(self, seconds: float) -> None:
        began = time.time()
        deadline = self.session.extend(seconds).timestamp()
        assert deadline >= self.deadline, "it was shortened"
        assert deadline >= began + seconds - 5
        assert self.session.extend(seconds / 2).timestamp() >= deadline, "it was shortened"
        assert self.elsewhere().status().time_left >= self.deadline - time.time() - 5
        self.deadline = deadline

    @rule()
    def cleanup_while_work_goes_on(self) -> None:
        self.flush()
        if self.working or not self.session.status().totals["pending"]:
            return
        with pytest.raises(ConfigError, match="still works on"):
            self.session.cleanup()
        assert self.session.status().state == "open"

    # ------------------------------------------------------------------ the end

    def teardown(self) -> None:
        try:
            if self.handles:
                self.end()
        finally:
            for handle in self.handles:
                handle.cleanup(force=True)

    def end(self) -> None:
        """Let workers finish; nothing is lost, no rule was broken, and a cleanup leaves what it must and no more."""
        self.at_rest()
        self.scale(2)
        self.collect_and_wait(elsewhere=True)
        for _ in range(2):
            self.take_news(self.session.collect(since=self.token))
        _, left = cf.wait(self.futures, LIMIT)
        assert not left
        for call in self.model.calls.values():
            self.check_future(call)
        while self.session.status().totals["running"]:  # what was cancelled and is reserved yet may run, or be given up
            time.sleep(0.005)
        for run in self.runs_now():
            sync.run(assert_run_invariants(self.store, run))
        self.session.cleanup()
        assert self.session.status().state == "closed"
        found = self.elsewhere(by_name=True).collect()
        assert not self.model.seen.keys() - found.keys()
        for key, value in found.items():
            self.model.check(key, value)
        self.session.cleanup(force=True)
        with pytest.raises(UnknownId):
            self.elsewhere()
        assert sync.run(names(self.store, self.session.id)) == []

    def check_future(self, call: Call) -> None:
        if call.future is not None and call.future.cancelled():
            assert self.model.may_be_cancelled(call), call
        elif call.future is not None:
            self.model.check(call.key, call.future.outcome(LIMIT))


async def names(store: Any, part: str) -> list[str]:
    return [meta.key async for page in store.list("") for meta in page if part in meta.key]


class ProcessMachine(SessionMachine):
    """Workers are processes, the store is a directory."""

    def open(self) -> Session:
        self.place = tempfile.mkdtemp()
        return Session(self.place, fleet=None, name="it", progress=False, **self.settings())

    @precondition(lambda self: self.working)
    @rule(noticed=st.booleans())
    def kill(self, noticed: bool) -> None:
        """Kill all workers with SIGKILL; if that is not to be noticed, their supervisors, too."""
        fleet = self.session._link.fleet
        supervisors = [] if noticed else [record.pid for record in records.read_all(fleet.directory).values()]
        for pid in [*supervisors, *(process.pid for process in fleet.processes())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        fleet.ensure(1)

    def teardown(self) -> None:
        super().teardown()
        shutil.rmtree(self.place, ignore_errors=True)
