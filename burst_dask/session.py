"""Sessions: the callable that Dask takes as a scheduler, and the way back to what it left."""

from __future__ import annotations

import difflib
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import dask
from dask._expr import FinalizeCompute
from dask.base import collections_to_expr, unpack_collections
from dask.core import flatten
from dask.utils import shorten_traceback

from burst_dask import link as links
from burst_dask import sync, tasklogs
from burst_dask.calling import Calling
from burst_dask.clock import Entropy, SystemClock
from burst_dask.config import Settings
from burst_dask.environment.packing import pack
from burst_dask.environment.versions import own_versions
from burst_dask.errors import ConfigError, StoreUnavailable, UnknownId
from burst_dask.fleet.base import Fleet
from burst_dask.fleet.inprocess import InProcessFleet
from burst_dask.fleet.local import LocalFleet
from burst_dask.journal.log import Author
from burst_dask.journal.view import RunView, in_parallel
from burst_dask.link import Link, close, delete, incomplete, listed
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Manifest, Scale
from burst_dask.protocol.session import SessionState
from burst_dask.report import RunStatus, SessionStatus
from burst_dask.run import Run, run_status
from burst_dask.store import Hedging, Store, open_store, requests_of
from burst_dask.submission import Asked, Repack, submit
from burst_dask.tasklogs import TaskLog
from burst_dask.worker.memory_watch import processors

_BRING_YOUR_OWN = (
    "with fleet=None the session starts no workers, and you bring your own: burst worker --session ID --store URL"
)


class Session(Calling):
    """A named place in a store, with its workers and its runs; Dask takes it as a scheduler.

    Parameters
    ----------
    store
        URL or path, see `burst_dask.store.open_store`; by default a directory of this user. An
        open `Store` will do, too.
    workers
        How many worker processes; by default one for each processor.
    fleet
        ``"local"`` starts the workers on this machine, whatever the store; they outlive this
        process. None starts none: bring your own with ``burst worker --session ID --store URL``.
    endpoint_url
        Of an S3-compatible service. Other options of the store, such as ``region``, may be
        given by name as well.
    name
        Shown to people; any text.
    code
        Local packages and modules that tasks import, such as ``["src/mypkg", "helpers.py"]``: workers get
        them as they are now.
    packages
        What workers install with pip before they start, such as ``["rasterio>=1.3"]``.
    progress
        Whether waiting shows a progress bar; None: on a terminal and in a notebook.
    **settings
        Fields of `burst_dask.config.Settings`.

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
        fleet: str | None = "local",
        endpoint_url: str | None = None,
        name: str | None = None,
        code: Sequence[str | os.PathLike[str]] = (),
        packages: Sequence[str] = (),
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        options, checked = _split(settings, endpoint_url)
        wanted = _check_workers(workers, fleet)
        packed = pack(code, packages)
        opened = _open(store, options)
        clock, entropy = SystemClock(), Entropy()
        manifest = Manifest(
            session=SessionId(entropy.token(8)),
            name=name,
            created=clock.wall(),
            host=platform.node(),
            versions=own_versions(),
            settings=checked.to_dict(),
            environment=packed.environment,
        )
        author = Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy)
        self._link = Link(opened, manifest, checked, author, SessionState())
        self._progress = progress
        self._entered: list[dask.config.set] = []
        sync.run(links.create(self._link, wanted, packed.archive))
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
        self.flush()

        async def look() -> SessionStatus:
            link = self._link
            await link.follow()
            seen = await link.seen()

            async def one(run: RunId) -> RunStatus | None:
                view = await RunView.open(link.store, run)
                return None if view is None else await run_status(link, view, seen.status)

            runs = await in_parallel(one, link.state.runs)
            return SessionStatus(
                id=link.session,
                name=link.manifest.name,
                store=link.store.url,
                host=link.manifest.host,
                closed=link.state.closed,
                workers=seen.status,
                runs=tuple(run for run in runs if run is not None),
                settings=link.manifest.settings,
                notes=await links.notes(link, seen),
            )

        return sync.run(look())

    def logs(self, worker: str | None = None) -> list[TaskLog]:
        """Return what tasks of all runs have printed, in order of time; see `Run.logs`.

        Parameters
        ----------
        worker
            Only what was printed on the worker of that id.
        """
        return sync.run(tasklogs.of_session(self._link, worker))

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
            ``priority``, ``retries``, ``retry_on``, ``task_timeout`` and ``resources``, as of `get`.

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
            ``priority`` (int), ``retries`` (int), ``retry_on`` (classes of exceptions after which a task is tried
            again, or their names; any by default), ``task_timeout`` (seconds that a try of a task may take) and
            ``resources`` (dict) for all tasks of the graph that are not annotated otherwise (the annotation of a
            time limit is ``timeout``). ``num_workers``, ``pool`` and ``chunksize`` say how a
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
        self.flush()  # futures may be part of the graph
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
        """Restore the former defaults, and make what was submitted durable; the session and its workers go on."""
        self._entered.pop().__exit__(None, None, None)
        self.flush()

    # ------------------------------------------------------------------ workers and the end

    def scale(self, workers: int) -> None:
        """Have that many workers on this machine; 0 stops them, and the work waits.

        Fewer are had by letting all hand over their work and starting anew.
        """
        if workers < 0:
            raise ConfigError(f"workers={workers}: must be 0 or more")
        link = self._link
        if link.state.closed:
            raise ConfigError(f"session {self.id} is closed; open a new one with Session(…)")
        sync.run(link.append(Scale(workers)))
        if link.fleet is None:
            link.fleet = _fleet_here(link)
        if link.fleet.alive() > workers:
            link.fleet.stop()
        link.fleet.ensure(workers)
        link.guard.renew()

    def cleanup(self, force: bool = False) -> None:
        """Stop this session's workers, nobody else's, and delete what it has stored.

        Without `force`, results and the logs that lead to them stay and can still be collected;
        the graphs with their data go. With it nothing stays, and running work is cancelled. It may
        be called again, also after it was interrupted.

        Raises
        ------
        ConfigError
            Work is going on and `force` is false; nothing was done.
        """
        link = self._link
        if not force:
            self.flush()
            busy = sync.run(incomplete(link))
            if busy:
                raise ConfigError(
                    f"session {self.id} still works on {', '.join(busy)}; nothing was done. "
                    "Wait, cancel the runs, or cleanup(force=True), which also deletes the results"
                )
        if "_futures" in vars(self):
            self._futures.close()
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
        Of a run or of a session.
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

    Examples
    --------
    >>> burst = Session("memory://attach-doctest", workers=1)
    >>> run = burst.compute(dask.delayed(sum)([1, 2]))
    >>> attach(run.id, store=burst.store).result()
    (3,)
    >>> burst.cleanup(force=True)
    """
    if not isinstance(identifier, str) or not keys.is_id(identifier):
        raise ConfigError(f"{identifier!r} is not the id of a run or session, such as 'k3w9x2mq.7gfh2y' or 'k3w9x2mq'")
    link = sync.run(_attach(_open(store, options), identifier))
    if "." not in identifier:
        return Session._of(link, progress)
    view = sync.run(_open_run(link, RunId(identifier)))
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
    if isinstance(workers, bool) or not isinstance(workers, int):
        raise ConfigError(f"workers={workers!r}: must be a whole number")
    if workers < 1:
        raise ConfigError(f"workers={workers}: a session needs at least 1; {_BRING_YOUR_OWN}")
    return workers


