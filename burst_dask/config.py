"""Settings of a session: what can be tuned, its default, and why the default is what it is."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from burst_dask.errors import ConfigError

_MAY_BE_ZERO = {"retry_delay", "worker_price"}
_MAY_BE_NONE = {"session_timeout", "absolute_timeout", "max_cost", "max_hourly_cost"}
#: Seconds that a session may be asked to last at most, 100 years: beyond, dates cannot be told.
LONGEST = 100 * 365 * 86_400.0


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What workers and clients of a session go by; kept in its manifest. Times are in seconds.

    Raises
    ------
    ConfigError
        From `Settings.of`: an unknown name or a value out of range.
    """

    #: how often a worker renews its heartbeat. A PUT costs 5 USD a million: 0.002 USD an hour
    heartbeat: float = 10.0
    #: a holder whose heartbeat is older than this, by the store's clock, may be taken over:
    #: three heartbeats, so that one lost or slow PUT is not a death
    lease: float = 30.0
    #: a worker without work for this long exits
    idle_timeout: float = 300.0
    #: the session ends so long after the last sign of a client: its opening, a submission, an attaching or
    #: waiting client, an extension. Past its deadline workers take no new work, commit what they have and exit;
    #: results stay, and `Session.extend` lets it go on. A week, because work of days must not end because
    #: nobody looked: it bounds what a forgotten task that never ends may cost. None: no limit
    session_timeout: float | None = 604_800.0
    #: … and so long after its opening at the latest, whatever clients do; None: no limit. None, because workers
    #: without work leave by themselves, so that a session that lives long costs nothing but storage
    absolute_timeout: float | None = None
    #: bounds of the exponential backoff of a worker that finds nothing to do
    idle_poll_min: float = 1.0
    idle_poll_max: float = 30.0
    #: first and longest wait between looks for a result that others depend on, and between
    #: looks into the session log while a client waits
    wait_poll_min: float = 0.05
    wait_poll_max: float = 2.0
    #: for how long after a client's last sign workers look into the session log quickly
    attached_for: float = 300.0
    #: how often a busy worker looks into the session log, for cancellations and closing
    session_poll: float = 10.0
    #: a commit takes everything that finished within this time: at 40 ms a PUT about 1 % of it
    commit_interval: float = 5.0
    #: the same when another shard depends on what finished
    commit_interval_wanted: float = 1.0
    #: seconds of work that a holder reserves ahead; the rest of its shard can be split off
    reserve_ahead: float = 5.0
    #: splitting moves work that takes at least this long: two PUTs must pay
    split_from: float = 1.0
    #: shards that a worker holds at once; with so many, one that only waits for others is released
    held_at_once: int = 16
    #: in a run of so many shards idle workers look at heartbeats rather than at all logs: these soon fill
    #: more than a page of a listing
    large_run: int = 500
    #: whether idle workers run a second copy of a task that takes much longer than others; the first one to end
    #: counts. Tasks annotated with ``impure=True`` never have one
    backups: bool = True
    #: results up to this many bytes each ride in the entry itself …
    inline_result: int = 16_384
    #: … up to this many bytes an entry
    inline_entry: int = 262_144
    #: whether results that nobody asked for stay in the store for as long as the session. By default workers delete
    #: them when nobody needs them any more: the store's bill then does not grow with all that a run ever stored.
    #: Results that were asked for, errors, and the inputs of tasks that failed always stay
    keep_intermediates: bool = False
    #: how often a worker looks for such results while its shards go on; at the end of a shard it looks at once
    discard_interval: float = 10.0
    #: how long a worker that got SIGTERM lets running tasks end before it hands over
    release_grace: float = 1.0
    #: how many workers a task may lose, alone, before its outcome is WorkerLost
    lost_workers: int = 3
    #: pause before a task that failed is tried again, if it may be (`retries`); doubles with each try, up to a
    #: minute: most of what goes away by itself (throttling, a connection) has by then. 0 tries at once
    retry_delay: float = 1.0
    #: bytes; None divides the machine's memory by its workers. Past 0.95 of it a worker is replaced
    memory_limit: int | None = None
    #: fraction of the memory limit beyond which results are spilled to disk
    spill_at: float = 0.6
    #: threads of each worker process
    threads: int = 1
    #: what each worker has of resources that tasks ask for in annotations, such as {"GPU": 1}
    resources: dict[str, float] = {}
    #: USD an hour that a worker costs, for what status says of the cost so far; those on this machine cost nothing
    worker_price: float = 0.0
    #: USD that the session may cost in all: workers and requests. Then workers take no new work, commit what they
    #: have and exit. None: no limit
    max_cost: float | None = None
    #: USD an hour that its workers may cost together; None: no limit
    max_hourly_cost: float | None = None

    @classmethod
    def of(cls, **values: Any) -> Settings:
        """Return checked settings.

        Examples
        --------
        >>> Settings.of(lease=60).lease
        60.0
        """
        try:
            settings = msgspec.convert(values, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"setting refused: {error}; known settings are {', '.join(cls.__struct_fields__)}"
            ) from None
        settings.check()
        return settings

    def check(self) -> None:
        """Raise `ConfigError` for values that cannot work."""
        for name in self.__struct_fields__:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not (value > 0 or (name in _MAY_BE_ZERO and value == 0)):
                hint = "; None means no limit" if name in _MAY_BE_NONE else ""
                raise ConfigError(f"{name}={value!r}: must be more than 0{hint}")
            if not math.isfinite(value) or (name in _MAY_BE_NONE and value > LONGEST):
                hint = f"at most {LONGEST:g} seconds; None means no limit" if name in _MAY_BE_NONE else "finite"
                raise ConfigError(f"{name}={value!r}: must be {hint}")
        if self.lease < 2 * self.heartbeat:
            raise ConfigError(
                f"lease={self.lease} is under two heartbeats of {self.heartbeat}: a single slow PUT would be a death"
            )
        for low, high in (("idle_poll_min", "idle_poll_max"), ("wait_poll_min", "wait_poll_max")):
            if getattr(self, low) > getattr(self, high):
                raise ConfigError(f"{low}={getattr(self, low)} is more than {high}={getattr(self, high)}")

    def to_dict(self) -> dict[str, Any]:
        return msgspec.structs.asdict(self)
