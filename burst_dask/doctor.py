"""``burst doctor``: whether what lies in the store keeps the rules of PROTOCOL.md, and what a person should know of it.

It only reads, and it may be asked at any time, also while workers are busy.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from burst_dask.clock import Clock
from burst_dask.errors import UnknownId
from burst_dask.journal.heartbeats import Heartbeats, heartbeats
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.shard import Phase, Shard
from burst_dask.report.tables import duration
from burst_dask.store import Store
from burst_dask.store.signing import key_in
from burst_dask.testing.facts import Facts, SessionFacts, garbage, gather, gather_session
from burst_dask.testing.invariants import CHECKS, violations_of
from burst_dask.testing.needed import leftover
from burst_dask.testing.reading import Violation, fetched, listed
from burst_dask.trust.trusting import trusted


@dataclass(frozen=True)
class RunReport:
    """What was found of one run."""

    run: RunId
    #: how much of each kind of thing was checked
    counts: dict[str, int]
    violations: tuple[Violation, ...]
    garbage: tuple[str, ...]
    notes: tuple[str, ...]

    def lines(self) -> Iterator[str]:
        """Yield the report for a person."""
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        yield f"run {self.run}: {counts}" if counts else f"run {self.run}"
        told: set[tuple[str, ...]] = set()
        for violation in self.violations:
            # One story may explain many violations, and is told once.
            again = violation.story in told
            told.add(violation.story)
            yield from _listed("broken", [violation._replace(story=()) if again else violation])
        yield from _listed("garbage", self.garbage)
        yield from _listed("note", self.notes)


@dataclass(frozen=True)
class Diagnosis:
    """What was found of a run, or of a session and all its runs."""

    identifier: str
    session: SessionFacts
    workers_alive: int
    runs: tuple[RunReport, ...]

    @property
    def healthy(self) -> bool:
        """Whether no rule is broken; garbage breaks none."""
        return not self.session.violations and not any(run.violations for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Return what ``--json`` prints."""
        return {
            "id": self.identifier,
            "healthy": self.healthy,
            "rules": _rules(),
            "session": {
                "id": self.session.session,
                "entries": self.session.entries,
                "workers_alive": self.workers_alive,
                "violations": [violation._asdict() for violation in self.session.violations],
            },
            "runs": [
                {
                    "id": run.run,
                    **run.counts,
                    "violations": [violation._asdict() for violation in run.violations],
                    "garbage": run.garbage,
                    "notes": run.notes,
                }
                for run in self.runs
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        state = "closed" if self.session.state.closed else "open"
        yield (
            f"session {self.session.session}: {state}, {self.session.entries} entries in its log, "
            f"{self.workers_alive} workers alive"
        )
        yield from _listed("broken", self.session.violations)
        for run in self.runs:
            yield from run.lines()
        yield f"checked: {', '.join(_rules())}"
        if self.healthy:
            yield "healthy: every rule holds"
        else:
            count = len(self.session.violations) + sum(len(run.violations) for run in self.runs)
            yield f"{count} broken: this is a bug in burst_dask or damage in the store; please report it with this text"


def _listed(title: str, items: Iterable[object]) -> Iterator[str]:
    for item in items:
        yield f"  {title}: " + str(item).replace("\n", "\n  ")


def _rules() -> list[str]:
    rules = {rule for rule, _ in CHECKS}
    numbers = sorted((rule for rule in rules if rule.isdecimal()), key=int)
    return [*numbers, *sorted(rules.difference(numbers, {"complete"})), "objects", "session log"]


async def diagnose(store: Store, identifier: str, clock: Clock, signed: bool = False) -> Diagnosis:
    """Check a run, or a session and all its runs; `signed` refuses one that is not signed.

    Raises
    ------
    UnknownId
        The store holds nothing of that id.
    StoreError
        The store does not answer.
    KeyMissing, UntrustedObject
        The session is signed, and its key is not here; or it is not the one that was opened.

    Examples
    --------
    >>> import asyncio
    >>> from burst_dask.clock import SystemClock
    >>> from burst_dask.store import open_store
    >>> asyncio.run(diagnose(open_store("memory://nothing-here"), "k3w9x2mq", SystemClock()))
    Traceback (most recent call last):
    ...
    burst_dask.errors.UnknownId: memory://nothing-here holds nothing of 'k3w9x2mq'; it was cleaned up, or lies in \
another store: pass --store
    """
    id = keys.session_of(identifier)
    if (found := await trusted(store, id, signed=signed)) is not None:
        store = found.store
    session = await gather_session(store, id)
    if key_in(store, id) is not None:
        session = replace(session, violations=(*session.violations, *await _unsigned(store, id)))
    seen = await heartbeats(store, id)
    folders = [keys.run_in(id, folder) for folder in await store.folders(keys.runs(id))]
    whole_session = identifier == id
    runs = list(dict.fromkeys([*session.state.runs, *folders])) if whole_session else [RunId(identifier)]
    there = bool(session.entries or session.manifest) if whole_session else runs[0] in {*folders, *session.state.runs}
    if not there and not (whole_session and folders):
        raise UnknownId(
            f"{store.url} holds nothing of {identifier!r}; it was cleaned up, or lies in another store: pass --store"
        )
    liveness = _Liveness(session, seen, clock.wall())
    # One after another: all task records of a run are in memory at once.
    reports = [_report(await gather(store, run, session), liveness, store.url) for run in runs]
    return Diagnosis(identifier, session, len(liveness.alive), tuple(reports))


async def _unsigned(store: Store, session: SessionId) -> list[Violation]:
    """Look at what no rule is about, and yet is read of a signed session: what workers say, code, and marks."""
    prefixes = (keys.workers(session), keys.session_prefix(session) + "code/", keys.differences(session))
    names = [meta.key for prefix in prefixes for meta in await listed(store, prefix)]
    for folder in await store.folders(keys.runs(session)):
        run = keys.run_in(session, folder)
        names += [keys.names(run), keys.complete(run)]
    found: list[Violation] = []
    await in_parallel(lambda name: fetched(store, name, found), names)
    return found


class _Liveness:
    """Which workers are alive, by one listing of their heartbeats."""

    def __init__(self, session: SessionFacts, seen: Heartbeats, wall: float) -> None:
        self._seen = seen
        self._lease = session.settings.lease
        # Nobody writes a heartbeat here. When all have died, the newest one is a dead one's; then this machine's
        # clock tells, which may differ from the store's and so is believed only beyond a lease.
        self._now = max([*seen.beats.values(), wall - self._lease])
        self.alive = {worker for worker in seen.beats if not self._is_dead(worker)}

    def _is_dead(self, worker: WorkerId) -> bool:
        return policy.lease_is_dead(self._now, self._seen.beats.get(worker), worker in self._seen.ended, self._lease)

    def why_dead(self, worker: WorkerId) -> str | None:
        """Return in words why a worker counts as dead; None of one that lives."""
        if not self._is_dead(worker):
            return None
        if worker in self._seen.ended:
            return "has ended"
        beat = self._seen.beats.get(worker)
        return "has no heartbeat" if beat is None else f"has had no heartbeat for {duration(self._now - beat)}"


def _report(facts: Facts, liveness: _Liveness, url: str) -> RunReport:
    submission_died = facts.plan is None and keys.plan(facts.run) not in facts.objects
    if submission_died and facts.run not in facts.session.state.runs:
        return RunReport(facts.run, {}, (), tuple(garbage(facts)), ())
    notes = () if facts.plan is None else tuple(_notes(facts, liveness, url))
    left = (
        f"{key} ({facts.objects.get(key, 0)} bytes): nobody needs its results any more; workers delete such segments "
        "in the background, and cleanup() does"
        for key in leftover(facts)
    )
    return RunReport(facts.run, _counts(facts), tuple(violations_of(facts)), (*garbage(facts), *left), notes)


def _counts(facts: Facts) -> dict[str, int]:
    if facts.plan is None:
        return {}
    found = Counter[str]()
    for shard in (shard for family in facts.families for shard in family):
        outcomes = facts.index(shard).outcomes
        found["shards"] += 1
        found["done"] += len(outcomes.done)
        found["failed"] += len(outcomes.failed)
        found["stored"] += len(outcomes.stored)
    return {
        "tasks": facts.plan.tasks,
        "done": found["done"],
        "failed": found["failed"],
        "shards": found["shards"],
        "entries": sum(map(len, facts.logs.values())),
        "stored results": found["stored"],
        "objects": len(facts.objects),
    }


def _notes(facts: Facts, liveness: _Liveness, url: str) -> Iterator[str]:
    """Yield what breaks no rule, and somebody would want to know."""
    state = facts.session.state
    if facts.is_swept:
        yield "its graph was deleted by a cleanup: only logs and results could be checked"
    left = sum(len(facts.index(shard).pending) for family in facts.families for shard in family)
    if not left:
        return
    if facts.run in state.cancelled or state.closed:
        yield f"it was {'closed' if state.closed else 'cancelled'} with {left} tasks left, which nobody will run"
        return
    for shard in (shard for family in facts.families for shard in family):
        index = facts.index(shard)
        if index.holder is None or Shard(shard, index).phase is not Phase.HELD:
            continue
        why = liveness.why_dead(index.holder)
        if why is not None:
            yield f"shard {shard} is held by {index.holder}, which {why}: the next idle worker takes it over"
    if not liveness.alive:
        line = f"burst worker --session {facts.session.session} --store '{url}'"
        yield f"it has {left} tasks left and no worker is alive; start some: {line}"
