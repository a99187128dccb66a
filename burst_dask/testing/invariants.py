"""What must hold of a run's objects at any moment, whatever has died: PROTOCOL.md, as checks of a store.

The simulator, the tests and ``burst doctor`` all use it. `check_run` reads everything once into
`Facts`; each check is a function of them, in the table `CHECKS` with the rule that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from burst_dask.config import Settings
from burst_dask.errors import BurstError, CorruptObject, IllegalTransition, InvariantBroken, ProtocolError
from burst_dask.journal import log
from burst_dask.journal.view import in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import unseal
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import (
    Commit,
    Entry,
    Manifest,
    Plan,
    Release,
    ShardIndex,
    ShardRecord,
    Split,
    decode,
    decode_with_end,
)
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.shard import describe, fold, object_key_name
from burst_dask.store.base import Span, Store


class Violation(NamedTuple):
    """Something that must not be."""

    #: as in PROTOCOL.md: a number, ``"reservation"`` or ``"splitting"``
    rule: str
    #: one sentence that names the object or the task
    what: str
    #: the log of the shard in plain words
    story: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n    ".join((f"rule {self.rule}: {self.what}", *self.story))


async def assert_run_invariants(store: Store, run: RunId, *, complete: bool = False) -> None:
    """Raise unless all rules hold of a run.

    Raises
    ------
    InvariantBroken
        Lists what is wrong, with the story of each shard.
    """
    violations = await check_run(store, run, complete=complete)
    if violations:
        raise InvariantBroken(f"run {run} breaks the protocol:\n  " + "\n  ".join(map(str, violations)))


async def check_run(store: Store, run: RunId, *, complete: bool = False) -> list[Violation]:
    """Return what is wrong with a run; nothing is, if all is well.

    Parameters
    ----------
    complete
        Also every task must have its outcome.

    Examples
    --------
    >>> import asyncio
    >>> from burst_dask.store import open_store
    >>> found = asyncio.run(check_run(open_store("memory://nothing-here"), RunId("k3w9x2mq.7gfh2y")))
    >>> print(found[0])
    rule 7: run k3w9x2mq.7gfh2y has no plan
    """
    facts = await _gather(store, run)
    if facts.plan is None:
        return facts.damaged or [Violation("7", f"run {run} has no plan")]
    found = list(facts.damaged)
    for rule, check in CHECKS:
        if rule == "complete" and not (complete or facts.marked_complete):
            continue
        found += (Violation(rule, what, facts.story(shard) if shard else ()) for what, shard in check(facts))
    return found


# ---------------------------------------------------------------------------- what is there


@dataclass
class Facts:
    """A run as it lies in the store."""

    run: RunId
    plan: Plan | None = None
    #: plan number -> its task records; damaged ones are missing
    records: dict[int, ShardRecord] = field(default_factory=dict)
    #: shard -> entries with the number that their key says, in order
    logs: dict[ShardId, list[tuple[int, Entry]]] = field(default_factory=dict)
    #: shard and entry number -> what follows the entry
    inline: dict[tuple[ShardId, int], memoryview] = field(default_factory=dict)
    #: key of each segment -> its bytes
    segments: dict[str, bytes] = field(default_factory=dict)
    session: SessionState = field(default_factory=SessionState)
    settings: Settings = field(default_factory=Settings)
    marked_complete: bool = False
    #: objects that cannot be read
    damaged: list[Violation] = field(default_factory=list)

    def story(self, shard: ShardId) -> tuple[str, ...]:
        """Return the log of a shard in plain words."""
        return (f"shard {shard}:", *(f"  {describe(entry)}" for _, entry in self.logs.get(shard, ())))

    def index(self, shard: ShardId) -> ShardIndex:
        """Return the newest state of a shard."""
        log_ = self.logs.get(shard)
        return log_[-1][1].index if log_ else ShardIndex(tasks=self.beginning(shard) or EMPTY)

    def beginning(self, shard: ShardId) -> Bitmap | None:
        """Return the tasks that a shard began with; None for one that nobody split off."""
        assert self.plan is not None
        parent, dash, _ = shard.rpartition("-")
        if not dash:
            return Bitmap.full(self.plan.shards[int(shard)].count)
        return self.index(ShardId(parent)).children.get(shard)

    def first(self, shard: ShardId) -> int:
        """Return the global number of position 0."""
        assert self.plan is not None
        return self.plan.shards[keys.root_number(shard)].first

    @cached_property
    def families(self) -> dict[int, list[ShardId]]:
        """Plan number -> the shard and all that was split off it, whether they have a log or not."""
        assert self.plan is not None
        found: dict[int, list[ShardId]] = {}
        for number in range(len(self.plan.shards)):
            family = [keys.root_shard(number)]
            for shard in family:
                family.extend(self.index(shard).children)
            found[number] = family
        return found

    @cached_property
    def outcomes(self) -> dict[int, int | None]:
        """Global number -> None when done, else the number of the task whose failure it is."""
        found: dict[int, int | None] = {}
        for shard in (shard for family in self.families.values() for shard in family):
            first, outcomes = self.first(shard), self.index(shard).outcomes
            found.update((first + position, None) for position in outcomes.done)
            found.update((first + position, first + position) for position in outcomes.failed)
            for cause, positions in outcomes.upstream.items():
                found.update((first + position, cause) for position in positions)
        return found

    @cached_property
    def owner(self) -> dict[int, ShardId]:
        """Global number -> the shard it belongs to."""
        return {
            self.first(shard) + position: shard
            for family in self.families.values()
            for shard in family
            for position in self.index(shard).tasks
        }


async def _gather(store: Store, run: RunId) -> Facts:
    facts = Facts(run)
    session = keys.session_of(run)
    try:
        async for entry in log.read_session(store, session, 0):
            facts.session = facts.session.apply(entry)
    except ProtocolError as error:
        facts.damaged.append(Violation("session log", str(error)))
    names = [meta.key async for page in store.list(keys.run_prefix(run)) for meta in page]
    bodies = dict(zip(names, await in_parallel(store.get, names), strict=True))
    manifest, plan = await store.get(keys.manifest(session)), bodies.get(keys.plan(run))
    try:
        if manifest is not None:
            facts.settings = Settings.of(**decode(Manifest, keys.manifest(session), manifest).settings)
        if plan is not None:
            facts.plan = decode(Plan, keys.plan(run), plan)
    except CorruptObject as error:
        facts.damaged.append(Violation("7", str(error)))
    facts.marked_complete = keys.complete(run) in bodies
    for key, body in bodies.items():
        if body is not None:
            _take(facts, key, body)
    if facts.plan is not None:
        _take_records(facts, facts.plan, bodies)
    return facts


def _take(facts: Facts, key: str, body: bytes) -> None:
    """Take in an entry or a segment."""
    if key.startswith(keys.run_logs(facts.run)):
        shard, number = keys.shard_of_entry(key), keys.entry_number(key)
        try:
            entry, end = decode_with_end(Entry, key, body)
        except CorruptObject as error:
            facts.damaged.append(Violation("1", str(error)))
            return
        facts.logs.setdefault(shard, []).append((number, entry))
        facts.inline[shard, number] = memoryview(body)[end:]
    elif "/segments/" in key:
        facts.segments[key] = body


def _take_records(facts: Facts, plan: Plan, bodies: Mapping[str, bytes | None]) -> None:
    for number, info in enumerate(plan.shards):
        key = keys.pack(facts.run, info.place.pack)
        body = bodies.get(key)
        if body is None:
            facts.damaged.append(Violation("7", f"the plan names pack {key}, which is not there"))
            continue
        try:
            record = decode(ShardRecord, key, memoryview(body)[info.place.start : info.place.end])
        except BurstError as error:
            facts.damaged.append(Violation("7", f"the record of shard {number}: {error}"))
            continue
        facts.records[number] = record


# ---------------------------------------------------------------------------- what must hold

#: What a check finds: a sentence, and the shard whose story tells more.
Findings = Iterator[tuple[str, ShardId | None]]


def _logs_fold(facts: Facts) -> Findings:
    """Each log is entries 0, 1, 2, …, each legal after the one before, each with the state that folding gives."""
    nonces: set[str] = set()
    for shard, entries in sorted(facts.logs.items()):
        beginning = facts.beginning(shard)
        if beginning is None:
            yield f"shard {shard} has a log, and no SPLIT made it", shard
            continue
        for expected, (number, entry) in enumerate(entries):
            if not number == entry.number == expected:
                yield f"shard {shard}: entry {entry.number} lies in slot {number}, where {expected} comes next", shard
                break
            if entry.nonce in nonces:
                yield f"shard {shard}, entry {number}: its nonce was used before", shard
            nonces.add(entry.nonce)
        try:
            fold(shard, beginning, [entry for _, entry in entries])
        except IllegalTransition as error:
            yield error.reason, shard


def _results_are_durable(facts: Facts) -> Findings:
    """What an index names is there, and is what was written."""
    for shard in sorted(facts.logs):
        index = facts.index(shard)
        for position, location in sorted(index.outcomes.stored.items()):
            if location.object >= len(index.objects):
                yield f"task {facts.first(shard) + position}: its result lies in an object without a name", shard
                continue
            number, name = object_key_name(location, index)
            if number is None:
                key = keys.segment(facts.run, shard, name)
                body: bytes | memoryview | None = facts.segments.get(key)
            else:
                key = f"entry {number} of shard {shard}"
                body = facts.inline.get((shard, number))
            if body is None:
                yield f"task {facts.first(shard) + position}: its result lies in {key}, which is not there", shard
                continue
            try:
                unseal(key, _cut(key, body, Span(location.start, location.end)))
            except CorruptObject as error:
                yield f"task {facts.first(shard) + position}: {error}", shard


def _cut(key: str, body: bytes | memoryview, span: Span) -> memoryview:
    if span.end > len(body):
        raise CorruptObject(f"{key}: it ends after {len(body)} bytes, and a result should lie at {span}")
    return memoryview(body)[span.start : span.end]


def _each_task_once(facts: Facts) -> Findings:
    """The shards of a family share out the tasks of the plan's shard, none to two of them."""
    assert facts.plan is not None
    for number, family in facts.families.items():
        seen = EMPTY
        for shard in family:
            tasks = facts.index(shard).tasks
            if seen & tasks:
                yield f"tasks {list(seen & tasks)} of plan shard {number} are in two shards", shard
            if not facts.index(shard).outcomes.all <= tasks:
                yield f"shard {shard} has outcomes of tasks that are not in it", shard
            seen |= tasks
        if seen != Bitmap.full(facts.plan.shards[number].count):
            yield f"plan shard {number} has lost tasks", family[0]


