"""What a resumed session has computed before: finished tasks of earlier runs, found by their keys.

::

    Earlier ── reads once: plans, newest entries, and the keys in packs, of the runs of before
       │
       │  look(graph)         which of its tasks are the ones of an earlier run?
       ▼
    Reuse.whole               all that is wanted is computed, or being computed, by one run: go on in that
    Reuse.stored              else: results that take the place of tasks
    Reuse.warn                what could not be found again, and why

A result is used again if the key of its task tells that it is the same one (`burst_dask.graph.prints`), if it has
one, and if the object that holds it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import warnings
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from burst_dask.client.cancelling import undone
from burst_dask.client.link import Link
from burst_dask.client.shapes import numbers
from burst_dask.errors import CorruptObject
from burst_dask.graph.prints import Kind, Prints, kind, layer
from burst_dask.graph.stored import Stored
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Names, ShardRecord, decode
from burst_dask.protocol.shard import object_key_name
from burst_dask.store import Store
from burst_dask.store.base import Span, listed

#: Runs of a session that are looked into, the newest ones: each takes five requests or more.
RUNS = 2000
#: Runs read at once …
RUNS_PARALLEL = 16
#: … and packs, each of which may be tens of megabytes.
PACKS_PARALLEL = 4
#: Names in a warning at most.
NAMED = 8


class ResumeWarning(UserWarning):
    """Not all of what was computed before can be found again, or the session is another than the script says."""


class _Keys(NamedTuple):
    """The tasks of a plan shard, or what was asked for if that is all that is known."""

    #: global numbers
    numbers: Sequence[int]
    #: pickled list of Dask keys
    keys: bytes
    #: position in `numbers` -> fingerprint
    prints: Mapping[int, bytes]


@dataclass
class Prior:
    """A run of before."""

    view: RunView
    #: whether it is of the session itself, and not of one that is over
    own: bool
    keys: list[_Keys]
    outputs: frozenset[int]
    #: keys of the segments that are there
    segments: set[str] = field(default_factory=set)
    #: whether outcomes that it does not have yet will come
    goes_on: bool = False
    #: tasks that will have none all the same, because they, or what they need, were cancelled
    undone: Container[int] = ()
    #: whether something here waits for what it does not have yet, so that it must not be cancelled
    joined: bool = False

    @property
    def run(self) -> RunId:
        return self.view.run

    @property
    def is_spoilt(self) -> bool:
        """Whether tasks have failed."""
        return self.view.totals().failed > 0

    async def refresh(self, link: Link) -> None:
        """Take in what became of the run, and which of its segments are there: intermediate ones may be deleted."""
        await self.view.survey()
        if any(name and name[0] != "@" for shard in self.view.shards.values() for name in shard.index.objects):
            prefix = keys.run_prefix(self.run) + "segments/"
            self.segments = {meta.key async for meta in listed(link.store, prefix)}
        totals = self.view.totals()
        self.goes_on = self.own and not totals.failed and self.run in link.state.live_runs
        # Cancelled tasks that a worker has reserved may be let finish, or not be started: they are not waited for.
        self.undone = (await undone(link, [self.view], alive=())).get(self.run, ()) if self.goes_on else ()

    def has(self, number: int) -> bool:
        """Tell whether a task has a result that is there."""
        outcome = self.view.outcome(number)
        if outcome is None or not outcome.done or outcome.location is None:
            return False
        entry, name = object_key_name(outcome.location, outcome.shard.index)
        return entry is not None or keys.segment(self.run, outcome.shard.id, name) in self.segments

    def will_have(self, number: int) -> bool:
        """Tell whether a task has a result, or will get one that outlives its worker."""
        if self.has(number):
            return True
        if not self.goes_on or number not in self.outputs or number in self.undone:
            return False
        return self.view.outcome(number) is None


@dataclass
class Reuse:
    """What earlier runs have of a graph."""

    link: Link
    prints: Prints
    #: key -> tasks of earlier runs that are the same, the newest first
    same: dict[Any, list[tuple[Prior, int]]]
    #: key of a task that has no counterpart -> key of one that looks the same but for its token
    alike: dict[Any, Any]
    #: runs under way of which intermediate results are used, so that they are to be cancelled
    _taken: set[RunId] = field(default_factory=set)

    def whole(self, wanted: Iterable[Any]) -> tuple[Prior, list[int]] | None:
        """Return a run of the session that computes all that is wanted, and the numbers of that; or None."""
        wanted = list(wanted)
        for prior, _ in self.same.get(wanted[0], ()) if wanted else ():
            if not prior.own:
                continue
            found = [
                next((n for its, n in self.same.get(key, ()) if its is prior and n in prior.outputs), None)
                for key in wanted
            ]
            if all(number is not None and prior.will_have(number) for number in found):
                prior.joined = True
                return prior, [number for number in found if number is not None]
        return None

    def replaced(self, wanted: Collection[Any]) -> list[RunId]:
        """Return the unfinished runs that a new one takes the place of, so that they are to be cancelled.

        Something has failed in such a run, and all that it is for is wanted anew; or the new run needs intermediate
        results of it, which may be deleted when all that needs them there is done. Else tasks would run twice. A run
        that something in this process waits for is none of them.

        Parameters
        ----------
        wanted
            Keys of what the new run is for; `stored` was asked for all that it uses.
        """
        asked: dict[RunId, set[int]] = {}
        for key in wanted:
            for prior, number in self.same.get(key, ()):
                asked.setdefault(prior.run, set()).add(number)
        spoilt = [
            prior.run
            for places in self.same.values()
            for prior, _ in places
            if self._is_under_way(prior)
            and not prior.joined
            and prior.is_spoilt
            and prior.outputs <= asked.get(prior.run, set())
        ]
        return list(dict.fromkeys([*spoilt, *sorted(self._taken)]))

    def _is_under_way(self, prior: Prior) -> bool:
        return bool(prior.run in self.link.state.live_runs and prior.view.totals().pending)

    def stored(self, key: Any) -> Stored | None:
        """Return what stands for the result of a task, if an earlier run has it or will have it."""
        place = self.place(key)
        return None if place is None else Stored(key, place[0].run, place[1], self.link.store.url)

    def place(self, key: Any, *, lasting: bool = False) -> tuple[Prior, int] | None:
        """Return where the result of a task is, or will be.

        A run is either waited for from then on, or its intermediate results are used and it is cancelled; never both.

        Parameters
        ----------
        lasting
            Leave out intermediate results of a run that is under way, which may be deleted any time.
        """
        for prior, number in self.same.get(key, ()):
            if prior.has(number):
                if number not in prior.outputs and self._is_under_way(prior):
                    if lasting or prior.joined:
                        continue
                    self._taken.add(prior.run)
                return prior, number
        for prior, number in self.same.get(key, ()):
            if prior.run not in self._taken and not prior.has(number) and prior.will_have(number):
                prior.joined = True
                return prior, number
        return None

    def recorded(self) -> dict[Any, bytes]:
        """Return the fingerprints that are to be found again."""
        of = {
            key: its
            for key, its in self.prints.of.items()
            if not ((what := self.prints.kind(key)) is Kind.RANDOM or (what is Kind.FINAL and key in self.prints.vague))
        }
        return {**self.prints.layers(), **of}

    def notes(self, left: Collection[Any]) -> Iterator[tuple[str, str]]:
        """Yield the layers of tasks that are computed anew because their keys tell nothing, and what to say."""
        drawn = [key for key in left if self.prints.kind(key) is Kind.RANDOM]
        if drawn:
            yield from _named(
                drawn,
                "have keys that are others in each process, so that their results cannot be found when this "
                "script runs again: {}. Give each a key of its own (dask_key_name=, or key= of submit), or say that "
                "the function always gives the same (dask.delayed(…, pure=True), submit(…, pure=True))",
            )
        known = {_first(key) for key in self.same}
        changed = [key for key in self.alike if key in left and _first(key) not in known]
        if changed:
            yield from _named(
                changed,
                "look as in an earlier run and have other keys, so they are computed again: {}. Their data have "
                "changed, or their tokens are not deterministic across interpreters: then define __dask_tokenize__ "
                "for what they hold, or name them (https://docs.dask.org/en/stable/custom-collections.html)",
            )


def _first(key: Any) -> Any:
    return key[0] if type(key) is tuple and key else key


def _named(found: Sequence[Any], text: str) -> Iterator[tuple[str, str]]:
    by_layer: dict[str, list[Any]] = {}
    for key in found:
        by_layer.setdefault(layer(key), []).append(key)
    shown = [f"{name!r} ({len(its)}, such as {its[0]!r})" for name, its in list(by_layer.items())[:NAMED]]
    more = f" and {len(by_layer) - NAMED} others" if len(by_layer) > NAMED else ""
    said = f"{len(found)} tasks " + text.format(", ".join(shown) + more)
    for name in by_layer:
        yield name, said


class Earlier:
    """The runs that were there when a session was resumed.

    Parameters
    ----------
    link
        The session; what it runs from now on is not looked for.
    before
        The session of that name that is over, whose results are used, too.
    """

    def __init__(self, link: Link, before: Link | None = None) -> None:
        self._link = link
        self._runs = [(run, True) for run in reversed(link.state.runs)][:RUNS]
        if before is not None:
            self._runs += [(run, False) for run in reversed(before.state.runs)][:RUNS]
        self._priors: list[Prior] | None = None
        self._lock = asyncio.Lock()
        #: fingerprints of what calls of this process are, by key
        self._calls: dict[Any, bytes] = {}
        self._warned: set[str] = set()

    async def look(self, dsk: Mapping[Any, Any], random: Collection[Any] = ()) -> Reuse:
        """Find the tasks of a graph in earlier runs.

        Parameters
        ----------
        random
            Keys that this process has drawn.
        """
        prints = await asyncio.to_thread(Prints, dsk, self._calls, random)
        async with self._lock:
            if self._priors is None:
                found = await in_parallel(self._read, self._runs, RUNS_PARALLEL)
                self._priors = [prior for prior in found if prior is not None]
        same, alike = await asyncio.to_thread(_match, self._priors, dsk, prints)
        involved = {prior.run: prior for places in same.values() for prior, _ in places}
        if involved:
            await self._link.follow()
            await in_parallel(lambda prior: prior.refresh(self._link), involved.values(), RUNS_PARALLEL)
        return Reuse(self._link, prints, same, alike)

    def know(self, prints: Mapping[Any, bytes]) -> None:
        """Remember what calls are that later ones may depend on."""
        self._calls.update(prints)

    def warn(self, reuse: Reuse, left: Collection[Any], stacklevel: int = 2) -> None:
        """Warn of tasks that are computed anew because their keys tell nothing; of each name once."""
        said: dict[str, None] = {}
        for name, text in reuse.notes(left):
            if name not in self._warned:
                self._warned.add(name)
                said[text] = None
        for text in said:
            warnings.warn(text, ResumeWarning, stacklevel=stacklevel + 1)

    async def _read(self, item: tuple[RunId, bool]) -> Prior | None:
        """Return what a run has, or None when it cannot be read: then it is of no use here."""
        run, own = item
        with contextlib.suppress(CorruptObject):
            view = await RunView.open(self._link.store, run)
            if view is not None:
                found = await _keys(view)
                prior = Prior(view, own, found, frozenset(numbers(view.plan.outputs)))
                await prior.refresh(self._link)
                return prior
        return None


async def _keys(view: RunView) -> list[_Keys]:
    """Return the keys of a run's tasks: one request for each pack, or for near records of one."""
    by_pack: dict[int, list[int]] = {}
    for number, info in enumerate(view.plan.shards):
        by_pack.setdefault(info.place.pack, []).append(number)

    async def read(pack: int) -> list[_Keys] | None:
        places = [view.plan.shards[number].place for number in by_pack[pack]]
        key = keys.pack(view.run, pack)
        found = await view.store.get_ranges(key, [Span(place.start, place.end) for place in places])
        return None if found is None else await asyncio.to_thread(_of_records, key, found)

    packs = await in_parallel(read, by_pack, PACKS_PARALLEL)
    if any(found is None for found in packs):  # a cleanup has deleted the graph and kept what was asked for
        return await _names(view.store, view)
    return [one for found in packs if found is not None for one in found]


