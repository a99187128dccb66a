"""The state of a shard, and the only place that says which entry may follow which.

A shard's state is the fold of its log. Because each entry carries the folded `ShardIndex`, the
newest entry alone gives the state, and `fold` over all of them must give the same (a check that
``burst doctor``, the simulator and the tests make).

::

             CLAIM                    COMMIT, SPLIT, BACKUP, TAKEOVER
    free ───────────────▶ held ◀──────────────────────────────────┐
      ▲                    │  └───────────────────────────────────┘
      └────── RELEASE ─────┤                                          DISCARD
                           └── when no task is pending ──▶ complete ◀────┐
                                                              └──────────┘

`TRANSITIONS` is that picture as a table; each rule function checks its entry against the state
and returns the next state, or raises `IllegalTransition`. They are pure: no I/O, no clock.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from burst_dask.errors import IllegalTransition
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import LASTING, ShardId, WorkerId, child_shard
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
    ShardIndex,
    Split,
    Takeover,
)

#: A task that dies together with others is at most this suspicious: only dying alone proves it.
SUSPECT_IN_COMPANY = 2


class Phase(enum.Enum):
    """Where a shard is in its life."""

    #: nobody holds it; any worker may claim it
    FREE = "free"
    #: the holder runs it; others may split, back up or, its lease being dead, take over
    HELD = "held"
    #: every task has its outcome: no entry may follow but what notes that results are deleted
    COMPLETE = "complete"


class Shard(msgspec.Struct, frozen=True):
    """A shard as folded up to some entry.

    Its next entry has number `next`; whoever creates that entry decides what happens.
    """

    id: ShardId
    index: ShardIndex
    next: int = 0

    @classmethod
    def untouched(cls, shard: ShardId, tasks: Bitmap) -> Shard:
        """Return the state before entry 0."""
        return cls(shard, ShardIndex(tasks=tasks))

    @classmethod
    def at(cls, shard: ShardId, entry: Entry) -> Shard:
        """Return the state after `entry`, which alone tells it."""
        return cls(shard, entry.index, entry.number + 1)

    @property
    def phase(self) -> Phase:
        if self.index.complete:
            return Phase.COMPLETE
        return Phase.FREE if self.index.holder is None else Phase.HELD

    @property
    def splittable(self) -> Bitmap:
        """Tasks that an idle worker may take."""
        if self.phase is not Phase.HELD:
            return EMPTY
        # What was tried stays where that is counted, and so do suspects (rule 10): a child would begin at 0.
        return self.index.pending - self.index.reserved - Bitmap.of((*self.index.outcomes.tries, *self.index.strikes))

    def apply(self, writer: WorkerId, action: Action) -> Shard:
        """Return the state after `writer` appends `action` as the next entry.

        Raises
        ------
        IllegalTransition
            The state does not allow it; the message names the rule.
        """
        rule = TRANSITIONS[self.phase].get(type(action))
        if rule is None:
            raise IllegalTransition(
                f"shard {self.id}, entry {self.next}: {type(action).__name__} by {writer} "
                f"while the shard is {self.phase.value}"
            )
        return Shard(self.id, rule(self, writer, action), self.next + 1)


def _require(condition: bool, shard: Shard, what: str) -> None:
    if not condition:
        raise IllegalTransition(f"shard {shard.id}, entry {shard.next}: {what}")


def _claim(shard: Shard, writer: WorkerId, action: Claim) -> ShardIndex:
    return msgspec.structs.replace(shard.index, holder=writer, reserved=action.reserved & shard.index.pending)


def _commit(shard: Shard, writer: WorkerId, action: Commit) -> ShardIndex:
    _require(writer == shard.index.holder, shard, f"commit by {writer}, held by {shard.index.holder}")
    index = _with_outcomes(shard, action.outcomes, action.segments)
    _require(action.reserved <= index.pending, shard, "reserves tasks that are not pending in it")
    index = _without(shard, index, action.discarded)
    return msgspec.structs.replace(index, reserved=action.reserved)


def _release(shard: Shard, writer: WorkerId, action: Release) -> ShardIndex:
    _require(writer == shard.index.holder, shard, f"release by {writer}, held by {shard.index.holder}")
    index = _with_outcomes(shard, action.outcomes, action.segments)
    return msgspec.structs.replace(index, holder=None, reserved=EMPTY, cause=action.reason)


def _takeover(shard: Shard, writer: WorkerId, action: Takeover) -> ShardIndex:
    index = shard.index
    _require(action.lost == index.holder, shard, f"takeover from {action.lost}, held by {index.holder}")
    _require(writer != index.holder, shard, f"takeover by {writer} from itself")
    return msgspec.structs.replace(
        index,
        holder=writer,
        reserved=action.reserved & index.pending,
        strikes=_strike(index.strikes, index.reserved & index.pending),
        cause=action.cause,
    )


def _split(shard: Shard, writer: WorkerId, action: Split) -> ShardIndex:
    index = shard.index
    _require(action.child == child_shard(shard.id, shard.next), shard, f"split names its child {action.child}")
    _require(bool(action.tasks), shard, "split of no tasks")
    _require(action.tasks <= shard.splittable, shard, "split of tasks that are reserved, have outcomes or are not here")
    return msgspec.structs.replace(
        index, tasks=index.tasks - action.tasks, children={**index.children, action.child: action.tasks}
    )


def _backup(shard: Shard, writer: WorkerId, action: Backup) -> ShardIndex:
    _require(writer != shard.index.holder, shard, f"backup by the holder {writer}")
    # An error is the holder's to decide: what it has built on its own result meanwhile would contradict it.
    _require(not action.outcomes.failed, shard, "backup of a failure")
    index = _with_outcomes(shard, action.outcomes, action.segments)
    return msgspec.structs.replace(index, reserved=index.reserved & index.pending)


def _discard(shard: Shard, writer: WorkerId, action: Discard) -> ShardIndex:
    _require(bool(action.discarded), shard, "discards nothing")
    return _without(shard, shard.index, action.discarded)


Rule = Callable[[Shard, WorkerId, Any], ShardIndex]

TRANSITIONS: dict[Phase, dict[type, Rule]] = {
    Phase.FREE: {Claim: _claim},
    Phase.HELD: {Commit: _commit, Release: _release, Takeover: _takeover, Split: _split, Backup: _backup},
    Phase.COMPLETE: {Discard: _discard},
}


def _with_outcomes(shard: Shard, new: Outcomes, segments: tuple[str, ...]) -> ShardIndex:
    """Merge outcomes into the index: each task gets one, and the first stays (rule 3)."""
    index = shard.index
    _require(new.all <= index.pending, shard, "outcome for a task that has one or is not here")
    _require(not new.done & new.failed, shard, "a task both done and failed")
    _require(new.cancelled <= new.failed, shard, "a task cancelled and not among those that failed")
    objects = index.objects + segments
    _require(all(place.object < len(objects) for place in new.stored.values()), shard, "result in an unnamed object")
    _require(all(tasks <= index.tasks for tasks in new.logs.values()), shard, "output of a task that is not here")
    _require(Bitmap.of(new.tries) <= index.pending - new.all, shard, "another try of a task that is not pending")
    return msgspec.structs.replace(index, outcomes=merge(index.outcomes, new), objects=objects)


def _without(shard: Shard, index: ShardIndex, discarded: tuple[int, ...]) -> ShardIndex:
    """Take segments out of the index, and with them the places of the results that lie there."""
    if not discarded:
        return index
    names = list(index.objects)
    for place in discarded:
        _require(0 <= place < len(shard.index.objects), shard, "discards an object that no entry before it has named")
        _require(is_segment(names[place]), shard, "discards what is no segment, or was discarded before")
        names[place] = ""
    gone = {p: place for p, place in index.outcomes.stored.items() if not names[place.object]}
    failed = index.outcomes.failed
    _require(not any(position in failed for position in gone), shard, "discards an error")
    stored = {p: place for p, place in index.outcomes.stored.items() if p not in gone}
    return msgspec.structs.replace(
        index,
        outcomes=msgspec.structs.replace(index.outcomes, stored=stored),
        objects=tuple(names),
        discarded=index.discarded | Bitmap.of(gone),
        freed=index.freed + sum(place.end - place.start for place in gone.values()),
    )


def is_segment(name: str) -> bool:
    """Tell whether an item of `ShardIndex.objects` is a segment that is there.

    >>> is_segment("00003-k3w9x2mq"), is_segment("@3"), is_segment("")
    (True, False, False)
    """
    return bool(name) and not name.startswith("@")


def may_be_discarded(name: str) -> bool:
    """Tell whether an item of `ShardIndex.objects` is a segment that may hold intermediate results only."""
    return is_segment(name) and not name.endswith(LASTING)


def segments_of(index: ShardIndex) -> dict[int, list[int]]:
    """Return the segments that are there: place in `ShardIndex.objects` -> positions of tasks with outcomes in it."""
    found: dict[int, list[int]] = {place: [] for place, name in enumerate(index.objects) if is_segment(name)}
    for position, location in index.outcomes.stored.items():
        if location.object in found:
            found[location.object].append(position)
    return found


def merge(old: Outcomes, new: Outcomes) -> Outcomes:
    """Return the union of two disjoint sets of outcomes."""
    upstream = dict(old.upstream)
    for cause, tasks in new.upstream.items():
        upstream[cause] = upstream.get(cause, EMPTY) | tasks
    done, failed = old.done | new.done, old.failed | new.failed
    return Outcomes(
        done=done,
        failed=failed,
        stored={**old.stored, **new.stored},
        upstream=upstream,
        seconds=old.seconds + new.seconds,
        ran=old.ran + new.ran,
        logs={**old.logs, **new.logs},
        tries={p: n for p, n in {**old.tries, **new.tries}.items() if p not in done and p not in failed},
        cancelled=old.cancelled | new.cancelled,
    )


def _strike(strikes: dict[int, int], suspects: Bitmap) -> dict[int, int]:
    """Count a worker's death against the tasks it had reserved (rule 10).

    One that dies in company may be innocent, so company alone never takes it past
    `SUSPECT_IN_COMPANY`; one that dies alone is counted each time.
    """
    after = dict(strikes)
    alone = len(suspects) == 1
    for task in suspects:
        count = strikes.get(task, 0)
        after[task] = max(count + 1, SUSPECT_IN_COMPANY) if alone else max(count, min(count + 1, SUSPECT_IN_COMPANY))
    return after


def fold(shard: ShardId, tasks: Bitmap, entries: Iterable[Entry]) -> Shard:
    """Return the state after `entries`, checking each against the rules and its own index.

    Parameters
    ----------
    tasks
        The positions that the shard began with.

    Raises
    ------
    IllegalTransition
        An entry breaks a rule; the error carries the story up to it.
    """
    state = Shard.untouched(shard, tasks)
    story: list[str] = []
    for entry in entries:
        story.append(describe(entry))
        try:
            _require(entry.number == state.next, state, f"entry {entry.number} follows entry {state.next - 1}")
            state = state.apply(entry.writer, entry.action)
            _require(state.index == entry.index, state, "its index is not what folding the log gives")
        except IllegalTransition as error:
            raise IllegalTransition(error.reason, tuple(story)) from None
    return state


def object_key_name(location: Location, index: ShardIndex) -> tuple[int | None, str]:
    """Return the entry number that `location` lies in, or None and the name of its segment."""
    name = index.objects[location.object]
    return (int(name[1:]), "") if name.startswith("@") else (None, name)


def describe(entry: Entry) -> str:
    """Return the entry in plain words, for stories and error messages."""
    action = entry.action
    if isinstance(action, Claim):
        what = f"claimed, reserving {len(action.reserved)}"
    elif isinstance(action, Split):
        what = f"took {len(action.tasks)} tasks as shard {action.child}"
    elif isinstance(action, Discard):
        what = f"discarded {len(action.discarded)} segments with results that nobody needs any more"
    elif isinstance(action, Takeover):
        what = f"took over from {action.lost} ({action.cause}), reserving {len(action.reserved)}"
    else:
        done, failed = len(action.outcomes.done), len(action.outcomes.failed)
        what = f"{type(action).__name__.lower()}: {done} done, {failed} failed"
        if isinstance(action, Release):
            what += f" ({action.reason})"
        elif isinstance(action, Commit):
            what += f", reserving {len(action.reserved)}"
            if action.discarded:
                what += f", discarding {len(action.discarded)} segments"
    pending = len(entry.index.pending)
    return f"{entry.number}: {entry.writer} {what}; {pending} pending"
