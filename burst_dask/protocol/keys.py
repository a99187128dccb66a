"""The names of all objects: the only module that knows them.

::

    probe-v1                                     the store has passed the probe
    probe/<token>                                what the probe tries, and deletes (`burst_dask.store.probe`)
    sessions/<session>                           manifest; its listing is the list of sessions
    over/<session>                               nobody needs to start workers for it (`burst_dask.api.healing`)
    s/<session>/log/<n>                          session log
    s/<session>/clock                            written to read the store's clock
    s/<session>/workers/<worker>/beat            heartbeat, rewritten
    s/<session>/workers/<worker>/ended           the worker is gone, and why (create-only)
    s/<session>/code/<digest>                    code that workers put on their path: a zip
    s/<session>/differences/<digest>             how packages of some workers differ from the client's
    s/<session>/runs/<run>/plan                  written last: the run exists when it does
    s/<session>/runs/<run>/names                 Dask keys of what was asked for, if too many for the plan
    s/<session>/runs/<run>/complete              somebody has seen that every task has its outcome
    s/<session>/runs/<run>/packs/<n>             shard records, one after another
    s/<session>/runs/<run>/log/<shard>/<n>       shard log
    s/<session>/runs/<run>/segments/<shard>/<s>  large results, one after another
    s/<session>/runs/<run>/logs/<shard>/<s>      what the tasks of one entry have printed

Entry numbers are zero-padded, so that a listing is in log order and its last key is the
newest. A run id is ``<session>.<own part>``: it alone is enough to find the run.
"""

from __future__ import annotations

import re
from functools import cache
from typing import NewType

SessionId = NewType("SessionId", str)
RunId = NewType("RunId", str)
WorkerId = NewType("WorkerId", str)
#: ``"00012"`` is the thirteenth shard of the plan; ``"00012-3"`` what entry 3 split off it.
ShardId = NewType("ShardId", str)

PROBED = "probe-v1"
SESSIONS = "sessions/"
OVER = "over/"
_ENTRY_DIGITS = 8
_SHARD_DIGITS = 5
_ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}(\.[a-z0-9]+)?")


def is_id(text: str) -> bool:
    """Tell whether `text` has the form of a session or run id.

    >>> is_id("k3w9x2mq"), is_id("k3w9x2mq.7gfh"), is_id("no/slash")
    (True, True, False)
    """
    return _ID.fullmatch(text) is not None


def session_of(run: str) -> SessionId:
    """Return the session a run id names, or the session id itself.

    >>> session_of("k3w9x2mq.7gfh")
    'k3w9x2mq'
    """
    return SessionId(run.partition(".")[0])


def manifest(session: SessionId) -> str:
    return SESSIONS + session


def over(session: SessionId) -> str:
    return OVER + session


def session_prefix(session: SessionId) -> str:
    return f"s/{session}/"


def session_log(session: SessionId) -> str:
    return f"s/{session}/log/"


def clock(session: SessionId) -> str:
    return f"s/{session}/clock"


def code(session: SessionId, digest: str) -> str:
    return f"s/{session}/code/{digest}"


def differences(session: SessionId) -> str:
    return f"s/{session}/differences/"


def difference(session: SessionId, digest: str) -> str:
    return differences(session) + digest


def workers(session: SessionId) -> str:
    return f"s/{session}/workers/"


def worker_prefix(session: SessionId, worker: WorkerId) -> str:
    return f"{workers(session)}{worker}/"


def beat(session: SessionId, worker: WorkerId) -> str:
    return worker_prefix(session, worker) + "beat"


def ended(session: SessionId, worker: WorkerId) -> str:
    return worker_prefix(session, worker) + "ended"


def split_worker_key(key: str) -> tuple[WorkerId, str]:
    """Return the worker and ``"beat"`` or ``"ended"`` of a key below `workers`.

    >>> split_worker_key("s/k3w9x2mq/workers/w7/beat")
    ('w7', 'beat')
    """
    worker, kind = key.rsplit("/", 2)[1:]
    return WorkerId(worker), kind


def runs(session: SessionId) -> str:
    return f"s/{session}/runs/"


def run_in(session: SessionId, folder: str) -> RunId:
    """Return the id of the run whose objects lie in a folder directly below `runs`.

    >>> run_in(SessionId("k3w9x2mq"), "7gfh2y")
    'k3w9x2mq.7gfh2y'
    """
    return RunId(f"{session}.{folder}")


def run_prefix(run: RunId) -> str:
    session, _, own = run.partition(".")
    return f"{runs(SessionId(session))}{own}/"


def plan(run: RunId) -> str:
    return run_prefix(run) + "plan"


def names(run: RunId) -> str:
    return run_prefix(run) + "names"


def complete(run: RunId) -> str:
    return run_prefix(run) + "complete"


def pack(run: RunId, number: int) -> str:
    return f"{run_prefix(run)}packs/{number:05d}"


def run_logs(run: RunId) -> str:
    return run_prefix(run) + "log/"


def shard_log(run: RunId, shard: ShardId) -> str:
    return f"{run_logs(run)}{shard}/"


def segment(run: RunId, shard: ShardId, name: str) -> str:
    return f"{run_prefix(run)}segments/{shard}/{name}"


#: How names end of segments of which nothing may be deleted: it saves to look. That none other has outputs is not said.
LASTING = "-kept"


def task_logs(run: RunId, shard: ShardId, name: str) -> str:
    return f"{run_prefix(run)}logs/{shard}/{name}"


def entry(log: str, number: int) -> str:
    """Return the key of entry `number` of the log with that prefix.

    >>> entry("s/a/log/", 12)
    's/a/log/00000012'
    """
    return f"{log}{number:0{_ENTRY_DIGITS}d}"


def entry_number(key: str) -> int:
    """Return the entry number that a log key ends with."""
    return int(key[-_ENTRY_DIGITS:])


def shard_of_entry(key: str) -> ShardId:
    """Return the shard of a key below `run_logs`.

    >>> shard_of_entry("s/a/runs/b/log/00012-3/00000004")
    '00012-3'
    """
    return ShardId(key.rsplit("/", 2)[1])


@cache
def root_shard(number: int) -> ShardId:
    """Return the id of the plan's shard `number`.

    >>> root_shard(12)
    '00012'
    """
    return ShardId(f"{number:0{_SHARD_DIGITS}d}")


def child_shard(parent: ShardId, entry_number: int) -> ShardId:
    """Return the id of the shard that entry `entry_number` of `parent` splits off."""
    return ShardId(f"{parent}-{entry_number}")


def root_number(shard: ShardId) -> int:
    """Return the plan's number of the shard that `shard` is, or was split off.

    >>> root_number(ShardId("00012-3-5"))
    12
    """
    return int(shard.partition("-")[0])
