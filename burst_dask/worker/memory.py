"""Results in memory, spilled to disk beyond a limit.

Small values stay in a plain dict: a shard has at most some thousand of them, and the
bookkeeping would cost more than they weigh. Large ones go through zict, as in distributed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from typing import Any

import zict

from burst_dask import serialize

#: Bytes below which a value is not worth the bookkeeping of spilling.
SMALL = 4096


class Memory:
    """All values that a worker keeps, of all the shards that it holds.

    Parameters
    ----------
    limit
        Bytes of large values kept in memory; what is beyond goes to disk, least recently used
        first. None never spills.
    directory
        Parent of the spill directory; None is the system's.
    """

    def __init__(self, limit: int | None = None, directory: str | None = None) -> None:
        self._scopes = 0
        self.sizes: dict[str, int] = {}
        self._directory: str | None = None
        self.large: MutableMapping[str, Any]
        if limit is None:
            self.large = {}
            return
        self._directory = tempfile.mkdtemp(prefix="burst-spill-", dir=directory)
        slow = _Disk(self._directory)
        self.large = zict.Buffer({}, slow, n=limit, weight=lambda key, value: self.sizes.get(key, SMALL))

    def scope(self) -> Scope:
        """Return an empty mapping of its own, kept here."""
        self._scopes += 1
        return Scope(self, self._scopes)

    def close(self) -> None:
        """Delete what was spilled."""
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


class _Disk(MutableMapping[str, Any]):
    """Values as files; one that cannot be pickled cannot be spilled, and stays in memory."""

    def __init__(self, directory: str) -> None:
        self._files = zict.File(directory)
        self._kept: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        try:
            self._files[key] = b"".join(serialize.dumps(value))
        except OSError:
            raise
        except Exception:  # whatever a user's __reduce__ raises
            self._kept[key] = value

    def __getitem__(self, key: str) -> Any:
        return self._kept[key] if key in self._kept else serialize.loads(self._files[key])

    def __delitem__(self, key: str) -> None:
        if key in self._kept:
            del self._kept[key]
        else:
            del self._files[key]

    def __contains__(self, key: object) -> bool:
        return key in self._kept or key in self._files

    def __iter__(self) -> Iterator[str]:
        yield from self._kept
        yield from self._files

    def __len__(self) -> int:
        return len(self._kept) + len(self._files)


class Scope(MutableMapping[int, Any]):
    """The values of one holding, by global number of their tasks."""

    def __init__(self, memory: Memory, number: int) -> None:
        self._memory = memory
        self._number = number
        self._small: dict[int, Any] = {}
        self._large: set[int] = set()

    def put(self, key: int, value: Any, size: int) -> None:
        """Keep `value`, which takes `size` bytes."""
        if size < SMALL:
            self._small[key] = value
        else:
            name = self._name(key)
            self._memory.sizes[name] = size
            self._large.add(key)
            self._memory.large[name] = value

    def _name(self, key: int) -> str:
        return f"{self._number}-{key}"

    def __setitem__(self, key: int, value: Any) -> None:
        self.put(key, value, 0)

    def __getitem__(self, key: int) -> Any:
        if key in self._small:
            return self._small[key]
        return self._memory.large[self._name(key)]

    def __contains__(self, key: object) -> bool:
        return key in self._small or key in self._large

    def __delitem__(self, key: int) -> None:
        if key in self._large:
            self._large.discard(key)
            name = self._name(key)
            del self._memory.large[name]
            del self._memory.sizes[name]
        else:
            del self._small[key]

    def __iter__(self) -> Iterator[int]:
        yield from self._small
        yield from self._large

    def __len__(self) -> int:
        return len(self._small) + len(self._large)
