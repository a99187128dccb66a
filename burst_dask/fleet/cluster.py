"""Workers inside a running `distributed` cluster: on Slurm, on Kubernetes, anywhere that has one.

Beside each of the cluster's workers runs a local fleet (`burst_dask.fleet.local`), started by
`distributed.Client.run`. The cluster lends its machines; its scheduler knows nothing of the tasks, and may be
restarted. The processes outlive the client, and end with the cluster's worker beside which they run, so that
none is left when its job is over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distributed import Client, Worker, get_client
from distributed.client import default_client

from burst_dask.errors import ConfigError, FleetError
from burst_dask.fleet.local import LocalFleet
from burst_dask.protocol.keys import SessionId
from burst_dask.store import Key
from burst_dask.trust.keyring import write_key

#: Name of the file beside a worker of the cluster that has the key of a signed session.
KEY_FILE = "key"
#: Seconds to wait for the scheduler of a cluster, and for an answer of its workers.
CONNECT = 20.0


def address_of_default() -> str:
    """Return the address of the scheduler of this process's `distributed.Client`.

    Raises
    ------
    ConfigError
        There is no client.
    """
    try:
        return str(get_client().scheduler.address)
    except ValueError:
        raise ConfigError(
            "fleet='distributed' runs workers inside the cluster of this process's distributed.Client, and there is "
            "none: make one with distributed.Client(address). Nothing was started"
        ) from None


def size_of_default() -> int:
    """Return how many workers the cluster of this process's `distributed.Client` has, and 1 at least."""
    return max(1, len(get_client().scheduler_info(n_workers=-1)["workers"]))


class ClusterFleet:
    """Worker processes beside the workers of a `distributed` cluster.

    Parameters
    ----------
    session, store_url
        What the workers work for; the cluster's machines must reach the store.
    address
        Of the cluster's scheduler.
    threads
        Threads of each worker.
    memory_limit
        Bytes for each worker; None shares out what the cluster's worker may use.
    key
        Of a signed session: it goes to the cluster's workers in messages of the cluster, and lies there in a file.
    """

    #: seconds until a worker that is started works
    boot = LocalFleet.boot

    def __init__(
        self,
        session: SessionId,
        store_url: str,
        address: str,
        *,
        threads: int = 1,
        memory_limit: int | None = None,
        key: Key | None = None,
    ) -> None:
        self._session = session
        self._key = key
        self._address = address
        self._known: Client | None = None
        self._arguments: dict[str, Any] = {
            "session": session,
            "store_url": store_url,
            "threads": threads,
            "memory_limit": memory_limit,
        }

    async def counted(self) -> dict[int, int]:
        """Return how many workers run or are about to, by the number of their start; others under -1."""
        return dict(sum(map(Counter, (await asyncio.to_thread(self._run, _slots)).values()), Counter()))

    async def shrink(self, workers: int) -> None:
        """Do nothing: the machines are there anyway, and what is idle ends by itself."""

    async def resting(self) -> int:
        """Return 0: workers on machines that are there anyway may be started again at any time."""
        return 0

    async def begin(self, number: int, workers: int, still: Callable[[], bool] = lambda: True) -> None:
        """Start workers as start `number`."""
        await asyncio.to_thread(lambda: self._start(workers, self._counts(), number))

    def ensure(self, workers: int) -> int:
        """Start what is missing to `workers`; return how many that were."""
        counts = self._counts()
        missing = max(0, workers - sum(counts.values()))
        self._start(missing, counts, -1)
        return missing

    def reduce(self, workers: int) -> None:
        """Stop all if there are more than `workers`: which of them have nothing to do is not known."""
        if self.alive() > workers:
            self.stop()

    def alive(self) -> int:
        """Return how many worker processes run in the cluster."""
        return sum(self._run(_alive).values())

    def stop(self, grace: float = 5.0) -> None:
        """Let the workers hand over within `grace` seconds, then kill them; returns when they are gone."""
        self._run(_stop, grace=grace)

    def remove(self) -> None:
        """Stop the workers and delete their logs."""
        self._run(_remove)

    def describe(self) -> str:
        """Say in one line what runs, and where."""
        try:
            return f"{self.alive()} worker processes beside the workers of the cluster at {self._address}"
        except FleetError as error:
            return str(error)

    # ------------------------------------------------------------------ the cluster

    @property
    def _client(self) -> Client:
        """The client of this process if it is one of that cluster, else one of our own; another if it was closed."""
        if self._known is None or self._known.status != "running":
            self._known = self._connected()
        return self._known

    def _connected(self) -> Client:
        try:
            client = default_client()
            if client.scheduler.address == self._address:
                return client
        except ValueError:
            pass  # there is none
        try:
            return Client(self._address, timeout=CONNECT, set_as_default=False, name="burst-dask")
        except (OSError, TimeoutError) as error:
            raise FleetError(
                f"the cluster at {self._address} does not answer ({error}). What was submitted is kept; workers may be "
                f"started elsewhere: burst worker --session {self._session} --store URL"
            ) from error

    def _counts(self) -> dict[str, int]:
        """Return how many workers run, or are about to, beside each worker of the cluster."""
        counts = {address: sum(slots.values()) for address, slots in self._run(_slots).items()}
        if not counts:
            raise FleetError(f"the cluster at {self._address} has no workers now; what was submitted is kept")
        return counts

    def _start(self, count: int, counts: Mapping[str, int], number: int) -> None:
        for address, share in spread(count, counts).items():
            self._run(_start, workers=[address], count=share, number=number, key=self._key)

    def _run(self, function: Callable[..., Any], workers: list[str] | None = None, **arguments: Any) -> dict[str, Any]:
        """Call `function` beside the cluster's workers; return what it answers, by their addresses."""
        client = self._client
        try:
            found = client.run(function, workers=workers, on_error="return", **self._arguments, **arguments)
        except (OSError, TimeoutError) as error:
            raise FleetError(f"the cluster at {self._address} does not answer ({error})") from error
        for address, answer in found.items():
            if isinstance(answer, ModuleNotFoundError):
                raise FleetError(
                    f"worker {address} of the cluster has no {answer.name}: install burst_dask there, as it is here"
                ) from answer
            if isinstance(answer, Exception):
                raise FleetError(f"worker {address} of the cluster failed: {answer}") from answer
        return dict(found)


