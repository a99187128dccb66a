"""Sessions: the callable that Dask takes as a scheduler, and the way back to what it left."""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NoReturn

import dask
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr, unpack_collections
from dask.core import flatten
from dask.utils import parse_bytes, shorten_traceback

from burst_dask import link as links
from burst_dask import sync
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.ending import close, delete, extend, incomplete
from burst_dask.errors import ConfigError, StoreUnavailable
from burst_dask.finding import find, open_run
from burst_dask.fleet.base import Fleet
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.fleet.local import LocalFleet
from burst_dask.journal.log import Author
from burst_dask.link import Link
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Cancel, Manifest, Scale
from burst_dask.protocol.session import SessionState
from burst_dask.report import SessionStatus
from burst_dask.run import Run
from burst_dask.statuses import session_status
from burst_dask.store import Store, open_store, requests_of
from burst_dask.submission import Asked, Repack, submit
from burst_dask.worker.memory_watch import processors
from burst_dask.worker.process import own_versions

_BRING_YOUR_OWN = (
    "with fleet=None the session starts no workers, and you bring your own: burst worker --session ID --store URL"
)


class Session:
    """A named place in a store, with its workers and its runs; Dask takes it as a scheduler.

    Parameters
    ----------
    store
        URL or path, see `burst_dask.store.open_store`; by default a directory of this user. An
        open `Store` will do, too.
    workers
        How many worker processes; by default one for each processor.
    cpu
        Threads of each worker process: the setting ``threads`` by its name in the cloud.
    memory
        Of each worker process, such as ``"8GB"`` or a number of bytes: the setting ``memory_limit``.
    fleet
        ``"local"`` starts the workers on this machine, whatever the store; they outlive this
        process. None starts none: bring your own with ``burst worker --session ID --store URL``.
    endpoint_url
        Of an S3-compatible service. Other options of the store, such as ``region``, may be
        given by name as well.
    name
        Shown to people; any text. `attach` takes it in the place of the id while no other session has it.
    progress
        Whether waiting shows a progress bar; None: on a terminal and in a notebook.
    **settings
        Fields of `burst_dask.config.Settings`: `session_timeout`, `absolute_timeout`, `idle_timeout`, ….

    Raises
    ------
    ConfigError
        An argument is wrong.
    StoreError
        The store cannot be used; nothing is left in it.
    FleetError
        Workers could not be started; nothing is left in the store.

    Notes
    -----
    Callbacks (`dask.callbacks`, `dask.diagnostics.ProgressBar`) are not called, as with
    distributed: they are about tasks that run in the client.

    Examples
    --------
    >>> import dask.bag
    >>> burst = Session("memory://session-doctest", workers=1)
    >>> with burst:
    ...     dask.bag.from_sequence(range(10), npartitions=2).sum().compute()
    45
    >>> burst.cleanup(force=True)
    """

    def __init__(
        self,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        workers: int | None = None,
        cpu: int | None = None,
        memory: str | int | None = None,
        fleet: str | None = "local",
        endpoint_url: str | None = None,
        name: str | None = None,
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        options, checked = _split(settings | _size(cpu, memory, settings), endpoint_url)
        wanted = _check_workers(workers, fleet)
        opened = _open(store, options)
        clock, entropy = SystemClock(), Entropy()
        manifest = Manifest(
            session=SessionId(entropy.token(8)),
            name=name,
            created=clock.wall(),
            host=platform.node(),
            versions=own_versions(),
            settings=checked.to_dict(),
        )
        author = Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy)
        self._link = Link(opened, manifest, checked, author, SessionState())
        self._progress = progress
        self._entered: list[dask.config.set] = []
        sync.run(links.create(self._link, wanted))
        if wanted is not None:
            self._start(wanted)

    @classmethod
    def _of(cls, link: Link, progress: bool | None = None) -> Session:
        """Return the session of a link that is there already."""
        session = cls.__new__(cls)
        session._link, session._progress, session._entered = link, progress, []
        return session

    def _start(self, workers: int) -> None:
        """Start the first workers; leave nothing in the store if there cannot be any."""
        self._link.fleet = _fleet_here(self._link)
        try:
            self._link.fleet.ensure(workers)
        except BaseException:
            self.cleanup(force=True)
            raise

    # ------------------------------------------------------------------ what it is

    @property
    def id(self) -> str:
        """The id that `attach` and ``burst worker --session`` take."""
        return self._link.session

    @property
    def store(self) -> str:
        """The URL that opens the same store elsewhere."""
        return self._link.store.url

    @property
    def requests(self) -> dict[str, int]:
        """Store requests that this client has sent, by verb."""
        return requests_of(self._link.store)

    def __repr__(self) -> str:
        return f"Session({self.id!r}, store={self.store!r})"

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a Session cannot be pickled, so no part of a task: give the task id and store, for attach(id, store)"
        )

    def status(self) -> SessionStatus:
        """Return the state of the session and of all its runs, never with a request for each task."""

        return sync.run(session_status(self._link))

    # ------------------------------------------------------------------ submitting

    def compute(self, *collections: Any, traverse: bool = True, optimize_graph: bool = True, **keywords: Any) -> Run:
        """Submit collections and return at once; the run's `result` is what `dask.compute` returns.

        Parameters
        ----------
        *collections
            As of `dask.compute`: collections, and lists, dicts and so on with collections in them.
        traverse, optimize_graph
            As of `dask.compute`.
        **keywords
            ``priority``, ``retries`` and ``resources``, as of `get`.

        Examples
        --------
        >>> burst = Session("memory://compute-doctest", workers=1)
        >>> burst.compute({"a": dask.delayed(1) + 1}).result()
        ({'a': 2},)
        >>> burst.cleanup(force=True)
        """
        asked = Asked.of(keywords)
        found, repack = unpack_collections(*collections, traverse=traverse)
        if not found:
            raise ConfigError("there is nothing to compute: no argument is or holds a Dask collection")
        with shorten_traceback():
            expression = FinalizeCompute(collections_to_expr(found, optimize_graph)).optimize()
            names = list(flatten(expression.__dask_keys__()))
        return self._submit(expression, names, asked, repack)

    def get(self, dsk: Any, keys: Any, **keywords: Any) -> Any:
        """Compute `keys` of a graph and return what Dask's own schedulers return.

        Ctrl-C detaches: it says how to come back to the run, which goes on.

        Parameters
        ----------
        dsk
            An expression, a `HighLevelGraph` or a dict.
        keys
            A key, or nested lists of keys.
        **keywords
            ``priority`` (int), ``retries`` (int) and ``resources`` (dict) for all tasks of the graph
            that are not annotated otherwise. ``num_workers``, ``pool`` and ``chunksize`` say how a
            scheduler in this process runs tasks and are without effect. All others are refused.

        Raises
        ------
        Exception
            A task's own, with the traceback of the worker. The run is cancelled then.

        Examples
        --------
        >>> burst = Session("memory://get-doctest", workers=1)
        >>> burst.get({"x": 1, "y": (sum, ["x", 2])}, ["y", ["x"]])
        (3, (1,))
        >>> burst.cleanup(force=True)
        """
        run = self._submit(dsk, keys, Asked.of(keywords))
        try:
            return run.result()
        except StoreUnavailable:
            raise  # the run goes on without this client
        except Exception:
            run._abandon()
            raise

    __call__ = get

    def _submit(self, graph: Any, names: Any, asked: Asked, repack: Repack | None = None) -> Run:
        plan = submit(self._link, graph, names, asked, repack)
        return Run(self._link, plan, attached=False, progress=self._progress)

    # ------------------------------------------------------------------ the default scheduler

    def __enter__(self) -> Session:
        """Make this the default scheduler, and shuffles such as workers without a common disk can do."""
        # Bags go by the dataframe's shuffle method as well.
        setting = dask.config.set({"scheduler": self, "dataframe.shuffle.method": "tasks"})
        self._entered.append(setting)
        return self

    def __exit__(self, *error: object) -> None:
        """Restore the former defaults; the session and its workers go on."""
        self._entered.pop().__exit__(None, None, None)

    # ------------------------------------------------------------------ workers and the end

    def scale(self, workers: int) -> None:
        """Have that many workers on this machine; 0 stops them, and the work waits.

        Fewer are had by letting all hand over their work and starting anew.
        """
        _check_count(workers)
        if workers < 0:
            raise ConfigError(f"workers={workers}: must be 0 or more")
        link = self._link

        async def scale() -> None:
            await link.follow()
            await link.check_open()
            await link.append(Scale(workers))

        sync.run(scale())
        if link.fleet is None:
            link.fleet = _fleet_here(link)
        if link.fleet.alive() > workers:
            link.fleet.stop()
        link.fleet.ensure(workers)

    def extend(self, seconds: float = 3600.0) -> datetime | None:
        """Let the session last that much longer from now on, at least; it is never shortened.

        An expired session goes on; its workers have gone, and `scale` starts new ones.

        Parameters
        ----------
        seconds
            From now.

        Returns
        -------
        datetime or None
            The new deadline, by the store's clock; None when the session has no limit.

        Raises
        ------
        ConfigError
            The session is closed, or would last beyond its `absolute_timeout`; nothing was changed.
        """
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds < float("inf"):
            raise ConfigError(f"extend(seconds={seconds!r}): must be a number of seconds, more than 0")
        deadline = sync.run(extend(self._link, seconds))
        return None if deadline is None else datetime.fromtimestamp(deadline, tz=UTC)

    def cancel(self, force: bool = False) -> None:
        """Cancel all runs so far, as `Run.cancel` does with one of them; later ones are worked on."""
        sync.run(self._link.append(Cancel(None, force)))

    def cleanup(self, force: bool = False) -> None:
        """Stop this session's workers, nobody else's, and delete what it has stored.

        Without `force`, what was asked for, errors, and the logs that lead to them stay and can still be
        collected; intermediate results and the graphs with their data go. With it nothing stays, and running
        work is cancelled. It may be called again, also after it was interrupted.

        Raises
        ------
        ConfigError
            Work is going on and `force` is false; nothing was done.
        """
        link = self._link
        if not force:
            busy = sync.run(incomplete(link))
            if busy:
                raise ConfigError(
                    f"session {self.id} still works on {', '.join(busy)}; nothing was done. "
                    "Wait, cancel the runs, or cleanup(force=True), which also deletes the results"
                )
        sync.run(close(link))
        fleet = link.fleet or _fleet_here(link)
        fleet.remove()
        sync.run(delete(link, force))