def _dependencies_first(facts: Facts) -> Findings:
    """What is done had all it needs; what failed upstream names a first cause among what it needs."""
    for number, record in facts.records.items():
        first = facts.first(keys.root_shard(number))
        for position, needs in enumerate(record.dependencies):
            task = first + position
            if task not in facts.outcomes:
                continue
            shard, cause = facts.owner.get(task), facts.outcomes[task]
            causes = {facts.outcomes.get(need, need) for need in needs if facts.outcomes.get(need, -1) is not None}
            missing = [need for need in needs if need not in facts.outcomes]
            if cause is None and (causes or missing):
                yield f"task {task} is done, and tasks {sorted(set(needs) - _done(facts))} before it are not", shard
            elif cause is not None and cause != task:
                if facts.outcomes.get(cause) != cause:
                    yield f"task {task} failed because of task {cause}, which did not fail itself", shard
                elif cause not in causes:
                    yield f"task {task} failed because of task {cause}, which none of those before it failed of", shard
            elif cause == task and causes:
                yield (
                    f"task {task} failed by itself, although what it needs had failed",
                    shard,
                )


def _done(facts: Facts) -> set[int]:
    return {task for task, cause in facts.outcomes.items() if cause is None}


def _outcomes_in_order(facts: Facts) -> Findings:
    """In one log no outcome comes before those of the tasks it needs."""
    for shard, entries in facts.logs.items():
        record = facts.records.get(keys.root_number(shard))
        if record is None:
            continue
        first = facts.first(shard)
        for _, entry in entries:
            if not isinstance(entry.action, Commit | Release):
                continue
            known, tasks = entry.index.outcomes.all, entry.index.tasks
            for position in entry.action.outcomes.done:
                late = [
                    need
                    for need in record.dependencies[position]
                    if need >= first and need - first in tasks and need - first not in known
                ]
                if late:
                    yield f"task {first + position} is done with entry {entry.number}, before tasks {late}", shard


