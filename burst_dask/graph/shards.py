"""An ordered graph in shards, and the objects that hold it, one at a time."""

from __future__ import annotations

import contextlib
import pickle
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

from dask._task_spec import GraphNode

from burst_dask import serialize
from burst_dask.errors import ConfigError
from burst_dask.graph import cutting, weighing
from burst_dask.graph.blame import blame
from burst_dask.graph.reading import Annotations, Externals, ordered
from burst_dask.protocol import frames, records
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.frames import Buffer
from burst_dask.protocol.keys import RunId
from burst_dask.protocol.records import Place, Plan, ShardInfo, ShardRecord

#: Bytes at which a pack is full: 8 to 16 MiB make the best requests.
PACK_BYTES = 8 << 20
#: Objects of this size lie beside the records; smaller ones only when shards have them in common.
BESIDE_FROM = 1 << 20
#: Larger constants are warned of.
LARGE_CONSTANT = 10_000_000


class LargeConstantWarning(UserWarning):
    """The graph holds data that a task should rather load."""


class ShardedGraph:
    """A graph cut into shards, ready to be stored.

    Parameters
    ----------
    run
        The run that the graph becomes.
    keys
        The Dask keys, in order: global number -> key.
    nodes
        The tasks in the same order.
    dependencies
        For each task, the numbers of those that it depends on, ascending.
    bounds
        Where shards begin, and the number of tasks.
    outputs
        The shape of what was asked for, with numbers in the place of keys.
    notes
        Number -> annotations.
    sizes
        Number -> id of a large object in the task -> bytes.
    externals
        The Dask keys of results of other runs, and where those are. Their numbers follow those of the tasks.
    """

    def __init__(
        self,
        run: RunId,
        keys: Sequence[Any],
        nodes: Sequence[GraphNode],
        dependencies: Sequence[tuple[int, ...]],
        bounds: Sequence[int],
        outputs: Any,
        notes: Mapping[int, dict[str, Any]],
        sizes: Mapping[int, Mapping[int, int]],
        externals: Externals | None = None,
    ) -> None:
        self.run = run
        self.keys = keys
        self.nodes = nodes
        self.dependencies = dependencies
        self.bounds = bounds
        self.outputs = outputs
        self.notes = notes
        self.externals = externals or {}
        #: Dask key -> fingerprint, of tasks that have one (`burst_dask.graph.prints`)
        self.prints: Mapping[Any, bytes] = {}
        self._external_keys = list(self.externals)
        self._wanted = sorted(set(numbers_in(outputs)))
        self._connect()
        self._beside = _beside(bounds, sizes)
        self._infos: list[ShardInfo] = []
        self._packed = 0

    @classmethod
    def of(
        cls,
        dsk: Mapping[Any, GraphNode],
        keys: Any,
        annotations: Annotations,
        *,
        run: RunId,
        parallelism: int,
        large: int = LARGE_CONSTANT,
        externals: Externals | None = None,
    ) -> ShardedGraph:
        """Order and cut what `materialize` returned.

        Parameters
        ----------
        parallelism
            Threads that are expected to work on it.
        large
            Bytes; a constant over this is warned of.
        externals
            What tasks depend on beside other tasks: Dask key -> run and global number there.
        """
        names = ordered(dsk, externals)
        number = {key: i for i, key in enumerate([*names, *(externals or ())])}
        nodes = [dsk[key] for key in names]
        dependencies = [tuple(sorted(number[key] for key in node.dependencies)) for node in nodes]
        sizes = weighing.large_objects(nodes)
        _warn(names, sizes, large)
        inner = dependencies
        if externals:
            inner = [tuple(need for need in needs if need < len(names)) for needs in dependencies]
        bounds = cutting.cut(inner, parallelism=parallelism, sizes=sizes)
        outputs = map_nested(keys, number.__getitem__)
        notes = _notes(annotations, number)
        return cls(run, names, nodes, dependencies, bounds, outputs, notes, sizes, externals)

    def _connect(self) -> None:
        """Find what crosses between shards."""
        bounds = self.bounds
        count = len(bounds) - 1
        self._upstream: list[set[int]] = [set() for _ in range(count)]
        #: shard -> numbers of the externals that its tasks need
        self._outer: list[set[int]] = [set() for _ in range(count)]
        #: number -> shards of its dependents elsewhere
        self._foreign: dict[int, set[int]] = {}
        self._free = [0] * count
        shard_of: list[int] = []
        bound: set[int] = set()  # tasks that need something from another shard or run
        for shard, (first, end) in enumerate(pairwise(bounds)):
            shard_of += [shard] * (end - first)
            for number in range(first, end):
                for need in self.dependencies[number]:
                    if need < first:
                        self._upstream[shard].add(shard_of[need])
                        self._foreign.setdefault(need, set()).add(shard)
                        bound.add(number)
                    elif need >= self.tasks:
                        self._outer[shard].add(need)
                        bound.add(number)
                    elif need in bound:
                        bound.add(number)
            self._free[shard] = end - first - sum(number in bound for number in range(first, end))

    @property
    def tasks(self) -> int:
        return len(self.keys)

    def packs(self) -> Iterator[tuple[int, list[Buffer]]]:
        """Yield the packs, number and body, one at a time: a body may be forgotten before the next is made.

        Raises
        ------
        UnpicklableTask
            Names the key and the object. The plan must not be written then.
        """
        packer = Packer()
        infos = []
        outputs = iter(self._wanted)
        output = next(outputs, None)
        for shard, (first, end) in enumerate(pairwise(self.bounds)):
            asked = []
            while output is not None and output < end:
                asked.append(output - first)
                output = next(outputs, None)
            place = packer.append([records.encode(self._record(shard, first, end, Bitmap.of(asked), packer))])
            upstream = tuple(sorted(self._upstream[shard]))
            outer = tuple(number - self.tasks for number in sorted(self._outer[shard]))
            infos.append(ShardInfo(first, end - first, place, upstream, self._free[shard], len(asked), outer))
            yield from packer.full()
        yield from packer.rest()
        self._infos, self._packed = infos, packer.total

    def _record(self, shard: int, first: int, end: int, outputs: Bitmap, packer: Packer) -> ShardRecord:
        buffers: list[Place] = []

        def place(view: memoryview) -> int:
            buffers.append(packer.buffer(view))
            return len(buffers) - 1

        beside: set[int] = self._beside.get(shard, set())
        indices: dict[int, int] = {}

        def share(item: Any) -> int | None:
            if id(item) not in beside:
                return None
            if id(item) not in indices:
                buffers.append(packer.object(item))
                indices[id(item)] = len(buffers) - 1
            return indices[id(item)]

        dependencies = tuple(self.dependencies[first:end])
        span = range(first, end)
        nodes = self.nodes[first:end]
        try:
            payload = serialize.dump_payload(nodes, place, share if beside else None)
        except Exception as error:  # whatever pickling the user's objects raises
            raise blame(nodes, error) from error
        return ShardRecord(
            shard=shard,
            first=first,
            keys=pickle.dumps(self.keys[first:end], 5),
            dependencies=dependencies,
            foreign_keys=pickle.dumps(
                {n: self._key(n) for needs in dependencies for n in needs if not first <= n < end}, 5
            ),
            dependents={n - first: tuple(sorted(self._foreign[n])) for n in span if n in self._foreign},
            outputs=outputs,
            annotations={n - first: self.notes[n] for n in span if n in self.notes} if self.notes else {},
            payload=payload,
            buffers=tuple(buffers),
            prints={n - first: self.prints[self.keys[n]] for n in span if self.keys[n] in self.prints}
            if self.prints
            else {},
        )

    def _key(self, number: int) -> Any:
        return self.keys[number] if number < self.tasks else self._external_keys[number - self.tasks]

    def plan(self, *, created: float, priority: int = 0) -> Plan:
        """Return the plan, to be written when all packs are."""
        if len(self._infos) != len(self.bounds) - 1:
            raise RuntimeError("the plan is known when all packs have been made")
        return Plan(
            run=self.run,
            tasks=self.tasks,
            shards=tuple(self._infos),
            outputs=pickle.dumps(self.outputs, 5),
            created=created,
            size=self._packed,
            priority=priority,
            externals=tuple(self.externals.values()),
            names=pickle.dumps([self.keys[number] for number in dict.fromkeys(numbers_in(self.outputs))], 5),
        )