def attach(
    identifier: str,
    store: str | os.PathLike[str] | Store | None = None,
    *,
    progress: bool | None = None,
    **options: str,
) -> Any:
    """Come back to a run or a session, from any process that can read the store.

    Parameters
    ----------
    identifier
        Of a run or of a session, or the name of a session if only one has it.
    store, progress, **options
        As of `Session`.

    Returns
    -------
    Run or Session
        What the id names.

    Raises
    ------
    UnknownId
        The store does not hold it; the message lists what is spelled alike.
    ConfigError
        Several sessions have that name; the message lists them.

    Notes
    -----
    It only reads, so it works for whoever may read the store, and after the session has expired
    or was closed: status, results and stories are there until the session is cleaned up.

    Examples
    --------
    >>> burst = Session("memory://attach-doctest", workers=1)
    >>> run = burst.compute(dask.delayed(sum)([1, 2]))
    >>> attach(run.id, store=burst.store).result()
    (3,)
    >>> burst.cleanup(force=True)
    """
    if not isinstance(identifier, str) or not identifier:
        raise ConfigError(f"{identifier!r} is not the id of a run or session, such as 'k3w9x2mq.7gfh2y' or 'k3w9x2mq'")
    entropy = Entropy()
    author = Author(WorkerId(f"client-{entropy.token(6)}"), SystemClock(), entropy)
    link = sync.run(find(_open(store, options), identifier, author))
    here = link.manifest.host == platform.node() and "memory://" not in link.store.url
    if here and link.workers and sync.run(link.condition()) == "open":
        link.fleet = _fleet_here(link)
    if identifier == link.session or not keys.is_id(identifier) or "." not in identifier:
        return Session._of(link, progress)
    view = sync.run(open_run(link, RunId(identifier)))
    return Run(link, view, attached=True, progress=progress)


