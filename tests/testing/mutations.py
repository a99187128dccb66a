"""Bugs to put into the product, each of which the simulator must find (`test_mutations`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from burst_dask.client import submission
from burst_dask.journal import log, needs
from burst_dask.journal.needs import FOR_EVER, Needs, Shape
from burst_dask.journal.outcomes import TaskOutcome
from burst_dask.protocol import keys, policy, shard
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.records import encode
from burst_dask.protocol.session_records import AddRun
from burst_dask.store.retrying import Retrying
from burst_dask.worker import discarding
from burst_dask.worker.discarding import Discarder
from burst_dask.worker.finder import Finder
from burst_dask.worker.holding import Holding
from burst_dask.worker.moves import Moves
from burst_dask.worker.outgoing import Outgoing
from burst_dask.worker.tender import Tender

Patch = pytest.MonkeyPatch
MUTATIONS: dict[str, Callable[[Patch], None]] = {}


def mutation(function: Callable[[Patch], None]) -> Callable[[Patch], None]:
    MUTATIONS[function.__name__] = function
    return function


# ---------------------------------------------------------------------------- rule 1: fencing


@mutation
def commit_without_the_condition(patch: Patch) -> None:
    """A commit replaces what is in its slot."""

    async def append(store: Any, run: Any, attempt: log.Attempt) -> Any:
        key = keys.entry(keys.shard_log(run, attempt.shard.id), attempt.entry.number)
        await store.put(key, [encode(attempt.entry), *attempt.blobs])
        return attempt.shard

    patch.setattr(log, "append", append)


@mutation
def check_and_then_write(patch: Patch) -> None:
    """Create-if-absent as two requests."""

    async def create(self: Retrying, key: str, body: Any) -> bool:
        if await self.get(key) is not None:
            return False
        await self.put(key, body)
        return True

    patch.setattr(Retrying, "create", create)


@mutation
def go_on_when_fenced(patch: Patch) -> None:
    """A holder that lost its slot takes the next one all the same."""
    append = log.append

    async def again(store: Any, run: Any, attempt: log.Attempt) -> Any:
        after = await append(store, run, attempt)
        while after is None:
            entry = msgspec.structs.replace(attempt.entry, number=attempt.entry.number + 1)
            state = msgspec.structs.replace(attempt.shard, next=attempt.shard.next + 1)
            attempt = log.Attempt(state, entry, attempt.blobs)
            after = await append(store, run, attempt)
        return after

    patch.setattr(log, "append", again)


# ---------------------------------------------------------------------------- rule 2: durable before named


@mutation
def commit_before_the_segment(patch: Patch) -> None:
    """The entry goes first, its segment follows."""
    commit_append = Tender._append

    async def append(self: Tender, action: Any, outgoing: Outgoing) -> bool:
        held = await commit_append(self, action, outgoing)
        for name, body in ((outgoing.segment_name, outgoing.segment), (outgoing.lasting_name, outgoing.lasting)):
            if body:
                key = keys.segment(self.view.run, self.holding.shard.id, name)
                await self.context.insist(lambda key=key, body=body: self.context.store.put(key, body))
        return held

    patch.setattr(Tender, "_append", append)
    _skip(patch, "/segments/", unless="append")


def _skip(patch: Patch, part: str, unless: str) -> None:
    """Skip the next put of a key with `part`, and let the one after it through."""
    put = Retrying.put
    seen: set[str] = set()

    async def skipping(self: Retrying, key: str, body: Any) -> None:
        if part in key and key not in seen:
            seen.add(key)
            return
        await put(self, key, body)

    patch.setattr(Retrying, "put", skipping)


# ---------------------------------------------------------------------------- rule 3: one outcome


@mutation
def commit_twice(patch: Patch) -> None:
    """What has an outcome gets another one with the next commit."""
    kept: dict[int, Any] = {}
    collect = Holding.collect

    def again(self: Holding) -> Any:
        finished = collect(self)
        finished.ran = {**kept.get(id(self), {}), **finished.ran}
        kept[id(self)] = finished.ran
        return finished

    patch.setattr(Holding, "collect", again)
    patch.setattr(shard, "_require", lambda condition, state, what: None)
    patch.setattr("burst_dask.protocol.records.ShardIndex.pending", property(lambda self: self.tasks), raising=True)


# ---------------------------------------------------------------------------- rule 4: dependencies


@mutation
def forget_upstream_failure(patch: Patch) -> None:
    """The dependents of a failed task in another shard are left waiting."""
    told = Holding._told

    def forgetful(self: Holding) -> list[tuple[int, TaskOutcome]]:
        return [(number, outcome) for number, outcome in told(self) if outcome.done]

    patch.setattr(Holding, "_told", forgetful)


@mutation
def run_before_dependencies(patch: Patch) -> None:
    """A task counts as ready when one of its dependencies has an outcome."""

    def met(self: Holding, position: int) -> None:
        self.unmet[position] = 0
        if position in self.todo and position not in self.running:
            self._enable(position)

    patch.setattr(Holding, "_met", met)


@mutation
def blame_the_nearest(patch: Patch) -> None:
    """An upstream failure names the task before it rather than the first cause."""
    fail_upstream = Holding._fail_upstream

    def blame(self: Holding, positions: Any, cause: int) -> None:
        for position in list(positions):
            fail_upstream(self, [position], self.table.first + position)

    patch.setattr(Holding, "_fail_upstream", blame)


# ---------------------------------------------------------------------------- rule 5: lost answers


@mutation
def take_an_unanswered_create_for_lost(patch: Patch) -> None:
    """No read-back: what exists after a lost answer is somebody else's."""

    async def never(self: Retrying, key: str, body: Any) -> bool:
        return False

    async def append(store: Any, run: Any, attempt: log.Attempt) -> Any:
        key = keys.entry(keys.shard_log(run, attempt.shard.id), attempt.entry.number)
        created = await store.create(key, [encode(attempt.entry), *attempt.blobs])
        return attempt.shard if created else None

    patch.setattr(Retrying, "_is_ours", never)
    patch.setattr(log, "append", append)


