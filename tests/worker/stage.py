"""A stage to play the agent on: a session in a memory store, runs made by hand, agents as coroutines."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Sequence
from typing import Any

from burst_dask import serialize
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.journal import log
from burst_dask.journal.view import RunView
from burst_dask.protocol import keys
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import (
    Beat,
    Ended,
    Entry,
    Manifest,
    Place,
    Plan,
    ShardInfo,
    ShardRecord,
    decode,
    encode,
)
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import AddRun, Open
from burst_dask.store import Store, open_store
from burst_dask.testing.facts import gather
from burst_dask.testing.invariants import violations_of
from burst_dask.worker.context import Context
from burst_dask.worker.execution import ThreadExecutor
from burst_dask.worker.memory import Memory
from burst_dask.worker.process import own_versions, run_agent

#: Quick enough for tests, with nothing left to chance: no assertion depends on these.
QUICK: dict[str, float] = {
    "heartbeat": 0.2,
    "lease": 1.0,
    "idle_poll_min": 0.02,
    "idle_poll_max": 0.2,
    "wait_poll_min": 0.01,
    "wait_poll_max": 0.1,
    "session_poll": 0.1,
    "commit_interval": 0.2,
    "commit_interval_wanted": 0.05,
    "retry_delay": 0.01,
    "discard_interval": 0.05,
}


#: Agents are in this process, so tasks may share locks with their test: they are pickled by number.
FUNCTIONS: list[Callable[..., Any]] = []


class Node:
    """A task: a function of the values of its dependencies."""

    def __init__(self, function: Callable[..., Any], inputs: Sequence[str]) -> None:
        self.number, self.inputs = len(FUNCTIONS), inputs
        FUNCTIONS.append(function)

    def __call__(self, values: dict[str, Any]) -> Any:
        return FUNCTIONS[self.number](*(values[key] for key in self.inputs))


Task = tuple[Callable[..., Any], list[int]]


class Stage:
    """One session with one run at a time."""

    def __init__(self, store: Store | None = None, **settings: Any) -> None:
        self.entropy = Entropy()
        self.clock = SystemClock()
        self.store = store or open_store(f"memory://{self.entropy.token()}")
        self.session = SessionId(self.entropy.token(8))
        self.settings = Settings.of(**{**QUICK, **settings})
        self.author = log.Author(WorkerId("client"), self.clock, self.entropy)
        self.state = SessionState()
        self.agents: dict[str, asyncio.Task[str]] = {}
        self.stops: dict[str, asyncio.Event] = {}

    async def open(self) -> Stage:
        manifest = Manifest(
            session=self.session,
            name=None,
            created=0.0,
            host="h",
            versions=own_versions(),
            settings=self.settings.to_dict(),
        )
        await self.store.create(keys.manifest(self.session), encode(manifest))
        await self.append(Open())
        return self

    async def append(self, action: Any) -> None:
        self.state = await log.append_session(self.store, self.session, self.state, self.author, action)

    async def submit(
        self,
        tasks: Sequence[Task],
        cuts: Sequence[int] = (),
        outputs: Sequence[int] | None = None,
        annotations: dict[int, dict[str, Any]] | None = None,
        externals: Sequence[tuple[RunId, int]] = (),
    ) -> RunView:
        """Submit tasks, numbered in order, in plan shards that begin at 0 and at each of `cuts`.

        Numbers behind the last task are those of `externals`.
        """
        run = RunId(f"{self.session}.{self.entropy.token(6)}")
        starts = [0, *cuts]
        ends = [*cuts, len(tasks)]
        home = {t: s for s, (first, end) in enumerate(zip(starts, ends, strict=True)) for t in range(first, end)}
        wanted_outputs = set(range(len(tasks)) if outputs is None else outputs)
        pack = b""
        infos = []
        for number, (first, end) in enumerate(zip(starts, ends, strict=True)):
            dependents: dict[int, set[int]] = {}
            for later, (_, needs) in enumerate(tasks):
                for need in needs:
                    if home.get(need) == number != home[later]:
                        dependents.setdefault(need - first, set()).add(home[later])
            foreign = {n for _, needs in tasks[first:end] for n in needs if not first <= n < end}
            free = sum(1 for _, needs in tasks[first:end] if all(first <= n < end for n in needs))
            record = ShardRecord(
                shard=number,
                first=first,
                keys=pickle.dumps([f"t-{t}" for t in range(first, end)]),
                dependencies=tuple(tuple(needs) for _, needs in tasks[first:end]),
                foreign_keys=pickle.dumps({n: f"t-{n}" for n in foreign}),
                dependents={p: tuple(sorted(s)) for p, s in dependents.items()},
                outputs=Bitmap.of(t - first for t in wanted_outputs if first <= t < end),
                annotations={t - first: note for t, note in (annotations or {}).items() if first <= t < end},
                payload=serialize.dump_payload(
                    [Node(function, [f"t-{n}" for n in needs]) for function, needs in tasks[first:end]], lambda _: None
                ),
                buffers=(),
            )
            data = encode(record)
            place = Place(0, len(pack), len(pack) + len(data))
            pack += data
            upstream = tuple(sorted({home[n] for n in foreign if n in home}))
            outer = tuple(sorted(n - len(tasks) for n in foreign if n not in home))
            infos.append(ShardInfo(first, end - first, place, upstream, free, len(record.outputs), outer))
        plan = Plan(
            run=run,
            tasks=len(tasks),
            shards=tuple(infos),
            outputs=pickle.dumps(sorted(wanted_outputs)),
            created=0.0,
            size=len(pack),
            externals=tuple(externals),
        )
        await self.store.put(keys.pack(run, 0), pack)
        await self.store.create(keys.plan(run), encode(plan))
        await self.append(AddRun(run))
        view = await RunView.open(self.store, run)
        assert view is not None
        return view

    def context(self, name: str = "me", threads: int = 1) -> Context:
        """What the parts of an agent share, to play one of them alone."""
        return Context(
            store=self.store,
            session=self.session,
            worker=WorkerId(name),
            settings=self.settings,
            clock=self.clock,
            entropy=self.entropy,
            executor=ThreadExecutor(threads, name),
            memory=Memory(),
        )

    async def beat(self, name: str) -> None:
        record = Beat(worker=WorkerId(name), host="h", pid=1, threads=1, started=0.0)
        await self.store.put(keys.beat(self.session, WorkerId(name)), encode(record))

    def start(self, name: str = "w", **more: Any) -> None:
        self.stops[name] = asyncio.Event()
        agent = run_agent(self.store, self.session, WorkerId(name), stop=self.stops[name], **more)
        self.agents[name] = asyncio.create_task(agent)

    async def stop(self, *names: str) -> None:
        for name in names or list(self.agents):
            self.stops[name].set()
            await self.agents.pop(name)

    async def kill(self, name: str) -> None:
        """End an agent as SIGKILL would: it writes nothing more."""
        task = self.agents.pop(name)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def complete(self, view: RunView) -> None:
        """Wait until every task has an outcome; an agent that fails fails the test."""
        while view.totals().pending:
            await view.survey()
            for task in self.agents.values():
                if task.done():
                    task.result()
            await asyncio.sleep(0.01)

    async def results(self, view: RunView, tasks: Sequence[int]) -> list[Any]:
        bodies = await view.fetch(tasks)
        return [serialize.loads(bodies[task]) for task in tasks]

    async def story(self, view: RunView) -> dict[str, list[Entry]]:
        """Return every entry of every shard of a run that keeps every rule."""
        facts = await gather(self.store, view.run)
        assert [str(violation) for violation in violations_of(facts)] == []
        await view.survey()
        return {shard: list(entries.values()) for shard, entries in facts.logs.items()}


def constant(value: int) -> Task:
    """Return a task that gives a value."""
    return (lambda: value), []


async def ended(stage: Stage, worker: str) -> Ended:
    """Return how a worker has ended."""
    key = keys.ended(stage.session, WorkerId(worker))
    data = await stage.store.get(key)
    assert data is not None
    return decode(Ended, key, data)
