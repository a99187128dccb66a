"""Running tasks in threads, and turning records into tasks and values into bytes.

`Executor` is what the agent needs of whatever runs its tasks; the simulator has one of its own.
"""

from __future__ import annotations

import asyncio
import pickle
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from dask.sizeof import sizeof
from dask.utils import key_split

from burst_dask import serialize
from burst_dask.clock import thread_time
from burst_dask.errors import TaskTimeout, UnstorableResult
from burst_dask.protocol import policy
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.records import ShardRecord
from burst_dask.worker import output
from burst_dask.worker.memory import Scope
from burst_dask.worker.output import Capture
from burst_dask.worker.ran import Ran
from burst_dask.worker.table import TaskTable


class Call(NamedTuple):
    """One task to run."""

    position: int
    number: int
    key: Any
    node: Any
    #: Dask key and global number of each input
    inputs: tuple[tuple[Any, int], ...]
    #: whether somebody outside the shard needs the result
    wanted: bool
    #: whether a later task of the shard needs it
    used: bool
    #: how often it has been started, this time included
    attempt: int
    #: seconds that it may take; such a call comes alone
    timeout: float | None = None


class Executor(Protocol):
    """What the agent needs of whatever runs its tasks."""

    #: how many batches run at once
    threads: int

    async def open(self, record: ShardRecord, buffers: Sequence[memoryview]) -> TaskTable:
        """Decode the tasks of a shard. Never raises for their sake: a task that cannot be decoded fails when run."""

    async def run(self, calls: Sequence[Call], values: Scope, seconds: float) -> list[Ran]:
        """Run calls one after another; stop early when `seconds` have passed or one of them fails.

        One that takes longer than its time limit fails, although its thread still runs: see `Ran.stuck`.
        """

    async def load(self, bodies: dict[int, memoryview]) -> dict[int, tuple[Any, int] | Exception]:
        """Decode stored results; each becomes its value and size, or why it cannot be decoded."""

    async def dump(self, values: dict[int, Any], limit: int | None) -> dict[int, list[Buffer]]:
        """Encode results, as many as fit in `limit` bytes; those that cannot be pickled are left out."""

    def close(self) -> None:
        """Start nothing more."""


class Undecodable:
    """Stands in for a task that could not be decoded: running it raises why."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, values: dict[Any, Any]) -> Any:
        raise self.error


def broken_table(first: int, count: int, error: Exception) -> TaskTable:
    """Return a table whose every task fails with `error`."""
    return TaskTable(
        first=first,
        keys=[f"task {first + position}" for position in range(count)],
        nodes=[Undecodable(error)] * count,
        dependencies=((),) * count,
        dependents=[[] for _ in range(count)],
        foreign_keys={},
        kinds=["undecodable"] * count,
    )


def open_table(record: ShardRecord, buffers: Sequence[memoryview]) -> TaskTable:
    """Decode the tasks of a shard."""
    names = pickle.loads(record.keys)  # noqa: S301 - who may write the store may run code, see README
    count = len(names)
    try:
        nodes: list[Any] = serialize.load_payload(record.payload, buffers)
    except Exception as error:  # whatever importing the user's modules raises
        nodes = [Undecodable(error)] * count
    dependents: list[list[int]] = [[] for _ in range(count)]
    for position, numbers in enumerate(record.dependencies):
        for number in numbers:
            if 0 <= number - record.first < count:
                dependents[number - record.first].append(position)
    notes = record.annotations
    return TaskTable(
        first=record.first,
        keys=names,
        nodes=nodes,
        dependencies=record.dependencies,
        dependents=dependents,
        foreign_keys=pickle.loads(record.foreign_keys),  # noqa: S301 - who may write the store may run code, see SECURITY.md
        outputs=record.outputs,
        consumed=Bitmap.of(record.dependents),
        retries={position: int(note["retries"]) for position, note in notes.items() if "retries" in note},
        priority={position: int(note["priority"]) for position, note in notes.items() if "priority" in note},
        resources={position: note["resources"] for position, note in notes.items() if note.get("resources")},
        impure=Bitmap.of(position for position, note in notes.items() if note.get("impure")),
        timeouts={position: float(note["timeout"]) for position, note in notes.items() if "timeout" in note},
        retry_on={position: tuple(note["retry_on"]) for position, note in notes.items() if "retry_on" in note},
        retry_delay={position: float(note["retry_delay"]) for position, note in notes.items() if "retry_delay" in note},
        kinds=[key_split(name) for name in names],
    )


class ThreadExecutor:
    """Runs tasks in threads of this process.

    Parameters
    ----------
    threads
        How many batches run at once.
    worker
        Name of the worker, for the record of a failure.
    """

    def __init__(self, threads: int, worker: str) -> None:
        self.threads = threads
        self._worker = worker
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="burst-task")
        # Decoding may import large modules: it must neither block the event loop nor wait for tasks.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="burst-decode")
        self._keeps_output = False

    async def open(self, record: ShardRecord, buffers: Sequence[memoryview]) -> TaskTable:
        return await asyncio.get_running_loop().run_in_executor(self._decoder, open_table, record, buffers)

    async def run(self, calls: Sequence[Call], values: Scope, seconds: float) -> list[Ran]:
        if not self._keeps_output:
            self._keeps_output = True
            output.add_user()
        if not output.installed():
            output.install()
        loop, capture = asyncio.get_running_loop(), Capture()
        running = loop.run_in_executor(self._pool, run_calls, calls, values, seconds, self._worker, capture)
        if (limit := calls[0].timeout) is not None:
            await asyncio.wait({running}, timeout=limit)
            if not running.done():
                return [given_up(calls[0], limit, capture, self._worker, running)]
        return await running

    async def load(self, bodies: dict[int, memoryview]) -> dict[int, tuple[Any, int] | Exception]:
        if sum(map(len, bodies.values())) < 100_000:
            return load_bodies(bodies)
        return await asyncio.get_running_loop().run_in_executor(self._decoder, load_bodies, bodies)

    async def dump(self, values: dict[int, Any], limit: int | None) -> dict[int, list[Buffer]]:
        return await asyncio.get_running_loop().run_in_executor(self._decoder, dump_values, values, limit)

    def close(self) -> None:
        if self._keeps_output:
            self._keeps_output = False
            output.remove_user()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.shutdown(wait=False, cancel_futures=True)


def load_bodies(bodies: dict[int, memoryview]) -> dict[int, tuple[Any, int] | Exception]:
    """Decode stored results."""
    loaded: dict[int, tuple[Any, int] | Exception] = {}
    for number, body in bodies.items():
        try:
            loaded[number] = serialize.loads(body), len(body)
        except Exception as error:  # whatever unpickling a user's class raises
            loaded[number] = error
    return loaded


def dump_values(values: dict[int, Any], limit: int | None) -> dict[int, list[Buffer]]:
    """Encode results, as many as fit in `limit` bytes."""
    dumped: dict[int, list[Buffer]] = {}
    for position, value in values.items():
        try:
            body = serialize.dumps(value)
        except Exception:  # noqa: S112 - whatever a user's __reduce__ raises: it is computed again, then
            continue
        if limit is not None:
            limit -= sum(memoryview(part).nbytes for part in body)
            if limit < 0:
                break
        dumped[position] = body
    return dumped


def run_calls(
    calls: Sequence[Call], values: Scope, seconds: float, worker: str, capture: Capture | None = None
) -> list[Ran]:
    """Run calls one after another in this thread; those not returned were not started.

    Parameters
    ----------
    capture
        Gets what they print, one call after another.
    """
    capture = Capture() if capture is None else capture
    capture.thread = threading.get_ident()
    done: list[Ran] = []
    fresh: dict[int, Any] = {}
    token = output.current.set(capture)
    start = thread_time()
    for call in calls:
        ran = _run_call(call, values, fresh, worker, start)
        done.append(ran)
        if capture.printed:
            ran.output = capture.take(call.position, call.key, call.attempt)
        start = start + ran.seconds
        seconds -= ran.seconds
        if ran.failed or seconds <= 0:
            break
    output.current.reset(token)
    return done


def _run_call(call: Call, values: Scope, fresh: dict[int, Any], worker: str, start: float) -> Ran:
    try:
        value = call.node(inputs_of(call, values, fresh))
        elapsed = thread_time() - start
        fresh[call.number] = value
        return succeeded(call, value, elapsed)
    except BaseException as error:  # also SystemExit: a task must not end its worker
        return failed(call, error, thread_time() - start, worker)


def inputs_of(call: Call, values: Scope, fresh: Mapping[int, Any]) -> dict[Any, Any]:
    """Return what a task's node takes: values of the same batch are in `fresh`."""
    return {key: fresh[n] if n in fresh else values[n] for key, n in call.inputs}


