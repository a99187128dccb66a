"""What is stored: every record as a frozen struct, and the only module that encodes them.

`encode` and `decode` carry a record to and from the bytes of one object. Positions of tasks
are local to the plan's shard (0 is its first task in `dask.order` order), also in shards that
were split off it; *global* numbers count through the whole run. Behind the last of its tasks
they go on with the run's *externals*: results of other runs of the session.
"""

from __future__ import annotations

from bisect import bisect_right
from operator import attrgetter
from typing import Any, ClassVar, NamedTuple, TypeVar

import msgspec

from burst_dask.errors import CorruptObject
from burst_dask.protocol import frames
from burst_dask.protocol.bitmap import EMPTY, Bitmap
from burst_dask.protocol.keys import RunId, SessionId, ShardId, WorkerId


class Record(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Base of what is an object of its own in the store."""

    KIND: ClassVar[int]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """A range of bytes of a pack."""

    pack: int
    start: int
    end: int


class Location(NamedTuple):
    """Where the stored outcome of a task lies: a blob (`frames.seal`) in one object."""

    #: index into `ShardIndex.objects`
    object: int
    start: int
    end: int


# ---------------------------------------------------------------------------- the graph


class ShardInfo(msgspec.Struct, frozen=True, array_like=True):
    """What the plan says of a shard, enough to choose one without reading it."""

    #: global number of its first task
    first: int
    count: int
    #: where its `ShardRecord` lies
    place: Place
    #: plan numbers of the shards that its tasks depend on
    upstream: tuple[int, ...]
    #: tasks that need nothing from other shards or runs, not even through others
    free: int
    #: tasks whose results were asked for
    outputs: int
    #: positions in `Plan.externals` of what its tasks depend on
    externals: tuple[int, ...] = ()


class Plan(Record, frozen=True, tag="plan", kw_only=True):
    """One submitted graph. Written after all that it names (PROTOCOL.md rule 7)."""

    KIND = 1
    run: RunId
    tasks: int
    shards: tuple[ShardInfo, ...]
    #: pickled nested list, tuple or single one of global numbers: the shape of what was asked for
    outputs: bytes
    #: seconds since 1970 by the client's clock, for people
    created: float
    #: bytes of packs, for people
    size: int
    priority: int = 0
    #: results of other runs that tasks depend on: run, global number there. Here, number i of them has the
    #: global number ``tasks + i``
    externals: tuple[tuple[RunId, int], ...] = ()
    #: pickled list of the Dask keys of what was asked for, in the order of `outputs`; empty when that is long,
    #: and lies in an object of its own (`keys.names`)
    names: bytes = b""

    def locate(self, number: int) -> tuple[int, int]:
        """Return the plan shard of the task with that global number, and its position there."""
        place = bisect_right(self.shards, number, key=attrgetter("first")) - 1
        return place, number - self.shards[place].first


class Names(Record, frozen=True, tag="names", kw_only=True):
    """What `Plan.names` is too small for."""

    KIND = 9
    keys: bytes


class ShardRecord(Record, frozen=True, tag="shard", kw_only=True):
    """The task records of one shard: a column for each field, a row for each task.

    Stored by column because a shard is read whole, and a column of numbers or of similar keys
    compresses and decodes many times better than rows.
    """

    KIND = 2
    #: plan number
    shard: int
    #: global number of the first task
    first: int
    #: pickled list of the Dask keys of the tasks
    keys: bytes
    #: for each task, the global numbers of the tasks and externals that it depends on, in ascending order
    dependencies: tuple[tuple[int, ...], ...]
    #: pickled dict, global number -> Dask key, of dependencies outside the shard, externals among them
    foreign_keys: bytes
    #: position -> plan numbers of the other shards that hold a dependent of it
    dependents: dict[int, tuple[int, ...]]
    #: positions whose results were asked for
    outputs: Bitmap
    #: position -> {"retries": int, "priority": int, "resources": {str: float}, "timeout": seconds, "retry_on": names,
    #: "retry_delay": seconds}
    annotations: dict[int, dict[str, Any]]
    #: one pickle of the list of runnable nodes, see `burst_dask.serialize`
    payload: bytes
    #: the payload's out-of-band buffers, each a blob
    buffers: tuple[Place, ...]
    #: position -> fingerprint of the task, see `burst_dask.graph.prints`; only in sessions that are resumed
    prints: dict[int, bytes] = {}

    @property
    def wanted(self) -> Bitmap:
        """Positions whose results somebody outside the shard needs."""
        return self.outputs | Bitmap.of(self.dependents)


# ---------------------------------------------------------------------------- the shard log


class Claim(msgspec.Struct, frozen=True, tag="claim"):
    """The shard was free and is now held by the writer."""

    reserved: Bitmap


class Outcomes(msgspec.Struct, frozen=True, omit_defaults=True):
    """What became of some tasks. Several of these merge by union."""

    done: Bitmap = EMPTY
    failed: Bitmap = EMPTY
    #: where results and errors lie; a result that only its own shard needs may have none
    stored: dict[int, Location] = {}
    #: global number of the first cause -> positions that failed because of it, without running
    upstream: dict[int, Bitmap] = {}
    #: time spent running tasks, and how many that were
    seconds: float = 0.0
    ran: int = 0
    #: name of an object with `Logs` -> positions of tasks whose output it has
    logs: dict[str, Bitmap] = {}
    #: position -> how often it has been tried, of tasks that failed and are to be tried again
    tries: dict[int, int] = {}

    #: of `failed`, those that were cancelled, or need what was; the others failed
    cancelled: Bitmap = EMPTY

    @property
    def all(self) -> Bitmap:
        return self.done | self.failed


class Commit(msgspec.Struct, frozen=True, tag="commit"):
    """The holder's tasks have outcomes; from now on it may start what is reserved."""

    outcomes: Outcomes
    reserved: Bitmap
    #: names of segments that `outcomes.stored` refers to beyond those already known
    segments: tuple[str, ...] = ()
    #: places in `ShardIndex.objects` of segments that are deleted next: as of `Discard`
    discarded: tuple[int, ...] = ()


class Release(msgspec.Struct, frozen=True, tag="release"):
    """The holder lets the shard go, with what it has finished."""

    outcomes: Outcomes
    reason: str
    segments: tuple[str, ...] = ()


class Takeover(msgspec.Struct, frozen=True, tag="takeover"):
    """The holder's lease is dead; the writer holds the shard from now on."""

    lost: WorkerId
    cause: str
    reserved: Bitmap


class Split(msgspec.Struct, frozen=True, tag="split"):
    """The writer, an idle worker, takes tasks that nobody has reserved as a new child shard."""

    child: ShardId
    tasks: Bitmap


class Backup(msgspec.Struct, frozen=True, tag="backup"):
    """A second worker finished a straggler's task first."""

    outcomes: Outcomes
    segments: tuple[str, ...] = ()


class Discard(msgspec.Struct, frozen=True, tag="discard"):
    """Nobody needs a result any more that lies in these segments; they are deleted next (PROTOCOL.md, "Discarding")."""

    #: places in `ShardIndex.objects`
    discarded: tuple[int, ...]


Action = Claim | Commit | Release | Takeover | Split | Backup | Discard


class ShardIndex(msgspec.Struct, frozen=True, omit_defaults=True):
    """The whole state of a shard after an entry: what folding the log up to it gives."""

    #: positions of the tasks that belong to this shard
    tasks: Bitmap
    holder: WorkerId | None = None
    outcomes: Outcomes = Outcomes()
    #: what `Location.object` counts: ``"@<n>"`` is entry n, ``""`` a discarded segment, anything else a segment
    objects: tuple[str, ...] = ()
    reserved: Bitmap = EMPTY
    #: position -> how often a worker died while it was reserved (PROTOCOL.md rule 10)
    strikes: dict[int, int] = {}
    children: dict[ShardId, Bitmap] = {}
    #: why the shard last lost its holder
    cause: str = ""
    #: positions of tasks whose stored results were discarded, and how many bytes these had
    discarded: Bitmap = EMPTY
    freed: int = 0

    @property
    def pending(self) -> Bitmap:
        """Positions without an outcome."""
        return self.tasks - self.outcomes.all

    @property
    def complete(self) -> bool:
        return not self.pending


class Entry(Record, frozen=True, tag="entry", kw_only=True):
    """One entry of a shard log; small results follow it as blobs."""

    KIND = 3
    number: int
    writer: WorkerId
    #: unique to this attempt to write: settles a lost answer (PROTOCOL.md rule 5)
    nonce: str
    #: seconds since 1970 by the writer's clock, for people
    wrote: float
    action: Action
    index: ShardIndex


class Printed(msgspec.Struct, frozen=True, array_like=True):
    """What a task has printed at about one time."""

    #: seconds since 1970 by the worker's clock
    time: float
    #: ``"stdout"``, ``"stderr"``, or the level of a `logging` record, such as ``"INFO"``
    stream: str
    text: str


class TaskOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one try of a task has printed."""

    position: int
    #: pickled Dask key
    key: bytes
    #: 1 for the first try
    attempt: int
    #: characters that were printed before `printed` and are not kept
    dropped: int
    printed: tuple[Printed, ...]


class Logs(Record, frozen=True, tag="logs", kw_only=True):
    """What tasks have printed; written before the entry that names it."""

    KIND = 8
    worker: WorkerId
    tasks: tuple[TaskOutput, ...]


class Versions(msgspec.Struct, frozen=True):
    """What a worker must have in common with the client."""

    #: major and minor, as ``"3.11"``
    python: str
    dask: str
    burst_dask: str


class Environment(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the client had around it when it opened a session, and what it brings along for workers."""

    #: version of every distribution that was installed, by normalised name, and of ``"python"``
    packages: dict[str, str] = {}
    #: those of them that were imported, as far as their names tell
    imported: tuple[str, ...] = ()
    #: digest of the zip of code that workers put on their path; ``""`` when there is none
    code: str = ""
    #: what workers install, in the words of pip
    requirements: tuple[str, ...] = ()


class FleetChoice(msgspec.Struct, frozen=True):
    """Which fleet starts the workers of a session, so that any client starts others like them."""

    #: ``"local"``, ``"ecs"`` or ``"distributed"``
    kind: str = "local"
    #: what that fleet needs to know, as it defines it
    options: dict[str, Any] = {}


class Manifest(Record, frozen=True, tag="manifest", kw_only=True):
    """A session as it was opened."""

    KIND = 5
    session: SessionId
    name: str | None
    created: float
    #: the machine that opened it, for people
    host: str
    versions: Versions
    settings: dict[str, Any]
    environment: Environment = Environment()
    fleet: FleetChoice = FleetChoice()
    #: where the key is by which the session's objects are signed (`burst_dask.trust.keyring`), and never the key
    #: itself: ``"file"``, or ``"secretsmanager:<region>:<name>"``; ``""`` when they are not signed
    key: str = ""


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A shard that a worker holds, as of its heartbeat."""

    run: RunId
    shard: ShardId
    #: number of the entry that came next
    next: int
    #: seconds of work that could be split off, about
    spare: float


class Beat(Record, frozen=True, tag="beat", kw_only=True):
    """A heartbeat: that it is there counts, and when the store dated it; the rest is for people and for thieves."""

    KIND = 6
    worker: WorkerId
    host: str
    pid: int
    threads: int
    #: seconds since 1970 by the worker's clock
    started: float
    holds: tuple[Held, ...] = ()
    #: bytes of resident memory
    memory: int = 0
    #: store requests so far, by verb
    requests: dict[str, int] = {}


class Ended(Record, frozen=True, tag="ended", kw_only=True):
    """A worker is gone for good, and why. Written once, by itself or by its supervisor."""

    KIND = 7
    worker: WorkerId
    #: ``"idle"``, ``"closed"``, ``"expired"``, ``"halted"`` (the session's money is spent), ``"stopped"`` (SIGTERM),
    #: ``"stuck"`` (its threads run what was given up), ``"killed"`` (it ran a task that was cancelled by force),
    #: ``"died"``, ``"refused"`` (its versions do not fit), ``"unprepared"`` (code or packages could not be put in
    #: place) or ``"untrusted"`` (the session is signed, and its manifest or its log is not what its key vouches for)
    reason: str
    message: str = ""
    wrote: float = 0.0
    #: store requests in its life, by verb; unknown of one that died
    requests: dict[str, int] = {}
    #: how many entries of the session log it had read, when it ended by itself
    next: int = 0


class Difference(msgspec.Struct, frozen=True, array_like=True):
    """A package of which client and worker have different versions."""

    package: str
    client: str
    worker: str


class Differences(Record, frozen=True, tag="differences", kw_only=True):
    """How the packages of some workers differ from the client's; written by the first of them, for people."""

    KIND = 10
    worker: WorkerId
    host: str
    packages: tuple[Difference, ...]


R = TypeVar("R", bound=Record)


def _to_plain(value: Any) -> Any:
    if isinstance(value, Bitmap):
        return value.to_bytes()
    raise TypeError(f"{type(value).__name__} has no encoding")


def _from_plain(kind: type, value: Any) -> Any:
    if kind is Bitmap:
        return Bitmap.from_bytes(value)
    raise TypeError(f"{kind.__name__} has no encoding")


_encoder = msgspec.msgpack.Encoder(enc_hook=_to_plain)
_decoders: dict[type[Record], msgspec.msgpack.Decoder[Any]] = {}


def encode(record: Record) -> bytes:
    """Return the bytes of the object that holds `record`, up to where blobs begin."""
    return frames.pack(record.KIND, _encoder.encode(record))


def decode(kind: type[R], name: str, data: frames.Buffer) -> R:
    """Return the record that the object `name` holds.

    Raises
    ------
    CorruptObject
        The object is damaged, of another kind, or of a newer format.
    """
    return decode_with_end(kind, name, data)[0]


def decode_with_end(kind: type[R], name: str, data: frames.Buffer) -> tuple[R, int]:
    """Return the record, and the offset in `data` at which its blobs begin."""
    header, end = frames.unpack(name, kind.KIND, data)
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind, dec_hook=_from_plain)
    try:
        record: R = decoder.decode(header)
    except msgspec.DecodeError as error:
        raise CorruptObject(f"{name}: {error}") from error
    return record, end
