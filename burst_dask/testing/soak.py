"""Simulate seed after seed: ``python -m burst_dask.testing.soak --minutes 60``.

Seeds that once found a bug come first. The first one that breaks a rule is told with the story of the shard,
and with the command that replays it exactly; the exit code is 1 then.
"""

from __future__ import annotations

import logging
import sys

import click

from burst_dask.clock import Entropy, SystemClock
from burst_dask.testing.world import World, play

#: seed -> what it found. Their scenarios change when `burst_dask.testing.scenario` draws otherwise; they stay as
#: seeds like any other then.
KNOWN_BAD: dict[int, str] = {
    0: "an agent with exactly LOOK_AHEAD seconds of work left spun without waiting",
    21: "a holder started a task while the entry that gave it back was on its way; it was split off and ran twice",
    35: "an agent claimed the shard that it was letting go, and failed when both had ended",
    55: "results only in memory were lost with a RELEASE, and computed again without any failure",
    333: "a shard with a killer was claimed anew with all of it reserved, so that the killer never ran alone",
    36: "one commit followed another to reserve a task that another shard had",
    570: "the referee missed that an asked-for result may be left when its backup copy came first",
    520788312720: "an idle worker never looked again at a child shard of a large run that it had once seen held",
    1043498063136: "a result that nobody needed was left in a child shard that its last consumer's worker had not read",
}


def command(seed: int) -> str:
    """Return what replays a seed."""
    return f"python -m burst_dask.testing.soak --seed {seed}"


def report(world: World) -> str:
    """Return what went wrong in a world, and how to see it again."""
    scenario = world.scenario
    return "\n".join(
        [
            f"seed {scenario.seed} broke the rules ({scenario.weather.value}, {len(scenario.graph.work)} tasks, "
            f"{len(scenario.arrivals)} workers, {world.ended:.0f} s of virtual time):",
            *(f"  {what}" for what in world.broken),
            *(f"  fault at {fault.at:.3f} s: {fault.kind.value}, {fault.seconds:.1f} s" for fault in scenario.faults),
            f"replay it: {command(scenario.seed)}",
        ]
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--minutes", type=float, default=1.0, show_default=True, help="How long to go on.")
@click.option("--seed", type=int, help="Replay this one only, and tell each entry of each log.")
@click.option("--first", type=int, help="First seed; by default a random one.")
def main(minutes: float, seed: int | None, first: int | None) -> None:
    """Simulate worlds until one breaks a rule of the protocol."""
    logging.disable(logging.CRITICAL)  # the agents' warnings: here everything fails all the time
    if seed is not None:
        world = play(seed)
        click.echo("\n".join(world.referee.stories()))
        _judge(world)
        return
    clock = SystemClock()
    until = clock.monotonic() + 60 * minutes
    next_seed = Entropy().integer(0, 1 << 40) if first is None else first
    seeds = [*KNOWN_BAD]
    played = 0
    virtual = 0.0
    while clock.monotonic() < until:
        if not seeds:
            seeds, next_seed = list(range(next_seed, next_seed + 100)), next_seed + 100
        world = play(seeds.pop(0))
        _judge(world)
        played, virtual = played + 1, virtual + world.ended
        if sys.stderr.isatty():
            click.echo(f"\r{played} seeds, {virtual / 3600:.1f} h of virtual time", err=True, nl=False)
    click.echo(f"{played} seeds, {virtual / 3600:.1f} h of virtual time: no rule was broken")


def _judge(world: World) -> None:
    if world.broken:
        click.echo(report(world))
        raise SystemExit(1)


if __name__ == "__main__":
    main()