def succeeded(call: Call, value: Any, seconds: float) -> Ran:
    """Return what came of a call that gave `value`; its result is encoded if it is to be stored.

    Raises
    ------
    UnstorableResult
        It must be stored, and cannot be pickled.
    """
    size = sizeof(value) if call.used or seconds > 10 * policy.STORE_LATENCY else 0
    body: list[Buffer] | None = None
    if call.wanted or policy.worth_storing(seconds, size):
        body = _store(call, value)
    return Ran(call.position, seconds, value, size, body)


def failed(call: Call, error: BaseException, seconds: float, worker: str) -> Ran:
    """Return what came of a call that raised `error`."""
    body = serialize.dump_failure(error, key=call.key, worker=worker, attempts=call.attempt)
    return Ran(call.position, seconds, body=body, failed=True, raised=_names(type(error)))


def _names(kind: type[BaseException]) -> tuple[str, ...]:
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__[:-1])


def given_up(call: Call, limit: float, capture: Capture, worker: str, running: asyncio.Future[Any]) -> Ran:
    """Return what came of a call that is past its time limit: an error that says where it was."""
    error = TaskTimeout(
        f"task {call.key!r} ran for longer than its time limit of {limit:g} s, and was given up in try {call.attempt}. "
        "Other tasks go on. Its limit is its annotation `timeout`"
    )
    frame, stack = sys._current_frames().get(capture.thread), []
    while frame is not None and frame.f_globals.get("__name__") != __name__:
        stack.append((frame, frame.f_lineno))
        frame = frame.f_back
    where = traceback.StackSummary.extract(reversed(stack)).format()
    error.add_note("It was here:\n" + "".join(where).rstrip())
    ran = failed(call, error, limit, worker)
    if capture.printed:
        ran.output = capture.take(call.position, call.key, call.attempt)
    ran.stuck = running
    return ran


def _store(call: Call, value: Any) -> list[Buffer] | None:
    try:
        return serialize.dumps(value)
    except Exception as error:
        if not call.wanted:
            return None  # it stays in memory, and would be recomputed
        raise UnstorableResult(
            f"the result of task {call.key!r}, a {type(value).__name__}, cannot be pickled, "
            "and it is needed outside of the worker that computed it"
        ) from error
