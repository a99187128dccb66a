"""What became of the tasks that were asked for: values, and errors that stay among them.

::

    asked       which tasks, in what order, and their Dask keys
    decoded     their values and `TaskError` s, fetched a portion at a time
    Collected   a dict of them, with a token: what is collected `since` is only what is new
    Results     the same as a mapping that fetches on access
"""

from __future__ import annotations

import pickle
import warnings
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Container, ItemsView, Iterable, Iterator, Mapping, Sequence, ValuesView
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import msgspec
import psutil

from burst_dask import sync
from burst_dask.client.shapes import numbers
from burst_dask.errors import ConfigError, CorruptObject, ProtocolError
from burst_dask.journal import across
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys
from burst_dask.protocol.frames import Buffer, compress, decompress
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Names, decode
from burst_dask.serialize import Failure, load_failure, loads

#: Bytes of results that are fetched together and decoded before the next are.
COLLECT_BYTES = 64 << 20

OnError = Literal["raise", "return"]


class LargeResultsWarning(UserWarning):
    """What is collected at once is more than the memory that is free."""


@dataclass(frozen=True, eq=False)
class TaskError:
    """Stands in the results for a task that failed.

    Examples
    --------
    >>> import dask
    >>> from burst_dask import Session
    >>> burst = Session("memory://task-error-doctest", workers=1)
    >>> run = burst.compute(dask.delayed(divmod)(1, 0, dask_key_name="bad"))
    >>> run.wait()
    >>> (error,) = run.collect().values()
    >>> error.key, error.attempts, error.exception
    ('bad', 1, ZeroDivisionError('integer division or modulo by zero'))
    >>> burst.cleanup(force=True)
    """

    #: Dask key of the task
    key: Any
    #: the exception as the task raised it, with its causes and its traceback
    exception: BaseException
    #: as the worker would have printed it
    traceback: str
    #: how often the task was run
    attempts: int
    worker: str
    #: key of the task whose exception it is; another one's if this task did not run because that one failed
    cause: Any

    @property
    def message(self) -> str:
        """The exception in one line; of one that failed upstream, with the name of the first cause."""
        text = f"{type(self.exception).__name__}: {self.exception}"
        if not self.upstream:
            return text
        return f"did not run, because task {self.cause!r}, which it depends on, failed: {text}"

    @property
    def upstream(self) -> bool:
        """Whether the task did not run, because one that it depends on failed."""
        return bool(self.cause != self.key)

    def reraise(self) -> NoReturn:
        """Raise the exception; its traceback goes on where the task's code raised it."""
        if self.upstream and not any(
            "which it depends on" in note for note in getattr(self.exception, "__notes__", ())
        ):
            self.exception.add_note(f"task {self.key!r} {self.message.partition(', failed:')[0]}, failed")
        raise self.exception

    def __repr__(self) -> str:
        return f"TaskError({self.key!r}: {self.message})"


# ---------------------------------------------------------------------------- which tasks


class Asked(NamedTuple):
    """What was asked for in a run."""

    #: global number -> Dask key, in the order in which they were asked for
    keys: dict[int, Any]
    #: the other way round
    numbers: dict[Any, int]

    def only(self, tasks: Iterable[int]) -> Asked:
        """Return what of it is asked for now, in that order."""
        names = {task: self.keys[task] for task in tasks}
        return Asked(names, {name: number for number, name in names.items()})


async def asked(view: RunView) -> Asked:
    """Return what was asked for in a run, at one request if that was a lot."""
    plan = view.plan
    data = plan.names
    if not data:
        key = keys.names(plan.run)
        body = await view.store.get(key)
        if body is None:
            raise CorruptObject(f"{key}: the plan leaves the names to it, and it is gone")
        data = decode(Names, key, body).keys
    names = dict(zip(dict.fromkeys(numbers(plan.outputs)), pickle.loads(data), strict=True))  # noqa: S301 - as in `loads`
    return Asked(names, {name: number for number, name in names.items()})


def finished(view: RunView, tasks: Iterable[int]) -> list[int]:
    """Return those of `tasks` that are known to have a result or an error; what was cancelled has neither."""
    return [task for task in tasks if (found := view.outcome(task)) is not None and not found.cancelled]


# ---------------------------------------------------------------------------- fetching


def decoded(view: RunView, tasks: Iterable[int], names: Mapping[int, Any]) -> Iterator[tuple[int, Any]]:
    """Yield tasks that have outcomes, and their values or `TaskError` s, in any order.

    Portion by portion, so that each object is read once and memory is bounded; the next portion is on
    its way while one is decoded.
    """
    good: list[int] = []
    bad: dict[int, list[int]] = {}
    for task in dict.fromkeys(tasks):
        outcome = view.outcome(task)
        if outcome is None:
            raise ProtocolError(f"task {task} of run {view.run} has no outcome yet")
        if outcome.done:
            good.append(task)
        else:
            bad.setdefault(task if outcome.cause is None else outcome.cause, []).append(task)
    coming = None
    for portion in _portions(view, good):
        now, coming = coming, sync.start(view.fetch(portion))
        if now is not None:
            yield from ((task, loads(body)) for task, body in now.result().items())
    if coming is not None:
        yield from ((task, loads(body)) for task, body in coming.result().items())
    if bad:
        yield from _errors(view, bad, names)


