"""Calls submitted one by one: grouped in the background, and followed until they have outcomes.

::

    submit ──▶ _Group ──▶ a run     when nothing was added for a moment, when it is large, or when asked to
                            │
    Future ◀── Follower ◀───┘       one for the session, however many futures are pending
"""

from __future__ import annotations

import asyncio
import concurrent.futures as cf
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import dask
from dask._task_spec import Alias, Dict, GraphNode, List, Task, TaskRef, parse_input
from dask.tokenize import tokenize
from dask.utils import funcname

from burst_dask import sync
from burst_dask.api.following import Follower
from burst_dask.api.futures import Future
from burst_dask.client.link import Link
from burst_dask.client.submission import check_open, shard, store_run
from burst_dask.errors import ConfigError, GraphError, UnpicklableTask, UnsupportedGraph
from burst_dask.graph import Annotations, Outside, ShardedGraph, Stored, materialize
from burst_dask.graph.blame import blame
from burst_dask.journal.view import RunView
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan
from burst_dask.serialize import fault

#: A group is written when nothing was added for so many seconds: a loop that submits adds sooner …
QUIET = 0.05
#: … or when its first call has waited for so long …
MOST_WAIT = 1.0
#: … or when it has so many calls, which bounds what a crash loses and what is pickled at once.
MOST_CALLS = 5000
#: Longer lists without a future in them are not copied: many calls may have one in common.
_COPIED = 1000


class _Call(NamedTuple):
    future: Future
    node: GraphNode
    #: annotations
    notes: dict[str, Any]
    #: whether its key was drawn
    drawn: bool = False


@dataclass
class _Group:
    """Calls that become one run."""

    first: float
    calls: dict[Any, _Call] = field(default_factory=dict)
    #: when the last was added
    last: float = 0.0
    #: somebody waits
    hurry: asyncio.Event = field(default_factory=asyncio.Event)
    #: what `flush` waits for: the error of writing it, if any
    written: cf.Future[BaseException | None] = field(default_factory=cf.Future)

    def due_in(self, now: float) -> float:
        """Return in how many seconds to write it, if nothing is added.

        >>> group = _Group(first=0.0, last=0.5)
        >>> round(group.due_in(0.51), 3), round(group.due_in(2.0), 3)
        (0.04, 0.0)
        """
        if len(self.calls) >= MOST_CALLS:
            return 0.0
        return max(0.0, min(self.last + QUIET, self.first + MOST_WAIT) - now)