# ---------------------------------------------------------------------------- arguments


def _split(given: Mapping[str, Any], endpoint_url: str | None) -> tuple[dict[str, str], Settings]:
    """Return the store's options, and the settings."""
    fields = Settings.__struct_fields__
    options = {} if endpoint_url is None else {"endpoint_url": endpoint_url}
    for name, value in given.items():
        if name in fields:
            continue
        if close := difflib.get_close_matches(name, fields, 1, 0.75):
            raise ConfigError(f"there is no setting {name!r}; did you mean {close[0]!r}?")
        options[name] = value
    return options, Settings.of(**{name: value for name, value in given.items() if name in fields})


def _check_workers(workers: int | None, fleet: str | None) -> int | None:
    if fleet is None:
        if workers is not None:
            raise ConfigError(f"workers={workers} with fleet=None: {_BRING_YOUR_OWN}")
        return None
    if fleet != "local":
        raise ConfigError(f"fleet={fleet!r}: must be 'local' or None; {_BRING_YOUR_OWN}")
    if workers is None:
        return processors()
    _check_count(workers)
    if workers < 1:
        raise ConfigError(f"workers={workers}: a session needs at least 1; {_BRING_YOUR_OWN}")
    return workers


def _check_count(workers: int) -> None:
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise ConfigError(f"workers={workers!r}: must be a whole number")