def _wanted_results_are_stored(facts: Facts) -> Findings:
    """What somebody outside of a shard needs of it is in the store."""
    for number, family in facts.families.items():
        record = facts.records.get(number)
        if record is None:
            continue
        first = facts.first(family[0])
        wanted = record.wanted
        crossing: set[int] = set()
        if len(family) > 1:
            for position, needs in enumerate(record.dependencies):
                home = facts.owner.get(first + position)
                crossing.update(n - first for n in needs if n >= first and facts.owner.get(n) != home)
        for shard in family:
            outcomes = facts.index(shard).outcomes
            lost = ((wanted | Bitmap.of(crossing)) & outcomes.done) - Bitmap.of(outcomes.stored)
            if lost:
                yield f"results of tasks {[first + position for position in lost]} are needed, and not stored", shard
            own = outcomes.failed - Bitmap.of(p for tasks in outcomes.upstream.values() for p in tasks)
            if own - Bitmap.of(outcomes.stored):
                yield f"errors of tasks {[first + p for p in own - Bitmap.of(outcomes.stored)]} are not stored", shard


def _only_reserved_tasks_ran(facts: Facts) -> Findings:
    """A holder's outcomes are of tasks that the entry before had reserved."""
    for shard, entries in facts.logs.items():
        before = ShardIndex(tasks=facts.beginning(shard) or EMPTY)
        for _, entry in entries:
            if isinstance(entry.action, Commit | Release):
                outcomes = entry.action.outcomes
                upstream = Bitmap.of(p for tasks in outcomes.upstream.values() for p in tasks)
                # Suspects are given up without running.
                ran = outcomes.all - upstream - Bitmap.of(before.strikes)
                if ran - before.reserved:
                    yield (
                        f"entry {entry.number} has outcomes of tasks {list(ran - before.reserved)}, not reserved",
                        shard,
                    )
            before = entry.index


