"""The image of workers: what goes into it, and the tag that says so."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import io
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

import burst_dask
from burst_dask.aws.assets import DOCKERFILE, LOCK, asset
from burst_dask.aws.stack import ARCHITECTURES
from burst_dask.errors import ConfigError

#: The first date that a zip can tell: equal contents are equal bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_TAG_LENGTH = 16


class Sources(msgspec.Struct, frozen=True):
    """All that an image is built from, besides its base.

    Examples
    --------
    >>> sources = sources_here()
    >>> sorted(sources.files)
    ['Dockerfile', 'burst_dask-0.1.0-py3-none-any.whl', 'requirements.lock']
    >>> len(sources.tag)
    16
    """

    #: file names and contents: the build's context
    files: Mapping[str, bytes]
    #: minor version of Python, such as ``"3.12"``: workers need that of the client
    python: str

    @property
    def tag(self) -> str:
        """The hash of it all: equal tags are equal images."""
        digest = hashlib.sha256(self.python.encode())
        for name, content in sorted(self.files.items()):
            digest.update(f"\0{name}\0{len(content)}\0".encode() + content)
        return digest.hexdigest()[:_TAG_LENGTH]

    def tag_of(self, arch: str) -> str:
        """Return the tag of the image of one architecture; `tag` itself means all of them."""
        return f"{self.tag}-{arch}"

    def zipped(self) -> bytes:
        """Return the context as a zip."""
        return _zip(self.files)

    def write(self, folder: Path) -> None:
        """Write the context into a folder."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)


def sources_here(lock: Path | None = None) -> Sources:
    """Return what the image of this installation is built from.

    Parameters
    ----------
    lock
        A file of pinned requirements with hashes instead of the one that comes along.

    Raises
    ------
    ConfigError
        The lock cannot be read.
    """
    path = lock or asset(LOCK)
    try:
        pinned = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"the lock {path} cannot be read: {error.strerror}") from None
    name, wheel = wheel_here()
    files = {DOCKERFILE: asset(DOCKERFILE).read_bytes(), LOCK: pinned, name: wheel}
    return Sources(files, f"{sys.version_info.major}.{sys.version_info.minor}")


def locked_version(package: str, lock: bytes) -> str | None:
    """Return the version of a package that a lock pins; None if it has none.

    >>> locked_version("dask", b"cloudpickle==3.1\\ndask==2025.1.0 \\\\\\n    --hash=sha256:00\\n")
    '2025.1.0'
    """
    for line in lock.decode().splitlines():
        name, pinned, rest = line.partition("==")
        if pinned and name.partition("[")[0].strip().lower() == package:
            return rest.split()[0].rstrip(";\\")
    return None


def differing(sources: Sources) -> str:
    """Return in words why workers of that image would refuse this client; empty if they would not."""
    here, there = importlib.metadata.version("dask"), locked_version("dask", sources.files[LOCK])
    if there in (None, here):
        return ""
    return (
        f"the image has Dask {there}, and this environment has {here}: workers will refuse sessions opened here. "
        f"Install dask=={there} here, or pass a lock of your own with --lock"
    )


def wheel_here() -> tuple[str, bytes]:
    """Return the name and the bytes of a wheel of this package as it is installed, also from a checkout."""
    found = importlib.metadata.distribution("burst_dask")
    version = burst_dask.__version__
    info = f"burst_dask-{version}.dist-info"
    root = Path(burst_dask.__file__).parent
    files = {f"burst_dask/{path.relative_to(root).as_posix()}": path.read_bytes() for path in _package(root)}
    metadata = found.read_text("METADATA") or f"Metadata-Version: 2.1\nName: burst_dask\nVersion: {version}\n"
    files |= {
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: burst_dask\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": b"[console_scripts]\nburst = burst_dask.cli:main\n",
    }
    record = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in sorted(files.items())]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,", ""]).encode()
    return f"burst_dask-{version}-py3-none-any.whl", _zip(files)


def check_architectures(archs: tuple[str, ...]) -> tuple[str, ...]:
    """Return them without repetition, in the usual order; none asked for means all."""
    return tuple(arch for arch in ARCHITECTURES if arch in archs) if archs else ARCHITECTURES


def _package(root: Path) -> Iterator[Path]:
    """Yield the files of the package, without what Python makes of them and what only setting up needs."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if path.is_file() and "__pycache__" not in parts and parts[:2] != ("aws", "files"):
            yield path


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def _zip(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