class Packer:
    """Fills packs one after another, and stores equal constants once."""

    def __init__(self) -> None:
        self.total = 0
        self._number = 0
        self._body: list[Buffer] = []
        self._size = 0
        self._full: list[tuple[int, list[Buffer]]] = []
        self._digests: dict[bytes, Place] = {}
        #: id of an object that outlives the packer -> where it lies
        self._objects: dict[int, Place] = {}
        #: id of the owner of a buffer, and its size -> the owner: hashing a gigabyte for each of
        #: a hundred shards would take minutes
        self._known: dict[tuple[int, int], tuple[weakref.ref[Any], Place]] = {}

    def append(self, body: Sequence[Buffer]) -> Place:
        """Add an object to the current pack and return where it lies."""
        size = sum(memoryview(part).nbytes for part in body)
        if self._size and self._size + size > 2 * PACK_BYTES:
            self._close()
        place = Place(self._number, self._size, self._size + size)
        self._body += body
        self._size += size
        self.total += size
        if self._size >= PACK_BYTES:
            self._close()
        return place

    def buffer(self, view: memoryview) -> Place:
        """Add a buffer, unless an equal one is stored already, and return where it lies."""
        owner = view.obj
        known = self._known.get((id(owner), view.nbytes))
        if known is not None and known[0]() is owner:
            return known[1]
        place = self._constant([view])
        with contextlib.suppress(TypeError):  # its type has no weak references
            self._known[id(owner), view.nbytes] = weakref.ref(owner), place
        return place

    def object(self, item: Any) -> Place:
        """Add an object of the graph, unless an equal one is stored already, and return where it lies."""
        place = self._objects.get(id(item))
        if place is None:
            place = self._objects[id(item)] = self._constant(serialize.dumps(item))
        return place

    def _constant(self, body: Sequence[Buffer]) -> Place:
        digest = blake2b(digest_size=20)
        for part in body:
            digest.update(part)
        name = digest.digest()
        if name not in self._digests:
            self._digests[name] = self.append(frames.seal(body))
        return self._digests[name]

    def full(self) -> Iterator[tuple[int, list[Buffer]]]:
        """Yield the packs that are full and forget them."""
        while self._full:
            yield self._full.pop(0)

    def rest(self) -> Iterator[tuple[int, list[Buffer]]]:
        """Yield what is left."""
        if self._body:
            self._close()
        yield from self.full()

    def _close(self) -> None:
        self._full.append((self._number, self._body))
        self._number, self._body, self._size = self._number + 1, [], 0