@mutation
def take_an_unanswered_create_for_won(patch: Patch) -> None:
    """No read-back: what exists after a lost answer is one's own."""

    async def always(self: Retrying, key: str, body: Any) -> bool:
        return True

    patch.setattr(Retrying, "_is_ours", always)


# ---------------------------------------------------------------------------- rule 6: leases


@mutation
def judge_by_ones_own_clock(patch: Patch) -> None:
    """A lease is dead when one heartbeat is late."""
    patch.setattr(policy, "lease_is_dead", lambda judge, holder, ended, lease: holder is None or judge - holder > 5)


@mutation
def never_take_over(patch: Patch) -> None:
    """Dead holders keep their shards."""
    patch.setattr(Finder, "_take_over", nothing)


# ---------------------------------------------------------------------------- rules 7 and 8: plan last, no deletion


@mutation
def tell_before_the_plan(patch: Patch) -> None:
    """The workers are told of a run before it is stored."""
    store_run = submission.store_run

    async def eager(link: Any, run: Any, packs: Any, finish: Any) -> Any:
        await link.append(AddRun(run, 0))
        return await store_run(link, run, packs, finish)

    patch.setattr("burst_dask.testing.machines.store_run", eager)


@mutation
def tell_before_the_packs(patch: Patch) -> None:
    """The workers are told of a run while its packs are on their way."""
    put, store_run = Retrying.put, submission.store_run
    held: list[tuple[str, Any]] = []

    async def lazy(self: Retrying, key: str, body: Any) -> None:
        if "/packs/" in key:
            held.append((key, body))
        else:
            await put(self, key, body)

    async def eager(link: Any, run: Any, packs: Any, finish: Any) -> Any:
        held.clear()
        plan = await store_run(link, run, packs, finish)
        for key, body in held:
            await put(link.store.inner, key, body)
        return plan

    patch.setattr(Retrying, "put", lazy)
    patch.setattr("burst_dask.testing.machines.store_run", eager)