def spread(count: int, there: Mapping[str, int]) -> dict[str, int]:
    """Return how many of `count` to add where, so that all have about as many.

    Examples
    --------
    >>> spread(4, {"a": 0, "b": 3, "c": 1})
    {'a': 3, 'c': 1}
    """
    sizes = dict(there)
    for _ in range(count):
        fewest = min(sizes, key=lambda place: sizes[place])
        sizes[fewest] += 1
    return {place: size - there[place] for place, size in sizes.items() if size > there[place]}


# ---------------------------------------------------------------------------- beside a worker of the cluster


def _beside(
    worker: Worker, session: SessionId, memory_limit: int | None, key: Key | None = None, **arguments: Any
) -> LocalFleet:
    """Return the fleet beside a worker of the cluster; it ends with this process."""
    directory = Path(worker.local_directory) / "burst_dask" / session
    if key is not None:
        write_key(directory / KEY_FILE, key)
    return LocalFleet(
        session,
        **arguments,
        memory_limit=memory_limit,
        memory=worker.memory_manager.memory_limit,
        directory=directory,
        tied=True,
        key=str(directory / KEY_FILE) if key is not None else "",
    )


# `Client.run` calls them in the event loop of the cluster's worker, which must not be held up.


async def _start(dask_worker: Worker, count: int, number: int, **arguments: Any) -> None:
    await asyncio.to_thread(lambda: _beside(dask_worker, **arguments).start(count, number))


async def _slots(dask_worker: Worker, **arguments: Any) -> dict[int, int]:
    return await asyncio.to_thread(_beside(dask_worker, **arguments).slots)


async def _alive(dask_worker: Worker, **arguments: Any) -> int:
    return await asyncio.to_thread(_beside(dask_worker, **arguments).alive)


async def _stop(dask_worker: Worker, grace: float, **arguments: Any) -> None:
    await asyncio.to_thread(_beside(dask_worker, **arguments).stop, grace)


async def _remove(dask_worker: Worker, **arguments: Any) -> None:
    await asyncio.to_thread(_beside(dask_worker, **arguments).remove)
