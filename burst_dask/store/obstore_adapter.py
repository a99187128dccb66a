"""The `Store` over obstore: S3, GCS, Azure, a local directory and memory.

obstore's own retries are off: `burst_dask.store.retrying.Retrying` is the only retrier, so that
each "already exists" answers the very request that was sent.
"""

from __future__ import annotations

import asyncio
import builtins
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError

from burst_dask.errors import CorruptObject, StoreUnavailable
from burst_dask.store import leaving
from burst_dask.store.base import Body, Meta, Span
from burst_dask.store.files import Files
from burst_dask.store.requests import COALESCE, DELETE_BATCH, PAGE, PART, cut, flatten, plan, size_of
from burst_dask.store.translate import lost_race, no_such_place, translate

if TYPE_CHECKING:  # obstore has this for type checkers only
    from obstore.store import ObjectStore

__all__ = ["COALESCE", "FileStore", "ObstoreStore", "Traits"]

T = TypeVar("T")

#: A remote store has this long to begin an answer: S3's worst is seconds, a lease is 30 s …
_ANSWER_SECONDS = 10.0
#: … and this long for each MiB on top: a domestic uplink.
_SECONDS_PER_BYTE = 2.0 / (1 << 20)
#: The folders of a prefix come in as many pages as it takes, all within so many such times.
_FOLDERS_ANSWERS = 6
#: A plain put of more than this goes up in parts. Bytes.
_MULTIPART_FROM = 64 << 20
#: Requests of one call under way at once.
_PARALLEL = 16
#: Threads that write files. They mostly wait for the disk, which syncs several files together; in asyncio's own pool,
#: of a few threads more than there are processors, a slow disk would also hold up whoever else needs a thread.
_WRITERS = ThreadPoolExecutor(32, thread_name_prefix="burst-files")


class Traits(NamedTuple):
    """How the stores behind obstore differ."""

    #: behind a network: requests have deadlines, and large plain puts go up in parts
    remote: bool
    #: one request deletes many, and an absent object is no error
    bulk_delete: bool
    #: listings come in the order of keys, and begin where they are asked to
    ordered: bool
    #: folders exist of themselves, so there may be empty ones
    real_folders: bool = False