@mutation
def delete_early(patch: Patch) -> None:
    """A holder deletes the entries before its last one."""
    committed = Tender._append

    async def append(self: Tender, action: Any, outgoing: Outgoing) -> bool:
        held = await committed(self, action, outgoing)
        log_prefix = keys.shard_log(self.view.run, self.holding.shard.id)
        await self.context.store.delete([keys.entry(log_prefix, n) for n in range(self.holding.shard.next - 1)])
        return held

    patch.setattr(Tender, "_append", append)


# ---------------------------------------------------------------------------- rule 9: what stays in memory


@mutation
def keep_wanted_results_in_memory(patch: Patch) -> None:
    """Results that other shards need are not stored."""

    def wanted(self: Holding) -> None:
        self.consumed = EMPTY
        self.wanted = EMPTY

    patch.setattr(Holding, "_find_wanted", wanted)
    patch.setattr(policy, "worth_storing", lambda seconds, size: False)


@mutation
def forget_what_died_with_its_holder(patch: Patch) -> None:
    """Results that were only in a dead worker's memory are not computed again."""
    patch.setattr(Holding, "_lost", lambda self, position: False)


# ---------------------------------------------------------------------------- discarding


@mutation
def discard_before_the_consumers_have_committed(patch: Patch) -> None:
    """A result counts as needless while a task that depends on it is pending."""
    why = Needs.why

    def hasty(self: Needs, tasks: Any) -> Any:
        found = why(self, tasks)
        return None if found is not None and found.pending is not None else found

    patch.setattr(Needs, "why", hasty)


@mutation
def discard_what_would_be_computed_again_from(patch: Patch) -> None:
    """Inputs of a result that is only in memory count as needless: its task is done."""
    users_in = Needs._users_in

    def forgetful(self: Needs, number: int, task: int) -> Any:
        return (found for found in users_in(self, number, task) if not isinstance(found, int))

    patch.setattr(Needs, "_users_in", forgetful)


@mutation
def discard_inputs_of_failed_tasks(patch: Patch) -> None:
    """A task that failed cannot be replayed."""
    users_in = Needs._users_in

    def forgetful(self: Needs, number: int, task: int) -> Any:
        return (found for found in users_in(self, number, task) if found is not FOR_EVER)

    patch.setattr(Needs, "_users_in", forgetful)


@mutation
def discard_what_was_asked_for(patch: Patch) -> None:
    """The client, and runs that come later, are forgotten: only tasks of the same run count."""
    of = Shape.of.__func__  # type: ignore[attr-defined]
    patch.setattr(Shape, "of", classmethod(lambda kind, record: of(kind, record)._replace(outputs=EMPTY)))
    patch.setattr(keys, "LASTING", "")
    patch.setattr(discarding, "may_be_discarded", shard.is_segment)
    patch.setattr(needs, "may_be_discarded", shard.is_segment)


@mutation
def forget_consumers_in_other_shards(patch: Patch) -> None:
    """A result counts as needless when its own shard needs it no more."""
    of = Shape.of.__func__  # type: ignore[attr-defined]
    patch.setattr(Shape, "of", classmethod(lambda kind, record: of(kind, record)._replace(elsewhere={})))


@mutation
def delete_without_saying_so(patch: Patch) -> None:
    """Segments are deleted, and no entry says that they are gone."""

    async def silently(self: Discarder, view: Any, id: Any, places: list[int]) -> None:
        self.delete(view.run, id, [view.shard(id).index.objects[place] for place in places])

    patch.setattr(Discarder, "_append", silently)


@mutation
def delete_before_saying_so(patch: Patch) -> None:
    """Segments are deleted, and the next commit says so."""
    discard = Tender.discard

    def hasty(self: Tender, places: Any) -> None:
        state = self.holding.shard
        names = [state.index.objects[place] for place in places]
        self.context.discarder.delete(self.view.run, state.id, names)
        discard(self, places)

    patch.setattr(Tender, "discard", hasty)


@mutation
def never_look_again(patch: Patch) -> None:
    """What is needed at the first look is never deleted."""
    patch.setattr(Discarder, "stir", lambda self, view, number, over=False: None)
    patch.setattr(Discarder, "sweep", lambda self, view, workers: None)


