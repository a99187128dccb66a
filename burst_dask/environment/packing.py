"""The client's side: what a session says of its environment, and what it brings along for workers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec
from packaging.requirements import InvalidRequirement, Requirement

from burst_dask.environment import archive
from burst_dask.environment.versions import own_environment
from burst_dask.errors import ConfigError
from burst_dask.protocol.records import Environment

T = TypeVar("T")


class Packed(NamedTuple):
    """What goes into a new session."""

    environment: Environment
    #: the zip that `environment.code` names; empty when there is none
    archive: bytes


def pack(code: Sequence[str | os.PathLike[str]] = (), packages: Sequence[str] = ()) -> Packed:
    """Return what a session records and uploads.

    Parameters
    ----------
    code
        Directories of packages and single modules.
    packages
        Requirements, as pip takes them.

    Raises
    ------
    ConfigError
        A path is neither package nor module, or a requirement is none.

    Examples
    --------
    >>> pack(packages=["rasterio>=1.3"]).environment.requirements
    ('rasterio>=1.3',)
    """
    data = archive.pack(archive.read_code(_several("code", code))) if code else b""
    environment = msgspec.structs.replace(
        own_environment(),
        code=archive.digest(data) if data else "",
        requirements=check_requirements(packages),
    )
    return Packed(environment, data)


def check_requirements(packages: Sequence[str]) -> tuple[str, ...]:
    """Return requirements in a normal form and order, so that the same ones are installed once.

    Examples
    --------
    >>> check_requirements(["rasterio >= 1.3", "affine"])
    ('affine', 'rasterio>=1.3')
    >>> check_requirements(["./mine.whl"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    burst_dask.errors.ConfigError: packages: './mine.whl' is no requirement such as 'rasterio', ...
    """
    found = set()
    for package in _several("packages", packages):
        try:
            found.add(str(Requirement(package)))
        except (InvalidRequirement, TypeError):
            raise ConfigError(
                f"packages: {package!r} is no requirement such as 'rasterio', 'rasterio>=1.3' or "
                "'mine @ file:///shared/mine-1.0-py3-none-any.whl'. Options of pip come from the worker's environment, "
                "such as PIP_INDEX_URL; local packages are sent by code=[…]"
            ) from None
    return tuple(sorted(found))


def _several(name: str, given: Sequence[T]) -> Sequence[T]:
    if isinstance(given, str | os.PathLike):
        raise ConfigError(f"{name}={given!r}: must be a list, as in {name}=[{str(given)!r}]")
    return given
