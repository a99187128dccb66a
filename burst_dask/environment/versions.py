"""What a process has installed, and how two of them differ."""

from __future__ import annotations

import functools
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import dask
from packaging.utils import canonicalize_name

import burst_dask
from burst_dask.errors import VersionMismatch
from burst_dask.protocol.records import Difference, Environment, Versions

#: Stands for the interpreter among the packages; no package has that name.
PYTHON = "python"
ABSENT = "not installed"
#: What pip is about to remove begins with ~, and is no distribution any more.
_METADATA = re.compile(r"(?P<name>[A-Za-z0-9][\w.]*)-(?P<version>[^-]+)(-py[\d.]+)?\.(dist|egg)-info")


def own_versions() -> Versions:
    """Return what this process runs."""
    major, minor = sys.version_info[:2]
    return Versions(python=f"{major}.{minor}", dask=dask.__version__, burst_dask=burst_dask.__version__)


def check_versions(theirs: Versions, ours: Versions) -> None:
    """Raise `VersionMismatch` when pickles of the client would not be understood here."""
    different = [
        f"{name} {getattr(ours, field)} here, {getattr(theirs, field)} in the client"
        for field, name in (("python", "Python"), ("dask", "Dask"))
        if getattr(ours, field) != getattr(theirs, field)
    ]
    if different:
        raise VersionMismatch(
            f"this worker refuses the session: {'; '.join(different)}. Nothing was claimed. "
            "Start workers from the environment that the session was opened in, or open a session from this one."
        )


@functools.cache
def installed() -> Mapping[str, str]:
    """Return the version of each distribution that this process started with, by normalised name, and of Python."""
    return {
        PYTHON: platform.python_version(),
        canonicalize_name("burst_dask"): burst_dask.__version__,  # also when it is not installed, only on the path
        **installed_in(sys.path),
    }


def installed_in(path: Iterable[str | Path]) -> dict[str, str]:
    """Return the version of each distribution in these directories; the first of a name counts, as for imports.

    By the names of their metadata directories, whose form is specified (``name-version.dist-info``), because every
    worker asks at its start: `importlib.metadata` reads a file of each, 85 ms for 134 of them, and this takes 2.
    """
    found: dict[str, str] = {}
    for folder in path:
        try:
            names = sorted(entry.name for entry in Path(folder).iterdir())
        except OSError:  # absent, or a zip
            continue
        for name in names:
            if match := _METADATA.fullmatch(name):
                found.setdefault(canonicalize_name(match["name"]), match["version"])
    return dict(sorted(found.items()))


def imported(packages: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """Return those of `packages` that have the name of a module among `modules`.

    Not all have: scikit-learn is imported as sklearn. Looking that up reads a file of each package.

    Examples
    --------
    >>> imported(["burst-dask", "dask", "pandas"], ["burst_dask.api.session", "dask", "os"])
    ('burst-dask', 'dask')
    """
    roots = {canonicalize_name(module.partition(".")[0]) for module in modules}
    return tuple(sorted(roots.intersection(packages)))


def own_environment() -> Environment:
    """Return what a manifest keeps of this process."""
    packages = dict(installed())
    return Environment(packages=packages, imported=imported(packages, list(sys.modules)))


def compare(theirs: Environment, ours: Mapping[str, str]) -> tuple[Difference, ...]:
    """Return how a worker with the packages `ours` differs from the client.

    Of what only the client has, just what it had imported counts; what only the worker has, never.

    Examples
    --------
    >>> client = Environment({"pandas": "2.2", "numpy": "2.0", "pytest": "8.3", "rasterio": "1.4"}, ("rasterio",))
    >>> [row.package for row in compare(client, {"numpy": "1.26", "pandas": "2.2"})]
    ['numpy', 'rasterio']
    """
    found = []
    for package, version in sorted(theirs.packages.items()):
        here = ours.get(package, ABSENT)
        if here != version and (here != ABSENT or package in theirs.imported):
            found.append(Difference(package, version, here))
    return tuple(found)


def table(differences: Iterable[Difference]) -> str:
    """Return differences as a table for people.

    Examples
    --------
    >>> print(table([Difference("numpy", "2.0", "1.26"), Difference("rasterio", "1.4", "not installed")]))
    package   client  worker
    numpy     2.0     1.26
    rasterio  1.4     not installed
    """
    rows = [("package", "client", "worker"), *((row.package, row.client, row.worker) for row in differences)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in rows)
