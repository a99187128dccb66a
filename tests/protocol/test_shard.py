"""The shard log's rules: what may follow what, and what follows from it."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId, child_shard
from burst_dask.protocol.records import (
    Action,
    Backup,
    Claim,
    Commit,
    Discard,
    Entry,
    Location,
    Outcomes,
    Release,
    Split,
    Takeover,
)
from burst_dask.protocol.shard import TRANSITIONS, Phase, Shard, fold

ID = ShardId("00000")
A, B, C = WorkerId("a"), WorkerId("b"), WorkerId("c")


def shard(count: int = 4) -> Shard:
    return Shard.untouched(ID, Bitmap.full(count))


def held(count: int = 4, reserved: Bitmap = EMPTY) -> Shard:
    return shard(count).apply(A, Claim(reserved))


def done(*positions: int) -> Outcomes:
    return Outcomes(done=Bitmap.of(positions), ran=len(positions))


def commit(outcomes: Outcomes = Outcomes(), reserved: Bitmap = EMPTY) -> Commit:  # noqa: B008
    return Commit(outcomes=outcomes, reserved=reserved)


def entry(before: Shard, writer: WorkerId, action: Action) -> Entry:
    after = before.apply(writer, action)
    return Entry(number=before.next, writer=writer, nonce="n", wrote=0.0, action=action, index=after.index)


EXAMPLES: list[Action] = [
    Claim(EMPTY),
    commit(done(0)),
    Release(outcomes=Outcomes(), reason="stopped"),
    Takeover(lost=A, cause="test", reserved=EMPTY),
    Split(child=child_shard(ID, 1), tasks=Bitmap.of([3])),
    Backup(outcomes=done(0)),
    Discard((0,)),
]


def stored(count: int = 1) -> Shard:
    """Return a shard all of whose results lie in one segment."""
    outcomes = Outcomes(done=Bitmap.full(count), stored={p: Location(0, 10 * p, 10 * p + 9) for p in range(count)})
    return held(count).apply(A, Commit(outcomes, EMPTY, ("00001-a",)))


def test_what_may_be_discarded() -> None:
    after = stored(2).apply(B, Discard((0,)))
    assert after.index.objects == ("",) and after.index.outcomes.stored == {} and after.phase is Phase.COMPLETE
    assert after.index.discarded == Bitmap.full(2) == after.index.outcomes.done and after.index.freed == 18
    for state, places in ((after, (0,)), (stored(), (1,)), (stored(), (-1,)), (stored(), ()), (stored(), (0, 0))):
        with pytest.raises(IllegalTransition, match="discards"):
            state.apply(B, Discard(places))
    inline = held(1).apply(A, Commit(Outcomes(done=Bitmap.of([0])), EMPTY, ("@1",)))
    with pytest.raises(IllegalTransition, match="no segment"):
        inline.apply(B, Discard((0,)))
    failed = held(1).apply(A, Commit(Outcomes(failed=Bitmap.of([0]), stored={0: Location(0, 0, 9)}), EMPTY, ("a",)))
    with pytest.raises(IllegalTransition, match="an error"):
        failed.apply(B, Discard((0,)))


def test_a_holder_discards_with_its_commit_what_was_named_before() -> None:
    outcomes = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, 9)})
    first = held(3).apply(A, Commit(outcomes, EMPTY, ("00001-a",)))
    more = Outcomes(done=Bitmap.of([1]), stored={1: Location(1, 0, 9)})
    after = first.apply(A, Commit(more, EMPTY, ("00002-b",), (0,)))
    assert after.index.objects == ("", "00002-b") and after.index.outcomes.stored == {1: Location(1, 0, 9)}
    assert after.index.discarded == Bitmap.of([0])
    with pytest.raises(IllegalTransition, match="no entry before it has named"):
        first.apply(A, Commit(more, EMPTY, ("00002-b",), (1,)))


def test_a_backup_brings_results_only() -> None:
    with pytest.raises(IllegalTransition, match="backup of a failure"):
        held().apply(B, Backup(outcomes=Outcomes(failed=Bitmap.of([0]))))


@pytest.mark.parametrize("action", EXAMPLES, ids=lambda action: type(action).__name__)
@pytest.mark.parametrize("phase", Phase)
def test_what_the_table_does_not_list_is_refused(phase: Phase, action: Action) -> None:
    state = {Phase.FREE: shard(), Phase.HELD: held(), Phase.COMPLETE: stored()}[phase]
    assert state.phase is phase
    writer = A if isinstance(action, Commit | Release) else B
    if type(action) in TRANSITIONS[phase]:
        assert state.apply(writer, action).next == state.next + 1
    else:
        with pytest.raises(IllegalTransition, match=phase.value):
            state.apply(writer, action)


def test_only_the_next_entry_folds() -> None:
    """Rule 1."""
    first = entry(shard(), A, Claim(EMPTY))
    third = msgspec.structs.replace(entry(held(), A, commit(done(0))), number=2)
    with pytest.raises(IllegalTransition, match="entry 2 follows entry 0"):
        fold(ID, Bitmap.full(4), [first, third])


def test_only_the_holder_commits_and_releases() -> None:
    """Rule 1: a fenced holder cannot write what the fold refuses."""
    taken = held().apply(B, Takeover(lost=A, cause="test", reserved=EMPTY))
    for action in (commit(done(0)), Release(outcomes=done(0), reason="stopped")):
        with pytest.raises(IllegalTransition, match="held by b"):
            taken.apply(A, action)


def test_what_is_cancelled_is_among_what_failed() -> None:
    some = Bitmap.of([1, 2])
    new = Outcomes(failed=some, upstream={1: Bitmap.of([2])}, cancelled=some)
    state = held().apply(A, commit(new)).apply(A, commit(done(0)))  # nobody had reserved it
    assert state.index.outcomes.cancelled == some and state.index.pending == Bitmap.of([3])
    with pytest.raises(IllegalTransition, match="cancelled and not among those that failed"):
        held().apply(A, commit(Outcomes(done=some, cancelled=some)))


def test_a_second_outcome_is_refused() -> None:
    """Rule 3."""
    state = held().apply(A, commit(done(0)))
    for again in (done(0), Outcomes(failed=Bitmap.of([0])), done(9)):
        with pytest.raises(IllegalTransition, match="outcome for a task that has one"):
            state.apply(A, commit(again))
    with pytest.raises(IllegalTransition, match="both done and failed"):
        state.apply(A, commit(Outcomes(done=Bitmap.of([1]), failed=Bitmap.of([1]))))


def test_a_result_lies_in_a_named_object() -> None:
    """Rule 2, as far as an entry shows it."""
    outcomes = Outcomes(done=Bitmap.of([0]), stored={0: Location(0, 0, 9)})
    with pytest.raises(IllegalTransition, match="unnamed object"):
        held().apply(A, commit(outcomes))
    named = held().apply(A, Commit(outcomes=outcomes, reserved=EMPTY, segments=("@1",)))
    assert named.index.objects == ("@1",)


def test_a_split_takes_only_what_nobody_reserved() -> None:
    state = held(reserved=Bitmap.of([0, 1])).apply(A, commit(done(2), reserved=Bitmap.of([0, 1])))
    assert state.splittable == Bitmap.of([3])
    child = child_shard(ID, state.next)
    for tasks in ([0], [2], [3, 9], []):
        with pytest.raises(IllegalTransition, match="split of"):
            state.apply(B, Split(child=child, tasks=Bitmap.of(tasks)))
    with pytest.raises(IllegalTransition, match="names its child"):
        state.apply(B, Split(child=ShardId("00000-9"), tasks=Bitmap.of([3])))
    after = state.apply(B, Split(child=child, tasks=Bitmap.of([3])))
    assert after.index.children == {child: Bitmap.of([3])}
    assert after.index.pending == Bitmap.of([0, 1])


def test_a_takeover_names_who_is_lost() -> None:
    with pytest.raises(IllegalTransition, match="takeover from c"):
        held().apply(B, Takeover(lost=C, cause="test", reserved=EMPTY))
    with pytest.raises(IllegalTransition, match="from itself"):
        held().apply(A, Takeover(lost=A, cause="test", reserved=EMPTY))


def test_a_release_without_pending_tasks_completes() -> None:
    assert held(1).apply(A, Release(outcomes=done(0), reason="stopped")).phase is Phase.COMPLETE


def test_a_wrong_index_is_found_and_told_with_its_story() -> None:
    first = entry(shard(), A, Claim(EMPTY))
    second = entry(held(), A, commit(done(0)))
    forged = msgspec.structs.replace(second, index=first.index)
    with pytest.raises(IllegalTransition) as caught:
        fold(ID, Bitmap.full(4), [first, forged])
    assert "a claimed" in str(caught.value)
    assert "1 done" in str(caught.value)


class AnyLegalHistory(RuleBasedStateMachine):
    """Workers append whatever the table allows; the invariants hold after each entry."""

    workers = st.sampled_from([A, B, C])

    @initialize(count=st.integers(1, 12))
    def begin(self, count: int) -> None:
        self.count = count
        self.state = shard(count)
        self.entries: list[Entry] = []
        self.outcomes: dict[int, str] = {}

    def append(self, writer: WorkerId, action: Action) -> None:
        made = entry(self.state, writer, action)
        self.entries.append(made)
        self.state = self.state.apply(writer, action)

    def note(self, outcomes: Outcomes) -> None:
        for position in outcomes.all:
            assert position not in self.outcomes
            self.outcomes[position] = "done" if position in outcomes.done else "failed"

    def draw_outcomes(self, data: st.DataObject) -> Outcomes:
        some = data.draw(st.sets(st.sampled_from(sorted(self.state.index.pending)), max_size=4))
        failed = data.draw(st.sets(st.sampled_from(sorted(some)))) if some else set()
        return Outcomes(done=Bitmap.of(some - failed), failed=Bitmap.of(failed), ran=len(some))

    @precondition(lambda self: self.state.phase is Phase.FREE)
    @rule(worker=workers, count=st.integers(0, 12))
    def claim(self, worker: WorkerId, count: int) -> None:
        self.append(worker, Claim(self.state.index.pending.first(count)))

    @precondition(lambda self: self.state.phase is Phase.HELD)
    @rule(data=st.data(), count=st.integers(0, 5))
    def commit(self, data: st.DataObject, count: int) -> None:
        outcomes = self.draw_outcomes(data)
        self.note(outcomes)
        reserved = (self.state.index.pending - outcomes.all).first(count)
        self.append(self.state.index.holder, Commit(outcomes=outcomes, reserved=reserved))

    @precondition(lambda self: self.state.phase is Phase.HELD)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        outcomes = self.draw_outcomes(data)
        self.note(outcomes)
        self.append(self.state.index.holder, Release(outcomes=outcomes, reason="stopped"))

    @precondition(lambda self: self.state.phase is Phase.HELD)
    @rule(data=st.data())
    def takeover(self, data: st.DataObject) -> None:
        lost = self.state.index.holder
        worker = data.draw(st.sampled_from(sorted({A, B, C} - {lost})))
        self.append(worker, Takeover(lost=lost, cause="test", reserved=EMPTY))

    @precondition(lambda self: bool(self.state.splittable))
    @rule(worker=workers, count=st.integers(1, 3))
    def split(self, worker: WorkerId, count: int) -> None:
        child = child_shard(ID, self.state.next)
        self.append(worker, Split(child=child, tasks=self.state.splittable.first(count)))

    @precondition(lambda self: self.state.phase is Phase.HELD)
    @rule(data=st.data())
    def backup(self, data: st.DataObject) -> None:
        outcomes = self.draw_outcomes(data)
        outcomes = Outcomes(done=outcomes.all, stored={p: outcomes.stored[p] for p in outcomes.stored})
        self.note(outcomes)
        worker = data.draw(st.sampled_from(sorted({A, B, C} - {self.state.index.holder})))
        self.append(worker, Backup(outcomes=outcomes))

    @precondition(lambda self: self.state.phase is Phase.COMPLETE)
    @rule(worker=workers, action=st.sampled_from(EXAMPLES))
    def nothing_follows_completion(self, worker: WorkerId, action: Action) -> None:
        with pytest.raises(IllegalTransition):
            self.state.apply(worker, action)

    @invariant()
    def each_task_is_in_one_place(self) -> None:
        if not hasattr(self, "state"):
            return
        index = self.state.index
        places = [index.tasks, *index.children.values()]
        assert sum(map(len, places)) == self.count
        assert index.reserved <= index.pending
        assert {p: "done" for p in index.outcomes.done} | {p: "failed" for p in index.outcomes.failed} == self.outcomes

    @invariant()
    def the_fold_of_all_is_what_the_newest_says(self) -> None:
        if hasattr(self, "state"):
            assert fold(ID, Bitmap.full(self.count), self.entries) == self.state
            if self.entries:
                assert Shard.at(ID, self.entries[-1]) == self.state


test_any_legal_history_gives_each_task_one_outcome = AnyLegalHistory.TestCase
test_any_legal_history_gives_each_task_one_outcome.settings = settings(max_examples=60, stateful_step_count=25)


@given(st.integers(1, 30), st.integers(0, 30))
def test_an_orderly_handover_counts_no_strike(count: int, reserved: int) -> None:
    """Rule 10: only a death does."""
    state = held(count, Bitmap.full(count).first(reserved)).apply(A, Release(outcomes=Outcomes(), reason="stopped"))
    assert state.apply(B, Claim(EMPTY)).index.strikes == {}


def test_tries_are_counted_until_the_task_has_an_outcome() -> None:
    after = held().apply(A, commit(Outcomes(tries={1: 1, 2: 1}), Bitmap.of([1, 2])))
    after = after.apply(A, Release(outcomes=Outcomes(tries={1: 2}, done=Bitmap.of([2])), reason="stopped"))
    assert after.index.outcomes.tries == {1: 2}
    again = after.apply(B, Claim(EMPTY))
    assert again.index.outcomes.tries == {1: 2}
    assert sorted(again.splittable) == [0, 3]  # a child would begin to count anew
    assert again.apply(B, commit(done(1))).index.outcomes.tries == {}


def test_tries_of_a_task_with_an_outcome_are_refused() -> None:
    with pytest.raises(IllegalTransition, match="another try of a task that is not pending"):
        held().apply(A, commit(Outcomes(done=Bitmap.of([1]), tries={1: 1})))
    with pytest.raises(IllegalTransition, match="another try"):
        held().apply(A, commit(done(1))).apply(A, commit(Outcomes(tries={1: 1})))


def test_output_is_named_with_the_tasks_it_is_of() -> None:
    first = held().apply(A, commit(Outcomes(done=Bitmap.of([0]), logs={"x": Bitmap.of([0, 1])})))
    second = first.apply(A, commit(Outcomes(done=Bitmap.of([1]), logs={"y": Bitmap.of([1])})))
    assert second.index.outcomes.logs == {"x": Bitmap.of([0, 1]), "y": Bitmap.of([1])}
    with pytest.raises(IllegalTransition, match="output of a task that is not here"):
        held().apply(A, commit(Outcomes(logs={"x": Bitmap.of([9])})))
