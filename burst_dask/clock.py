"""The only place that reads a clock or draws a random number.

Everything else receives a `Clock` and an `Entropy`, so that the simulator can run the same
code under virtual time and a seed. A lint rule (ruff TID251) bans ``time``, ``random``,
``uuid`` and ``secrets`` elsewhere in the package.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

#: Without 0/o, 1/l/i, u and v: an id survives being read aloud and typed again.
ALPHABET = "23456789abcdefghjkmnpqrstwxyz"


class Clock(Protocol):
    """What the agent, the client and the store wrappers know of time."""

    def monotonic(self) -> float:
        """Seconds from an arbitrary start; never goes back. For durations and deadlines."""

    def wall(self) -> float:
        """Seconds since 1970 by this machine. Only shown to people, never compared."""

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""


class PausingClock(Clock, Protocol):
    """A clock by which threads wait, for calls that block."""

    def pause(self, seconds: float) -> None:
        """Block this thread for `seconds`; never the thread of an event loop."""


class SystemClock:
    """The clock of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def pause(self, seconds: float) -> None:
        time.sleep(seconds)


class Entropy:
    """Randomness, from the operating system or from a seed.

    Parameters
    ----------
    seed
        None draws from the operating system; anything else makes every draw repeatable.

    Examples
    --------
    >>> Entropy(7).token(4) == Entropy(7).token(4)
    True
    """

    def __init__(self, seed: int | str | None = None) -> None:
        self._random: random.Random = random.SystemRandom() if seed is None else random.Random(seed)

    def token(self, length: int = 12) -> str:
        """Return `length` characters of `ALPHABET`; 12 of them carry 58 bits."""
        return "".join(self._random.choices(ALPHABET, k=length))

    def secret(self, length: int = 32) -> bytes:
        """Return `length` bytes for a key: nobody can guess them, unless a seed was asked for."""
        return self._random.randbytes(length)

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high]."""
        return self._random.uniform(low, high)

    def integer(self, low: int, high: int) -> int:
        """Return a whole number in [low, high]."""
        return self._random.randint(low, high)

    def normal(self) -> float:
        """Return a number of the standard normal distribution."""
        return self._random.gauss(0.0, 1.0)

    def choice(self, items: Sequence[T]) -> T:
        """Return one of `items`."""
        return self._random.choice(items)

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Return `count` of `items`, or all of them, in random order."""
        return self._random.sample(items, min(count, len(items)))


def wall_time() -> float:
    """Return seconds since 1970 by this machine, to date what a task prints in its thread. Only shown to people."""
    return time.time()


def thread_time() -> float:
    """Return a monotonic reading for timing code inside one executor thread, in seconds."""
    return time.perf_counter()
