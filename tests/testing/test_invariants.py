"""A healthy run breaks no rule; one that was broken by hand breaks that rule and no other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from breaking import ROOT, Case, done, made, pair
from stage import Task

from burst_dask.errors import InvariantBroken
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.frames import seal
from burst_dask.protocol.keys import RunId, ShardId, WorkerId
from burst_dask.protocol.records import (
    Claim,
    Commit,
    Discard,
    Location,
    Outcomes,
    Place,
    Plan,
    ShardRecord,
    Split,
    Takeover,
    decode,
    encode,
)
from burst_dask.protocol.session_records import AddRun, Cancel, Close, SessionEntry
from burst_dask.protocol.shard import Shard, merge
from burst_dask.testing.facts import garbage, gather, own_failures
from burst_dask.testing.invariants import assert_run_invariants, check_run


async def test_a_healthy_run_breaks_no_rule(case: Case) -> None:
    assert await check_run(case.store, case.run, complete=True) == []
    facts = await gather(case.store, case.run)
    assert garbage(facts) == []
    # It has all that the checks look at.
    actions = {type(entry.action) for entry in await case.entries(ROOT)}
    assert {Claim, Split, Takeover, Commit} <= actions
    outcomes = [facts.index(shard).outcomes for shard in facts.known_shards]
    assert any(one.upstream for one in outcomes) and any(set(one.done) - set(one.stored) for one in outcomes)
    assert await case.names("/segments/")
    assert facts.index(ROOT).strikes and any("-" in shard for shard in facts.known_shards)


async def test_the_error_tells_rule_task_and_story(case: Case) -> None:
    await case.store.delete(await case.names("/segments/"))
    with pytest.raises(InvariantBroken) as caught:
        await assert_run_invariants(case.store, case.run)
    text = str(caught.value)
    assert f"run {case.run} breaks the protocol" in text
    assert "rule 2: the stored outcome of task 32" in text and "0: thief claimed" in text


# ---------------------------------------------------------------------------- rule 1


async def test_a_missing_entry(case: Case) -> None:
    number = (await case.find(Takeover)).number
    await case.store.delete([case.slot(ROOT, number)])
    violation = await case.violation()
    assert (violation.rule, violation.what) == ("1", f"shard 00000: there is no entry {number}")


async def test_an_entry_in_the_slot_of_another(case: Case) -> None:
    await case.rewrite(ROOT, (await case.find(Takeover)).number, number=99)
    assert await case.rules() == {"1"}


async def test_a_nonce_used_twice(case: Case) -> None:
    first, last = (await case.entries(ROOT))[0], (await case.entries(keys.root_shard(1)))[-1]
    await case.rewrite(keys.root_shard(1), last.number, nonce=first.nonce)
    assert "nonce" in (await case.violation()).what


async def test_an_index_that_folding_does_not_give(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    await case.rewrite(ROOT, last.number, index=msgspec.structs.replace(last.index, cause="forged"))
    violation = await case.violation()
    assert violation.rule == "1" and "not what folding the log gives" in violation.what


async def test_a_commit_by_another_than_the_holder(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    await case.rewrite(ROOT, last.number, writer=WorkerId("stranger"))
    violation = await case.violation()
    assert violation.rule == "1" and "commit by stranger" in violation.what


# ---------------------------------------------------------------------------- discarding


@pytest.mark.parametrize(
    ("outputs", "outcome", "reason"),
    [
        ([0], Outcomes(done=Bitmap.of([0])), "it was asked for"),
        ([], None, "task 1 needs it: it has no outcome"),
        ([], Outcomes(failed=Bitmap.of([0]), stored={0: Location(0, 0, 9)}), "it failed, and may be replayed"),
    ],
)
async def test_a_discarded_result_that_is_needed(outputs: list[int], outcome: Outcomes | None, reason: str) -> None:
    case, first = await made(pair(), cuts=[1], outputs=outputs)
    await case.store.put(keys.segment(case.run, ROOT, "a"), b"".join(seal([b"x"])))
    second = await case.append(Shard.untouched(keys.root_shard(1), Bitmap.full(1)), "w", Claim(Bitmap.of([0])))
    first = await case.append(first, "w", Claim(Bitmap.of([0])))
    size = len(b"".join(seal([b"x"])))
    stored = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, size)})
    first = await case.append(first, "w", Commit(stored, EMPTY, ("a",)))
    if outcome is not None:
        blob = b"".join(seal([b"e"]))
        if outcome.stored:
            outcome = msgspec.structs.replace(outcome, stored={0: Location(0, 0, len(blob))})
        await case.append(second, "w", Commit(outcome, EMPTY, ("@1",)), [blob])
    assert await case.rules(complete=False) == set()
    await case.append(first, "d", Discard((0,)))
    await case.store.delete([keys.segment(case.run, ROOT, "a")])
    violation = await case.violation(complete=False)
    assert violation.rule == "discarding" and "the result of task 0 was discarded" in violation.what
    assert reason in violation.what


# ---------------------------------------------------------------------------- rule 2


async def test_a_damaged_result(case: Case) -> None:
    (segment,) = await case.names("/segments/")
    await case.flip(segment)
    violation = await case.violation()
    assert violation.rule == "2" and "task 32" in violation.what


async def test_a_truncated_segment(case: Case) -> None:
    (segment,) = await case.names("/segments/")
    await case.store.put(segment, (await case.store.get(segment) or b"")[:-1])
    assert await case.rules() == {"2"}


async def test_a_damaged_result_in_an_entry(case: Case) -> None:
    newest = (await case.entries(ROOT))[-1].number
    _, blobs = await case.entry(ROOT, newest)
    assert blobs
    await case.flip(case.slot(ROOT, newest))
    assert await case.rules() == {"2"}


async def test_a_result_in_an_object_without_a_name(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    position = next(iter(last.index.outcomes.stored))
    nowhere = Location(99, 0, 8)

    def lose(outcomes: Outcomes) -> Outcomes:
        return msgspec.structs.replace(outcomes, stored={**outcomes.stored, position: nowhere})

    await case.rewrite_outcomes(ROOT, lose)
    assert "2" in await case.rules()


async def test_a_named_segment_without_results_must_be_there_too() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.full(2)))
    await case.append(shard, "w", Commit(done(0, 1), EMPTY, segments=("never-written",)))
    violation = await case.violation()
    assert violation.rule == "2" and "never-written" in violation.what


async def test_what_is_lost_together_is_told_together() -> None:
    case, shard = await made([(lambda: 1, []) for _ in range(20)])
    shard = await case.append(shard, "w", Claim(Bitmap.full(20)))
    outcomes = Outcomes(done=Bitmap.full(20), stored={p: Location(0, 8 * p, 8 * p + 8) for p in range(20)})
    await case.append(shard, "w", Commit(outcomes, EMPTY, segments=("gone",)))
    violation = await case.violation()
    assert "tasks 0, 1, 2, 3, 4, 5, 6, 7 and 12 more" in violation.what and "gone is not there" in violation.what


# ---------------------------------------------------------------------------- rule 3


async def test_a_second_outcome(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    again = Outcomes(done=last.index.outcomes.done.first(1))
    await case.forge(ROOT, Commit(again, EMPTY), outcomes=merge(last.index.outcomes, again))
    violation = await case.violation()
    assert violation.rule == "3" and "a second outcome" in violation.what


async def test_a_task_in_two_shards(case: Case) -> None:
    split = await case.find(Split)
    last = (await case.entries(ROOT))[-1]
    assert isinstance(split.action, Split)
    both = msgspec.structs.replace(last.index, tasks=last.index.tasks | split.action.tasks)
    await case.rewrite(ROOT, last.number, index=both)
    violations = await check_run(case.store, case.run)
    assert any(rule == "3" and "in two shards" in what for rule, what, _ in violations)


async def test_tasks_in_no_shard(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    await case.rewrite(ROOT, last.number, index=msgspec.structs.replace(last.index, children={}))
    violations = await check_run(case.store, case.run)
    assert any(rule == "3" and "in no shard" in what for rule, what, _ in violations)


# ---------------------------------------------------------------------------- rule 4


async def test_done_although_a_dependency_failed(case: Case) -> None:
    def fail(outcomes: Outcomes) -> Outcomes:
        if 0 not in outcomes.done:
            return outcomes
        return msgspec.structs.replace(
            outcomes, done=outcomes.done - Bitmap.of([0]), failed=outcomes.failed | Bitmap.of([0])
        )

    await case.rewrite_outcomes(ROOT, fail)
    violation = await case.violation()
    assert violation.rule == "4" and "task 30 is done" in violation.what and "task 0, which failed" in violation.what


async def test_an_upstream_failure_names_another_cause(case: Case) -> None:
    def blame(outcomes: Outcomes) -> Outcomes:
        return msgspec.structs.replace(
            outcomes, upstream=dict.fromkeys([4], outcomes.failed) if outcomes.upstream else {}
        )

    await case.rewrite_outcomes(keys.root_shard(2), blame)
    violation = await case.violation()
    assert violation.rule == "4" and "task 4, which did not fail by itself" in violation.what


async def test_an_upstream_failure_that_no_dependency_shares() -> None:
    def tasks() -> list[Task]:
        return [(lambda: 1, []), (lambda: 1, []), (lambda x: x, [1])]

    case, shard = await made(tasks())
    shard = await case.append(shard, "w", Claim(Bitmap.full(3)))
    blob = b"".join(seal([b"error"]))
    outcomes = Outcomes(
        done=Bitmap.of([1]),
        failed=Bitmap.of([0, 2]),
        upstream={0: Bitmap.of([2])},
        stored={0: Location(0, 0, len(blob))},
    )
    await case.append(shard, "w", Commit(outcomes, EMPTY, segments=("@1",)), [blob])
    violation = await case.violation()
    assert (violation.rule, violation.what) == (
        "4",
        "task 2 failed because of task 0, and needs nothing that failed of it",
    )


async def test_a_cause_that_does_not_exist(case: Case) -> None:
    def blame(outcomes: Outcomes) -> Outcomes:
        return msgspec.structs.replace(
            outcomes, upstream=dict.fromkeys([1000], outcomes.failed) if outcomes.upstream else {}
        )

    await case.rewrite_outcomes(keys.root_shard(2), blame)
    assert "which does not exist" in (await case.violation()).what


async def test_done_before_a_dependency_has_an_outcome() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.full(2)))
    shard = await case.append(shard, "w", Commit(done(1), Bitmap.of([0])))
    assert await case.rules(complete=False) == {"4"}
    await case.append(shard, "w", Commit(done(0), EMPTY))
    violation = await case.violation()
    assert violation.rule == "4" and "entry 1: task 1, before" in violation.what


async def test_done_although_another_shard_has_no_outcome_yet(case: Case) -> None:
    names = await case.names("/log/00001/")
    await case.store.delete(names[1:])
    violations = await check_run(case.store, case.run)
    assert {violation.rule for violation in violations} == {"4"}
    assert any("task 36 is done, and needs ['task 30, which has no outcome']" in what for _, what, _ in violations)


# ---------------------------------------------------------------------------- rule 7


async def test_a_missing_pack(case: Case) -> None:
    await case.store.delete([keys.pack(case.run, 0)])
    violation = await case.violation()
    assert violation.rule == "7" and violation.what.endswith("packs/00000, which is not there")


async def test_a_missing_plan(case: Case) -> None:
    await case.store.delete([keys.plan(case.run)])
    assert (await case.violation()).what == f"run {case.run} has no plan"


@pytest.mark.parametrize("changes", [{"upstream": ()}, {"outputs": 7}])
async def test_a_plan_that_does_not_agree_with_the_records(case: Case, changes: dict[str, Any]) -> None:
    key = keys.plan(case.run)
    plan = decode(Plan, key, await case.store.get(key) or b"")
    last = msgspec.structs.replace(plan.shards[2], **changes)
    await case.store.put(key, encode(msgspec.structs.replace(plan, shards=(*plan.shards[:2], last))))
    assert await case.rules() == {"7"}


async def test_a_plan_that_counts_other_tasks(case: Case) -> None:
    key = keys.plan(case.run)
    plan = decode(Plan, key, await case.store.get(key) or b"")
    await case.store.put(key, encode(msgspec.structs.replace(plan, tasks=plan.tasks + 1)))
    assert "its shards have others" in (await case.violation()).what


async def test_records_that_do_not_agree_on_who_needs_a_task(case: Case) -> None:
    key = keys.plan(case.run)
    plan = decode(Plan, key, await case.store.get(key) or b"")
    place = plan.shards[1].place
    pack = await case.store.get(keys.pack(case.run, 0)) or b""
    record = decode(ShardRecord, key, pack[place.start : place.end])
    assert record.dependents
    forged = encode(msgspec.structs.replace(record, dependents={}))
    there = Place(1, 0, len(forged))
    await case.store.put(keys.pack(case.run, 1), forged)
    infos = (plan.shards[0], msgspec.structs.replace(plan.shards[1], place=there), plan.shards[2])
    await case.store.put(key, encode(msgspec.structs.replace(plan, shards=infos)))
    violations = await check_run(case.store, case.run)
    assert {violation.rule for violation in violations} == {"7"}
    assert "do not agree on which shards need task 30" in violations[0].what


async def test_logs_of_a_run_that_the_session_does_not_name(case: Case) -> None:
    log_ = keys.session_log(keys.session_of(case.run))
    key = keys.entry(log_, 1)
    entry = decode(SessionEntry, key, await case.store.get(key) or b"")
    assert isinstance(entry.action, AddRun)
    await case.store.put(key, encode(msgspec.structs.replace(entry, action=AddRun(RunId("other.run")))))
    assert await case.rules() == {"7"}


async def test_a_closed_session_keeps_results_without_the_graph(case: Case) -> None:
    session = keys.session_of(case.run)
    entry = SessionEntry(number=2, writer="client", nonce="close", wrote=0.0, action=Close())
    await case.store.put(keys.entry(keys.session_log(session), 2), encode(entry))
    await case.store.delete(await case.names("/packs/"))
    assert await case.rules() == set()


# ---------------------------------------------------------------------------- rule 9


@pytest.mark.parametrize(
    ("shard", "position", "why"), [(0, 3, "an output"), (0, 0, "another shard"), (1, 1, "an error")]
)
async def test_a_wanted_result_without_a_place(case: Case, shard: int, position: int, why: str) -> None:
    def drop(outcomes: Outcomes) -> Outcomes:
        stored = {p: place for p, place in outcomes.stored.items() if p != position}
        return msgspec.structs.replace(outcomes, stored=stored)

    facts = await gather(case.store, case.run)
    (holder,) = [id for id in facts.families[shard] if position in facts.index(id).tasks]
    assert position in facts.index(holder).outcomes.stored, why
    await case.rewrite_outcomes(holder, drop)
    assert await case.rules() == {"9"}


async def test_a_result_that_crosses_a_split_without_a_place() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.of([0])))
    shard = await case.append(shard, "thief", Split(keys.child_shard(ROOT, 1), Bitmap.of([1])))
    await case.append(shard, "w", Commit(done(0), EMPTY))
    assert await case.rules(complete=False) == {"splitting", "9"}


# ---------------------------------------------------------------------------- rule 10, reservation, splitting


async def test_a_task_that_lost_too_many_workers_is_tried_again() -> None:
    case, shard = await made([(lambda: 1, [])])
    shard = await case.append(shard, "w0", Claim(Bitmap.of([0])))
    for death in range(1, 4):
        shard = await case.append(shard, f"w{death}", Takeover(WorkerId(f"w{death - 1}"), "died", Bitmap.of([0])))
    assert await case.rules(complete=False) == set()  # it died alone three times, and has to be given up now
    await case.append(shard, "w4", Takeover(WorkerId("w3"), "died", EMPTY))
    violation = await case.violation(complete=False)
    assert (violation.rule, violation.what) == ("10", "task 0 was tried again after it had lost 3 workers")


async def test_an_outcome_of_a_task_that_nobody_reserved() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.of([0])))
    await case.append(shard, "w", Commit(done(0, 1), EMPTY))
    violation = await case.violation()
    assert violation.rule == "reservation" and "entry 1 has outcomes of task 1" in violation.what


async def test_reserving_what_is_not_pending(case: Case) -> None:
    last = (await case.entries(ROOT))[-1]
    action = msgspec.structs.replace(last.action, reserved=Bitmap.of([0]))
    await case.rewrite(ROOT, last.number, action=action)
    assert await case.rules() == {"reservation"}


async def test_a_split_of_reserved_tasks() -> None:
    case, shard = await made(pair())
    await case.append(shard, "w", Claim(Bitmap.full(2)))
    child = keys.child_shard(ROOT, 1)
    tasks = Bitmap.of([0, 1])
    await case.forge(ROOT, Split(child, tasks), tasks=EMPTY, children={child: tasks})
    violation = await case.violation(complete=False)
    assert violation.rule == "splitting" and "takes tasks 0, 1: not free" in violation.what


async def test_a_split_that_leaves_an_input_behind() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.of([0])))
    await case.append(shard, "thief", Split(keys.child_shard(ROOT, 1), Bitmap.of([1])))
    violation = await case.violation(complete=False)
    assert violation.rule == "splitting" and "takes task 1, and leaves what they need" in violation.what


async def test_a_child_that_no_split_names(case: Case) -> None:
    entry, blobs = await case.entry(ROOT, 0)
    forged = msgspec.structs.replace(entry, nonce="forged")
    await case.store.put(case.slot(ShardId("00000-77"), 0), encode(forged) + blobs)
    violation = await case.violation()
    assert violation.rule == "splitting" and "shard 00000-77 has a log" in violation.what


# ---------------------------------------------------------------------------- complete, sessions, garbage


async def test_pending_tasks_are_wrong_only_when_all_should_be_over() -> None:
    case, shard = await made(pair())
    shard = await case.append(shard, "w", Claim(Bitmap.full(2)))
    await case.append(shard, "w", Commit(done(0), Bitmap.of([1])))
    assert await case.rules(complete=False) == set()
    assert (await case.violation()).what == "task 1: no outcome"
    await case.store.put(keys.complete(case.run), b"w")
    assert await case.rules(complete=False) == {"complete"}


# ---------------------------------------------------------------------------- cancelling


async def cancelled(named: Bitmap, outcomes: Outcomes) -> set[str]:
    """Return which rules a shard of two tasks breaks whose holder gives these outcomes, with `named` cancelled."""
    case, shard = await made(pair())
    session, number = keys.session_of(case.run), 2
    entry = SessionEntry(number=number, writer="c", nonce="n", wrote=0.0, action=Cancel(case.run, tasks=named))
    await case.store.put(keys.entry(keys.session_log(session), number), encode(entry))
    shard = await case.append(shard, "w", Claim(EMPTY))
    body = b"".join(bytes(part) for part in seal([b"error"]))
    stored = {position: Location(0, 0, len(body)) for position in own_failures(outcomes)}
    outcomes = msgspec.structs.replace(outcomes, stored=stored)
    await case.append(shard, "w", Commit(outcomes, EMPTY, (f"@{shard.next}",)), [body])
    return await case.rules(complete=False)


BOTH = Bitmap.of([0, 1])


async def test_a_cancelled_task_and_what_depends_on_it() -> None:
    outcomes = Outcomes(failed=BOTH, upstream={0: Bitmap.of([1])}, cancelled=BOTH)
    assert await cancelled(Bitmap.of([0]), outcomes) == set()


async def test_a_task_is_cancelled_that_nobody_cancelled() -> None:
    outcomes = Outcomes(failed=BOTH, upstream={0: Bitmap.of([1])}, cancelled=BOTH)
    assert await cancelled(Bitmap.of([1]), outcomes) == {"cancelling"}


async def test_what_depends_on_a_cancelled_task_counts_as_failed() -> None:
    outcomes = Outcomes(failed=BOTH, upstream={0: Bitmap.of([1])}, cancelled=Bitmap.of([0]))
    assert await cancelled(Bitmap.of([0]), outcomes) == {"cancelling"}
