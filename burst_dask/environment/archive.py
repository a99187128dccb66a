"""Local packages as one zip, whose digest names it: the same files give the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath

from burst_dask.errors import ConfigError, CorruptObject

#: Code is sent at each opening of a session and read by each machine: more than this many bytes is data, not code.
CODE_BYTES = 256 << 20
#: Compiled files, which workers make themselves, and what version control keeps.
_SKIPPED_FOLDERS = frozenset({"__pycache__", "CVS"})
_SKIPPED_SUFFIXES = frozenset({".pyc", ".pyo"})
#: The first date that a zip can hold.
_DATE = (1980, 1, 1, 0, 0, 0)


def read_code(paths: Iterable[str | os.PathLike[str]]) -> dict[str, bytes]:
    """Return the files of packages (directories) and single modules, by their name in the archive.

    Left out are compiled files, and whatever has a name that begins with a dot: ``.git``,
    ``.venv``, caches of tools.

    Raises
    ------
    ConfigError
        A path is neither a package nor a module, two have one name, or they are too large.

    Examples
    --------
    >>> import tempfile
    >>> package = Path(tempfile.mkdtemp()) / "mypkg"
    >>> package.mkdir()
    >>> _ = (package / "__init__.py").write_text("ANSWER = 42")
    >>> read_code([package])
    {'mypkg/__init__.py': b'ANSWER = 42'}
    """
    found: dict[str, Path] = {}
    roots: dict[str, Path] = {}
    for given in paths:
        root = Path(given).expanduser().absolute()  # a link keeps the name that it is imported by
        _check_root(given, root)
        if (other := roots.setdefault(root.name, root)) != root:
            raise ConfigError(f"code: {other} and {root} have the same name, and only one of them can be imported")
        found.update({root.name: root} if root.is_file() else dict(_walk(root, root.name, frozenset())))
    size = {name: path.stat().st_size for name, path in found.items()}
    if (total := sum(size.values())) > CODE_BYTES:
        largest = max(size, key=lambda name: size[name])
        raise ConfigError(
            f"code: {total:,} bytes, of which {largest} has {size[largest]:,}; at most {CODE_BYTES:,} are sent. "
            "Put data where workers can read it, such as the bucket, and give its address to the tasks"
        )
    return {name: path.read_bytes() for name, path in found.items()}


def _check_root(given: str | os.PathLike[str], root: Path) -> None:
    if not root.exists():
        raise ConfigError(f"code: there is no {os.fspath(given)!r} (looked for {root})")
    importable = (root.stem if root.is_file() else root.name).isidentifier()
    if not importable or (root.is_file() and root.suffix != ".py"):
        raise ConfigError(f"code: {root} cannot be imported: give the directory of a package, or a module (.py)")
    if root.is_dir() and not any(root.glob("*.py")):
        inside = sorted(str(child.parent) for child in root.glob("*/__init__.py"))
        hint = f"; did you mean {', '.join(map(repr, inside))}?" if inside else ""
        raise ConfigError(f"code: {root} is no package, it holds no module{hint}")


def _walk(folder: Path, name: str, above: frozenset[Path]) -> Iterator[tuple[str, Path]]:
    real = folder.resolve()
    if real in above:  # a link to a folder that it lies in
        return
    for child in folder.iterdir():
        if child.name.startswith(".") or child.name in _SKIPPED_FOLDERS or child.suffix in _SKIPPED_SUFFIXES:
            continue
        if child.is_dir():
            yield from _walk(child, f"{name}/{child.name}", above | {real})
        elif child.is_file():
            yield f"{name}/{child.name}", child


def pack(files: Mapping[str, bytes]) -> bytes:
    """Return the zip of `files`, by name: neither their order nor any date is in it.

    Examples
    --------
    >>> pack({"a.py": b"1", "b.py": b"2"}) == pack({"b.py": b"2", "a.py": b"1"})
    True
    """
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, _DATE)
            info.create_system = 3  # Unix, also when packed elsewhere
            info.external_attr = (stat.S_IFREG | 0o644) << 16
            archive.writestr(info, files[name], zipfile.ZIP_DEFLATED, 6)
    return data.getvalue()


def digest(data: bytes) -> str:
    """Return what names the archive: SHA-256, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def unpack(name: str, data: bytes, expected: str, folder: Path) -> None:
    """Write the files of an archive below `folder`.

    Parameters
    ----------
    name
        Of the object that holds it, for messages.
    expected
        Its `digest`.

    Raises
    ------
    CorruptObject
        The bytes are not those that the digest names, or a file would lie outside of `folder`. Nothing was written.
    """
    if digest(data) != expected:
        raise CorruptObject(f"{name}: its {len(data)} bytes are not those that were uploaded")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            for inside, info in files.items():
                _check_inside(name, inside, info)
            for inside, info in files.items():
                path = folder / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(info))
    except zipfile.BadZipFile as error:
        raise CorruptObject(f"{name}: {error}") from error


def _check_inside(name: str, inside: str, info: zipfile.ZipInfo) -> None:
    parts = PurePosixPath(inside).parts
    leaves = inside.startswith("/") or ".." in parts or "\\" in inside or ":" in inside
    kind = stat.S_IFMT(info.external_attr >> 16)
    if leaves or not parts or kind not in (0, stat.S_IFREG):
        raise CorruptObject(f"{name}: {inside!r} would not be a file inside of the folder that it is unpacked to")