class Futures:
    """The calls of one session in this process.

    Parameters
    ----------
    link
        The session.
    """

    def __init__(self, link: Link) -> None:
        self.link = link
        self.follower = Follower(link)
        self._lock = threading.RLock()
        self._group: _Group | None = None
        #: being written, the oldest first
        self._writing: list[_Group] = []
        self._by_key: weakref.WeakValueDictionary[Any, Future] = weakref.WeakValueDictionary()
        #: of tasks without an outcome: those that depend on them
        self._dependents: weakref.WeakKeyDictionary[Future, list[Future]] = weakref.WeakKeyDictionary()
        #: errors of groups that nobody has been told of
        self._errors: list[BaseException] = []
        #: fingerprints of the group that is being written, in a resumed session
        self._prints: Mapping[Any, bytes] = {}
        #: the pure ones are kept, to be given again
        self._pure: dict[Any, Future] = {}
        _at_exit(self)

    # ------------------------------------------------------------------ submitting

    def submit(
        self,
        function: Any,
        args: Iterable[Any],
        kwargs: Mapping[str, Any],
        *,
        key: Any = None,
        pure: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> Future:
        """Add a call to the current group; see `Session.submit`."""
        check_open(self.link)
        if not callable(function):
            raise ConfigError(f"{function!r} cannot be called: the first argument of submit is a function")
        args, kwargs, drawn = tuple(args), dict(kwargs), key is None and not pure
        if key is None:
            mark = tokenize(function, args, kwargs) if pure else self.link.author.entropy.token(16)
            key = f"{funcname(function)}-{mark}"
        elif key in self.link.futures or key in self._by_key:
            raise ConfigError(
                f"key={key!r}: there is a task of that key in session {self.link.session}; keys are unique"
            )
        with self._lock:
            known = self._pure.get(key) if pure else None
            if known is not None and not known.lost:
                return known
            node = Task(key, function, *map(_argument, args), **{name: _argument(arg) for name, arg in kwargs.items()})
            needs = [self._need(key, name) for name in node.dependencies]
            future = self._by_key[key] = Future(key, self)
            if any(need is not None and need.cancelled() for need in needs):
                future.end(cancel=True)  # nobody may ever make what it needs
                return future
            for need in needs:
                if need is not None and not need.done():
                    self._dependents.setdefault(need, []).append(future)
            self._add(_Call(future, node, {**_annotated(key), **(notes or {})}, drawn))
            if pure:
                self._pure[key] = future
        return future

    def _need(self, key: Any, name: Any) -> Future | None:
        """Return the future that a task depends on, if this process still has it."""
        future = self._by_key.get(name)
        if future is None and name not in self.link.futures:
            raise UnsupportedGraph(
                f"task {key!r} depends on a Future of another scheduler or session ({name!r}), which workers cannot "
                "reach; put its result in the place of the Future: future.result()"
            )
        return future

    def _add(self, call: _Call) -> None:
        now = self.link.clock.monotonic()
        group = self._group
        if group is None:
            group = _Group(first=now, last=now)
            sync.start(self._write_when_due(group))
            self._group = group
        group.calls[call.future.key], group.last = call, now
        if len(group.calls) >= MOST_CALLS:
            self._close_group()

    def _close_group(self) -> None:
        """Let the current group be written now; what is submitted from here on comes into another."""
        group, self._group = self._group, None
        if group is not None:
            self._writing.append(group)
            sync.loop().call_soon_threadsafe(group.hurry.set)

    def hurry(self) -> None:
        """Write what is waiting to be, without waiting for it."""
        sync.loop()  # raises in a forked process, which would wait for ever
        with self._lock:
            self._close_group()

    def flush(self) -> None:
        """Return when all that was submitted is in the store; see `Session.flush`."""
        sync.loop()  # as in `hurry`
        with self._lock:
            self._close_group()
            waiting = list(self._writing)
        for group in waiting:
            group.written.result()
        with self._lock:
            errors, self._errors = self._errors, []
        if errors:
            raise errors[0]

    # ------------------------------------------------------------------ writing

    async def _write_when_due(self, group: _Group) -> None:
        while not group.hurry.is_set() and (left := group.due_in(self.link.clock.monotonic())) > 0:
            try:
                async with asyncio.timeout(left):
                    await group.hurry.wait()
            except TimeoutError:
                continue
        with self._lock:
            if self._group is group:
                self._close_group()
        # In order, because later groups refer to where the tasks of earlier ones are.
        while self._writing[0] is not group:
            await asyncio.wrap_future(self._writing[0].written)
        error: BaseException | None = None
        try:
            await self._write(group)
        except BaseException as failed:
            error = failed
            for call in group.calls.values():
                if call.future.view is None:
                    call.future.end(failed)
        with self._lock:
            self._writing.remove(group)
            if error is not None:
                self._errors.append(error)
        group.written.set_result(error)

    async def _write(self, group: _Group) -> None:
        """Store a group as a run; calls that cannot be pickled, and what depends on them, fail alone."""
        left = await self._resume(self._submittable(dict(group.calls)))
        refused: BaseException | None = None
        while left := self._submittable(left):
            try:
                plan, places = await self._store(left)
            except GraphError as error:
                culprits = await asyncio.to_thread(_culprits, left)
                if not culprits:
                    raise
                for key, reason in culprits.items():
                    left[key].future.end(reason)
                refused = error
                continue
            self._place(RunView(self.link.store, plan), {number: left[key].future for key, number in places.items()})
            break
        if refused is not None:
            raise refused

    def _place(self, view: RunView, futures: dict[int, Future], own: bool = True) -> None:
        """Note where futures are, and follow them."""
        for number, future in futures.items():
            self.link.futures[future.key] = view.run, number
            future.view, future.number = view, number
        self.follower.follow(view, futures, own)
        for future in futures.values():
            if future.cancelled():  # meanwhile
                self.follower.drop(view.run, [future.number])

    async def _resume(self, calls: dict[Any, _Call]) -> dict[Any, _Call]:
        """Find what earlier runs have of some calls; return those that are to be submitted."""
        earlier = self.link.earlier
        if earlier is None or not calls:
            return calls
        drawn = {key for key, call in calls.items() if call.drawn}
        reuse = await earlier.look({key: call.node for key, call in calls.items()}, drawn)
        earlier.know(reuse.prints.of)
        self._prints = reuse.recorded()
        left: dict[Any, _Call] = {}
        found: dict[RunId, tuple[RunView, dict[int, Future]]] = {}
        for key, call in calls.items():
            place = reuse.place(key, lasting=True)
            if place is None:
                left[key] = call
            elif place[0].own and place[1] in place[0].outputs:
                found.setdefault(place[0].run, (place[0].view, {}))[1][place[1]] = call.future
            else:  # copied: intermediate results may be deleted, of a run that is complete, too
                left[key] = call._replace(node=Stored(key, place[0].run, place[1], self.link.store.url))
        for view, futures in found.values():
            self._place(view, futures, own=False)
        earlier.warn(reuse, [key for key, call in left.items() if type(call.node) is not Stored])
        return left

    def _submittable(self, calls: dict[Any, _Call]) -> dict[Any, _Call]:
        """Return the calls that nobody has cancelled and whose inputs there are, or will be."""
        good: dict[Any, _Call] = {}
        for key, call in calls.items():
            if call.future.done():
                continue
            missing = next((n for n in call.node.dependencies if n not in good and n not in self.link.futures), None)
            if missing is None:
                good[key] = call
                continue
            need = self._by_key.get(missing) or (calls[missing].future if missing in calls else None)
            if need is None or need.cancelled():
                call.future.end(cancel=True)
            else:
                call.future.end(cf.Future.exception(need))
        return good

    async def _store(self, calls: Mapping[Any, _Call]) -> tuple[Plan, dict[Any, int]]:
        link = self.link
        await link.check_open()
        outside = Outside(link.session, link.futures)
        names = list(calls)
        annotations: Annotations = {}
        for key, call in calls.items():
            for name, value in call.notes.items():
                annotations.setdefault(name, {})[key] = value

        def cut() -> ShardedGraph:
            dsk, _ = materialize({key: call.node for key, call in calls.items()}, names, outside)
            sharded = shard(link, dsk, names, annotations, outside)
            sharded.prints = self._prints
            return sharded

        sharded = await asyncio.to_thread(cut)
        priority = max(annotations.get("priority", {}).values(), default=0)
        plan = await store_run(
            link, sharded.run, sharded.packs(), lambda: sharded.plan(created=link.clock.wall(), priority=priority)
        )
        await link.have_workers()
        return plan, {key: number for number, key in enumerate(sharded.keys)}

    # ------------------------------------------------------------------ the end

    def cancel(self, future: Future, force: bool = False) -> bool:
        """Cancel a future and those that depend on it."""
        stack, numbers = [future], dict[RunId, list[int]]()
        while stack:
            one = stack.pop()
            if one.done():
                continue
            one.end(cancel=True)
            with self._lock:
                stack += self._dependents.get(one, [])
            if one.view is not None:
                numbers.setdefault(one.view.run, []).append(one.number)
        for run, tasks in numbers.items():
            self.follower.drop(run, tasks, force)
        return future.cancelled()

    def close(self) -> None:
        """Cancel all that has no outcome, and return when nothing more is done: the session is being cleaned up."""
        with self._lock:
            self._close_group()
            groups = list(self._writing)
        for group in groups:
            for call in group.calls.values():
                call.future.end(cancel=True)
            group.written.result()
        self.follower.close()


def _culprits(calls: Mapping[Any, _Call]) -> dict[Any, UnpicklableTask]:
    """Return the calls that cannot be pickled, and what is at fault in each."""
    faults = ((key, call.node, fault(call.node)) for key, call in calls.items())
    return {key: blame([node], why) for key, node, why in faults if why is not None}


def _argument(value: Any) -> Any:
    """Return an argument of a call as part of a task: futures in it become references.

    Lists and the like are copied, so that the caller may go on to change them.
    """
    if isinstance(value, TaskRef):
        return TaskRef(value.key)
    parsed = parse_input(value)
    if isinstance(parsed, Alias | List | Dict | Task) or type(value) not in (list, dict, set, bytearray):
        return parsed
    if len(value) > _COPIED:
        return value
    if isinstance(value, list):
        return [_copy(item) for item in value]
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return type(value)(value)


def _copy(value: Any) -> Any:
    return _argument(value) if type(value) in (list, dict, set, bytearray) else value


def _annotated(key: Any) -> dict[str, Any]:
    """Return the annotations in force (`dask.annotate`)."""
    return {name: value(key) if callable(value) else value for name, value in dask.get_annotations().items()}


# ---------------------------------------------------------------------------- leaving

#: Seconds that the end of the interpreter waits for answers of the store, so that none comes to nobody.
_LAST_ROUND = 2.0
_open: weakref.WeakSet[Futures] = weakref.WeakSet()


def _at_exit(futures: Futures) -> None:
    """See to it that nothing is left unwritten when the interpreter ends."""
    if not _open and not _registered:
        # Before the threads are gone in which tasks are pickled; atexit would come after.
        threading._register_atexit(_flush_all)  # type: ignore[attr-defined]
        _registered.append(True)
    _open.add(futures)


_registered: list[bool] = []


def _flush_all() -> None:
    for futures in list(_open):
        try:
            futures.flush()
        except Exception as error:  # whatever it is, other sessions have calls, too
            print(f"not all of session {futures.link.session} was submitted: {error}", file=sys.stderr)
        futures.follower.stop(_LAST_ROUND)


# A forked process has none of the threads that would write the calls; its parent does that.
os.register_at_fork(after_in_child=_open.clear)