def _portions(view: RunView, tasks: Iterable[int]) -> Iterator[list[int]]:
    """Yield tasks whose results lie together."""
    places = []
    for task in tasks:
        outcome = view.outcome(task)
        if outcome is None or outcome.location is None:
            raise ProtocolError(f"output {task} of run {view.run} has no stored result")
        places.append((outcome.shard.id, outcome.location, task))
    portion: list[int] = []
    size = 0
    for _, location, task in sorted(places):
        portion.append(task)
        size += location.end - location.start
        if size >= COLLECT_BYTES:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _errors(
    view: RunView, by_cause: Mapping[int, Sequence[int]], names: Mapping[int, Any]
) -> Iterator[tuple[int, TaskError]]:
    """Yield failed tasks and their errors; those of one cause share the exception."""

    async def body(cause: int) -> tuple[int, Buffer]:
        return cause, await across.error(view, cause)

    for cause, data in sync.run(in_parallel(body, by_cause)):
        failure = load_failure(data)
        for task in by_cause[cause]:
            # Without a name it is asked of nobody, or it is the cause itself.
            key = failure.key if task == cause else names.get(task, task)
            yield task, error_of(failure, key)


def error_of(failure: Failure, key: Any) -> TaskError:
    """Return what stands for the task of that key in the results."""
    return TaskError(
        key=key,
        exception=failure.exception,
        traceback=failure.traceback,
        attempts=failure.attempts,
        worker=failure.worker,
        cause=failure.key,
    )


def warn_if_large(what: Iterable[tuple[RunView, Iterable[int]]]) -> None:
    """Warn when the stored results of these tasks are more than the memory that is free."""
    size = 0
    for view, tasks in what:
        for task in tasks:
            outcome = view.outcome(task)
            if outcome is not None and outcome.location is not None:
                size += outcome.location.end - outcome.location.start
    free = psutil.virtual_memory().available
    if size > free:
        warnings.warn(
            f"the results are {size / 1e9:.1f} GB as stored, and {free / 1e9:.1f} GB of memory are free here. "
            "run.results() is a mapping that fetches each of them when it is looked at; run.as_completed() is a stream",
            LargeResultsWarning,
            stacklevel=4,
        )


# ---------------------------------------------------------------------------- what is collected


class Seen:
    """Which results somebody has collected already; `token` carries that to the next time, in any process."""

    def __init__(self, runs: Mapping[RunId, Iterable[int]] | None = None) -> None:
        self.runs = {run: set(tasks) for run, tasks in (runs or {}).items()}

    @classmethod
    def of(cls, since: str | Collected | None) -> Seen:
        """Return what `since` says, as given to `collect`.

        >>> seen = Seen({RunId("a.b"): [1, 50]})
        >>> Seen.of(seen.token).runs == seen.runs
        True
        """
        if since is None:
            return cls()
        token = since.token if isinstance(since, Collected) else since
        try:
            plain = msgspec.msgpack.decode(decompress(urlsafe_b64decode(token)), type=dict[str, bytes])
            return cls({RunId(run): _members(bits) for run, bits in plain.items()})
        except Exception as error:  # whatever decoding raises of what is no token
            raise ConfigError(
                f"since={since!r}: must be what collect returned, or the token of that ({type(error).__name__})"
            ) from error

    @property
    def token(self) -> str:
        plain = {run: _bits(tasks) for run, tasks in self.runs.items()}
        return urlsafe_b64encode(compress(msgspec.msgpack.encode(plain))).decode()

    def fresh(self, view: RunView, tasks: Iterable[int]) -> list[int]:
        """Return those of `tasks` that have an outcome and are not noted, and note them."""
        seen = self.runs.get(view.run, set())
        new = [task for task in finished(view, tasks) if task not in seen]
        if new:
            self.runs[view.run] = seen.union(new)
        return new