def _size(cpu: int | None, memory: str | int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `cpu` and `memory` stand for.

    >>> _size(4, "8GB", {})
    {'threads': 4, 'memory_limit': 8000000000}
    """
    found: dict[str, Any] = {}
    for name, value, setting in (("cpu", cpu, "threads"), ("memory", memory, "memory_limit")):
        if value is None:
            continue
        if setting in settings:
            raise ConfigError(f"{name}={value!r} and {setting}={settings[setting]!r} are the same setting: give one")
        found[setting] = value
    if cpu is not None and (isinstance(cpu, bool) or not isinstance(cpu, int) or cpu < 1):
        raise ConfigError(f"cpu={cpu!r}: must be a whole number of threads for each worker, 1 or more")
    if memory is not None:
        try:
            found["memory_limit"] = parse_bytes(memory)
        except (ValueError, TypeError, AttributeError):
            raise ConfigError(
                f"memory={memory!r}: must be an amount of memory for each worker, such as '8GB' or '512MiB'"
            ) from None
        if found["memory_limit"] <= 0:
            raise ConfigError(f"memory={memory!r}: must be more than 0")
    return found


def _open(store: str | os.PathLike[str] | Store | None, options: Mapping[str, Any]) -> Store:
    if isinstance(store, str | os.PathLike) or store is None:
        return open_store(store, **options)
    if options:
        raise ConfigError(f"{', '.join(options)}: an open store takes no options")
    return store


def _fleet_here(link: Link) -> Fleet:
    settings = link.settings
    if "memory://" in link.store.url:
        return InProcessFleet(link.session, link.store, threads=settings.threads)
    return LocalFleet(link.session, link.store.url, threads=settings.threads, memory_limit=settings.memory_limit)
