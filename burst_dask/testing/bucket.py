"""A simulated S3: one `Bucket`, and a `Connection` to it for each simulated process.

Latencies are drawn from S3's published distribution, a prefix answers 503 beyond its rate, and a
`Network` says what else goes wrong with a request: it may not arrive, its answer may be lost, it may
land long after its sender gave up, or meet a conflict (409).
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from burst_dask.clock import Entropy
from burst_dask.errors import CorruptObject, StoreUnavailable
from burst_dask.store.base import Body, Meta, Span
from burst_dask.store.requests import flatten
from burst_dask.testing.loop import VirtualLoop

T = TypeVar("T")

#: The store's clock when the simulation begins, in seconds since 1970: any date will do.
EPOCH = 1_800_000_000.0
#: Objects on a page of a listing, as of S3.
PAGE = 1000
#: Requests a second that one prefix takes (S3's documented limits).
PUT_RATE, GET_RATE = 3500.0, 5500.0
WRITES = frozenset({"put", "create", "delete"})
#: The part of a request's latency that passes before it takes effect.
THERE = 0.6
#: Bytes a second of one connection.
BANDWIDTH = 85e6
#: Seconds after which a client gives up a request without an answer.
GIVE_UP = 10.0


class Latency(NamedTuple):
    """A log-normal distribution by its median and its 95th percentile, in seconds, with a slow tail."""

    median: float
    p95: float
    #: how many requests take up to `slowest` seconds
    slow: float = 0.001
    slowest: float = 3.0

    def draw(self, entropy: Entropy) -> float:
        if self.slow and entropy.uniform(0, 1) < self.slow:
            return entropy.uniform(self.p95, self.slowest)
        return self.median * math.exp(math.log(self.p95 / self.median) / 1.645 * entropy.normal())


#: Small objects on S3 Standard: GET p50 27 ms, p95 75 ms; PUT p50 40 ms and as wide.
READ = Latency(0.027, 0.075)
WRITE = Latency(0.040, 0.111)


class Stored(NamedTuple):
    """An object."""

    body: bytes
    #: seconds since 1970 by the store's clock
    modified: float


class Bucket:
    """The objects, the store's clock and what one prefix takes.

    Parameters
    ----------
    skew
        The date of each object is wrong by up to this many seconds (PROTOCOL.md, promise 4).
    put_rate, get_rate
        Requests a second beyond which it answers 503.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        entropy: Entropy,
        *,
        skew: float = 0.0,
        put_rate: float = PUT_RATE,
        get_rate: float = GET_RATE,
    ) -> None:
        self.loop = loop
        self.objects: dict[str, Stored] = {}
        self.deleted: set[str] = set()
        #: called with the key and the body when an object has been written
        self.watchers: list[Callable[[str, bytes], None]] = []
        #: called with the key of an object that is deleted
        self.mourners: list[Callable[[str], None]] = []
        #: second -> kind of request -> how many arrived in it
        self.arrived: dict[int, Counter[str]] = {}
        #: what became of requests
        self.fates: Counter[Fate] = Counter()
        #: requests answered 503
        self.throttled = 0
        self._names: list[str] = []
        self._entropy = entropy
        self._skew = skew
        self._tokens = {"put": _Tokens(put_rate), "get": _Tokens(get_rate)}
        #: requests land whatever becomes of their sender
        self.context = contextvars.Context()
        #: it is over: whoever sends another request is cancelled
        self.closed = False

    def now(self) -> float:
        wrong = self._entropy.uniform(-self._skew, self._skew) if self._skew else 0.0
        return EPOCH + self.loop.time() + wrong

    def admits(self, verb: str) -> bool:
        """Count a request; tell whether the prefix takes one more of its kind now."""
        kind = "put" if verb in WRITES else "get"
        self.arrived.setdefault(int(self.loop.time()), Counter())[kind] += 1
        admitted = self._tokens[kind].take(self.loop.time())
        self.throttled += not admitted
        return admitted

    def create(self, key: str, body: bytes) -> bool:
        if key in self.objects:
            return False
        self.put(key, body)
        return True

    def put(self, key: str, body: bytes) -> None:
        if key not in self.objects:
            insort(self._names, key)
        self.objects[key] = Stored(body, self.now())
        for watcher in self.watchers:
            watcher(key, body)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            if self.objects.pop(key, None) is not None:
                self._names.pop(bisect_left(self._names, key))
                self.deleted.add(key)
                for mourner in self.mourners:
                    mourner(key)

    def get(self, key: str) -> bytes | None:
        found = self.objects.get(key)
        return None if found is None else found.body

    def page(self, prefix: str, after: str) -> list[Meta]:
        """Return the first objects below `prefix` beyond `after`, a page at most."""
        names = self._names
        start = max(bisect_left(names, prefix), bisect_right(names, after))
        end = min(bisect_left(names, prefix + "\U0010ffff"), start + PAGE)
        found = ((name, self.objects[name]) for name in names[start:end])
        return [Meta(name, len(item.body), item.modified) for name, item in found]

    def folders(self, prefix: str, after: str) -> list[str]:
        """Return the first names directly below `prefix` that have objects below them, a page at most."""
        names = self._names
        found: list[str] = []
        place = bisect_left(names, prefix + after + "0" if after else prefix)  # "0" follows "/"
        while place < len(names) and names[place].startswith(prefix) and len(found) < PAGE:
            name, slash, _ = names[place][len(prefix) :].partition("/")
            if slash:
                found.append(sys.intern(name))  # thousands of workers keep it
                place = bisect_left(names, f"{prefix}{name}0")
            else:
                place += 1
        return found


