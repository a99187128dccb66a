"""Objects as files of a directory, written so that they survive a power loss.

obstore's own writer for directories never syncs: after a power loss an object whose write was answered may be
gone, or be there and empty. So this one writes, and obstore reads and lists::

    create new#7053…     a name that listings never show
    write it, sync it    the whole content is on the disk …
    link it to the key   … before the key can be seen; of all that link one key, one succeeds
    sync the folder      the key is on the disk, too, before the write is answered
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from burst_dask.clock import Entropy
from burst_dask.errors import ConfigError, StoreUnavailable, StoreUnsuitable

Buffer = bytes | bytearray | memoryview

#: Names that obstore takes for its own unfinished files, and so neither lists nor reads.
_UNFINISHED = re.compile(r"[^#]*#\d+")
#: Parts of a key that are no names of files.
_NO_NAME = re.compile(r"\.{0,2}|.*[\x00-\x1f\x7f].*", re.DOTALL)
#: How often a write begins anew because somebody tidied away the folder that it had just made.
_TRIES = 10
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
#: What file systems answer that cannot sync a folder, and need not.
_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


class Files:
    """Writes and deletes the objects of one directory; every call blocks.

    Parameters
    ----------
    root
        The directory; it is created if it is not there.
    durable
        Whether a write is on the disk when it is answered. Without, it is when the system writes back what it
        has in memory; nothing but a power loss, or a crash of the system, shows the difference.
    """

    def __init__(self, root: Path, *, durable: bool = True, entropy: Entropy | None = None) -> None:
        self._root = root
        self._durable = durable
        self._entropy = entropy or Entropy()
        #: folders that are there, as are those above them, and are on the disk
        self._kept: set[Path] = set()
        missing = [path for path in (root, *root.parents) if not path.exists()]
        root.mkdir(parents=True, exist_ok=True)
        for path in missing:
            with contextlib.suppress(PermissionError):  # it may be written to, and not be read: then it is not ours
                self._sync_folder(path.parent)

    def create(self, key: str, buffers: Sequence[Buffer]) -> bool:
        """Write `key` unless it is there; tell whether it was not."""
        return self._write(key, buffers, _link)

    def put(self, key: str, buffers: Sequence[Buffer]) -> None:
        """Write `key`, in the place of what is there."""
        self._write(key, buffers, _replace)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete objects that are there, folders in which nothing is left, and what writers that died left in them."""
        paths = [self._path(key) for key in keys]
        for path in paths:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
        for folder in sorted({path.parent for path in paths}):
            self._tidy(folder)

    def _path(self, key: str) -> Path:
        parts = key.split("/")
        if any(map(_NO_NAME.fullmatch, parts)) or _UNFINISHED.fullmatch(parts[-1]):
            raise ConfigError(f"{key!r} cannot be the name of a file below {self._root}")
        return self._root.joinpath(*parts)

    def _write(self, key: str, buffers: Sequence[Buffer], publish: Callable[[Path, Path], bool]) -> bool:
        path = self._path(key)
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                self._keep(path.parent)
                with self._written(path.parent, buffers) as new:
                    if not publish(new, path):
                        return False
                    self._sync_folder(path.parent)
                    return True
            self._kept.clear()  # somebody has tidied away the folder, or the new file before it was locked
        raise StoreUnavailable(f"{path.parent} was removed each time that {path.name} was to be written there")

    @contextlib.contextmanager
    def _written(self, folder: Path, buffers: Sequence[Buffer]) -> Iterator[Path]:
        """Have a new file in `folder` that is whole and on the disk; it is gone afterwards, under this name."""
        new = folder / f"new#{self._entropy.integer(0, 10**18)}"
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), "wb") as file:
            try:
                with contextlib.suppress(OSError):  # not every file system has locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # says that its writer lives
                file.writelines(buffers)
                file.flush()
                if self._durable:
                    sync(file.fileno())
                yield new
            finally:
                new.unlink(missing_ok=True)

    def _keep(self, folder: Path) -> None:
        """See that `folder` is there and on the disk."""
        if folder in self._kept:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:  # and when pathlib looked what it is, it was gone
            if not folder.exists():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None
        new = [folder]
        while new[-1] != self._root and new[-1] not in self._kept:
            self._sync_folder(new[-1].parent)
            new.append(new[-1].parent)
        self._kept.update(new)

    def _sync_folder(self, folder: Path) -> None:
        if self._durable:
            sync_folder(folder)

    def _tidy(self, folder: Path) -> None:
        """Remove what dead writers left in `folder`, then it and those above it as far as they are empty."""
        while folder != self._root:
            try:
                for path in folder.iterdir():
                    if _UNFINISHED.fullmatch(path.name):
                        _remove_if_dead(path)
                folder.rmdir()
            except OSError:  # not empty, or gone
                return
            self._kept.discard(folder)
            folder = folder.parent


def sync(descriptor: int) -> None:
    """See that what was written to an open file, or happened in an open folder, is on the disk."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync leaves it to the disk when to write
        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """See that the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def _link(new: Path, path: Path) -> bool:
    try:
        path.hardlink_to(new)
    except FileExistsError:
        # A network file system may have carried out a request, lost the answer, and refused the repetition.
        return new.stat().st_nlink > 1
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise StoreUnsuitable(
            f"{path.parent} is on a file system without hard links ({error.strerror}), by which exactly one of several "
            "writers creates an object: choose a directory on another one"
        ) from None
    return True


def _replace(new: Path, path: Path) -> bool:
    new.replace(path)
    return True


def _remove_if_dead(new: Path) -> None:
    """Remove an unfinished file unless its writer lives, which holds a lock on it.

    Should that be an error, where locks do not reach other machines, the writer finds its file gone and begins anew.
    """
    with contextlib.suppress(OSError), new.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.unlink()
