"""Simulated tasks: what they take and give, graphs of them, and the executor that runs them in virtual time."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any

from burst_dask.clock import Clock, Entropy
from burst_dask.graph.shards import ShardedGraph
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Plan, Printed, ShardRecord, TaskOutput
from burst_dask.worker.execution import Call, dump_values, failed, inputs_of, load_bodies, open_table, succeeded
from burst_dask.worker.memory import Scope
from burst_dask.worker.ran import Ran
from burst_dask.worker.table import TaskTable


class Broken(Exception):
    """What a simulated task raises."""


@dataclass(frozen=True)
class Work:
    """A task: gives a value that depends on all that it was given.

    Attributes
    ----------
    number
        Its global number; its key is ``work-<number>``.
    seconds
        How long it runs.
    size
        Bytes of its result, beyond a digest.
    fails
        How many executions in a row fail; -1 for all.
    kills
        Whether the worker dies of it.
    prints
        Whether each try prints something.
    """

    number: int
    inputs: tuple[int, ...] = ()
    seconds: float = 0.0
    size: int = 0
    fails: int = 0
    kills: bool = False
    prints: bool = False
    #: the run it is a task of
    run: str = ""

    def __call__(self, values: Mapping[Any, Any]) -> str:
        return self.value([values[name(number)] for number in self.inputs])

    def value(self, inputs: Sequence[str]) -> str:
        """Return what it gives for the values of its inputs."""
        digest = blake2b("|".join([str(self.number), *(value[:16] for value in inputs)]).encode(), digest_size=8)
        return digest.hexdigest() + "." * self.size


def name(number: int) -> str:
    """Return the key of the task with that number; tasks of one kind take about the same time."""
    return f"work{number % 4}-{number}"


@dataclass(frozen=True)
class Graph:
    """Tasks in order, in shards that begin at `bounds`, of which the last is the number of tasks."""

    work: Sequence[Work]
    bounds: Sequence[int]
    outputs: Sequence[int]
    #: number -> allowed retries
    retries: Mapping[int, int] = field(default_factory=dict)

    def packs(self, run: RunId, created: float) -> tuple[Iterator[tuple[int, list[Buffer]]], Callable[[], Plan]]:
        """Return what `burst_dask.client.submission.store_run` takes."""
        nodes: list[Any] = [replace(work, run=run) for work in self.work]
        sharded = ShardedGraph(
            run,
            [name(work.number) for work in self.work],
            nodes,
            [work.inputs for work in self.work],
            self.bounds,
            list(self.outputs),
            {number: {"retries": retries} for number, retries in self.retries.items()},
            {},
        )
        return sharded.packs(), lambda: sharded.plan(created=created, priority=0)

    def expected(self) -> dict[int, str | None]:
        """Return the value of each task; None for those that must fail, themselves or upstream."""
        values: dict[int, str | None] = {}
        for work in self.work:
            inputs = [values[number] for number in work.inputs]
            fails = work.kills or work.fails < 0 or work.fails > self.retries.get(work.number, 0)
            given = [value for value in inputs if value is not None]
            values[work.number] = None if fails or len(given) < len(inputs) else work.value(given)
        return values

    def downstream(self, tasks: Collection[int]) -> set[int]:
        """Return tasks and all that depend on them."""
        found = set(tasks)
        for work in self.work:
            if not found.isdisjoint(work.inputs):
                found.add(work.number)
        return found


class SimulatedExecutor:
    """An `Executor` whose tasks take virtual time.

    Parameters
    ----------
    started
        Called with each task that starts.
    die
        Kills the process: what a task does that `Work.kills`.
    slowness
        How many times as long as elsewhere tasks take here.
    """

    def __init__(
        self,
        threads: int,
        worker: str,
        clock: Clock,
        started: Callable[[Work], None],
        die: Callable[[], None],
        slowness: float = 1.0,
    ) -> None:
        self.threads = threads
        self._worker = worker
        self._clock = clock
        self._started = started
        self._die = die
        self._slowness = slowness

    async def open(self, record: ShardRecord, buffers: Sequence[memoryview]) -> TaskTable:
        return open_table(record, buffers)

    async def run(self, calls: Sequence[Call], values: Scope, seconds: float) -> list[Ran]:
        done: list[Ran] = []
        fresh: dict[int, Any] = {}
        for call in calls:
            work: Work = call.node
            self._started(work)
            await self._clock.sleep(work.seconds * self._slowness)
            if work.kills:
                self._die()
                await asyncio.Event().wait()
            seconds -= work.seconds * self._slowness
            done.append(self._end(call, work, values, fresh))
            if work.prints:
                printed = Printed(self._clock.wall(), "stdout", f"try {call.attempt} on {self._worker}\n")
                done[-1].output = TaskOutput(call.position, pickle.dumps(call.key), call.attempt, 0, (printed,))
            if done[-1].failed or seconds <= 0:
                break
        return done

    def _end(self, call: Call, work: Work, values: Scope, fresh: dict[int, Any]) -> Ran:
        try:
            if work.fails < 0 or call.attempt <= work.fails:
                raise Broken(f"task {work.number} fails, as it was made to")
            value = fresh[call.number] = work(inputs_of(call, values, fresh))
            return succeeded(call, value, work.seconds * self._slowness)
        except Exception as error:
            return failed(call, error, work.seconds * self._slowness, self._worker)

    async def load(self, bodies: dict[int, memoryview]) -> dict[int, tuple[Any, int] | Exception]:
        return load_bodies(bodies)

    async def dump(self, values: dict[int, Any], limit: int | None) -> dict[int, list[Buffer]]:
        return dump_values(values, limit)

    def close(self) -> None:
        """There is nothing to close."""


#: Seconds a task runs, from the shortest to the longest of its mix.
MIXES: Sequence[tuple[float, float]] = ((0.001, 0.01), (0.1, 2.0), (5.0, 60.0), (0.01, 30.0))


def draw_graph(entropy: Entropy, *, tasks: int, failures: bool, killers: bool) -> Graph:
    """Return a graph of up to `tasks` tasks: chains, trees, fans and whatever lies between them."""
    count = entropy.integer(1, tasks)
    shortest, longest = entropy.choice(MIXES)
    reach = entropy.integer(1, count)
    density = entropy.uniform(0.0, 3.0)
    printing = entropy.choice([0.0, 0.1, 1.0])
    work: list[Work] = []
    retries: dict[int, int] = {}
    for number in range(count):
        earlier = range(max(0, number - reach), number)
        inputs = entropy.sample(earlier, round(entropy.uniform(0, density)))
        fails = 0
        if failures and entropy.uniform(0, 1) < 0.05:
            fails = entropy.choice([-1, 1, 2])
            retries[number] = entropy.integer(0, 2)
        work.append(
            Work(
                number,
                tuple(sorted(inputs)),
                seconds=shortest * (longest / shortest) ** entropy.uniform(0, 1),
                size=entropy.choice([0, 0, 100, 40_000]),
                fails=fails,
                kills=killers and entropy.uniform(0, 1) < 1.5 / count,
                prints=entropy.uniform(0, 1) < printing,
            )
        )
    cuts = sorted(entropy.sample(range(1, count), entropy.integer(0, 7))) if count > 1 else []
    outputs = sorted(entropy.sample(range(count), entropy.integer(1, count)))
    return Graph(work, [0, *cuts, count], outputs, retries)