def _killers_are_given_up(facts: Facts) -> Findings:
    """No task loses more workers than it may."""
    for shard in facts.logs:
        for position, strikes in facts.index(shard).strikes.items():
            if policy.lost_for_good(strikes - 1, facts.settings.lost_workers):
                yield f"task {facts.first(shard) + position} was tried again after it had lost too many workers", shard


def _plan_agrees(facts: Facts) -> Findings:
    """The plan and the task records say the same; a split names its child by its own number."""
    assert facts.plan is not None
    for number, record in facts.records.items():
        info = facts.plan.shards[number]
        if (record.shard, record.first, len(record.dependencies)) != (number, info.first, info.count):
            yield f"the record of plan shard {number} is of another one", None
    for shard, entries in facts.logs.items():
        for number, entry in entries:
            if isinstance(entry.action, Split) and entry.action.child != keys.child_shard(shard, number):
                yield f"entry {number} splits off {entry.action.child}", shard


def _all_have_outcomes(facts: Facts) -> Findings:
    """Every task has its outcome."""
    assert facts.plan is not None
    pending = sorted(set(range(facts.plan.tasks)) - facts.outcomes.keys())
    for shard in sorted({facts.owner[task] for task in pending if task in facts.owner}):
        of_it = [task for task in pending if facts.owner.get(task) == shard]
        yield f"tasks {of_it} have no outcome", shard


CHECKS: tuple[tuple[str, Callable[[Facts], Findings]], ...] = (
    ("1", _logs_fold),
    ("2", _results_are_durable),
    ("3", _each_task_once),
    ("4", _dependencies_first),
    ("4", _outcomes_in_order),
    ("7", _plan_agrees),
    ("9", _wanted_results_are_stored),
    ("10", _killers_are_given_up),
    ("reservation", _only_reserved_tasks_ran),
    ("complete", _all_have_outcomes),
)