def _open(store: str | os.PathLike[str] | Store | None, options: Mapping[str, Any]) -> Store:
    if isinstance(store, str | os.PathLike) or store is None:
        opened = open_store(store, **options)
        # A person waits here, and of many reads of a remote store some are slow.
        return Hedging(opened) if _is_remote(opened.url) else opened
    if options:
        raise ConfigError(f"{', '.join(options)}: an open store takes no options")
    return store


def _is_remote(url: str) -> bool:
    """Tell whether reads go over a network.

    >>> _is_remote("s3://bucket/prefix"), _is_remote("file:///data"), _is_remote("slow+file:///data")
    (True, False, True)
    """
    return not url.startswith(("file://", "memory://"))


def _fleet_here(link: Link) -> Fleet:
    settings = link.settings
    if "memory://" in link.store.url:
        return InProcessFleet(link.session, link.store, threads=settings.threads)
    return LocalFleet(link.session, link.store.url, threads=settings.threads, memory_limit=settings.memory_limit)


# ---------------------------------------------------------------------------- requests


async def _attach(store: Store, identifier: str) -> Link:
    session = keys.session_of(identifier)
    clock, entropy = SystemClock(), Entropy()
    link = await links.attach(store, session, Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy))
    if link is None:
        there = [meta.key.removeprefix(keys.SESSIONS) async for meta in listed(store, keys.SESSIONS)]
        raise _unknown(store, "session", session, there)
    here = link.manifest.host == platform.node() and "memory://" not in store.url
    if here and link.workers and not link.state.closed:
        link.fleet = _fleet_here(link)
    return link


async def _open_run(link: Link, run: RunId) -> RunView:
    view = await RunView.open(link.store, run)
    if view is None:
        raise _unknown(link.store, "run", run, link.state.runs)
    return view


def _unknown(store: Store, kind: str, identifier: str, there: Iterable[str]) -> UnknownId:
    close = difflib.get_close_matches(identifier, list(there), 3, 0.5)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "it was cleaned up, or lies in another store: pass store="
    )
    return UnknownId(f"{store.url} holds no {kind} {identifier!r}; {hint}")