# ---------------------------------------------------------------------------- rule 10: killers


@mutation
def never_suspect(patch: Patch) -> None:
    """The death of a worker counts against nobody."""
    patch.setattr(shard, "_strike", lambda strikes, suspects: strikes)


@mutation
def suspect_for_ever(patch: Patch) -> None:
    """Killers are tried again and again."""
    patch.setattr(policy, "lost_for_good", lambda strikes, allowed: False)


@mutation
def give_up_at_the_first_death(patch: Patch) -> None:
    """A task is given up with the first worker it loses."""
    patch.setattr(policy, "lost_for_good", lambda strikes, allowed: strikes >= 1)


# ---------------------------------------------------------------------------- reservation and splitting


@mutation
def start_what_is_not_reserved(patch: Patch) -> None:
    """A holder starts whatever is ready."""
    patch.setattr(Holding, "_may_start", lambda self, position: position not in self.lacking)


@mutation
def start_what_was_given_back(patch: Patch) -> None:
    """A task that was ready once may start, whatever has become of its reservation."""
    next_, may_start = Holding._next, Holding._may_start
    choosing: list[bool] = []

    def careless(self: Holding, followers: Any, free: Any) -> Any:
        choosing.append(True)
        try:
            return next_(self, followers, free)
        finally:
            choosing.pop()

    patch.setattr(Holding, "_next", careless)
    patch.setattr(Holding, "_may_start", lambda self, position: bool(choosing) or may_start(self, position))


@mutation
def split_what_is_reserved(patch: Patch) -> None:
    """A thief takes any pending task."""
    patch.setattr(shard.Shard, "splittable", property(lambda self: self.index.pending))


@mutation
def split_what_cannot_run_elsewhere(patch: Patch) -> None:
    """A thief takes tasks whose inputs are in the holder's memory."""
    patch.setattr("burst_dask.worker.finder.takeable", lambda view, best, table: best.splittable)
    patch.setattr("burst_dask.worker.finder.closed_part", lambda tasks, table, count: tasks)


@mutation
def forget_what_was_split_off(patch: Patch) -> None:
    """A thief does not claim what it has split off, and nobody else does."""
    split = Finder._split

    async def careless(self: Finder, view: Any, fresh: Any) -> None:
        before = {shard.id: shard.index.children for shard in view.shards.values()}
        patch.setattr(self, "_first", lambda tasks: EMPTY)
        await split(self, view, {id for id in fresh if id in before})

    patch.setattr(Finder, "_split", careless)
    patch.setattr(Finder, "_unclaimed", lambda self, view: [])
    patch.setattr(Finder, "_claim_freed", nothing)


async def nothing(*args: Any) -> None:
    """Stands in for what finds nothing."""


@mutation
def lose_a_finished_task(patch: Patch) -> None:
    """A commit leaves out the last of what has finished."""
    outcomes = Outgoing.outcomes

    def short(self: Outgoing, state: Any) -> Any:
        if len(self.finished.ran) > 1:
            self.finished.ran.popitem()
        return outcomes(self, state)

    patch.setattr(Outgoing, "outcomes", short)


# ---------------------------------------------------------------------------- cancelling


@mutation
def cancel_the_next_task_too(patch: Patch) -> None:
    """A holder also gives a task up that nobody has cancelled."""
    cancel = Tender.cancel
    patch.setattr(Tender, "cancel", lambda self, tasks: cancel(self, Bitmap(tasks.bits | tasks.bits << 1)))


@mutation
def forget_who_was_cancelled_with_another(patch: Patch) -> None:
    """What depends on a cancelled task counts as failed."""
    fail = Moves._fail_upstream
    patch.setattr(Moves, "_fail_upstream", lambda self, positions, cause, _: fail(self, positions, cause, False))


@mutation
def cancel_what_runs(patch: Patch) -> None:
    """A task that runs is given up, and its result committed later."""
    patch.setattr(
        Moves,
        "unstarted",
        lambda self, tasks: sorted(p for p in self.todo if self.table.first + p in tasks),
    )
    patch.setattr(Moves, "_forget", lambda self, position: None)
