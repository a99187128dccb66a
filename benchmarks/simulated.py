"""What the simulations of many workers have in common: when workers arrive, what they do, and the best they could."""

from __future__ import annotations

from functools import cache
from typing import Any
from weakref import WeakValueDictionary

from burst_dask.clock import Entropy
from burst_dask.journal import log
from burst_dask.journal import view as views
from burst_dask.protocol import keys
from burst_dask.testing.bucket import Bucket
from burst_dask.worker import roster

#: RunTask: calls a second, and how many at once (Fargate's documented limits).
RATE, BURST = 20.0, 100
BOOT = (30.0, 60.0)


def arrivals(workers: int, boot: str, entropy: Entropy) -> list[float]:
    """Return when each worker is ready, in seconds after the fleet was asked for."""
    if boot == "at-once":
        return [0.0] * workers
    return [max(0, number - BURST) / RATE + entropy.uniform(*BOOT) for number in range(workers)]


def draw(workers: int, tasks: int, seconds: float, boot: str, seed: int) -> tuple[list[float], list[float]]:
    """Return when each worker is ready, and how long each task takes: `seconds`, give or take 20 %."""
    entropy = Entropy(f"scale {seed}")
    starts = arrivals(workers, boot, entropy)
    return starts, [seconds * entropy.uniform(0.8, 1.2) for _ in range(tasks)]


def ideal(starts: list[float], work: float) -> float:
    """Return when workers that start at `starts` could have done `work` seconds of work together."""
    done = 0.0
    now = 0.0
    for working, start in enumerate(sorted(starts)):
        if done + working * (start - now) >= work:
            return now + (work - done) / working
        done, now = done + working * (start - now), start
    return now + (work - done) / len(starts)


def busiest(bucket: Bucket, kind: str) -> tuple[int, int]:
    """Return the second in which most requests of a kind ("put" or "get") arrived, and how many."""
    rates = {second: counts[kind] for second, counts in bucket.arrived.items()}
    top = max(rates, key=lambda second: rates[second])
    return top, rates[top]


def share() -> None:
    """Have all workers hold the same copy of what is the same, and is never changed.

    Each of ten thousand processes may well know ten thousand shards and workers; all in one process, they would fill
    this machine's memory. What is shared: decoded plans and newest entries of shards, ids, and sets of workers.
    """
    plans: dict[str, Any] = {}
    entries: dict[str, tuple[str, Any]] = {}
    alive: WeakValueDictionary[int, Any] = WeakValueDictionary()
    decode, decode_with_end = views.decode, log.decode_with_end

    def plan(kind: type, name: str, data: bytes) -> Any:
        if not name.endswith("/plan"):
            return decode(kind, name, data)
        if name not in plans:
            plans[name] = decode(kind, name, data)
        return plans[name]

    def entry(kind: type, name: str, data: bytes) -> Any:
        shard = name.rpartition("/")[0]
        if shard not in entries or entries[shard][0] != name:
            entries[shard] = name, decode_with_end(kind, name, data)
        return entries[shard][1]

    class Liveness(roster.Liveness):
        def __new__(cls, dead: Any, living: frozenset[Any]) -> Any:
            known = alive.setdefault(hash(living), living)
            return super().__new__(cls, dead, known if known == living else living)

    views.decode, log.decode_with_end, roster.Liveness = plan, entry, Liveness
    for name in ("split_worker_key", "shard_of_entry"):
        setattr(keys, name, cache(getattr(keys, name)))
