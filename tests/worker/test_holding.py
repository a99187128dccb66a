"""What a worker knows of a held shard: pure bookkeeping, tested without threads or store."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burst_dask.clock import SystemClock
from burst_dask.journal.outcomes import Source, TaskOutcome
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import (
    Backup,
    Claim,
    Commit,
    Location,
    Outcomes,
    Printed,
    Release,
    Split,
    Takeover,
    TaskOutput,
)
from burst_dask.protocol.shard import Shard
from burst_dask.worker.durations import Durations
from burst_dask.worker.holding import Holding
from burst_dask.worker.memory import Memory
from burst_dask.worker.ran import Ran
from burst_dask.worker.table import TaskTable

ME, OTHER, ID = WorkerId("me"), WorkerId("other"), ShardId("00000")


def make_table(
    dependencies: list[list[int]], first: int = 0, wanted: list[int] | None = None, **more: Any
) -> TaskTable:
    """A table of tasks; a dependency below `first` is in another shard."""
    dependents: list[list[int]] = [[] for _ in dependencies]
    for position, numbers in enumerate(dependencies):
        for number in numbers:
            if number >= first:
                dependents[number - first].append(position)
    return TaskTable(
        first=first,
        keys=[f"k-{position}" for position in range(len(dependencies))],
        nodes=[None] * len(dependencies),
        dependencies=tuple(map(tuple, dependencies)),
        dependents=dependents,
        foreign_keys={},
        outputs=Bitmap.of(wanted or []),
        kinds=["k"] * len(dependencies),
        **more,
    )


class World:
    """A holding and what its tests say of the rest of the run."""

    def __init__(self, table: TaskTable, shard: Shard | None = None) -> None:
        self.known: dict[int, TaskOutcome] = {}
        self.sources: dict[int, Source] = {}
        self.asked = 0
        self.table = table
        self.durations = Durations(SystemClock())
        self.durations.begin("k")
        self.durations.end("k", 0.001)
        self.resources: dict[str, float] = {}
        everything = Bitmap.full(table.count)
        self.shard = shard or Shard.untouched(ID, everything).apply(ME, Claim(everything))

    def hold(self) -> Holding:
        self.holding = Holding(self.shard, self.table, Memory().scope(), self, self.durations, self.resources)
        return self.holding

    def outcome(self, number: int) -> TaskOutcome | None:
        self.asked += 1
        if number >= self.table.first:
            index, position = self.holding_shard.index, number - self.table.first
            if position in index.outcomes.done:
                return TaskOutcome(True, None, self.holding_shard, index.outcomes.stored.get(position))
            return None
        return self.known.get(number)

    def source(self, number: int) -> Source:
        """Of a run in which 10 tasks are a shard."""
        return self.sources.setdefault(number // 10, Source())

    def tell(self, number: int, outcome: TaskOutcome) -> None:
        self.known[number] = outcome
        self.source(number).changes += 1

    @property
    def holding_shard(self) -> Shard:
        return self.shard


def run_all(holding: Holding, *, fails: frozenset[int] = frozenset()) -> list[int]:
    """Play the executor until nothing can start; return the order in which tasks ran."""
    order = []
    while True:
        positions, numbers = holding.to_load(1 << 30, lambda number: 1)
        if positions:
            holding.loaded(positions, {number: (number, 8) for number in numbers})
        batch = holding.take(0.05)
        if not batch:
            return order
        for at, position in enumerate(batch):
            order.append(position)
            failed = position in fails
            if holding.finish(Ran(position, 0.001, value=position, failed=failed)):
                holding.rested(position)
            if failed:
                for rest in batch[at + 1 :]:
                    holding.give_back(rest)
                break


def test_a_task_runs_after_its_dependencies() -> None:
    """Rule 4."""
    world = World(make_table([[], [0], [0], [1, 2], []]))
    holding = world.hold()
    order = run_all(holding)
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order.index(3) > max(order.index(1), order.index(2)) > order.index(0)
    assert set(holding.finished.ran) == {0, 1, 2, 3, 4}
    assert len(holding.values) == 0, "inputs are let go when nothing needs them"


def test_a_chain_of_tiny_tasks_is_one_batch() -> None:
    world = World(make_table([[], [0], [1], [2]]))
    assert world.hold().take(0.05) == [0, 1, 2, 3]


def test_a_task_of_an_unknown_kind_comes_alone() -> None:
    world = World(make_table([[], [], []]))
    world.durations = Durations(SystemClock())
    assert world.hold().take(0.05) == [0]


def test_dependents_of_a_failure_fail_and_name_its_cause() -> None:
    """Rule 4: they are never left pending, and never run."""
    world = World(make_table([[], [0], [1], [], [2, 3]], first=100))
    world.table = make_table([[], [100], [101], [], [102, 103]], first=100)
    holding = world.hold()
    order = run_all(holding, fails=frozenset([1]))
    assert sorted(order) == [0, 1, 3]
    assert {cause: set(tasks) for cause, tasks in holding.finished.upstream.items()} == {101: {2, 4}}
    assert holding.todo == set()


def test_a_failure_in_another_shard_comes_through() -> None:
    world = World(make_table([[7], [100], []], first=100))
    holding = world.hold()
    assert list(holding.awaited()) == [7]
    assert run_all(holding) == [2]
    world.tell(7, TaskOutcome(False, 3, world.shard, None))
    assert holding.news()
    assert {cause: set(tasks) for cause, tasks in holding.finished.upstream.items()} == {3: {0, 1}}


def test_an_outcome_elsewhere_is_awaited_then_read() -> None:
    world = World(make_table([[7], [7, 8]], first=100))
    holding = world.hold()
    assert holding.take(1.0) == []
    world.tell(7, TaskOutcome(True, None, world.shard, Location(0, 0, 1)))
    assert holding.news()
    assert holding.to_load(1, lambda number: 1) == ([0], {7})
    holding.loaded([0], {7: ("seven", 8)})
    assert holding.take(1.0) == [0]
    assert list(holding.awaited()) == [8]


def test_retries_are_used_up_before_a_task_fails() -> None:
    world = World(make_table([[]], retries={0: 2}))
    holding = world.hold()
    assert run_all(holding, fails=frozenset([0])) == [0, 0, 0]
    assert holding.finished.ran[0].failed


def test_a_task_that_failed_rests_before_it_is_tried_again() -> None:
    world = World(make_table([[], []], retries={0: 1}))
    holding = world.hold()
    assert holding.take(1.0) == [0, 1]
    assert holding.finish(Ran(0, failed=True))
    assert not holding.finish(Ran(1, value=1))
    assert holding.finished.tries == {0: 1}
    assert holding.take(1.0) == [] and not holding.active
    assert not holding.blocked and holding.ahead() == 0  # so that other work is reserved meanwhile
    assert sorted(holding.reserve(1, 5.0)) == [0]
    holding.rested(0)
    assert holding.take(1.0) == [0]
    assert not holding.finish(Ran(0, failed=True))
    assert holding.finished.ran[0].failed and holding.finished.tries == {}


def test_a_task_that_rests_keeps_its_reservation_and_takes_no_time() -> None:
    world = World(make_table([[] for _ in range(9)], retries={0: 5}))
    world.durations.end("k", 10.0)
    holding = world.hold()
    (first,) = holding.take(0.05)
    assert holding.finish(Ran(first, failed=True))
    assert len(holding.reserve(2, 5.0)) == 3


def test_no_suspect_is_reserved_while_a_task_rests() -> None:
    free = Shard.untouched(ID, Bitmap.full(2))
    struck = free.apply(OTHER, Claim(Bitmap.of([1]))).apply(ME, Takeover(OTHER, "died", Bitmap.of([0])))
    world = World(make_table([[], []], retries={0: 1}), struck)
    holding = world.hold()
    assert holding.take(1.0) == [0]
    assert holding.finish(Ran(0, failed=True))
    assert sorted(holding.reserve(1, 5.0)) == [0]


def test_tries_of_former_holders_count() -> None:
    everything = Bitmap.full(1)
    shard = Shard.untouched(ID, everything).apply(OTHER, Claim(everything))
    shard = shard.apply(OTHER, Release(Outcomes(tries={0: 2}), "stopped")).apply(ME, Claim(everything))
    holding = World(make_table([[]], retries={0: 2}), shard).hold()
    assert holding.take(1.0) == [0] and holding.attempts[0] == 3
    assert not holding.finish(Ran(0, failed=True))


def test_only_exceptions_named_by_retry_on_are_tried_again() -> None:
    table = make_table([[], []], retries={0: 5, 1: 5}, retry_on={0: ("OSError",), 1: ("OSError",)})
    holding = World(table).hold()
    assert holding.take(1.0) == [0, 1]
    assert holding.finish(Ran(0, failed=True, raised=("builtins.ConnectionError", "builtins.OSError")))
    assert not holding.finish(Ran(1, failed=True, raised=("builtins.ValueError", "builtins.Exception")))
    assert set(holding.finished.ran) == {1}


def test_a_backup_copy_ends_the_rest() -> None:
    world = World(make_table([[]], retries={0: 5}))
    holding = world.hold()
    holding.take(1.0)
    holding.finish(Ran(0, failed=True))
    holding.refold(holding.shard.apply(OTHER, Backup(Outcomes(done=Bitmap.of([0]), ran=1))))
    holding.rested(0)
    assert holding.take(1.0) == [] and not holding.todo


def test_a_task_with_a_time_limit_comes_alone() -> None:
    holding = World(make_table([[], [0], []], timeouts={1: 9.0})).hold()
    batches = []
    while batch := holding.take(1.0):
        batches.append(batch)
        for position in batch:
            holding.finish(Ran(position, value=1))
    assert batches == [[0, 2], [1]]


def test_what_every_try_has_printed_is_kept() -> None:
    holding = World(make_table([[]], retries={0: 1})).hold()
    for attempt in (1, 2):
        assert holding.take(1.0) == [0]
        output = TaskOutput(0, b"", attempt, 0, (Printed(0.0, "stdout", "x" * 100),))
        holding.finish(Ran(0, failed=attempt == 1, output=output))
        holding.rested(0)
    assert [output.attempt for output in holding.finished.outputs] == [1, 2]
    assert holding.finished_size == 200


def test_higher_priority_starts_first() -> None:
    world = World(make_table([[], [], []], priority={2: 10}))
    assert world.hold().take(0.05)[0] == 2


def test_only_reserved_tasks_start() -> None:
    """PROTOCOL.md, "Reservation"."""
    free = Shard.untouched(ID, Bitmap.full(4))
    world = World(make_table([[], [], [0], []]), free.apply(ME, Claim(Bitmap.of([0, 2]))))
    holding = world.hold()
    assert sorted(run_all(holding)) == [0, 2]
    outcomes = Outcomes(done=Bitmap.of([0, 2]), ran=2)
    holding.committed(holding.shard.apply(ME, Commit(outcomes=outcomes, reserved=Bitmap.of([3]))))
    assert run_all(holding) == [3]


def test_lost_results_are_recomputed_and_not_committed_again() -> None:
    """Rule 9."""
    full = Bitmap.full(4)
    held = Shard.untouched(ID, full).apply(OTHER, Claim(full))
    outcomes = Outcomes(done=Bitmap.of([0, 1, 2]), stored={1: Location(0, 0, 9)}, ran=3)
    died = held.apply(OTHER, Commit(outcomes=outcomes, reserved=Bitmap.of([3]), segments=("@1",)))
    taken = died.apply(ME, Takeover(lost=OTHER, cause="test", reserved=Bitmap.of([3])))
    # 3 needs 1, which is stored, and 2, which is lost; 2 needs 0, which is lost too.
    world = World(make_table([[], [], [0], [1, 2]]), taken)
    holding = world.hold()
    assert holding.revived == {0, 2}
    assert run_all(holding) == [0, 2, 3]
    assert set(holding.finished.ran) == {3}


def test_a_task_that_fails_when_recomputed_keeps_its_outcome_and_its_dependents_fail() -> None:
    full = Bitmap.full(2)
    held = Shard.untouched(ID, full).apply(OTHER, Claim(full))
    died = held.apply(OTHER, Commit(outcomes=Outcomes(done=Bitmap.of([0]), ran=1), reserved=Bitmap.of([1])))
    world = World(make_table([[], [0]]), died.apply(ME, Takeover(lost=OTHER, cause="test", reserved=EMPTY)))
    holding = world.hold()
    assert run_all(holding, fails=frozenset([0])) == [0]
    assert set(holding.finished.ran) == {1}
    assert holding.finished.ran[1].failed


def test_what_is_split_off_is_awaited_where_it_is_needed() -> None:
    free = Shard.untouched(ID, Bitmap.full(4))
    world = World(make_table([[], [], [1], [0, 2]]), free.apply(ME, Claim(Bitmap.of([0]))))
    holding = world.hold()
    assert run_all(holding) == [0]
    after = world.shard.apply(OTHER, Split(child=ShardId("00000-1"), tasks=Bitmap.of([1, 2])))
    holding.refold(after)
    assert holding.todo == {3}
    assert list(holding.awaited()) == [2]


def test_results_that_cross_a_split_are_wanted() -> None:
    """Rule 9: by the holder, when it made the split, and by whoever holds the child."""
    tasks = Bitmap.of([1, 2])
    child = Shard.untouched(ShardId("00000-1"), tasks).apply(ME, Claim(tasks))
    world = World(make_table([[], [], [1], [0, 2]]), child)
    assert world.hold().wanted == Bitmap.of([2])


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[int]], set[int], set[int]]:
    count = draw(st.integers(1, 25))
    dependencies = [
        sorted(draw(st.sets(st.integers(0, position - 1), max_size=4))) if position else [] for position in range(count)
    ]
    fails = draw(st.sets(st.integers(0, count - 1), max_size=4))
    reserved = draw(st.sets(st.integers(0, count - 1)))
    return dependencies, fails, reserved


@settings(max_examples=200)
@given(graphs())
def test_every_task_gets_one_outcome_whatever_fails(graph: tuple[list[list[int]], set[int], set[int]]) -> None:
    dependencies, fails, reserved = graph
    count = len(dependencies)
    shard = Shard.untouched(ID, Bitmap.full(count)).apply(ME, Claim(Bitmap.of(reserved)))
    world = World(make_table(dependencies), shard)
    holding = world.hold()
    ran: list[int] = []
    while holding.shard.index.pending:
        before = len(ran)
        ran += run_all(holding, fails=frozenset(fails))
        finished = holding.collect()
        failed = {p for p, one in finished.ran.items() if one.failed} | set().union(*finished.upstream.values(), set())
        done = set(finished.ran) - failed
        outcomes = Outcomes(done=Bitmap.of(done), failed=Bitmap.of(failed), ran=len(done))
        reserved_next = holding.reserve(1, 5.0)
        holding.committed(holding.shard.apply(ME, Commit(outcomes=outcomes, reserved=reserved_next)))
        assert len(ran) > before or finished or reserved_next, "it never stands still"
    assert len(ran) == len(set(ran)), "no task runs twice"
    expected_failed: set[int] = set()
    for position in range(count):
        upstream = expected_failed & set(dependencies[position])
        if upstream:
            expected_failed.add(position)
            assert position not in ran
        else:
            assert position in ran
            assert set(dependencies[position]) <= set(ran[: ran.index(position)])
            if position in fails:
                expected_failed.add(position)
    assert set(holding.shard.index.outcomes.failed) == expected_failed


def test_inputs_that_cannot_be_read_are_the_tasks_error() -> None:
    world = World(make_table([[7], [100]], first=100))
    world.tell(7, TaskOutcome(True, None, world.shard, Location(0, 0, 1)))
    holding = world.hold()
    positions, _ = holding.to_load(1, lambda number: 1)
    holding.give_up(Ran(positions[0], failed=True))
    assert holding.finished.ran[0].failed
    assert holding.finished.upstream == {100: {1}}


def test_only_shards_with_news_are_looked_at() -> None:
    """A task that joins thousands would otherwise ask for all of them at each commit of any."""
    world = World(make_table([[*range(40)]], first=100))
    holding = world.hold()
    holding.news()
    asked = world.asked
    assert not holding.news()
    assert world.asked == asked
    world.tell(13, TaskOutcome(True, None, world.shard, Location(0, 0, 5)))
    assert holding.news()
    assert world.asked == asked + 10
    assert not holding.news()
    for number in range(40):
        world.tell(number, TaskOutcome(True, None, world.shard, Location(0, 0, 5)))
    assert holding.news()
    assert holding.to_load(1000, lambda number: 5) == ([0], set(range(40)))


def test_one_outcome_is_awaited_for_each_waiting_task() -> None:
    holding = World(make_table([[3, 5], [5, 8], [3, 8], [9]], first=100)).hold()
    assert list(holding.awaited()) == [3, 5, 9]


@pytest.mark.parametrize("limit", [1, 10, 1000])
def test_inputs_are_read_in_bounded_portions(limit: int) -> None:
    world = World(make_table([[n] for n in range(20)], first=100))
    for number in range(20):
        world.tell(number, TaskOutcome(True, None, world.shard, Location(0, 0, 5)))
    positions, numbers = world.hold().to_load(limit, lambda number: 5)
    assert len(positions) == len(numbers) == min(20, max(1, -(-limit // 5)))


def test_a_task_waits_for_its_resource() -> None:
    world = World(make_table([[], [], []], resources={0: {"GPU": 1.0}, 1: {"GPU": 1.0}}))
    world.resources = {"GPU": 1.0}
    holding = world.hold()
    assert holding.take(0.05, {"GPU": 1.0}) == [0]
    assert holding.take(0.05, {"GPU": 0.0}) == [2], "others go on"
    assert not holding.startable({"GPU": 0.0})
    assert holding.take(0.05, {"GPU": 1.0}) == [1]


def test_what_a_worker_lacks_is_left_to_others() -> None:
    world = World(make_table([[], [], [0]], resources={0: {"GPU": 1.0}}))
    holding = world.hold()
    assert not holding.unfit
    assert run_all(holding) == [1]
    assert holding.unfit
    assert holding.reserve(1, 5.0) == EMPTY


def test_what_is_not_reserved_yet_is_not_left_to_others() -> None:
    full = Bitmap.full(2)
    held = Shard.untouched(ID, full).apply(OTHER, Claim(full))
    taken = held.apply(ME, Takeover(lost=OTHER, cause="test", reserved=EMPTY))
    holding = World(make_table([[], []], resources={1: {"GPU": 1.0}}), taken).hold()
    assert list(holding.candidates()) == [0] and not holding.unfit


def test_nothing_is_reserved_that_can_only_run_after_a_suspect() -> None:
    """Or a shard would stand still: suspects run last, and their dependents after them."""
    full = Bitmap.full(4)
    held = Shard.untouched(ID, full).apply(OTHER, Claim(Bitmap.of([0])))
    world = World(make_table([[], [0], [1], []]), held.apply(ME, Takeover(lost=OTHER, cause="test", reserved=EMPTY)))
    holding = world.hold()
    assert holding.reserve(1, 5.0) == Bitmap.of([3])
    holding.committed(holding.shard.apply(ME, Commit(outcomes=Outcomes(), reserved=Bitmap.of([3]))))
    assert run_all(holding) == [3]
    assert holding.reserve(1, 5.0) == Bitmap.of([0]), "then the suspect, alone"


def test_a_backup_copy_that_was_first_settles_its_dependents() -> None:
    world = World(make_table([[], [0]]))
    holding = world.hold()
    holding.take(1.0)
    world.shard = holding.shard.apply(OTHER, Backup(outcomes=stored(0), segments=("s",)))
    holding.refold(world.shard)
    assert holding.todo == {1} and not holding.unmet[1]
    holding.finish(Ran(0, value="late", size=1))
    assert not holding.finished.ran and holding.todo == {1}


def test_what_failed_here_and_upstream_is_revoked_when_a_backup_copy_succeeded() -> None:
    world = World(make_table([[], [0], [1]]))
    holding = world.hold()
    holding.take(0.001)
    holding.finish(Ran(0, body=[b"error"], failed=True))
    assert holding.finished.upstream == {0: {1, 2}}
    world.shard = holding.shard.apply(OTHER, Backup(outcomes=stored(0), segments=("s",)))
    holding.refold(world.shard)
    assert not holding.finished and holding.todo == {1, 2}
    assert holding.to_load(100, lambda number: 1) == ([1], {0})


def test_what_is_revoked_awaits_each_outcome_elsewhere_once() -> None:
    world = World(make_table([[], [1, 2, 10]], first=10))
    holding = world.hold()
    holding.take(0.001)
    holding.finish(Ran(0, body=[b"error"], failed=True))
    assert not holding.todo
    world.shard = holding.shard.apply(OTHER, Backup(outcomes=stored(0), segments=("s",)))
    holding.refold(world.shard)
    world.tell(1, TaskOutcome(True, None, world.shard, Location(0, 0, 5)))
    assert holding.news()
    assert list(holding.awaited()) == [2] and not holding.loadable
    world.tell(2, TaskOutcome(True, None, world.shard, Location(0, 0, 5)))
    assert holding.news()
    assert holding.to_load(100, lambda number: 1)[0] == [1]


def test_nothing_is_awaited_for_a_task_that_has_its_outcome() -> None:
    world = World(make_table([[1], []], first=10, resources={1: {"GPU": 1.0}}))
    holding = world.hold()
    assert list(holding.awaited()) == [1] and not holding.unfit
    holding.give_up(Ran(0, body=[b"cancelled"], failed=True, cancelled=True))
    assert not list(holding.awaited())
    assert holding.unfit, "what is left is for others, whatever becomes of what the cancelled one needed"


def test_what_the_entry_on_its_way_gives_back_does_not_start() -> None:
    world = World(make_table([[], [], []]))
    holding = world.hold()
    holding.sending(holding.shard.apply(ME, Commit(outcomes=Outcomes(), reserved=Bitmap.of([0]))))
    assert holding.take(1.0) == [0]
    after = holding.shard.apply(ME, Commit(outcomes=Outcomes(), reserved=Bitmap.of([0])))
    holding.committed(after)
    assert holding.take(1.0) == []
    holding.committed(after.apply(ME, Commit(outcomes=Outcomes(), reserved=Bitmap.of([0, 1, 2]))))
    assert holding.take(1.0) == [1, 2]


def stored(position: int) -> Outcomes:
    return Outcomes(done=Bitmap.of([position]), stored={position: Location(0, 0, 1)})
