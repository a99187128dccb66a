"""What must hold of a run's objects, each rule of PROTOCOL.md as a check of `Facts`: the table `CHECKS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from burst_dask.errors import IllegalTransition
from burst_dask.journal import across
from burst_dask.protocol import keys, policy
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId
from burst_dask.protocol.records import Backup, Commit, Release, ShardIndex, Split
from burst_dask.protocol.shard import Shard, describe
from burst_dask.testing.facts import Facts, own_failures
from burst_dask.testing.needed import needed_of


class Finding(NamedTuple):
    """What a check finds."""

    what: str
    #: the one whose story tells more
    shard: ShardId | None = None
    #: number of the entry at fault, if it is one
    entry: int | None = None


Findings = Iterator[Finding]


def _results_are_durable(facts: Facts) -> Findings:
    """What an index names is there, and is what was written."""
    lost: dict[tuple[ShardId, str], list[int]] = {}
    told: set[tuple[ShardId, int]] = set()
    for (shard, position), why in facts.lost.items():
        if facts.is_swept and not facts.is_kept(shard, position):
            continue
        lost.setdefault((shard, why), []).append(position)
        told.add((shard, facts.index(shard).outcomes.stored[position].object))
    for (shard, why), positions in lost.items():
        yield Finding(f"the stored outcome of {_names(facts, shard, Bitmap.of(positions))}: {why}", shard)
    for shard in facts.known_shards:
        for number, name in enumerate(facts.index(shard).objects):
            if (shard, number) in told or (shard, number) in facts.leaving or not name:
                continue
            if name.startswith("@"):
                there = name[1:].isdecimal() and int(name[1:]) <= max(facts.logs[shard])
            else:
                there = facts.is_swept or keys.segment(facts.run, shard, name) in facts.objects
            if not there:
                yield Finding(f"the index of shard {shard} names {name}, which is not there", shard)
    for (shard, name), why in facts.lost_logs.items():
        of = _names(facts, shard, facts.index(shard).outcomes.logs[name])
        yield Finding(f"what {of} printed: {why}", shard)


def _one_outcome(facts: Facts) -> Findings:
    """No entry gives an outcome to a task that has one or that is not in the shard, or two to one."""
    for shard in facts.known_shards:
        for before, entry in facts.steps(shard):
            if not isinstance(entry.action, Commit | Release | Backup):
                continue
            new = entry.action.outcomes
            for tasks, what in (
                (new.all & before.outcomes.all, "a second outcome"),
                (new.all - before.tasks, "an outcome, though the shard does not have them"),
                (new.done & new.failed, "two outcomes"),
            ):
                if tasks:
                    names = _names(facts, shard, tasks)
                    yield Finding(f"shard {shard}, entry {entry.number} gives {names} {what}", shard, entry.number)


def _shards_share_out_tasks(facts: Facts) -> Findings:
    """The shards of a family have all tasks of the plan's shard, none of them twice."""
    assert facts.plan is not None
    for number, family in enumerate(facts.families):
        if number in facts.uncertain:
            continue
        seen = EMPTY
        for shard in family:
            index = facts.index(shard)
            if seen & index.tasks:
                yield Finding(f"{_names(facts, shard, seen & index.tasks)}: in two shards", shard)
            if index.outcomes.all - index.tasks:
                names = _names(facts, shard, index.outcomes.all - index.tasks)
                yield Finding(f"{names}: outcomes in shard {shard}, which does not have them", shard)
            seen |= index.tasks
        whole = Bitmap.full(facts.plan.shards[number].count)
        if seen != whole:
            names = _names(facts, family[0], (whole - seen) | (seen - whole))
            yield Finding(f"{names}: in no shard, or not in the plan", family[0])


def _dependencies_first(facts: Facts) -> Findings:
    """What is done had all it needs; what failed upstream names a first cause that one of its needs failed of."""
    for number, family in enumerate(facts.families):
        if number not in facts.records:
            continue
        for shard in family:
            outcomes = facts.settled_outcomes(shard)
            own = own_failures(outcomes) - outcomes.cancelled
            for position in outcomes.done | own:
                # A task may fail by itself because what it needs was lost, and could not be computed again.
                missing = _not_done(facts, number, position)
                if missing and (position in outcomes.done or not _lost_need(facts, number, position)):
                    is_what = "done" if position in outcomes.done else "failed by itself"
                    yield Finding(f"task {facts.first(shard) + position} is {is_what}, and needs {missing}", shard)
            for cause, positions in outcomes.upstream.items():
                yield from _causes(facts, shard, cause, positions & outcomes.failed)


