"""The production agent and client, in worlds by seed: no rule of the protocol may break in any of them."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

from burst_dask.protocol.records import Action
from burst_dask.testing.bucket import Fate
from burst_dask.testing.scenario import COLLECTING, SUBMITTING, Kind, Scenario, Weather
from burst_dask.testing.soak import KNOWN_BAD, command, report
from burst_dask.testing.world import World, play

#: Seeds in one test: as many as a quick look takes.
TOGETHER = 25
#: Until each thing happens in five of them: backup copies are the rarest, in about 3 of 100.
SEEDS = range(0, 375, TOGETHER)


@pytest.fixture(autouse=True)
def quiet() -> object:
    """Everything fails all the time here: the agents' warnings would fill the log."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def test_seeds_that_once_found_a_bug() -> None:
    for seed in KNOWN_BAD:
        world = play(seed)
        assert not world.broken, report(world)


@cache
def happened(first: int) -> Counter[str]:
    """Play the seeds from `first` on; return in how many of them each thing happened."""
    found: Counter[str] = Counter()
    for seed in range(first, first + TOGETHER):
        world = play(seed)
        assert not world.broken, report(world)
        found.update(what for what, count in world.happened.items() if count)
    return found


@pytest.mark.parametrize("first", SEEDS)
def test_no_rule_breaks(first: int) -> None:
    assert happened(first).total() > 0


def test_the_seeds_leave_out_nothing() -> None:
    """Every action of the shard log, every fault and fate, and clients that die at each of the requests that matter."""
    found = sum(map(happened, SEEDS), Counter())
    expected = {action.__struct_config__.tag for action in get_args(Action)}
    expected |= {kind.value for kind in Kind} | {f"{fate.value} (network)" for fate in Fate} | {"printed", "deleted"}
    expected |= {"cancelled", "cancelled by force"}
    for role, parts in {"submitter": SUBMITTING, "collector": COLLECTING}.items():
        expected |= {f"{role} died at {part}" for part in (*parts, "any")}
        expected |= {f"{role} died, and its request {was}" for was in ("was sent", "was not")}
    assert expected == {what for what in found if found[what] >= 5}
    scenarios = [Scenario.of(seed) for seed in range(300)]
    assert {scenario.weather for scenario in scenarios} == set(Weather)
    assert any(work.kills for scenario in scenarios for work in scenario.graph.work)
    assert any(work.fails for scenario in scenarios for work in scenario.graph.work)


def trace(seed: int) -> str:
    """Return all that a world wrote, and when."""
    world = play(seed)
    lines = [f"{world.steps} {world.ended!r}"]
    lines += [f"{key} {stored.modified!r} {len(stored.body)}" for key, stored in sorted(world.bucket.objects.items())]
    return "\n".join(lines)


@pytest.mark.parametrize("seed", [3, 17, 23])
def test_a_seed_replays_exactly_in_another_process(seed: int) -> None:
    program = f"import test_simulation, logging; logging.disable(50); print(test_simulation.trace({seed}))"
    found = [
        subprocess.run(
            [sys.executable, "-c", program],
            env={
                **os.environ,
                "PYTHONHASHSEED": hash_seed,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert found[0] == found[1]
    assert found[0].strip() == trace(seed)


def test_a_broken_seed_is_told_with_its_story_and_the_command() -> None:
    world = World(Scenario.of(17))
    world.run()
    run, shard = sorted(world.referee._shards)[0]
    world.referee.complain("something is wrong", run, shard)
    text = report(world)
    assert "something is wrong" in text and "claimed" in text and command(17) in text
