"""Opening a session again by its name, so that a script goes on where it was."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from burst_dask import sync
from burst_dask.api.finding import There, sessions_in
from burst_dask.aws.secrets import is_shared
from burst_dask.client import opening
from burst_dask.client.ending import extend
from burst_dask.client.link import Link
from burst_dask.client.resuming import Earlier, ResumeWarning
from burst_dask.config import Settings
from burst_dask.environment.versions import own_versions
from burst_dask.journal.log import Author
from burst_dask.protocol.records import Environment, FleetChoice, Manifest
from burst_dask.protocol.session_records import Scale
from burst_dask.store import Store


class Found(NamedTuple):
    """What a name leads to."""

    #: the session that goes on; None when a new one is to be opened
    link: Link | None
    #: the one before it, whose results are used, too
    before: Link | None


async def reopen(store: Store, name: str, author: Author, environment: Environment, signed: bool = False) -> Found:
    """Return the newest session of that name, ready to go on.

    An expired one is extended by its `session_timeout`. One that is closed, or past its absolute timeout, is
    replaced by a new one that may use its results. One of another Python or Dask, or that has brought other code
    or packages, is replaced by one that does not use them: nobody can tell what they are worth to it.

    Parameters
    ----------
    environment
        What the script brings along now.
    signed
        Whether nothing is to be used that is not signed.
    """
    fitting: list[Manifest] = []
    for manifest in _named(await sessions_in(store), name):
        differs = _difference(manifest, environment, signed)
        if differs is None:
            fitting.append(manifest)
            continue
        if not fitting:
            warnings.warn(
                f"session {manifest.session} of the name {name!r} {differs}, so a new session is opened, and nothing "
                f"of it is used again. It is kept until burst cleanup {manifest.session}",
                ResumeWarning,
                stacklevel=2,
            )
        break
    links = [await opening.attach(store, manifest.session, author, signed) for manifest in fitting[:2]]
    found = [link for link in links if link is not None]
    newest, before = (*found, None, None)[:2]
    if newest is None or await _goes_on(newest):
        return Found(newest, before)
    return Found(None, newest)


def _named(there: list[There], name: str) -> Iterator[Manifest]:
    """Yield the manifests of sessions of that name, the newest first."""
    readable = [one for one in there if one.manifest is not None and one.manifest.name == name]
    # By the clock of the store: scripts may have run on several machines.
    readable.sort(key=lambda one: (-one.modified, -one.manifest.created if one.manifest else 0.0))
    return (one.manifest for one in readable if one.manifest is not None)


def _difference(manifest: Manifest, environment: Environment, signed: bool) -> str | None:
    """Say why a session cannot go on with what this process has; None if it can."""
    theirs, ours = manifest.versions, own_versions()
    if (theirs.python, theirs.dask) != (ours.python, ours.dask):
        return f"is of Python {theirs.python} and Dask {theirs.dask}, and here are {ours.python} and {ours.dask}"
    if manifest.environment.code != environment.code:
        return "has other code (code=[…])"
    if manifest.environment.requirements != environment.requirements:
        return "has other packages (packages=[…])"
    if signed and not manifest.key:
        return "is not signed"
    return None


async def _goes_on(link: Link) -> bool:
    """Tell whether a session takes work, after extending it if it has expired."""
    condition = await link.condition()
    if condition != "expired":
        return condition == "open"
    last = link.last_possible()
    left = float("inf") if last is None else last - await link.now()
    seconds = link.settings.session_timeout or left
    if left <= 1.0:  # dates may be in whole seconds
        return False
    await extend(link, min(seconds, left - 1.0))
    return await link.condition() == "open"


def earlier(link: Link, before: Link | None) -> Earlier:
    """Return what a session may use again: its own results, and those of the session before it if workers can."""
    return Earlier(
        link, None if before is not None and not _have_key(link.manifest.fleet, before.manifest.key) else before
    )


def _have_key(fleet: FleetChoice, key: str) -> bool:
    """Tell whether workers of a fleet can verify results of another session, of which `key` says where its key is."""
    if not key or fleet.kind == "local":  # they are of the same user
        return True
    # A cluster's machines, and a role of one session, have the key of the session that they work for, and no other.
    return fleet.kind == "ecs" and is_shared(key) and not fleet.options.get("isolated")


def go_on(link: Link, before: Link | None, workers: int | None, given: Iterable[str], settings: Settings) -> bool:
    """Take up a session that was there, as it was; tell whether workers are to be started here.

    Parameters
    ----------
    workers
        How many the script has; None when it starts none.
    given
        Names of what the script says, settings among them.
    settings
        What it says.
    """
    link.earlier = earlier(link, before)
    _tell_differences(link, workers, given, settings)
    if workers is None:
        return False
    if not link.workers:  # it never said, or was stopped by scale(0)
        sync.run(link.append(Scale(workers)))
    # Those that work elsewhere need no others here; those that are dead here are started again.
    here = link.manifest.fleet.kind != "local" or link.manifest.host == platform.node()
    return here or not sync.run(link.seen()).status.alive


def _tell_differences(link: Link, workers: int | None, given: Iterable[str], settings: Settings) -> None:
    """Warn of what the script says and the session has otherwise."""
    kept, said = link.settings.to_dict(), settings.to_dict()
    names = [name for name in given if name in kept and kept[name] != said[name]]
    differing = [f"{name}={kept[name]!r}, not {said[name]!r}" for name in names]
    if workers is not None and link.workers and workers != link.workers:
        differing.append(f"workers={link.workers}, not {workers}: scale() changes that")
    if differing:
        warnings.warn(
            f"session {link.session} goes on as it was opened: {'; '.join(differing)}", ResumeWarning, stacklevel=4
        )
