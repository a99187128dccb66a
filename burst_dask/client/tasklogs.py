"""What tasks have printed, as their workers kept it: of one task, of a run, of a session; and what is new."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from burst_dask.client.cancelling import undone
from burst_dask.client.link import Link
from burst_dask.errors import UnknownId
from burst_dask.journal.names import find_task
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.protocol import keys, policy
from burst_dask.protocol.keys import RunId, ShardId
from burst_dask.protocol.records import Logs, decode


class LogRecord(NamedTuple):
    """What a task has printed at about one time."""

    #: seconds since 1970 by the worker's clock
    time: float
    #: ``"stdout"``, ``"stderr"``, or the level of a `logging` record, such as ``"INFO"``
    stream: str
    text: str
    #: 1 for the first try of the task
    attempt: int
    worker: str


@dataclass(frozen=True)
class TaskLog:
    """What one task has printed, in all its tries; `str` gives the text.

    Examples
    --------
    >>> log = TaskLog("k3w9x2mq.7gfh2y", "sum-1", (LogRecord(0.0, "stdout", "hello\\n", 1, "w7"),))
    >>> print(log, end="")
    hello
    """

    run: str
    key: Any
    records: tuple[LogRecord, ...] = ()
    #: characters that were printed and are not kept: only the end of a long output is
    dropped: int = 0
    #: what is not here, and why, for people
    note: str = ""

    @property
    def text(self) -> str:
        """All that is kept, in order of time."""
        return "".join(record.text for record in self.records)

    @property
    def workers(self) -> tuple[str, ...]:
        """The workers on which it was printed."""
        return tuple(dict.fromkeys(record.worker for record in self.records))

    def __str__(self) -> str:
        return self.text

    def joined(self, other: TaskLog) -> TaskLog:
        """Return the log of both, in order of time."""
        records = sorted((*self.records, *other.records), key=lambda record: record.time)
        return replace(self, records=tuple(records), dropped=self.dropped + other.dropped)

    def on(self, worker: str | None) -> TaskLog:
        """Return the part that was printed on one worker; None takes all."""
        if worker is None:
            return self
        return replace(self, records=tuple(record for record in self.records if record.worker == worker))

    def lines(self) -> Iterator[LogRecord]:
        """Yield the records cut into lines, without their ends."""
        for record in self.records:
            for line in record.text.splitlines():
                yield record._replace(text=line)


# ---------------------------------------------------------------------------- reading


class Reader:
    """Reads the logs of a run that it has not read before."""

    def __init__(self, view: RunView) -> None:
        self.view = view
        self._seen: set[tuple[ShardId, str]] = set()

    async def news(self) -> list[TaskLog]:
        """Return what the newest entries name beyond what was returned before, by the task's first record."""
        await self.view.survey()
        fresh = [
            (shard.id, name)
            for shard in self.view.shards.values()
            for name in shard.index.outcomes.logs
            if (shard.id, name) not in self._seen
        ]
        self._seen.update(fresh)
        return _by_time(await _read(self.view, fresh))


async def _read(view: RunView, names: Iterable[tuple[ShardId, str]]) -> list[TaskLog]:
    """Return the logs in these objects, one for each task."""

    async def one(place: tuple[ShardId, str]) -> list[tuple[int, TaskLog]]:
        shard, name = place
        key = keys.task_logs(view.run, shard, name)
        data = await view.store.get(key)
        if data is None:  # somebody has cleaned up meanwhile
            return []
        record = decode(Logs, key, data)
        first = view.plan.shards[keys.root_number(shard)].first
        return [
            (
                first + output.position,
                TaskLog(
                    run=view.run,
                    key=pickle.loads(output.key),  # noqa: S301 - who may write the store may run code, see README
                    records=tuple(
                        LogRecord(*(p.time, p.stream, p.text), output.attempt, record.worker) for p in output.printed
                    ),
                    dropped=output.dropped,
                ),
            )
            for output in record.tasks
        ]

    found: dict[int, TaskLog] = {}
    for logs in await in_parallel(one, names):
        for number, log in logs:
            found[number] = found[number].joined(log) if number in found else log
    return list(found.values())


