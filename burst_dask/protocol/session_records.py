"""What the session log is made of: what clients ask for, and what those who see to the fleet do."""

from __future__ import annotations

import msgspec

from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Record


class Open(msgspec.Struct, frozen=True, tag="open", omit_defaults=True):
    """The session was created."""

    #: SHA-256 of the manifest, in a signed session
    manifest: str = ""


class AddRun(msgspec.Struct, frozen=True, tag="run"):
    """A run was submitted; its plan is in the store."""

    run: RunId
    priority: int = 0


class Attach(msgspec.Struct, frozen=True, tag="attach"):
    """A client waits: workers look for news quickly."""

    client: str


class Extend(msgspec.Struct, frozen=True, tag="extend"):
    """The session lasts until then, in seconds since 1970 by the store's clock; never shortens."""

    until: float


class Scale(msgspec.Struct, frozen=True, tag="scale"):
    """The fleet should have that many workers."""

    workers: int


class Adapt(msgspec.Struct, frozen=True, tag="adapt"):
    """The fleet should have as many workers as the work is worth, within these bounds."""

    minimum: int
    maximum: int
    #: when what waits should be done, in seconds since 1970 by the store's clock; 0: nobody has said so
    done_by: float = 0.0


class Start(msgspec.Struct, frozen=True, tag="start"):
    """Its writer is about to start that many workers: the number of this entry is the number of the start."""

    workers: int


class Afford(msgspec.Struct, frozen=True, tag="afford"):
    """The session may cost that much in all, in USD; it goes on if it was halted."""

    max_cost: float


class Halt(msgspec.Struct, frozen=True, tag="halt"):
    """The session's money is spent: workers take no new work, commit what they have and exit. In USD."""

    spent: float
    max_cost: float


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Workers take no new work of the run; None means of every run so far."""

    run: RunId | None = None
    #: do not let running tasks finish: a worker that runs one ends, and is replaced
    force: bool = False
    #: global numbers of the tasks of `run` that are not to be started; without any, the whole run is meant
    tasks: Bitmap = EMPTY


class Close(msgspec.Struct, frozen=True, tag="close"):
    """The session is over: workers commit what they have and exit."""


SessionAction = Open | AddRun | Attach | Extend | Scale | Adapt | Start | Afford | Halt | Cancel | Close


class SessionEntry(Record, frozen=True, tag="session-entry", kw_only=True):
    """One entry of a session log."""

    KIND = 4
    number: int
    writer: str
    nonce: str
    wrote: float
    action: SessionAction