def _not_done(facts: Facts, number: int, position: int) -> list[str]:
    """Return in words what a task needs and is not done."""
    here = facts.needs(number, position) & ~facts.done[number].bits
    first = facts.records[number].first
    if here and number in facts.uncertain:
        here &= facts.failed[number].bits
    missing = [first + need for need in Bitmap(here)]
    for need in facts.dependencies(number, position):
        if need >= facts.tasks:
            if not facts.externals.get(need, True):
                missing.append(need)
            continue
        if need >= first:
            continue
        elsewhere, there = facts.locate(need)
        if there in facts.done[elsewhere] or (elsewhere in facts.uncertain and there not in facts.failed[elsewhere]):
            continue
        missing.append(need)
    return [_without(facts, need) for need in sorted(missing)]


def _without(facts: Facts, need: int) -> str:
    assert facts.plan is not None
    failed = need in facts.causes or facts.externals.get(need) is False
    return f"{across.describe(facts.plan, need)}, which {'failed' if failed else 'has no outcome'}"


def _lost_need(facts: Facts, number: int, position: int) -> bool:
    needs = facts.needs(number, position)
    for shard in facts.families[number]:
        outcomes = facts.index(shard).outcomes
        if any(need not in outcomes.stored for need in Bitmap(outcomes.done.bits & needs)):
            return True
    return False


def _causes(facts: Facts, shard: ShardId, cause: int, positions: Bitmap) -> Findings:
    """Tasks that failed because of `cause` descend from it, and it failed by itself."""
    assert facts.plan is not None
    number = keys.root_number(shard)
    if cause in range(facts.tasks, facts.tasks + len(facts.plan.externals)):
        if facts.externals.get(cause, False) is not False:
            names = _names(facts, shard, positions)
            yield Finding(f"{names} failed because of {across.describe(facts.plan, cause)}, which did not fail", shard)
            return
    elif not 0 <= cause < facts.plan.tasks:
        yield Finding(f"{_names(facts, shard, positions)} failed because of task {cause}, which does not exist", shard)
        return
    elif facts.locate(cause)[0] in facts.uncertain:
        return
    elif facts.causes.get(cause) != cause:
        names = _names(facts, shard, positions)
        yield Finding(f"{names} failed because of task {cause}, which did not fail by itself", shard)
        return
    for position in positions:
        needs = facts.dependencies(number, position)
        of = {need if need >= facts.tasks else facts.causes.get(need) for need in needs}
        unknown = any(need < facts.tasks and facts.locate(need)[0] in facts.uncertain for need in needs)
        if cause not in of and not unknown:
            task = facts.first(shard) + position
            why = across.describe(facts.plan, cause)
            yield Finding(f"task {task} failed because of {why}, and needs nothing that failed of it", shard)


def _outcomes_in_order(facts: Facts) -> Findings:
    """In one log no outcome comes before those of the tasks it needs, nor before its first cause."""
    for shard in facts.known_shards:
        number = keys.root_number(shard)
        if number not in facts.records:
            continue
        first = facts.first(shard)
        for _, entry in facts.steps(shard):
            if not isinstance(entry.action, Commit | Release | Backup):
                continue
            known = entry.index.outcomes
            pending = entry.index.tasks.bits & ~known.all.bits
            late = Bitmap.of(p for p in entry.action.outcomes.done if facts.needs(number, p) & pending)
            for cause, positions in entry.action.outcomes.upstream.items():
                if cause - first in entry.index.tasks and cause - first not in known.failed:
                    late |= positions
            if late:
                names = _names(facts, shard, late)
                what = f"shard {shard}, entry {entry.number}: {names}, before what they need has an outcome"
                yield Finding(what, shard, entry.number)


def _plan_agrees(facts: Facts) -> Findings:
    """The plan and the task records say the same."""
    assert facts.plan is not None
    shards = facts.plan.shards
    if sum(info.count for info in shards) != facts.plan.tasks:
        yield Finding(f"the plan has {facts.plan.tasks} tasks, and its shards have others")
    for number, record in facts.records.items():
        info = shards[number]
        if (record.shard, record.first, len(record.dependencies)) != (number, info.first, info.count):
            yield Finding(f"the task records of shard {number} are of another one")
        needed = {need for needs in record.dependencies for need in needs}
        upstream = {facts.locate(need)[0] for need in needed if need < record.first}
        if upstream != set(info.upstream) or len(record.outputs) != info.outputs:
            yield Finding(f"the plan says other shards or outputs of shard {number} than its task records")
        if {need - facts.tasks for need in needed if need >= facts.tasks} != set(info.externals):
            yield Finding(f"the plan says other results of other runs for shard {number} than its task records")
    if not all(keys.session_of(run) == keys.session_of(facts.run) for run, _ in facts.plan.externals):
        yield Finding("the plan names results of another session")


