"""Submitting a graph: what the caller asks for, the objects in their order, and the shape of the answer."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
from dask.core import flatten

from burst_dask import sync
from burst_dask.client.link import Link
from burst_dask.client.shapes import Repack, dump
from burst_dask.errors import BurstError, ConfigError, StoreUnavailable
from burst_dask.graph import Annotations, Outside, ShardedGraph, materialize, without
from burst_dask.graph.shards import exceptions, map_nested, pause, seconds
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Names, Plan, encode
from burst_dask.protocol.session_records import AddRun, Cancel

#: Packs that are sent at once; with 8 to 16 MiB each this bounds the memory of submission.
UPLOADS = 4
#: Threads to cut for when nobody has said how many workers there will be.
UNKNOWN_THREADS = 16
#: Bytes of pickled keys that a plan, which every worker reads, may hold
NAMES_INLINE = 32_768


class Submitted(NamedTuple):
    """Where what was asked for is computed."""

    #: the plan of a new run, or the view of one of before that goes on
    run: Plan | RunView
    #: the shape of what was asked for, as `Plan.outputs`
    outputs: bytes

    @property
    def is_new(self) -> bool:
        return isinstance(self.run, Plan)


def submit(link: Link, graph: Any, names: Any, asked: Asked, repack: Repack | None = None) -> Submitted:
    """Store a graph as a new run, tell the session's workers, and see to it that there are some.

    In a resumed session an earlier run goes on instead, if it computes all that is asked for; else what earlier
    runs have takes the place of tasks.

    Parameters
    ----------
    graph, names
        As of `burst_dask.graph.materialize`.
    repack
        Makes the answer out of the values of `names`; stored with the run.

    Raises
    ------
    GraphError
        The graph cannot be stored.
    StoreError
        The store failed. In both cases nothing was submitted.
    """
    check_open(link)
    outside = Outside(link.session, link.futures)
    dsk, annotations = materialize(graph, names, outside)
    replaced: list[RunId] = []
    recorded: Mapping[Any, bytes] = {}
    if link.earlier is not None:
        wanted = list(flatten([names]))
        reuse = sync.run(link.earlier.look(dsk))
        if (whole := reuse.whole(wanted)) is not None:
            prior, found = whole
            sync.run(link.have_workers())
            return Submitted(prior.view, _shape_of(names, dict(zip(wanted, found, strict=True)), repack))
        dsk, outside = without(dsk, wanted, outside, reuse.stored)
        annotations = {name: {key: its[key] for key in its if key in dsk} for name, its in annotations.items()}
        recorded, replaced = reuse.recorded(), reuse.replaced(wanted)
        link.earlier.warn(reuse, dsk, stacklevel=5)
    asked.annotate(dsk, annotations)
    sharded = shard(link, dsk, names, annotations, outside)
    sharded.prints = recorded
    plan = _store(link, sharded, asked.priority, repack)
    for run in replaced:
        sync.run(link.append(Cancel(run)))
    sync.run(link.have_workers())
    return Submitted(plan, plan.outputs)


def _store(link: Link, sharded: ShardedGraph, priority: int, repack: Repack | None) -> Plan:
    def finish() -> Plan:
        plan = sharded.plan(created=link.clock.wall(), priority=priority)
        return plan if repack is None else msgspec.structs.replace(plan, outputs=dump(plan.outputs, repack))

    return sync.run(store_run(link, sharded.run, sharded.packs(), finish))


def _shape_of(names: Any, numbers: Mapping[Any, int], repack: Repack | None) -> bytes:
    outputs = pickle.dumps(map_nested(names, numbers.__getitem__), 5)
    return outputs if repack is None else dump(outputs, repack)


def check_open(link: Link) -> None:
    """Raise `ConfigError` if the session takes no more work."""
    state = link.state  # asked before each of thousands of calls
    if state.closed or state.halted is not None or link.may_be_over():
        sync.run(link.check_open())


def shard(link: Link, dsk: Mapping[Any, Any], names: Any, annotations: Annotations, outside: Outside) -> ShardedGraph:
    """Order and cut a graph for the workers of a session, as a new run."""
    run = RunId(f"{link.session}.{link.author.entropy.token(6)}")
    threads = (link.workers or UNKNOWN_THREADS) * link.settings.threads
    return ShardedGraph.of(dsk, names, annotations, run=run, parallelism=threads, externals=outside.found)


async def store_run(
    link: Link, run: RunId, packs: Iterator[tuple[int, list[Buffer]]], finish: Callable[[], Plan]
) -> Plan:
    """Store a run, its plan last, and tell the workers.

    What fails before the workers are told leaves nothing behind. After that nothing is deleted: they may
    be told although no answer came, and nothing inside a live run is deleted (PROTOCOL.md rule 8).

    Parameters
    ----------
    packs
        The objects that hold the task records. They are made in another thread while others are sent.
    finish
        Makes the plan, once all of `packs` are made.
    """
    store, sent = link.store, [keys.plan(run)]
    try:
        async with asyncio.TaskGroup() as group:
            under_way: deque[asyncio.Task[None]] = deque()
            while (made := await asyncio.to_thread(next, packs, None)) is not None:
                number, body = made
                if len(under_way) >= UPLOADS:
                    await under_way.popleft()
                sent.append(keys.pack(run, number))
                under_way.append(group.create_task(store.put(sent[-1], body)))
        plan = await asyncio.to_thread(finish)
        if len(plan.names) > NAMES_INLINE:
            sent.append(keys.names(run))
            await store.put(sent[-1], encode(Names(keys=plan.names)))
            plan = msgspec.structs.replace(plan, names=b"")
        # Last, so that a run either is there whole or is not there (PROTOCOL.md rule 7).
        await store.put(keys.plan(run), encode(plan))
    except BaseException as error:
        with contextlib.suppress(BurstError):
            await store.delete(sent)
        if isinstance(error, BaseExceptionGroup):
            raise error.exceptions[0] from None
        raise
    try:
        await link.append(AddRun(run, plan.priority))
    except StoreUnavailable as error:
        raise StoreUnavailable(
            f"{error}. Run {run} is stored whole, and may or may not have been submitted: "
            f"`burst status {run}` tells, and submitting again makes another run"
        ) from error
    return plan


# ---------------------------------------------------------------------------- what is asked for


class Asked(NamedTuple):
    """What the keywords of `Session.get` and `Session.compute` ask for."""

    priority: int = 0
    retries: int = 0
    resources: Mapping[str, float] | None = None
    #: seconds that a try of each task may take
    task_timeout: float | None = None
    #: exceptions, or names of such, after which a task may be tried again
    retry_on: Any = None
    #: seconds before the second try of a task; the session's by default
    retry_delay: float | None = None

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Asked:
        asked: dict[str, Any] = {}
        for name, value in keywords.items():
            if name in cls._fields:
                asked[name] = value
            elif name not in _WITHOUT_EFFECT and not _says_default(name, value):
                known = ", ".join((*cls._fields, *_WITHOUT_EFFECT))
                reason = _REFUSED.get(name, "this scheduler knows no such keyword")
                raise ConfigError(f"{name}={value!r} is refused: {reason}. Known are {known}")
        result = cls(**{name: value for name, value in asked.items() if value is not None})
        for name in ("priority", "retries"):
            if not isinstance(getattr(result, name), int):
                raise ConfigError(f"{name}={getattr(result, name)!r}: must be a whole number")
        if result.retries < 0:
            raise ConfigError(f"retries={result.retries}: must be 0 or more")
        if result.task_timeout is not None:
            seconds(result.task_timeout)
        if result.retry_on is not None:
            exceptions(result.retry_on)
        if result.retry_delay is not None:
            pause(result.retry_delay)
        if result.resources is not None and not isinstance(result.resources, Mapping):
            raise ConfigError(f"resources={result.resources!r}: must be a dict such as {{'GPU': 1}}")
        return result

    def annotate(self, dsk: Mapping[Any, Any], annotations: dict[str, dict[Any, Any]]) -> None:
        """Note what was asked for with all tasks that are not annotated otherwise."""
        for name, value in (
            ("retries", self.retries or None),
            ("resources", self.resources or None),
            ("timeout", self.task_timeout),
            ("retry_on", self.retry_on),
            ("retry_delay", self.retry_delay),
        ):
            if value is not None:
                annotations[name] = dict.fromkeys(dsk, value) | annotations.get(name, {})


#: How a scheduler in this process runs tasks; here the session's workers say that.
_WITHOUT_EFFECT = ("num_workers", "pool", "chunksize")
_REFUSED = {
    "cache": "results are in the store, not in a cache of this process",
    "callbacks": "tasks run elsewhere, so callbacks of this process are not called",
    "raise_exception": "a task's own exception is raised, with its traceback",
    "rerun_exceptions_locally": "tasks run on workers only",
    "workers": "any worker may take any task; resources={…} restricts tasks to workers that have them",
    "allow_other_workers": "any worker may take any task",
    "actors": "there are no actors: a worker may be replaced at any moment",
    "sync": "for a run that is not waited for there is Session.compute(…)",
    "asynchronous": "for a run that is not waited for there is Session.compute(…)",
    "direct": "results always come from the store",
    "fifo_timeout": "runs of one priority are worked on in the order of their submission",
    "get": "the scheduler is given as scheduler=",
}


def _says_default(name: str, value: Any) -> bool:
    """Tell whether a known keyword asks for no more than what happens anyway."""
    return name in _REFUSED and (value is True if name == "sync" else value in (None, False))