def unpack_outputs(outputs: bytes, values: Callable[[int], Any]) -> Any:
    """Return what Dask's own schedulers return: the value of a key, or nested tuples of values.

    Examples
    --------
    >>> unpack_outputs(pickle.dumps([1, [0]]), {0: "a", 1: "b"}.get)
    ('b', ('a',))
    """
    return map_nested(pickle.loads(outputs), values, tuple)  # noqa: S301 - who may write the store may run code, see README


def map_nested(shape: Any, function: Callable[[Any], Any], kind: Callable[[Any], Any] = list) -> Any:
    """Return nested lists with `function` of each item."""
    if isinstance(shape, list):
        return kind([map_nested(item, function, kind) for item in shape])
    return function(shape)


def numbers_in(outputs: Any) -> Iterator[int]:
    """Yield the numbers in the shape of what was asked for."""
    if isinstance(outputs, list):
        for item in outputs:
            yield from numbers_in(item)
    else:
        yield outputs


def _beside(bounds: Sequence[int], sizes: Mapping[int, Mapping[int, int]]) -> dict[int, set[int]]:
    """Return which large objects lie beside the record of each shard, by id."""
    holders: dict[int, set[int]] = {}
    shard = 0
    for number in sorted(sizes):
        while number >= bounds[shard + 1]:
            shard += 1
        for item, size in sizes[number].items():
            # A negative mark makes a large object count as one that shards have in common.
            holders.setdefault(item, {-1} if size >= BESIDE_FROM else set()).add(shard)
    beside: dict[int, set[int]] = {}
    for item, shards in holders.items():
        if len(shards) > 1:
            for shard in shards:
                beside.setdefault(shard, set()).add(item)
    return beside