class ObstoreStore:
    """A `Store` over one obstore store.

    Parameters
    ----------
    store
        With its bucket and prefix set, and its retries off.
    url
        The address that opens the same store.
    traits
        What the kind of store does differently.
    """

    def __init__(self, store: ObjectStore, url: str, traits: Traits) -> None:
        self._store = store
        self._url = url
        self._traits = traits

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._url}>"

    @property
    def url(self) -> str:
        return self._url

    async def create(self, key: str, body: Body) -> bool:
        buffers = flatten(body)
        try:
            await self._within(
                size_of(buffers),
                obstore.put_async(self._store, key, buffers, mode="create", use_multipart=False),
            )
        except AlreadyExistsError as error:
            if lost_race(error):
                return False
            raise translate(error, f"create {key}", self._url) from None
        except Exception as error:
            raise translate(error, f"create {key}", self._url) from None
        return True

    async def put(self, key: str, body: Body) -> None:
        buffers = flatten(body)
        size = size_of(buffers)
        try:
            await self._within(
                size,
                obstore.put_async(
                    self._store,
                    key,
                    buffers,
                    use_multipart=self._traits.remote and size > _MULTIPART_FROM,
                    chunk_size=PART,
                    max_concurrency=4,
                ),
            )
        except Exception as error:
            raise translate(error, f"put {key}", self._url) from None

    async def get(self, key: str) -> bytes | None:
        try:
            result = await self._within(0, obstore.get_async(self._store, key))
            return bytes(await self._within(result.meta["size"], result.bytes_async()))
        except FileNotFoundError as error:
            self._check_place(error, key)
            return None
        except Exception as error:
            raise translate(error, f"get {key}", self._url) from None

    async def get_ranges(self, key: str, spans: Sequence[Span], *, clip: bool = False) -> list[memoryview] | None:
        parts = plan(spans)
        try:
            if not parts:  # nothing but empty spans: only whether the object is there matters
                await self._within(0, obstore.head_async(self._store, key))
                return [memoryview(b"")] * len(spans)
            data = await self._gather(self._get_range(key, part, clip) for part in parts)
        except FileNotFoundError as error:
            self._check_place(error, key)
            return None
        except Exception as error:
            raise translate(error, f"get {key}", self._url) from None
        return [cut(span, parts, data) for span in spans]

    async def _get_range(self, key: str, span: Span, clip: bool) -> memoryview:
        size = span.end - span.start
        data: obstore.Bytes | bytes
        try:
            data = await self._within(size, obstore.get_range_async(self._store, key, start=span.start, end=span.end))
        except Exception as error:
            if "StartTooLarge" not in str(error) and "InvalidRange" not in str(error):
                raise
            data = b""
        if len(data) < size and not clip:
            raise CorruptObject(f"{self._url}: {key} ends before byte {span.end}: it is truncated")
        return memoryview(data)

    def _check_place(self, error: FileNotFoundError, key: str) -> None:
        """Raise if it is the bucket that is absent, not just the object."""
        if no_such_place(error):
            raise translate(error, f"get {key}", self._url) from None

    async def list(self, prefix: str, *, after: str = "") -> AsyncIterator[Sequence[Meta]]:
        try:
            if after and not self._traits.ordered:
                page: list[Meta] = []
                async for some in self._behind(prefix, after):
                    page += some
                    while len(page) >= PAGE:
                        yield page[:PAGE]
                        page = page[PAGE:]
                if page:
                    yield page
                return
            stream = obstore.list(
                self._store, prefix.rstrip("/") or None, offset=after or None, chunk_size=PAGE
            ).__aiter__()
            if not self._traits.ordered:
                entries = sorted([meta async for page in stream for meta in _metas(page)])
                for start in range(0, len(entries), PAGE):
                    yield entries[start : start + PAGE]
                return
            while (metas := await self._within(0, anext(stream, None))) is not None:
                yield _metas(metas)
        except Exception as error:
            raise translate(error, f"list {prefix!r}", self._url) from None

    async def _behind(self, prefix: str, after: str) -> AsyncIterator[builtins.list[Meta]]:
        """Yield what lies behind `after` in the order of keys, folder by folder.

        A store without order would read everything below `prefix` to tell what comes next.
        """
        found = await self._children(prefix)
        objects = {meta.key: meta for meta in _metas(found["objects"]) if meta.key > after}
        folders = {path + "/" for path in found["common_prefixes"]}
        folders = {path for path in folders if path > after or after.startswith(path)}
        batch: list[Meta] = []
        for key in sorted(folders | objects.keys()):
            if key not in folders:
                batch.append(objects[key])
                continue
            if batch:
                yield batch
                batch = []
            async for below in self._behind(key, after):
                yield below
        if batch:
            yield batch

    async def folders(self, prefix: str) -> builtins.list[str]:
        try:
            paths = (await self._children(prefix))["common_prefixes"]
            if self._traits.real_folders:
                holds = await self._gather(self._holds_objects(path) for path in paths)
                paths = [path for path, full in zip(paths, holds, strict=True) if full]
        except Exception as error:
            raise translate(error, f"list {prefix!r}", self._url) from None
        return sorted(path.rpartition("/")[2] for path in paths)

    async def _children(self, prefix: str) -> obstore.ListResult[Sequence[obstore.ObjectMeta]]:
        """Return what lies directly below `prefix`: objects, and folders without their slash."""
        request = obstore.list_with_delimiter_async(self._store, prefix.rstrip("/") or None)
        return await self._within(0, request, answers=_FOLDERS_ANSWERS)

    async def _holds_objects(self, path: str) -> bool:
        """Tell whether a directory holds more than what a writer that died has left: itself."""
        return await self._within(0, anext(obstore.list(self._store, path, chunk_size=1).__aiter__(), None)) is not None

    async def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if not self._traits.bulk_delete:
            await self._gather(self._delete_one(key) for key in keys)
            return
        for start in range(0, len(keys), DELETE_BATCH):
            batch = keys[start : start + DELETE_BATCH]
            try:
                await self._within(0, obstore.delete_async(self._store, batch))
            except Exception as error:
                raise translate(error, f"delete {batch[0]} and {len(batch) - 1} more", self._url) from None

    async def _delete_one(self, key: str) -> None:
        try:
            await self._within(0, obstore.delete_async(self._store, key))
        except FileNotFoundError as error:
            self._check_place(error, key)
        except Exception as error:
            raise translate(error, f"delete {key}", self._url) from None

    async def time(self, key: str) -> float:
        await self.put(key, b"")
        try:
            meta = await self._within(0, obstore.head_async(self._store, key))
        except FileNotFoundError:
            raise StoreUnavailable(f"{self._url} does not show {key}, which it has just stored") from None
        except Exception as error:
            raise translate(error, f"get {key}", self._url) from None
        return meta["last_modified"].timestamp()

    async def _within(self, size: int, request: Awaitable[T], *, answers: int = 1) -> T:
        """Await `request`, which moves `size` bytes, for as long as a working store would take."""
        with leaving.request():
            if not self._traits.remote:
                return await request
            seconds = answers * _ANSWER_SECONDS + size * _SECONDS_PER_BYTE
            try:
                async with asyncio.timeout(seconds):
                    return await request
            except TimeoutError:
                raise StoreUnavailable(f"{self._url} did not answer within {seconds:.0f} s") from None

    async def _gather(self, requests: Iterable[Awaitable[T]]) -> Sequence[T]:
        """Await all requests, some at a time; a single one costs no task."""
        waiting = list(requests)
        if len(waiting) == 1:
            return [await waiting[0]]
        free = asyncio.Semaphore(_PARALLEL)

        async def one(request: Awaitable[T]) -> T:
            async with free:
                return await request

        return await asyncio.gather(*map(one, waiting))


class FileStore(ObstoreStore):
    """A directory: obstore reads and lists, `Files` writes and deletes.

    Parameters
    ----------
    files
        Of the same directory as `store`.
    """

    def __init__(self, store: ObjectStore, url: str, files: Files) -> None:
        super().__init__(store, url, Traits(remote=False, bulk_delete=False, ordered=False, real_folders=True))
        self._files = files

    async def create(self, key: str, body: Body) -> bool:
        return await self._in_thread(f"create {key}", lambda: self._files.create(key, flatten(body)))

    async def put(self, key: str, body: Body) -> None:
        await self._in_thread(f"put {key}", lambda: self._files.put(key, flatten(body)))

    async def delete(self, keys: Iterable[str]) -> None:
        gone = list(keys)
        await self._in_thread(f"delete of {len(gone)} objects", lambda: self._files.delete(gone))

    async def _in_thread(self, doing: str, call: Callable[[], T]) -> T:
        try:
            return await self._within(0, asyncio.get_running_loop().run_in_executor(_WRITERS, call))
        except Exception as error:
            raise translate(error, doing, self._url) from None


def _metas(page: Sequence[obstore.ObjectMeta]) -> list[Meta]:
    return [Meta(meta["path"], meta["size"], meta["last_modified"].timestamp()) for meta in page]
