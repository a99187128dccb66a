"""Commands on the image of workers: image build, image push."""

from __future__ import annotations

import json
from pathlib import Path

import click

from burst_dask.aws import pushing, schedule
from burst_dask.aws.clients import Clients
from burst_dask.aws.image import Sources, check_architectures, differing, sources_here
from burst_dask.aws.stack import ARCHITECTURES, DEFAULT_NAME, Stack, read_stack
from burst_dask.clock import SystemClock
from burst_dask.commands.aws import place
from burst_dask.errors import BurstError, ConfigError

_archs = click.option(
    "--arch", "archs", type=click.Choice(ARCHITECTURES), multiple=True, help="Only this one; may be repeated."
)
_lock = click.option(
    "--lock", type=click.Path(path_type=Path), help="Pinned requirements with hashes, instead of those that come along."
)
_program = click.option("--docker", "program", default="docker", show_default=True, help="Program that builds.")


@click.group(name="image")
def image_group() -> None:
    """Build the image that workers run, and push it to the stack's repository."""


@image_group.command()
@_archs
@_lock
@_program
@click.option("--name", default=DEFAULT_NAME, show_default=True, help="Name of the image, without a tag.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
def build(archs: tuple[str, ...], lock: Path | None, program: str, name: str, as_json: bool) -> None:
    """Build the image on this machine. Nothing is pushed, and no account is needed."""
    sources = _sources(lock)
    docker = pushing.Docker(program)
    can = docker.architectures()
    if not can:
        raise ConfigError(
            f"{program} cannot be used here: it is not installed, or its daemon does not run. `burst image push` "
            "builds with CodeBuild then"
        )
    wanted = check_architectures(archs) if archs else can
    if lacking := sorted(set(wanted) - set(can)):
        raise ConfigError(f"{program} cannot build for {', '.join(lacking)} here; `burst image push --codebuild` can")
    names = []
    for arch in wanted:
        names.append(f"{name}:{sources.tag_of(arch)}")
        docker.build(sources, names[-1], arch)
    click.echo(json.dumps({"tag": sources.tag, "images": names}) if as_json else "\n".join(names))


@image_group.command()
@place
@_archs
@_lock
@_program
@click.option("--codebuild", is_flag=True, help="Build at AWS, also where there is a docker.")
@click.option("--force", is_flag=True, help="Build again what the repository has already.")
def push(
    stack: str,
    profile: str | None,
    region: str | None,
    as_json: bool,
    archs: tuple[str, ...],
    lock: Path | None,
    program: str,
    codebuild: bool,
    force: bool,
) -> None:
    """Build the image and push it: with docker where there is one, else with CodeBuild, which costs a few cents."""
    clients = Clients.of(region, profile)
    there = read_stack(clients, stack)
    if there is None or not there.repository:
        raise ConfigError(f"there is no stack {stack} in {clients.region}: run `burst setup aws` first")
    sources = _sources(lock)
    docker = pushing.Docker(program)
    can = () if codebuild else docker.architectures()
    wanted = check_architectures(archs) if archs or not can else can
    if lacking := sorted(set(wanted) - set(can)):
        if can:
            raise ConfigError(
                f"{program} cannot build for {', '.join(lacking)} here; pass --codebuild. Nothing was pushed"
            )
        if not codebuild:
            click.echo(f"{program} cannot be used here, so CodeBuild builds", err=True)
    tags = {sources.tag_of(arch): arch for arch in wanted}
    if force:
        pushing.forget(clients, there, [sources.tag, *tags])
    found = pushing.pushed(clients, there, list(tags))
    left = [arch for tag, arch in tags.items() if tag not in found]
    try:
        if left and can:
            _with_docker(docker, clients, there, sources, left)
        elif left:
            pushing.build_at_aws(clients, there, sources, left, SystemClock(), lambda line: click.echo(line, err=True))
        built = pushing.publish(clients, there, sources)
    except BurstError:
        if force:
            click.echo(
                f"Warning: {there.repository}:{sources.tag} was deleted, as --force asks, and there is no other yet: "
                "until there is, sessions that use it can start no workers",
                err=True,
            )
        raise
    uri = f"{there.repository}:{sources.tag}"
    if as_json:
        click.echo(json.dumps({"image": uri, "architectures": built, "built": left}))
    else:
        done = f"built {' and '.join(left)}" if left else "it was there already"
        click.echo(f"{uri} for {' and '.join(built)} ({done})")
    if old := schedule.outdated(there, uri):
        click.echo(old, err=True)


def _with_docker(docker: pushing.Docker, clients: Clients, stack: Stack, sources: Sources, archs: list[str]) -> None:
    names = [f"{stack.repository}:{sources.tag_of(arch)}" for arch in archs]
    for name, arch in zip(names, archs, strict=True):
        docker.build(sources, name, arch)
    docker.login(clients, stack.repository)
    for name in names:
        docker.push(name)


def _sources(lock: Path | None) -> Sources:
    sources = sources_here(lock)
    if different := differing(sources):
        click.echo(f"Warning: {different}", err=True)
    return sources
