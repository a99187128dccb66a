"""What a few tasks and one worker's knowledge tell of who needs a result, against the plain rule over all tasks."""

from __future__ import annotations

import pickle

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from burst_dask.journal.needs import FOR_EVER, Needs, Shape, Why, discardable
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Location, Outcomes, Place, Plan, ShardIndex, ShardInfo, ShardRecord
from burst_dask.protocol.shard import Shard
from burst_dask.store import open_store
from burst_dask.testing.needed import Fate, needed

P, F, U, S, M = Fate.PENDING, Fate.FAILED, Fate.UPSTREAM, Fate.STORED, Fate.UNSTORED


class World:
    """A run in which each task has met a given fate."""

    def __init__(self, inputs: list[list[int]], cuts: list[int], asked: set[int], fates: list[Fate]) -> None:
        self.inputs, self.asked, self.fates = inputs, asked, fates
        self.bounds = [0, *cuts, len(inputs)]
        self.home = {t: n for n in range(len(self.bounds) - 1) for t in range(self.bounds[n], self.bounds[n + 1])}
        self.shapes = {number: Shape.of(self._record(number)) for number in range(len(self.bounds) - 1)}
        infos = []
        for number, first in enumerate(self.bounds[:-1]):
            tasks = range(first, self.bounds[number + 1])
            upstream = tuple(sorted({self.home[need] for t in tasks for need in inputs[t]} - {number}))
            infos.append(ShardInfo(first, len(tasks), Place(0, 0, 0), upstream, 0, len(asked & set(tasks))))
        run = RunId("session.run")
        plan = Plan(run=run, tasks=len(inputs), shards=tuple(infos), outputs=pickle.dumps([]), created=0.0, size=0)
        self.view = RunView(open_store("memory://needs"), plan)
        for number in self.shapes:
            self.view.learn(self._shard(number))

    def _record(self, number: int) -> ShardRecord:
        first, end = self.bounds[number], self.bounds[number + 1]
        elsewhere: dict[int, set[int]] = {}
        for task, needs in enumerate(self.inputs):
            for need in needs:
                if self.home[need] == number != self.home[task]:
                    elsewhere.setdefault(need - first, set()).add(self.home[task])
        return ShardRecord(
            shard=number,
            first=first,
            keys=b"",
            dependencies=tuple(tuple(needs) for needs in self.inputs[first:end]),
            foreign_keys=b"",
            dependents={position: tuple(sorted(some)) for position, some in elsewhere.items()},
            outputs=Bitmap.of(task - first for task in self.asked if first <= task < end),
            annotations={},
            payload=b"",
            buffers=(),
        )

    def _shard(self, number: int) -> Shard:
        first, end = self.bounds[number], self.bounds[number + 1]
        of = {fate: [task - first for task in range(first, end) if self.fates[task] is fate] for fate in Fate}
        outcomes = Outcomes(
            done=Bitmap.of(of[S] + of[M]),
            failed=Bitmap.of(of[F] + of[U]),
            stored={position: Location(0, 0, 1) for position in of[S] + of[F]},
            upstream={10**6: Bitmap.of(of[U])} if of[U] else {},
        )
        index = ShardIndex(tasks=Bitmap.full(end - first), outcomes=outcomes, objects=("00000-a",))
        return Shard(keys.root_shard(number), index, 1)

    def why(self, task: int, known: set[int] | None = None) -> Why | None:
        shapes = {number: shape for number, shape in self.shapes.items() if known is None or number in known}
        return Needs(self.view, shapes).why([task])


def chain(*fates: Fate, cuts: list[int] | None = None, asked: set[int] | None = None) -> World:
    """Return a world of tasks each of which needs the one before it."""
    return World([[n - 1] if n else [] for n in range(len(fates))], cuts or [], asked or set(), list(fates))


def test_a_result_is_needed_until_its_last_consumer_has_committed() -> None:
    assert World([[], [0], [0]], [1, 2], set(), [S, S, P]).why(0) == Why(pending=keys.root_shard(2))
    assert World([[], [0], [0]], [1, 2], set(), [S, S, S]).why(0) is None