def _by_time(logs: Iterable[TaskLog]) -> list[TaskLog]:
    return sorted(logs, key=lambda log: log.records[0].time if log.records else 0.0)


async def of_session(link: Link, worker: str | None) -> list[TaskLog]:
    """Return the logs of all tasks of all runs, or what was printed on one worker, in order of time."""
    await link.follow()
    return await Follower(link, None, worker).news()


# ---------------------------------------------------------------------------- one task


async def of_task(view: RunView, key: Any) -> TaskLog:
    """Return the log of the task with that Dask key, which may be given as its text.

    Raises
    ------
    UnknownId
        The run has no such task.
    """
    found = await find_task(view, key)
    if found is None:
        return await _find_log(view, key)
    number, its_key = found
    shard, position = view.owner(number)
    while True:
        await view.poll(shard.id)
        owner, position = view.owner(number)
        if owner.id == shard.id:
            break
        shard = owner
    index = owner.index
    names = [(owner.id, name) for name, tasks in index.outcomes.logs.items() if position in tasks]
    logs = {str(log.key): log for log in await _read(view, names)}
    log = logs.get(str(its_key), TaskLog(view.run, its_key))
    notes = []
    if position not in index.outcomes.all:
        notes.append("it has no outcome yet; what it prints is kept with each try that ends")
    if _lost_workers(view, owner.id, position):
        notes.append(
            "workers died while this task was theirs to run: what it printed there is at most in their own logs: "
            "session.worker_logs()"
        )
    return replace(log, note="; ".join(notes))


def _lost_workers(view: RunView, shard: ShardId, position: int) -> bool:
    """Tell whether a worker died while a task was reserved, also before it was split off."""
    while not view.shard(shard).index.strikes.get(position):
        parent, dash, _ = shard.rpartition("-")
        if not dash:
            return False
        shard = ShardId(parent)
    return True


async def _find_log(view: RunView, key: Any) -> TaskLog:
    """Return the log of a task when the graph is gone, and the logs alone know keys."""
    for log in await Reader(view).news():
        if str(log.key) == str(key):
            return log
    raise UnknownId(
        f"run {view.run} has no log of a task {key!r}; since its graph was cleaned up, "
        "tasks that printed nothing are not known"
    )


# ---------------------------------------------------------------------------- what comes


class Follower:
    """Reads what tasks print as it is committed.

    Parameters
    ----------
    runs
        Those to follow; None follows all of the session, also those that are submitted meanwhile.
    worker
        Only what is printed there; None takes all.
    """

    def __init__(self, link: Link, runs: Iterable[RunId] | None, worker: str | None = None) -> None:
        self._link = link
        self._runs = None if runs is None else list(runs)
        self._worker = worker
        self._readers: dict[RunId, Reader] = {}
        self._since = link.clock.monotonic()

    async def news(self) -> list[TaskLog]:
        """Return what was not returned before, in order of time."""
        for run in self._link.state.runs if self._runs is None else self._runs:
            if run not in self._readers and (view := await RunView.open(self._link.store, run)) is not None:
                self._readers[run] = Reader(view)
        found = await in_parallel(Reader.news, self._readers.values())
        parts = (log.on(self._worker) for logs in found for log in logs)
        return _by_time(part for part in parts if part.records)

    async def more(self) -> list[TaskLog] | None:
        """Wait for something new and return it; None when the runs or the session have ended and all was returned."""
        link, settings = self._link, self._link.settings
        while True:
            over = await self._over()
            if logs := await self.news():
                self._since = link.clock.monotonic()
                return logs
            if over:
                return None
            waited = link.clock.monotonic() - self._since
            await link.clock.sleep(policy.patience(waited, settings.wait_poll_min, settings.wait_poll_max))
            await link.follow()

    async def _over(self) -> bool:
        """Tell whether nothing more was to come when the last news was read."""
        link, readers = self._link, self._readers
        going = {run: reader.view for run, reader in readers.items() if run not in link.state.cancelled}
        gone = await undone(link, going.values())
        left = (view.totals().pending - (gone[run].count if run in gone else 0) for run, view in going.items())
        if readers and not any(left):
            return True
        # Closed or past its deadline: workers that are yet alive commit what they have.
        return await link.condition() != "open" and not (await link.seen()).status.alive