def _records_agree(facts: Facts) -> Findings:
    """The task records say of each task which other shards need it."""
    assert facts.plan is not None
    if len(facts.records) < len(facts.plan.shards):
        return
    consumers: dict[tuple[int, int], set[int]] = {}
    for number, record in facts.records.items():
        for need in {need for needs in record.dependencies for need in needs if need < record.first}:
            consumers.setdefault(facts.locate(need), set()).add(number)
    said = {
        (number, position): set(others)
        for number, record in facts.records.items()
        for position, others in record.dependents.items()
    }
    for number, position in sorted(consumers.keys() | said.keys()):
        if consumers.get((number, position)) != said.get((number, position)):
            task = facts.records[number].first + position
            yield Finding(f"the task records do not agree on which shards need task {task}")


def _wanted_results_are_stored(facts: Facts) -> Findings:
    """What somebody outside of a shard needs of it is in the store, and so is every error."""
    for number, family in enumerate(facts.families):
        record = facts.records.get(number)
        needed: dict[ShardId, int] = {}
        if record is not None and len(family) > 1:
            for shard in family:
                bits = 0
                for position in facts.index(shard).tasks:
                    bits |= facts.needs(number, position)
                needed[shard] = bits
        for shard in family:
            outcomes = facts.index(shard).outcomes
            stored = Bitmap.of(outcomes.stored) | facts.index(shard).discarded
            wanted = EMPTY if record is None else record.wanted
            for other, bits in needed.items():
                if other != shard:
                    wanted |= Bitmap(bits)
            if lost := (wanted & outcomes.done) - stored:
                yield Finding(f"{_names(facts, shard, lost)}: needed outside of shard {shard}, and not stored", shard)
            if lost := own_failures(outcomes) - stored:
                yield Finding(f"{_names(facts, shard, lost)}: failed, and the error is not stored", shard)


def _nobody_needs_what_was_discarded(facts: Facts) -> Findings:
    """What was discarded was asked for by nobody, and every task that depends on it can do without."""
    discarded = [shard for shard in facts.known_shards if facts.settled_index(shard).discarded]
    why = needed_of(facts) if discarded else None
    for shard in discarded if why else ():
        first = facts.first(shard)
        for position in facts.settled_index(shard).discarded:
            if reason := (why or {}).get(first + position):
                yield Finding(f"the result of task {first + position} was discarded, and {reason}", shard)


def _killers_are_given_up(facts: Facts) -> Findings:
    """No task loses more workers than it may."""
    allowed = facts.session.settings.lost_workers
    for shard in facts.known_shards:
        for position, strikes in facts.index(shard).strikes.items():
            if policy.lost_for_good(strikes - 1, allowed):
                task = facts.first(shard) + position
                yield Finding(f"task {task} was tried again after it had lost {allowed} workers", shard)


def _only_reserved_tasks_ran(facts: Facts) -> Findings:
    """A holder's outcomes are of tasks that the entry before had reserved."""
    for shard in facts.known_shards:
        for before, entry in facts.steps(shard):
            if not isinstance(entry.action, Commit | Release):
                continue
            new = entry.action.outcomes
            ran = ((new.done | (own_failures(new) - new.cancelled)) & before.pending) - before.reserved
            ran -= Bitmap.of(p for p in ran & new.failed if _failed_without_running(facts, shard, before, p))
            if ran:
                names = _names(facts, shard, ran)
                what = f"shard {shard}, entry {entry.number} has outcomes of {names}, which nobody had reserved"
                yield Finding(what, shard, entry.number)
            if isinstance(entry.action, Commit) and (more := entry.action.reserved - entry.index.pending):
                names = _names(facts, shard, more)
                yield Finding(f"shard {shard}, entry {entry.number} reserves {names}, not pending", shard, entry.number)


def _failed_without_running(facts: Facts, shard: ShardId, before: ShardIndex, position: int) -> bool:
    """Tell whether a task may have failed unreserved: it kills workers, or a result that it needs was lost."""
    if policy.lost_for_good(before.strikes.get(position, 0), facts.session.settings.lost_workers):
        return True
    number = keys.root_number(shard)
    if number not in facts.records:
        return True
    needs = Bitmap(facts.needs(number, position))
    return any(need not in before.outcomes.stored for need in needs & before.outcomes.done)


def _only_cancelled_tasks_are_cancelled(facts: Facts) -> Findings:
    """A task has the outcome cancelled if the session log names it, or if its first cause has that outcome."""
    named = facts.session.state.cancelled_tasks.get(facts.run, EMPTY)
    cancelled: set[int] = set()
    for shard in facts.known_shards:
        cancelled.update(facts.first(shard) + position for position in facts.index(shard).outcomes.cancelled)
    for shard in facts.known_shards:
        outcomes, first = facts.index(shard).outcomes, facts.first(shard)
        own = own_failures(outcomes) & outcomes.cancelled
        bad = Bitmap.of(position for position in own if first + position not in named)
        for cause, positions in outcomes.upstream.items():
            if cause < facts.tasks and facts.locate(cause)[0] not in facts.uncertain:
                bad |= positions - outcomes.cancelled if cause in cancelled else positions & outcomes.cancelled
        if bad and not facts.session.violations:
            yield Finding(f"{_names(facts, shard, bad)}: cancelled though nobody asked for it, or the reverse", shard)