def test_what_was_asked_for_stays() -> None:
    assert chain(S, S, asked={0}).why(0) == FOR_EVER


def test_inputs_of_a_task_that_failed_stay_and_those_of_what_failed_upstream_do_not() -> None:
    assert chain(S, F, cuts=[1]).why(0) == FOR_EVER
    assert chain(S, U, cuts=[1]).why(0) is None


def test_what_is_only_in_memory_is_computed_again_from_its_inputs() -> None:
    """Rule 9: the next holder would need them."""
    assert chain(S, M, M, P).why(0) == Why(pending=keys.root_shard(0))
    assert chain(S, M, M, S, P).why(0) is None
    assert chain(S, M, F).why(0) == FOR_EVER


def test_without_a_shape_nothing_is_said_unless_everything_has_ended() -> None:
    assert chain(S, S, P, cuts=[1]).why(0, known=set()) == Why(unknown=0)
    assert chain(S, S, P, cuts=[1]).why(0, known={0}) == Why(unknown=1)
    assert chain(S, S, S, cuts=[1]).why(0, known=set()) is None
    assert chain(S, S, S, cuts=[1], asked={0}).why(0, known=set()) == Why(unknown=0)  # which of them was asked for?
    assert chain(S, P, cuts=[1]).why(0, known={0}) == Why(pending=keys.root_shard(1))  # any of its tasks is to run yet


def test_only_segments_that_may_have_intermediates_are_looked_at() -> None:
    world = chain(S, S)
    assert discardable(world.view, 0)
    for name in ("", "@0", f"00000-a{keys.LASTING}"):
        shard = world.view.shard(keys.root_shard(0))
        world.view.learn(Shard(shard.id, msgspec.structs.replace(shard.index, objects=(name,)), shard.next + 1))
        assert not discardable(world.view, 0)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    count = draw(st.integers(1, 12))
    inputs = [sorted(draw(st.sets(st.integers(0, task - 1), max_size=3))) if task else [] for task in range(count)]
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
    world = World(inputs, cuts, set(), [P] * count)
    fates: list[Fate] = []
    asked = draw(st.sets(st.integers(0, count - 1), max_size=2))
    for task in range(count):
        before = [fates[need] for need in inputs[task]]
        if any(fate is P for fate in before):
            fates.append(P)
        elif any(fate in (F, U) for fate in before):
            fates.append(U)
        else:
            # Only what the own shard alone needs may be in memory only.
            outside = any(task in inputs[user] and world.home[user] != world.home[task] for user in range(count))
            fates.append(draw(st.sampled_from([P, F, S] if outside or task in asked else [P, F, S, M])))
    return World(inputs, cuts, asked, fates)


@given(worlds(), st.sets(st.integers(0, 3)))
def test_it_agrees_with_the_plain_rule(world: World, known: set[int]) -> None:
    plainly = needed(world.inputs, world.asked, world.fates.__getitem__)
    for task, fate in enumerate(world.fates):
        if fate is S:
            assert (world.why(task) is None) == (task not in plainly)
            if world.why(task, known) is None:  # who knows less may keep what nobody needs, and never the other way
                assert task not in plainly


@given(worlds())
def test_what_is_not_needed_never_will_be(world: World) -> None:
    """Whatever becomes of pending tasks, and whichever stored results are discarded meanwhile."""
    before = needed(world.inputs, world.asked, world.fates.__getitem__)
    later = list(world.fates)
    for task, fate in enumerate(later):
        if fate is S and task not in before:
            later[task] = M
        elif fate is P:
            failed = any(later[need] in (F, U) for need in world.inputs[task])
            later[task] = U if failed else S
    after = needed(world.inputs, world.asked, later.__getitem__)
    assert after.keys() <= before.keys()
    assert all(not any(later[need] is M and need not in before for need in world.inputs[task])
               for task, fate in enumerate(world.fates) if fate is P)  # fmt: skip
