"""Every error that burst_dask raises, grouped by what a handler would do about it.

::

    BurstError
    ├── ConfigError             the call is wrong: change the argument it names
    │   └── UnknownId               no such session or run in that store
    ├── StoreError              the store did not do what was asked
    │   ├── StoreUnavailable        it may work later: nothing was lost, try again
    │   ├── StoreAccessDenied       it will not work with these credentials
    │   ├── StoreMissing            there is no such bucket, container or directory
    │   ├── StoreFull               no space left
    │   ├── StoreUnsuitable         it breaks a promise that the protocol rests on
    │   └── CorruptObject           an object is truncated, altered or of a newer format
    │       ├── TornObject              it is cut short or altered, as by a power loss
    │       ├── ResultDiscarded         an intermediate result was deleted when nobody needed it any more
    │       └── UntrustedObject         an object of a signed session is not signed with its key
    ├── KeyMissing              a session is signed, and its key is not here
    ├── GraphError              the graph cannot be stored: nothing was submitted
    │   ├── UnpicklableTask         a task or its arguments cannot be pickled
    │   └── UnsupportedGraph        the graph needs something that workers do not share
    ├── TaskFailed              a task has an error as its outcome
    │   ├── TaskCancelled           it was cancelled before it had begun
    │   ├── WorkerLost              workers died whenever they ran it
    │   ├── TaskTimeout             it ran for longer than its time limit
    │   ├── UnstorableResult        its result cannot be pickled
    │   └── RemoteTaskError         its own exception could not be carried over
    ├── RunCancelled            somebody cancelled the run
    ├── SessionEnded            the session is closed or past its deadline: nobody works on what is left
    ├── WaitTimeout             the time ran out; the run goes on
    ├── FleetError              workers could not be started, or all refused the session
    │   ├── VersionMismatch         worker and client differ in Python or Dask
    │   ├── EnvironmentFailed       the session's code or packages could not be put in place
    │   └── CloudError              the cloud did not do what was asked
    │       ├── AccessDenied            a right is missing, which it names
    │       ├── CredentialsMissing      there are none, or the cloud does not know them
    │       ├── CredentialsExpired      renew them: nothing was lost
    │       ├── CloudUnavailable        throttled or unreachable: try again
    │       └── CloudLimit              a quota of the account is used up
    └── ProtocolError           a rule of PROTOCOL.md is broken: please report it
        ├── IllegalTransition       an entry that the shard's state does not allow
        └── InvariantBroken         what a run left in its store does not agree with itself

A message says what happened, what was kept, and what to do next.
"""

from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any


class BurstError(Exception):
    """Base of every error that burst_dask raises on purpose."""


class ConfigError(BurstError, ValueError):
    """A setting or argument is wrong; the message names it and a value that would do."""


class UnknownId(ConfigError, LookupError):
    """The store holds no session or run of that id; the message lists near misses."""


class StoreError(BurstError):
    """The store did not do what was asked of it."""


class StoreUnavailable(StoreError, ConnectionError):
    """Throttled, timed out or unreachable, even after the retries; trying later may help."""


class StoreAccessDenied(StoreError, PermissionError):
    """The credentials are missing, expired or not allowed to do this."""


class StoreMissing(StoreError, FileNotFoundError):
    """There is no such bucket, container or directory."""


class StoreFull(StoreError, OSError):
    """The store has no space left; what was committed before stays readable."""


class StoreUnsuitable(StoreError):
    """The store breaks a promise that the protocol rests on (PROTOCOL.md, "What a store must do")."""


class CorruptObject(StoreError):
    """An object is truncated or altered, or was written by a newer version; the message names it."""


class TornObject(CorruptObject):
    """An object is cut short or is not what was written, as a power loss leaves what was not synced."""


class ResultDiscarded(CorruptObject):
    """An intermediate result was deleted when its last consumer had committed (`Settings.keep_intermediates`)."""


class UntrustedObject(CorruptObject):
    """What a signed session has stored is not signed with its key; nothing of it was unpickled.

    It was altered, moved or cut, or written by somebody without the key.
    """


class KeyMissing(BurstError, LookupError):
    """The session is signed, and its key is not here or may not be read; nothing of it was read.

    Attributes
    ----------
    reference
        Where it was looked for, as `burst_dask.trust.keyring` writes it.
    """

    reference: str = ""


class GraphError(BurstError):
    """The graph cannot be stored. Nothing was submitted."""


class UnpicklableTask(GraphError, TypeError):
    """A task cannot be pickled; the message names its key and the object at fault."""


class UnsupportedGraph(GraphError, NotImplementedError):
    """The graph needs something that workers do not share, such as a local disk."""


class TaskFailed(BurstError):
    """A task has an error as its outcome."""


class TaskCancelled(TaskFailed, CancelledError):
    """The task was cancelled before it had begun, or needs one that was."""


class WorkerLost(TaskFailed):
    """Workers died each time they ran the task (killed, out of memory, crashed in native code)."""


class TaskTimeout(TaskFailed, TimeoutError):
    """The task ran for longer than its time limit, and was given up."""


class UnstorableResult(TaskFailed, TypeError):
    """A task's result cannot be pickled, and is needed outside of the worker that computed it."""


class RemoteTaskError(TaskFailed):
    """Stands in for a task's exception that could not be pickled, or not be unpickled here."""


class RunCancelled(BurstError):
    """The run was cancelled before it was complete."""


class SessionEnded(BurstError):
    """The session is closed or past its deadline, and its workers have gone. What was committed is kept."""


class WaitTimeout(BurstError, TimeoutError):
    """The time given to wait ran out. The run goes on, and nothing of it is lost.

    Attributes
    ----------
    results
        What was done by then, if it was to be collected.
    """

    results: Any = None


class FleetError(BurstError):
    """Workers could not be started, or every worker refused the session."""


class VersionMismatch(FleetError):
    """Worker and client differ in Python minor version or in Dask version."""


class EnvironmentFailed(FleetError):
    """The session's code could not be unpacked, or its packages not be installed, on a worker."""


class CloudError(FleetError):
    """The cloud that workers run on did not do what was asked; the message names the call."""


class AccessDenied(CloudError, PermissionError):
    """A right is missing.

    Attributes
    ----------
    action
        Which one, as IAM writes it: ``ecs:RunTask``.
    """

    action: str = ""


class CredentialsMissing(CloudError):
    """There are no credentials, or the cloud does not know them."""


class CredentialsExpired(CloudError):
    """The credentials have expired. Workers have their own, and go on."""


class CloudUnavailable(CloudError, ConnectionError):
    """Throttled or unreachable, also after retries; trying later may help."""


class CloudLimit(CloudError):
    """A quota of the account is used up, or would be."""


class ProtocolError(BurstError):
    """A rule of PROTOCOL.md is broken. This is a bug in burst_dask or in the store."""


class IllegalTransition(ProtocolError):
    """An entry that the shard's folded state does not allow; carries the shard's story.

    Parameters
    ----------
    reason
        The rule that the entry breaks.
    story
        The entries that led here in plain words, oldest first.
    """

    def __init__(self, reason: str, story: tuple[str, ...] = ()) -> None:
        super().__init__(reason, story)
        self.reason = reason
        self.story = story

    def __str__(self) -> str:
        return "\n  ".join((self.reason, *self.story))


class InvariantBroken(ProtocolError):
    """What lies in the store breaks rules of PROTOCOL.md; the message lists them, with the stories of the shards."""