def _bits(tasks: set[int]) -> bytes:
    # Not a Bitmap: that is made for the tasks of a shard, and with a million of them each step would copy all.
    bits = bytearray(max(tasks, default=-1) // 8 + 1)
    for task in tasks:
        bits[task // 8] |= 1 << task % 8
    return bytes(bits)


def _members(bits: bytes) -> Iterator[int]:
    return (8 * place + bit for place, byte in enumerate(bits) if byte for bit in range(8) if byte >> bit & 1)


class Collected(Mapping[Any, Any]):
    """Results by Dask key, in the order in which they were asked for; a `TaskError` for each task that failed.

    Attributes
    ----------
    token : str
        Given as ``since=`` to the next `collect`, that returns only what is new.
    pending : int
        How many tasks had no outcome yet.
    cancelled : int
        How many tasks never will, because they, or what they need, were cancelled.
    """

    def __init__(self, values: Mapping[Any, Any], token: str, pending: int, cancelled: int = 0) -> None:
        self._values = dict(values)
        self.token = token
        self.pending = pending
        self.cancelled = cancelled

    def __getitem__(self, key: Any) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def errors(self) -> dict[Any, TaskError]:
        """Those of the results that are errors."""
        return {key: value for key, value in self._values.items() if isinstance(value, TaskError)}

    def __repr__(self) -> str:
        cancelled = f", {self.cancelled} cancelled" if self.cancelled else ""
        return f"<Collected: {len(self)} results, {len(self.errors)} of them errors; {self.pending} pending{cancelled}>"


def collected(
    runs: Iterable[tuple[RunView, Asked]],
    since: str | Collected | None,
    on_error: OnError,
    gone: Mapping[RunId, Container[int]] | None = None,
) -> Collected:
    """Fetch what is done of these runs, in their order, as far as their views know.

    Parameters
    ----------
    gone
        What cancelling leaves undone of each run.
    """
    check_on_error(on_error)
    seen = Seen.of(since)
    pending = cancelled = 0
    fresh: list[tuple[RunView, Asked, list[int]]] = []
    for view, wanted in runs:
        given_up = _given_up(view, wanted.keys, (gone or {}).get(view.run, ()))
        cancelled += given_up
        pending += len(wanted.keys) - len(finished(view, wanted.keys)) - given_up
        fresh.append((view, wanted, seen.fresh(view, wanted.keys)))
    warn_if_large((view, tasks) for view, _, tasks in fresh)
    values: dict[Any, Any] = {}
    for view, wanted, tasks in fresh:
        found = dict(decoded(view, tasks, wanted.keys))
        for task in tasks:
            value = found[task]
            if on_error == "raise" and isinstance(value, TaskError):
                value.reraise()
            values[wanted.keys[task]] = value
    return Collected(values, seen.token, pending, cancelled)


def _given_up(view: RunView, tasks: Iterable[int], gone: Container[int]) -> int:
    """Return how many of these tasks were cancelled, or need what was."""
    outcomes = ((task, view.outcome(task)) for task in tasks)
    return sum(task in gone if found is None else found.cancelled for task, found in outcomes)


def check_on_error(on_error: str) -> None:
    """Raise unless it is one of the two words."""
    if on_error not in ("raise", "return"):
        raise ConfigError(f"on_error={on_error!r}: must be 'raise' or 'return'")


class Results(Mapping[Any, Any]):
    """What is done of a run, by Dask key: each result is fetched when it is looked at, and not kept.

    Made by `Run.results`. Iterating over `values` or `items` fetches as much together as fits in
    little memory. A task that failed is there as a `TaskError`.
    """

    def __init__(self, view: RunView, wanted: Asked) -> None:
        self._view = view
        self._wanted = wanted
        self._done = {wanted.keys[task]: task for task in finished(view, wanted.keys)}

    def __getitem__(self, key: Any) -> Any:
        if key not in self._done:
            if key in self._wanted.numbers:
                raise KeyError(
                    f"task {key!r} was not done when these results were asked for, or was cancelled; "
                    "run.results() looks again"
                )
            raise KeyError(f"no task {key!r} was asked for in run {self._view.run}")
        task = self._done[key]
        return dict(decoded(self._view, [task], self._wanted.keys))[task]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._done)

    def __len__(self) -> int:
        return len(self._done)

    def __contains__(self, key: object) -> bool:
        return key in self._done

    def items(self) -> ItemsView[Any, Any]:
        return _Items(self)

    def values(self) -> ValuesView[Any]:
        return _Values(self)

    def stream(self) -> Iterator[tuple[Any, Any]]:
        """Yield keys and results in order, each portion fetched when it is needed."""
        size, portion = 0, []
        for task in self._done.values():
            outcome = self._view.outcome(task)
            if outcome is not None and outcome.location is not None:
                size += outcome.location.end - outcome.location.start
            portion.append(task)
            if size >= COLLECT_BYTES:
                yield from self._fetch(portion)
                size, portion = 0, []
        yield from self._fetch(portion)

    def _fetch(self, portion: list[int]) -> Iterator[tuple[Any, Any]]:
        found = dict(decoded(self._view, portion, self._wanted.keys))
        for task in portion:
            yield self._wanted.keys[task], found.pop(task)

    def __repr__(self) -> str:
        return f"<Results of run {self._view.run}: {len(self)} of {len(self._wanted.keys)} done>"


class _Items(ItemsView[Any, Any]):
    _mapping: Results

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return self._mapping.stream()


class _Values(ValuesView[Any]):
    _mapping: Results

    def __iter__(self) -> Iterator[Any]:
        return (value for _, value in self._mapping.stream())
