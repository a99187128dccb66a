"""Sessions: the callable that Dask takes as a scheduler, and the way back to what it left."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NoReturn

import dask

from burst_dask import sync
from burst_dask.api.arguments import (
    check_cost,
    check_count,
    check_name,
    check_resume,
    check_seconds,
    check_signed,
    size,
    split,
)
from burst_dask.api.cleaning import remove
from burst_dask.api.finding import find, open_run
from burst_dask.api.fleets import can_start, check_resumed, choose, fleet_of, key_place, made_ready
from burst_dask.api.places import address_of, opened
from burst_dask.api.reopening import Found, earlier, go_on, reopen
from burst_dask.api.run import Run
from burst_dask.api.scheduling import Scheduling
from burst_dask.client import opening, tasklogs
from burst_dask.client.ending import afford, close, delete, extend, incomplete
from burst_dask.client.link import Link
from burst_dask.client.statuses import session_status
from burst_dask.client.tasklogs import TaskLog
from burst_dask.clock import Entropy, SystemClock
from burst_dask.environment.packing import pack
from burst_dask.environment.versions import own_versions
from burst_dask.errors import BurstError, ConfigError, FleetError
from burst_dask.fleet.base import Logging, ProcessLog
from burst_dask.fleet.ecs import RoleNotKnownYet
from burst_dask.journal.log import Author
from burst_dask.protocol import keys
from burst_dask.protocol.keys import RunId, SessionId, WorkerId
from burst_dask.protocol.records import Manifest
from burst_dask.protocol.session import SessionState
from burst_dask.protocol.session_records import Adapt, Cancel, Scale
from burst_dask.report.tables import SessionStatus
from burst_dask.store import Store, requests_of


class Session(Scheduling):
    """A named place in a store, with its workers and its runs; Dask takes it as a scheduler.

    Parameters
    ----------
    store
        URL or path, see `burst_dask.store.open_store`; by default a directory of this user. An
        open `Store` will do, too.
    workers
        How many worker processes; by default one for each processor, and 4 on ECS.
    cpu
        Threads of each worker process: the setting ``threads`` by its name in the cloud. On ECS each of them has a
        processor, and 0.25 and 0.5 are less than one.
    memory
        Of each worker process, such as ``"8GB"`` or a number of bytes: the setting ``memory_limit``.
    fleet
        ``"local"`` starts the workers on this machine, whatever the store; they outlive this
        process. ``"ecs"`` starts them on Amazon ECS, in the stack of ``burst setup aws``. ``"auto"`` is that for
        a store on Amazon S3 where the stack stands, and says so, and local otherwise.
        ``"distributed"`` starts them inside the cluster of this process's `distributed.Client`.
        None starts none: bring your own with ``burst worker --session ID --store URL``.
    endpoint_url
        Of an S3-compatible service. Other options of the store, such as ``region``, may be
        given by name as well.
    name
        Shown to people; any text. `attach` takes it in the place of the id while no other session has it.
    resume
        Go on with the newest session of that `name`, if there is one; see Notes.
    code
        Local packages and modules that tasks import, such as ``["src/mypkg", "helpers.py"]``: workers get
        them as they are now.
    packages
        What workers install with pip before they start, such as ``["rasterio>=1.3"]``.
    signed
        Sign what the session stores with a key that is kept outside of the store, so that its workers and clients
        refuse what anybody else has written there; see Notes.
    progress
        Whether waiting shows a progress bar; None: on a terminal and in a notebook.
    **settings
        Fields of `burst_dask.config.Settings`: `session_timeout`, `absolute_timeout`, `idle_timeout`, …. On ECS also
        those of `burst_dask.fleet.ecs.EcsArguments`: `launch_type` (``"FARGATE"`` or ``"EC2"``), `instance_type`,
        `spot` (True, False or ``"with-fallback"``), `arch`, `subnets`, `security_groups`, `image`, `tags` and
        `isolated` (True: workers have a role of their own, which may do nothing outside of this session).

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
    **Resuming.** With ``resume=True`` the same script may run again and again, whatever became of it before: what it
    submits is computed only as far as an earlier run of the session has no result of it. A run that computes the
    same goes on. In a changed graph the results of tasks with the same keys are used, if they were stored: what was
    asked for, what went from one worker to another, and what took long. Failed tasks are tried again.

    Keys that hold a token of Dask's are trusted, and those that you have chosen (``dask_key_name=``, ``key=``) as long
    as function, arguments and all that the task depends on are the same. Keys that are others in each process, as
    those of ``dask.delayed`` without ``pure=True`` are, are named in a `ResumeWarning`.

    The session keeps its settings and its number of workers. If it has expired it is extended; if it is closed or past
    its `absolute_timeout`, a new one is opened that uses its results as long as they are there. If Python, Dask, `code`
    or `packages` have changed, a new session is opened that uses nothing.

    **Signing.** Tasks and results are pickles, so whoever may write to the store could run code where they are
    unpickled. With ``signed=True`` that takes the session's key, too. On ECS the key is a secret in AWS Secrets
    Manager, which workers and clients read (0.40 USD a month until `cleanup`). Else it is a file of this user, in the
    folder that ``BURST_KEYS`` names or in one below that for user data: to come back from another machine, copy it
    there. That is why signing is asked for: without it the id of a run is all that it takes. With `resume`, only
    signed sessions go on. SECURITY.md says what signing does not prevent.

    **Callbacks** (`dask.callbacks`, `dask.diagnostics.ProgressBar`) are not called, as with
    distributed: they are about tasks that run in the client.

    Examples
    --------
    >>> import dask.bag
    >>> burst = Session("memory://session-doctest", workers=1)
    >>> with burst:
    ...     dask.bag.from_sequence(range(10), npartitions=2).sum().compute()
    45
    >>> again = Session("memory://session-doctest", name="nightly", resume=True, workers=1)
    >>> again.id == Session(again.store, name="nightly", resume=True, workers=1).id
    True
    >>> burst.cleanup(force=True), again.cleanup(force=True)
    (None, None)
    """

    def __init__(  # noqa: PLR0913 - all by name, and each of its own
        self,
        store: str | os.PathLike[str] | Store | None = None,
        *,
        workers: int | None = None,
        cpu: float | None = None,
        memory: str | int | None = None,
        fleet: str | None = "auto",
        endpoint_url: str | None = None,
        name: str | None = None,
        resume: bool = False,
        signed: bool = False,
        code: Sequence[str | os.PathLike[str]] = (),
        packages: Sequence[str] = (),
        progress: bool | None = None,
        **settings: Any,
    ) -> None:
        given = split(settings | size(cpu, memory, settings), endpoint_url)
        options = given.options
        check_name(name)
        check_resume(resume, name)
        check_signed(signed)
        chosen = choose(fleet, address_of(store, options), workers, cpu, given)
        packed = pack(code, packages)
        place = opened(store, options)
        clock, entropy = SystemClock(), Entropy()
        author = Author(WorkerId(f"client-{entropy.token(6)}"), clock, entropy)
        self._progress = progress
        self._entered: list[dask.config.set] = []
        found = Found(None, None)
        if resume and name is not None:
            found = sync.run(reopen(place, name, author, packed.environment, signed))
        if found.link is not None:
            check_resumed(found.link, chosen.fleet)
            link = self._link = found.link
            said = settings | size(cpu, memory, settings)
            if go_on(link, found.before, chosen.workers, said, chosen.settings) and link.workers:
                link.fleet = fleet_of(link)
                sync.run(link.start_workers(eager=True))  # what the session has stays when there cannot be any
            return
        session = SessionId(entropy.token(8))
        with made_ready(chosen.fleet, session, place.url, found.before) as its_fleet:
            manifest = Manifest(
                session=session,
                name=name,
                created=clock.wall(),
                host=platform.node(),
                versions=own_versions(),
                settings=chosen.settings.to_dict(),
                environment=packed.environment,
                fleet=its_fleet,
                key=key_place(its_fleet, session) if signed else "",
            )
            place = opening.keyed(place, manifest, author) if signed else place
            self._link = Link(place, manifest, chosen.settings, author, SessionState())
            sync.run(opening.create(self._link, chosen.workers, packed.archive))
            if resume:
                self._link.earlier = earlier(self._link, found.before)
            if chosen.workers is not None:
                self._start()

    @classmethod
    def _of(cls, link: Link, progress: bool | None = None) -> Session:
        """Return the session of a link that is there already."""
        session = cls.__new__(cls)
        session._link, session._progress, session._entered = link, progress, []
        return session

    def _start(self) -> None:
        """Start the first workers; leave nothing in the store if there cannot be any."""
        self._link.fleet = fleet = fleet_of(self._link)
        try:
            sync.run(self._link.start_workers(eager=True))
        except RoleNotKnownYet as error:  # to give up would be to begin anew with a role as young
            said = f"no worker of session {self.id} was started yet: {error}"
            self._link.warn(f"{said}. It is tried again a minute from now, while a client waits")
        except BaseException:
            # What stood in the way of the start may be in the way of these; each is tried all the same.
            with contextlib.suppress(BurstError):
                sync.run(close(self._link))
            with contextlib.suppress(FleetError):
                fleet.remove()
            sync.run(delete(self._link, True))
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
        signed = ", signed=True" if self._link.manifest.key else ""
        return f"Session({self.id!r}, store={self.store!r}{signed})"

    def __reduce__(self) -> NoReturn:
        raise ConfigError(
            "a Session cannot be pickled, so no part of a task: give the task id and store, for attach(id, store)"
        )

    def status(self) -> SessionStatus:
        """Return the state of the session and of all its runs, never with a request for each task."""
        self.flush()

        return sync.run(session_status(self._link))

    def logs(self, worker: str | None = None) -> list[TaskLog]:
        """Return what tasks of all runs have printed, in order of time; see `Run.logs`.

        Parameters
        ----------
        worker
            Only what was printed on the worker of that id.
        """
        return sync.run(tasklogs.of_session(self._link, worker))

    def worker_logs(self, worker: str | None = None) -> list[ProcessLog]:
        """Return what the processes of workers have written to their standard output and error, oldest first.

        They are files of this machine, or streams of the log group on ECS. Workers that were started by hand write
        elsewhere. What tasks have printed is also in `logs`.

        Parameters
        ----------
        worker
            Only where the worker of that id ran.
        """
        fleet = self._link.fleet or fleet_of(self._link)
        return fleet.process_logs(worker) if isinstance(fleet, Logging) else []

    # ------------------------------------------------------------------ workers and the end

    def scale(self, workers: int) -> None:
        """Have that many workers, on this machine or where the session has them; 0 stops them, and the work waits.

        On this machine fewer are had by letting all hand over their work and starting anew.
        """
        check_count(workers)
        if workers < 0:
            raise ConfigError(f"workers={workers}: must be 0 or more")
        self._resize(Scale(workers))

    def adapt(self, minimum: int = 0, maximum: int = 10, *, within: float | None = None) -> None:
        """Have as many workers as the work is worth, within these bounds.

        A fleet begins small, and grows when tasks prove long: a worker is started when there is at least a
        task and two minutes of work for it, and the money for that. It grows further where that ends the work in time:
        before the session does, or within what is said here. Workers without work leave by themselves
        (`idle_timeout`), and there may be fewer than `minimum` while nothing waits.

        Parameters
        ----------
        minimum, maximum
            Workers.
        within
            Seconds from now within which what waits should be done. It is no promise: how long tasks take is known
            when the first ones have ended. `status` says so when that cannot be in time.

        Examples
        --------
        >>> from burst_dask import Session
        >>> burst = Session("memory://adapt-doctest", workers=1, progress=False)
        >>> burst.adapt(maximum=2)
        >>> burst.submit(sum, [1, 2]).result()
        3
        >>> burst.cleanup(force=True)
        """
        for workers in (minimum, maximum):
            check_count(workers)
        if not 0 <= minimum <= maximum or not maximum:
            raise ConfigError(f"adapt(minimum={minimum}, maximum={maximum}): must be 0 <= minimum <= maximum, and some")
        done_by = 0.0
        if within is not None:
            check_seconds("adapt: within", within)
            done_by = sync.run(self._link.now()) + within
        self._resize(Adapt(minimum, maximum, done_by))

    def _resize(self, goal: Scale | Adapt) -> None:
        link = self._link

        async def say() -> None:
            await link.follow()
            await link.check_open()
            await link.append(goal)

        sync.run(say())
        if link.fleet is None:
            link.fleet = fleet_of(link)
        link.fleet.reduce(link.workers or 0)
        sync.run(link.start_workers(eager=True))
        link.guard.renew()

    def extend(self, seconds: float | None = None, *, max_cost: float | None = None) -> datetime | None:
        """Let the session last longer from now on, at least, or cost more; the deadline never becomes earlier.

        An expired or halted session goes on; its workers have gone, and `scale` starts new ones.

        Parameters
        ----------
        seconds
            From now; an hour if neither is given.
        max_cost
            USD that the session may cost in all, what is spent included.

        Returns
        -------
        datetime or None
            The deadline, by the store's clock; None when the session has no limit.

        Raises
        ------
        ConfigError
            The session is closed, or would last beyond its `absolute_timeout`; nothing was changed.
        """
        if max_cost is not None:
            sync.run(afford(self._link, check_cost(max_cost)))
        elif seconds is None:
            seconds = 3600.0
        if seconds is None:
            deadline = sync.run(self._link.deadline())
        else:
            check_seconds("extend: seconds", seconds)
            deadline = sync.run(extend(self._link, seconds))
        return None if deadline is None else datetime.fromtimestamp(deadline, tz=UTC)

    def cancel(self, force: bool = False) -> None:
        """Cancel all runs and calls so far, as `Run.cancel` does with one run; later ones are worked on."""
        try:
            self.flush()  # a call that was not yet written would become a later one
        finally:
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
        remove(link, link.fleet or fleet_of(link), force)


def attach(
    identifier: str,
    store: str | os.PathLike[str] | Store | None = None,
    *,
    signed: bool = False,
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
    signed
        Refuse a session that is not signed. One that is, is verified in any case; this tells a signed session from
        another one that somebody has put in its place, on a machine that has no key of it.

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
    KeyMissing
        The session is signed, and its key is not here; the message says where it is to be put.
    UntrustedObject
        It is not what its key vouches for, or not signed.

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
    if not isinstance(identifier, str) or not identifier.strip():
        raise ConfigError(f"{identifier!r} is not the id of a run or session, such as 'k3w9x2mq.7gfh2y' or 'k3w9x2mq'")
    identifier = identifier.strip()  # as it comes from a line that was copied
    entropy = Entropy()
    author = Author(WorkerId(f"client-{entropy.token(6)}"), SystemClock(), entropy)
    link = sync.run(find(opened(store, options), identifier, author, signed))
    if can_start(link) and link.workers and sync.run(link.condition()) == "open":
        link.fleet = fleet_of(link)
    if "." not in identifier or keys.session_of(identifier) != link.session:  # a name may have a dot in it
        return Session._of(link, progress)
    view = sync.run(open_run(link, RunId(identifier)))
    return Run(link, view, attached=True, progress=progress)
