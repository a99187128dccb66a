"""What a seed stands for: a graph, settings, a fleet, a network, and all that goes wrong, each at its time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from burst_dask.clock import Entropy
from burst_dask.config import Settings
from burst_dask.testing.bucket import Fate
from burst_dask.testing.work import Graph, draw_graph

#: Parts of the keys of the requests that matter most to who submits, and to who collects.
SUBMITTING = ("/packs/", "/plan", "/log/", "sessions/")
COLLECTING = ("/segments/", "/plan", "/log/", "sessions/")


class Weather(Enum):
    """How much goes wrong."""

    #: nothing
    CALM = "calm"
    #: answers are lost and writes conflict, which must not make any task run twice
    LOSSY = "lossy"
    #: requests are lost or late, and processes die, stop and go on
    STORM = "storm"


class Kind(Enum):
    """What happens to a worker."""

    #: SIGKILL; its supervisor records the end and starts another
    CRASH = "crash"
    #: its machine is gone: nobody records anything
    VANISH = "vanish"
    #: SIGSTOP, and SIGCONT later: often when its lease is dead
    PAUSE = "pause"
    #: SIGTERM
    TERMINATE = "terminate"
    #: it cannot reach the store for a while
    PARTITION = "partition"
    #: its clock jumps
    JUMP = "jump"
    #: all workers vanish, and there are none for an hour
    BLACKOUT = "blackout"


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong."""

    at: float
    kind: Kind
    #: which of the workers alive then, modulo their number
    worker: int
    #: how long it lasts, or how far a clock jumps
    seconds: float


@dataclass(frozen=True)
class Cancellation:
    """Tasks that a client cancels."""

    at: float
    tasks: frozenset[int]
    force: bool


@dataclass(frozen=True)
class Death:
    """When a client dies: with its request number `count` of those whose key has `part` in it."""

    part: str
    count: int
    #: whether that request is still sent
    sent: bool


@dataclass(frozen=True)
class Scenario:
    """All that a seed decides; the same seed gives the same scenario, on any machine."""

    seed: int
    weather: Weather
    graph: Graph
    settings: Settings
    threads: int
    #: when each worker starts
    arrivals: tuple[float, ...]
    network: dict[Fate, float]
    faults: tuple[Fault, ...]
    #: clients that try to submit, one after another, and die of it
    submitter_dies: tuple[Death, ...]
    #: the same for those that collect
    collector_dies: tuple[Death, ...]
    cancellations: tuple[Cancellation, ...]
    #: how many times as long as elsewhere tasks take on the first worker
    slowness: float
    #: the store's dates are wrong by so many seconds
    skew: float
    #: from here on nothing goes wrong any more
    horizon: float = field(default=0.0)

    @property
    def processes_fail(self) -> bool:
        """Whether a task may have to run twice."""
        return self.weather is Weather.STORM

    @classmethod
    def of(cls, seed: int) -> Scenario:
        """Draw the scenario of a seed."""
        entropy = Entropy(f"scenario {seed}")
        weather = (Weather.CALM, Weather.LOSSY, Weather.STORM, Weather.STORM, Weather.STORM)[seed % 5]
        storm = weather is Weather.STORM
        graph = draw_graph(
            entropy,
            tasks=entropy.choice([8, 40, 120]),
            failures=entropy.uniform(0, 1) < 0.5,
            killers=storm and entropy.uniform(0, 1) < 0.2,
        )
        workers = entropy.integer(1, 6)
        horizon = entropy.choice([20.0, 120.0, 600.0])
        # By draws of its own: what older seeds stand for stays as it was.
        discarding = Entropy(f"scenario {seed} discarding")
        faults = [_fault(entropy, horizon) for _ in range(entropy.integer(0, 8))] if storm else []
        return cls(
            seed=seed,
            weather=weather,
            graph=graph,
            settings=_settings(entropy, discarding),
            threads=entropy.choice([1, 1, 2, 4]),
            arrivals=tuple(entropy.choice([0.0, entropy.uniform(0, horizon / 2)]) for _ in range(workers)),
            network=_network(entropy, weather),
            faults=tuple(sorted(faults, key=lambda fault: fault.at)),
            submitter_dies=_deaths(entropy, storm, SUBMITTING),
            collector_dies=_deaths(entropy, storm, COLLECTING),
            cancellations=_cancellations(seed, graph, horizon, storm),
            # Where the longest take a minute, others run second copies.
            slowness=entropy.choice([1.0, 1.0, max(4.0, 60.0 / max(work.seconds for work in graph.work))]),
            skew=entropy.choice([0.0, 1.0]),
            horizon=horizon,
        )


def _settings(entropy: Entropy, discarding: Entropy) -> Settings:
    """Return the defaults, or something tighter: rare paths then come often."""
    return Settings.of(
        commit_interval=entropy.choice([5.0, 0.5]),
        reserve_ahead=entropy.choice([5.0, 1.0]),
        held_at_once=entropy.choice([16, 1, 2]),
        backups=entropy.choice([True, True, False]),
        large_run=entropy.choice([500, 1]),
        split_from=entropy.choice([1.0, 0.1]),
        inline_result=entropy.choice([16_384, 64]),
        inline_entry=entropy.choice([262_144, 1000]),
        release_grace=entropy.choice([1.0, 10.0]),
        keep_intermediates=discarding.uniform(0, 1) < 0.1,
        discard_interval=discarding.choice([10.0, 1.0, 0.1]),
    )


def _network(entropy: Entropy, weather: Weather) -> dict[Fate, float]:
    if weather is Weather.CALM:
        return {}
    share = entropy.choice([0.005, 0.03, 0.1])
    faults = {Fate.UNANSWERED: share, Fate.CONFLICT: share}
    if weather is Weather.STORM:
        faults |= {Fate.NEVER: share, Fate.LATE: share / 2}
    return faults


def _fault(entropy: Entropy, horizon: float) -> Fault:
    kind = entropy.choice(list(Kind))
    if kind is Kind.BLACKOUT and entropy.uniform(0, 1) < 0.7:
        kind = Kind.CRASH
    seconds = entropy.choice([entropy.uniform(0, 5), entropy.uniform(5, 120)])
    if kind is Kind.BLACKOUT:
        seconds = 3600.0
    elif kind is Kind.JUMP:
        seconds = entropy.uniform(-86_400, 86_400)
    return Fault(entropy.uniform(0, horizon), kind, entropy.integer(0, 100), seconds)


def _deaths(entropy: Entropy, storm: bool, parts: Sequence[str]) -> tuple[Death, ...]:
    if not storm:
        return ()
    return tuple(_death(entropy, parts) for _ in range(entropy.choice([0, 0, 1, 3])))


def _cancellations(seed: int, graph: Graph, horizon: float, storm: bool) -> tuple[Cancellation, ...]:
    if seed % 7 not in (2, 3, 5):  # the others play as they did before there were any
        return ()
    entropy = Entropy(f"cancellations {seed}")
    count = len(graph.work)
    return tuple(
        Cancellation(
            entropy.choice([0.0, entropy.uniform(0, 5), entropy.uniform(0, horizon)]),
            frozenset(entropy.sample(range(count), entropy.integer(1, max(1, count // 4)))),
            storm and entropy.choice([True, False]),  # by force others may run twice, which is for storms
        )
        for _ in range(entropy.choice([1, 1, 3]))
    )


def _death(entropy: Entropy, parts: Sequence[str]) -> Death:
    """Return a death anywhere, or at one of the few requests that matter most."""
    part = entropy.choice(["", *parts])
    return Death(part, entropy.integer(1, 3 if part else 40), entropy.choice([True, False]))
