"""How long tasks take, by their kind (the prefix of their key, as in distributed)."""

from __future__ import annotations

from collections import Counter

from burst_dask.clock import Clock

#: Seconds that a task of a new kind is taken for, until one has run (distributed's
#: ``unknown-task-duration``).
UNKNOWN = 0.5
#: Weight of the newest measurement in the moving average.
_NEWEST = 0.25


class Durations:
    """Moving averages of the durations of each kind of task, and how long running ones already take."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._mean: dict[str, float] = {}
        self._running: Counter[str] = Counter()
        self._since: dict[str, float] = {}
        self._typical = UNKNOWN

    def known(self, kind: str) -> float | None:
        """Return the mean of the ones that have ended, or None before any has."""
        return self._mean.get(kind)

    def guess(self, kind: str) -> float:
        """Return how long a task of that kind probably takes, no less than running ones already do."""
        mean = self._mean.get(kind, UNKNOWN)
        since = self._since.get(kind)
        return mean if since is None else max(mean, self._clock.monotonic() - since)

    def typical(self) -> float:
        """Return what a task of no known kind probably takes: as the last ones, whatever they were."""
        return self._typical

    def begin(self, kind: str) -> None:
        """Note that one starts."""
        self._running[kind] += 1
        self._since.setdefault(kind, self._clock.monotonic())

    def end(self, kind: str, seconds: float | None) -> None:
        """Note that one ended after `seconds`; None when it did not run after all."""
        self._running[kind] -= 1
        if self._running[kind] <= 0:
            self._running.pop(kind, None)
            self._since.pop(kind, None)
        else:
            self._since[kind] = self._clock.monotonic()
        if seconds is not None:
            self._typical += _NEWEST * (seconds - self._typical)
            mean = self._mean.get(kind)
            self._mean[kind] = seconds if mean is None else mean + _NEWEST * (seconds - mean)