def _notes(annotations: Annotations, number: Mapping[Any, int]) -> dict[int, dict[str, Any]]:
    """Return what workers know how to heed, by number of the task."""
    notes: dict[int, dict[str, Any]] = {}
    for name, read in _HEEDED.items():
        for key, value in annotations.get(name, {}).items():
            notes.setdefault(number[key], {})[name] = read(value)
    return notes


def _resources(value: Mapping[str, float]) -> dict[str, float]:
    return {str(name): float(amount) for name, amount in value.items()}


def seconds(value: Any) -> float:
    """Return a time limit, or raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ConfigError(f"timeout={value!r} of a task: must be a number of seconds, more than 0")
    return float(value)


def pause(value: Any) -> float:
    """Return the seconds before a second try, or raise `ConfigError`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ConfigError(f"retry_delay={value!r} of a task: must be a number of seconds, 0 or more")
    return float(value)


def exceptions(value: Any) -> list[str]:
    """Return the names of exception classes, given as such or as names, one or several; or raise `ConfigError`.

    Examples
    --------
    >>> exceptions((ConnectionError, "botocore.exceptions.ClientError", "TimeoutError"))
    ['builtins.ConnectionError', 'botocore.exceptions.ClientError', 'TimeoutError']
    """
    names = []
    for item in value if isinstance(value, list | tuple | set | frozenset) else [value]:
        # Dask calls what annotates a layer, if it can be called, with each key: of a class that makes an exception.
        kind = type(item) if isinstance(item, BaseException) else item
        if isinstance(kind, type) and issubclass(kind, BaseException):
            names.append(f"{kind.__module__}.{kind.__qualname__}")
        elif isinstance(kind, str) and kind:
            names.append(kind)
        else:
            raise ConfigError(f"retry_on={item!r}: must be classes of exceptions, or their names")
    return names


#: What workers know how to heed, and what makes a record's value of an annotation's.
_HEEDED: dict[str, Callable[[Any], Any]] = {
    "retries": int,
    "priority": int,
    "resources": _resources,
    "impure": bool,
    "timeout": seconds,
    "retry_on": exceptions,
    "retry_delay": pause,
}


def _warn(names: Sequence[Any], sizes: Mapping[int, Mapping[int, int]], limit: int) -> None:
    over: dict[int, tuple[int, int]] = {}
    for number, objects in sizes.items():
        for item, size in objects.items():
            if size > limit:
                over.setdefault(item, (size, number))
    if over:
        size, number = max(over.values())
        more = f" (and {len(over) - 1} more over {limit / 1e6:.0f} MB)" if len(over) > 1 else ""
        warnings.warn(
            f"task {names[number]!r} holds a constant of {size / 1e6:.1f} MB{more}, which is uploaded with the graph; "
            "let a task load it instead, as with dask.dataframe.read_parquet or dask.array.from_zarr",
            LargeConstantWarning,
            stacklevel=3,
        )