class _Tokens:
    """A token bucket that holds one second's worth."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._left = rate
        self._at = 0.0

    def take(self, now: float) -> bool:
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Fate(Enum):
    """What becomes of a request."""

    ARRIVES = "arrives"
    #: it is lost on its way
    NEVER = "never"
    #: a conditional write meets another one (409): nothing landed
    CONFLICT = "conflict"
    #: it lands when its sender has given up
    LATE = "late"
    #: it lands, and the answer is lost
    UNANSWERED = "unanswered"


@dataclass
class Network:
    """What lies between a process and the bucket.

    Parameters
    ----------
    faults
        Fate -> the fraction of requests that meet it.
    late
        Seconds after which a late request lands, at most.
    """

    faults: dict[Fate, float] = field(default_factory=dict)
    late: float = 120.0
    read: Latency = READ
    write: Latency = WRITE
    #: nothing arrives while this is true
    cut: bool = False
    #: told the key of each request before it is sent; what returns False ends its sender, and is not sent
    admit: Callable[[str], bool] | None = None

    def fate(self, verb: str, entropy: Entropy) -> Fate:
        """Draw what becomes of a request."""
        if self.cut:
            return Fate.NEVER
        if not self.faults:
            return Fate.ARRIVES
        drawn = entropy.uniform(0, 1)
        for fate, share in self.faults.items():
            drawn -= share
            if drawn < 0 and not (fate is Fate.CONFLICT and verb != "create"):
                return fate
        return Fate.ARRIVES


class Connection:
    """A `Store` as one process sees it."""

    def __init__(self, bucket: Bucket, network: Network, entropy: Entropy) -> None:
        self.bucket = bucket
        self.network = network
        self._entropy = entropy
        self._loop = bucket.loop

    @property
    def url(self) -> str:
        return "memory://simulated"

    async def create(self, key: str, body: Body) -> bool:
        data = b"".join(flatten(body))
        return await self._send("create", key, lambda: self.bucket.create(key, data), len(data))

    async def put(self, key: str, body: Body) -> None:
        data = b"".join(flatten(body))
        await self._send("put", key, lambda: self.bucket.put(key, data), len(data))

    async def get(self, key: str) -> bytes | None:
        return await self._send("get", key, lambda: self.bucket.get(key))

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        body = await self._send("get", key, lambda: self.bucket.get(key))
        if body is None:
            return None
        if not clip and any(span.end > len(body) for span in spans):
            raise CorruptObject(f"{key}: it ends after {len(body)} bytes")
        return [memoryview(body)[span.start : span.end] for span in spans]

    async def folders(self, prefix: str) -> list[str]:
        found: list[str] = []
        while True:
            start = found[-1] if found else ""
            page = await self._send("list", prefix, lambda start=start: self.bucket.folders(prefix, start))  # type: ignore[misc]
            found += page
            if len(page) < PAGE:
                return sorted(found)  # pages are in the order of keys, where "00012-3/" comes before "00012/"

    async def delete(self, keys: Iterable[str]) -> None:
        doomed = list(keys)
        await self._send("delete", doomed[0] if doomed else "", lambda: self.bucket.delete(doomed))

    async def time(self, key: str) -> float:
        await self.put(key, b"")
        return self.bucket.objects[key].modified

    async def _send(self, verb: str, key: str, effect: Callable[[], T], size: int = 0) -> T:
        """Carry out `effect` in the bucket, some time from now, and return its answer some time later."""
        if self.bucket.closed:
            raise asyncio.CancelledError
        network, entropy = self.network, self._entropy
        latency = (network.write if verb in WRITES else network.read).draw(entropy) + size / BANDWIDTH
        answer: asyncio.Future[T] = self._loop.create_future()
        if network.admit is not None and not network.admit(key):
            return await answer  # which never comes
        fate = network.fate(verb, entropy)
        self.bucket.fates[fate] += 1
        if fate is Fate.NEVER:
            self._later(entropy.uniform(0.1, GIVE_UP), _fail, answer, f"{verb}: it did not arrive")
        elif fate is Fate.CONFLICT:
            self._later(latency, _fail, answer, f"{verb}: 409, another request was under way")
        else:
            arrives = entropy.uniform(GIVE_UP, network.late) if fate is Fate.LATE else latency * THERE
            answered = fate is Fate.ARRIVES
            self._later(arrives, self._land, verb, effect, answer, latency * (1 - THERE), answered)
            if not answered:
                self._later(GIVE_UP, _fail, answer, f"{verb}: no answer")
        return await answer

    def _land(self, verb: str, effect: Callable[[], T], answer: asyncio.Future[T], back: float, answered: bool) -> None:
        """The request has reached the bucket."""
        if not self.bucket.admits(verb):
            outcome: tuple[Any, ...] = (_fail, answer, "503 Slow Down: reduce your request rate")
        else:
            result = effect()
            back += len(result) / BANDWIDTH if isinstance(result, bytes) else 0.0
            outcome = (_answer, answer, result)
        if not answered:
            return
        if self.network.cut:
            self._later(GIVE_UP, _fail, answer, f"{verb}: no answer")
        else:
            self._later(back, *outcome)

    def _later(self, delay: float, callback: Callable[..., None], *args: Any) -> None:
        self._loop.call_later(delay, callback, *args, context=self.bucket.context)

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        while True:
            start = after
            page = await self._send("list", prefix, lambda start=start: self.bucket.page(prefix, start))  # type: ignore[misc]
            if page:
                yield page
            if len(page) < PAGE:
                return
            after = page[-1].key


def _answer(answer: asyncio.Future[T], result: T) -> None:
    if not answer.done():
        answer.set_result(result)


def _fail(answer: asyncio.Future[Any], why: str) -> None:
    if not answer.done():
        answer.set_exception(StoreUnavailable(f"simulated: {why}"))