def _of_records(name: str, bodies: Iterable[memoryview]) -> list[_Keys]:
    found = []
    for body in bodies:
        record = decode(ShardRecord, name, body)
        first, count = record.first, len(record.dependencies)
        found.append(_Keys(range(first, first + count), record.keys, record.prints))
    return found


async def _names(store: Store, view: RunView) -> list[_Keys]:
    plan = view.plan
    data = plan.names
    if not data:
        body = await store.get(keys.names(plan.run))
        data = pickle.dumps([]) if body is None else decode(Names, keys.names(plan.run), body).keys
    return [_Keys(list(dict.fromkeys(numbers(plan.outputs))), data, {})]


def _match(
    priors: Iterable[Prior], dsk: Mapping[Any, Any], prints: Prints
) -> tuple[dict[Any, list[tuple[Prior, int]]], dict[Any, Any]]:
    """Return for keys of a graph the same tasks of earlier runs, and for others one that looks the same."""
    finals = {its: key for key, its in prints.of.items() if prints.kind(key) is Kind.FINAL and key not in prints.vague}
    layers = {its: key for key, its in prints.layers().items()}
    same: dict[Any, list[tuple[Prior, int]]] = {}
    alike: dict[Any, Any] = {}
    for prior in priors:
        for shard in prior.keys:
            names = pickle.loads(shard.keys)  # noqa: S301 - who may write the store may run code, see README
            for position, key in enumerate(names):
                its = shard.prints.get(position) if shard.prints else None
                if key in dsk:
                    if _is_same(prints, key, its):
                        same.setdefault(key, []).append((prior, shard.numbers[position]))
                elif its is not None and its in finals:
                    if kind(key) is Kind.FINAL:
                        same.setdefault(finals[its], []).append((prior, shard.numbers[position]))
                elif its is not None and its in layers and kind(key) is Kind.TOKEN:
                    alike[layers[its]] = key
    return same, alike


def _is_same(prints: Prints, key: Any, recorded: bytes | None) -> bool:
    """Tell whether a key of the graph names the task that it named in an earlier run."""
    expected = prints.of.get(key)
    if expected is None:
        return True  # its token tells
    return recorded == expected and prints.kind(key) not in (Kind.RANDOM, Kind.FINAL)