def _splits_take_free_tasks(facts: Facts) -> Findings:
    """A SPLIT takes pending tasks that nobody reserved, whose inputs are stored or go with them."""
    for shard in sorted(facts.logs):
        if facts.beginning(shard) is None:
            yield Finding(f"shard {shard} has a log, and neither the plan nor a SPLIT names it", shard)
    for shard in facts.known_shards:
        number = keys.root_number(shard)
        for before, entry in facts.steps(shard):
            if not isinstance(entry.action, Split):
                continue
            tasks, at = entry.action.tasks, f"shard {shard}, entry {entry.number}"
            if entry.action.child != keys.child_shard(shard, entry.number):
                yield Finding(f"{at} names its child {entry.action.child}", shard, entry.number)
            if held := tasks - (before.pending - before.reserved):
                yield Finding(f"{at} takes {_names(facts, shard, held)}: not free", shard, entry.number)
            if number not in facts.records:
                continue
            have = (before.outcomes.done & Bitmap.of(before.outcomes.stored)) | tasks
            lacking = (before.tasks - have).bits
            if bad := Bitmap.of(p for p in tasks & before.tasks if facts.needs(number, p) & lacking):
                names = _names(facts, shard, bad)
                yield Finding(f"{at} takes {names}, and leaves what they need", shard, entry.number)


def entries_follow(facts: Facts) -> Findings:
    """Each log is entries 0, 1, 2, …, each legal after the one before, each with the state that folding gives."""
    nonces: set[str] = set()
    for shard, log in facts.logs.items():
        for number, entry in log.items():
            if entry.nonce in nonces:
                yield Finding(f"shard {shard}, entry {number}: its nonce was used before", shard)
            nonces.add(entry.nonce)
            if entry.number != number:
                yield Finding(f"shard {shard}: entry {entry.number} lies in slot {number}", shard)
        bad = facts.unreadable.get(shard, {})
        if missing := [number for number in range(max(log)) if number not in log and number not in bad]:
            yield Finding(f"shard {shard}: there is no entry {', '.join(map(str, missing))}", shard)
    for shard in facts.known_shards:
        for before, entry in facts.steps(shard):
            what = ""
            try:
                after = Shard(shard, before, entry.number).apply(entry.writer, entry.action)
                if after.index != entry.index:
                    what = f"shard {shard}, entry {entry.number}: its index is not what folding the log gives"
            except IllegalTransition as error:
                what = error.reason
            if what:
                yield Finding(f"{what} ({describe(entry)})", shard, entry.number)


def _all_have_outcomes(facts: Facts) -> Findings:
    """Every task has its outcome."""
    for number, family in enumerate(facts.families):
        for shard in family:
            if number not in facts.uncertain and (pending := facts.index(shard).pending):
                yield Finding(f"{_names(facts, shard, pending)}: no outcome", shard)


def _session_names_it(facts: Facts) -> Findings:
    """A run that is worked on was named by the session log."""
    if facts.logs and facts.run not in facts.session.state.runs and not facts.session.violations:
        yield Finding(f"workers wrote to the logs of run {facts.run}, which no entry of the session log names")


def _names(facts: Facts, shard: ShardId, positions: Bitmap, most: int = 8) -> str:
    """Return the global numbers of tasks, as words."""
    first = facts.first(shard)
    some = ", ".join(str(first + position) for position in positions.first(most))
    more = f" and {len(positions) - most} more" if len(positions) > most else ""
    return f"task{'s' if len(positions) > 1 else ''} {some}{more}"


#: `entries_follow` comes after those that say more exactly what is wrong with an entry.
CHECKS: tuple[tuple[str, Callable[[Facts], Findings]], ...] = (
    ("2", _results_are_durable),
    ("3", _one_outcome),
    ("3", _shards_share_out_tasks),
    ("4", _dependencies_first),
    ("4", _outcomes_in_order),
    ("7", _plan_agrees),
    ("7", _records_agree),
    ("7", _session_names_it),
    ("9", _wanted_results_are_stored),
    ("discarding", _nobody_needs_what_was_discarded),
    ("10", _killers_are_given_up),
    ("reservation", _only_reserved_tasks_ran),
    ("cancelling", _only_cancelled_tasks_are_cancelled),
    ("splitting", _splits_take_free_tasks),
    ("1", entries_follow),
    ("complete", _all_have_outcomes),
)
