"""Objects <-> bytes: results, failures, and the payloads of shards.

A **result** is a body that describes itself: ``count(4)``, then, when there are out-of-band
buffers, ``pickle length(8)`` and for each buffer ``length * 2 + writeable (8)``; then the pickle
(protocol 5), then the buffers, each at a multiple of 64 bytes.

Plain pickle writes what it can, cloudpickle the rest: what is defined in ``__main__`` or in a
function, or in a module registered with `cloudpickle.register_pickle_by_value`. Why not
distributed.protocol: ``benchmarks/serialize.py`` gives, in microseconds to dump and to load,

====================  =============  =============  =============
value                 plain pickle   distributed    this module
====================  =============  =============  =============
int                       0.2 + 0.1     14 + 9          0.3 + 0.3
array of 100 B            3.7 + 2.3     14 + 13         4.4 + 2.5
array of 8 MB             131 + 132     14 + 152        5.2 + 133
frame of 24 MB         11,633 + 956    563 + 963        473 + 960
Arrow table of 20 MB      637 + 647  1,648 + 16          17 + 660
====================  =============  =============  =============

An array that was writeable is writeable again, as with distributed: code that assigns into its
input works here as well. A body that is itself writeable is used in place; buffers of a read-only
one are copied, which is also what keeps one value from pinning the whole segment it was read in.
"""

from __future__ import annotations

import io
import pickle
import struct
import traceback
from collections.abc import Callable, Sequence
from types import FunctionType, TracebackType
from typing import Any, NoReturn

import cloudpickle
import msgspec
from tblib import Traceback

from burst_dask.errors import RemoteTaskError
from burst_dask.protocol.frames import Buffer

#: Smaller buffers ride in the pickle: a buffer of its own costs more than copying so few bytes.
OUT_OF_BAND_FROM = 4096
#: The same for the constants of a graph, each of which is a range read of its own.
PLACED_FROM = 65_536
_ALIGN = 64
_COUNT = struct.Struct("<I")
_NO_BUFFERS = _COUNT.pack(0)
_PROTOCOL = 5
#: Types that pickle writes by themselves: nothing in them can need cloudpickle.
_PLAIN = frozenset({int, float, complex, bool, str, bytes, type(None)})

Keep = Callable[[pickle.PickleBuffer], bool]
#: Tells which buffer holds an object, or None for one that is pickled in its place.
Share = Callable[[Any], int | None]


def dumps(value: Any) -> list[Buffer]:
    """Return the buffers of the body that holds `value`.

    Examples
    --------
    >>> loads(b"".join(dumps({"a": 1})))
    {'a': 1}
    """
    if type(value) in _PLAIN:
        return [_NO_BUFFERS + pickle.dumps(value, _PROTOCOL)]
    views: list[memoryview] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < OUT_OF_BAND_FROM:
            return True
        views.append(view)
        return False

    data = _pickle(value, keep, views.clear)
    if not views:
        return [_NO_BUFFERS, data]
    sizes = [view.nbytes * 2 + (not view.readonly) for view in views]
    head = struct.pack(f"<IQ{len(views)}Q", len(views), len(data), *sizes)
    body: list[Buffer] = [head, data]
    offset = len(head) + len(data)
    for view in views:
        padding = -offset % _ALIGN
        body += (bytes(padding), view)
        offset += padding + view.nbytes
    return body


def loads(body: Buffer) -> Any:
    """Return the value that `dumps` wrote, whether it lies in one buffer of any kind."""
    view = memoryview(body)
    (count,) = _COUNT.unpack_from(view)
    if not count:
        return pickle.loads(view[_COUNT.size :])  # noqa: S301 - who may write the store may run code, see README
    length, *sizes = struct.unpack_from(f"<Q{count}Q", view, _COUNT.size)
    start = _COUNT.size + 8 * (count + 1)
    offset = start + length
    buffers = []
    for size in sizes:
        offset += -offset % _ALIGN
        buffers.append(_own(view[offset : offset + size // 2], bool(size & 1)))
        offset += size // 2
    return pickle.loads(view[start : start + length], buffers=buffers)  # noqa: S301 - who may write the store may run code, see SECURITY.md


def _own(view: memoryview, writeable: bool) -> memoryview:
    """Return the bytes of `view` as memory that may be kept, writeable or not as asked."""
    if view.readonly:
        view = memoryview(bytearray(view))
    return view if writeable else view.toreadonly()


def _pickle(value: Any, keep: Keep, restart: Callable[[], None], share: Share | None = None) -> bytes:
    """Pickle as Dask does; `restart` forgets the buffers of an attempt that is given up."""
    if not cloudpickle.list_registry_pickle_by_value():
        try:
            if share is None:
                data = pickle.dumps(value, _PROTOCOL, buffer_callback=keep)
            else:
                data = _run(_SharingPickler, value, keep, share)
        except Exception:  # whatever __reduce__ of a user's class raises: cloudpickle may do better
            data = b"__main__"
        # What __main__ defines is found by name here, but not in the __main__ of a worker.
        if b"__main__" not in data:
            return data
        restart()
    return _run(_SharingCloudPickler, value, keep, share or _share_nothing)


class _SharingPickler(pickle.Pickler):
    share: Share

    def persistent_id(self, obj: Any) -> int | None:
        return self.share(obj)


class _SharingCloudPickler(cloudpickle.Pickler):  # type: ignore[misc]
    share: Share

    def persistent_id(self, obj: Any) -> int | None:
        return self.share(obj)


def _share_nothing(_: Any) -> None:
    return None


def _run(kind: type[_SharingPickler] | type[_SharingCloudPickler], value: Any, keep: Keep, share: Share) -> bytes:
    file = io.BytesIO()
    pickler = kind(file, _PROTOCOL, buffer_callback=keep)
    pickler.share = share
    pickler.dump(value)
    return file.getvalue()


def fault(value: Any) -> Exception | None:
    """Return why `value` cannot be pickled, if so."""
    try:
        cloudpickle.dumps(value, _PROTOCOL)
    except Exception as error:
        return error
    return None


# ---------------------------------------------------------------------------- payloads


def dump_payload(nodes: Sequence[Any], place: Callable[[memoryview], int | None], share: Share | None = None) -> bytes:
    """Return one pickle of the tasks of a shard, so that what they share is stored once.

    Parameters
    ----------
    nodes
        `dask._task_spec.GraphNode` s.
    place
        Stores a buffer of at least `PLACED_FROM` bytes and returns its index among the buffers
        that `load_payload` gets; None leaves it in the payload. May be called again for the
        same buffer.
    share
        Tells of an object the index of the buffer that holds `dumps` of it, or None. For what
        is large but no buffer, such as text, or a frame of Python objects.

    Raises whatever pickling raises; `burst_dask.graph.blame` finds the task and the object.
    """
    marks: list[int] = []

    def keep(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < PLACED_FROM:
            return True
        index = place(view)
        if index is None:
            return True
        marks.append(index * 2 + (not view.readonly))
        return False

    data = _pickle(nodes, keep, marks.clear, share)
    return struct.pack(f"<I{len(marks)}I", len(marks), *marks) + data


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: memoryview, owned: Sequence[memoryview], shared: Sequence[memoryview]) -> None:
        super().__init__(io.BytesIO(data), buffers=owned)
        self._shared = shared
        self._loaded: dict[int, Any] = {}

    def persistent_load(self, pid: int) -> Any:
        if pid not in self._loaded:
            self._loaded[pid] = loads(self._shared[pid])
        return self._loaded[pid]


def load_payload(payload: Buffer, buffers: Sequence[memoryview]) -> list[Any]:
    """Return the tasks that `dump_payload` wrote; `buffers` are those that were placed or shared."""
    view = memoryview(payload)
    (count,) = _COUNT.unpack_from(view)
    marks = struct.unpack_from(f"<{count}I", view, _COUNT.size)
    owned = [_own(buffers[mark // 2], bool(mark & 1)) for mark in marks]
    nodes: list[Any] = _Unpickler(view[_COUNT.size * (count + 1) :], owned, buffers).load()
    return nodes


# ---------------------------------------------------------------------------- failures


class Failure(msgspec.Struct, frozen=True):
    """Why a task failed."""

    #: the task's own exception with its traceback, or a `RemoteTaskError` that stands in for it
    exception: BaseException
    #: as the worker would have printed it, with the chain of causes
    traceback: str
    key: Any
    worker: str
    #: how often the task was run
    attempts: int
    #: the exception's traceback on the worker; raising the exception puts more in front of it
    remote: TracebackType | None = None

    def reraise(self) -> NoReturn:
        """Raise the exception; its traceback goes on where the task's code raised it."""
        raise self.exception.with_traceback(self.remote)


class _Frame(msgspec.Struct, frozen=True, array_like=True):
    file: str
    name: str
    line: int
    module: str


class _Raised(msgspec.Struct, frozen=True, array_like=True):
    """One exception of a chain."""

    kind: str
    text: str
    #: b"" when it cannot be carried over
    pickle: bytes
    frames: list[_Frame]
    suppress: bool
    notes: list[str]
    cause: int | None = None
    context: int | None = None
    #: those in an exception group
    members: list[int] = []


class _Carried(msgspec.Struct, frozen=True, array_like=True):
    chain: list[_Raised]
    traceback: str
    key: bytes
    worker: str
    attempts: int


#: Modules whose frames lead to the task's code and are of no interest to its author.
_OURS = ("burst_dask", "dask._task_spec", "concurrent.futures")
#: Of a deeper traceback only so many frames at either end: that of a recursion has thousands.
_FRAMES = 50
#: Longest chain of causes that is carried.
_CHAIN = 20


def dump_failure(error: BaseException, *, key: Any, worker: str, attempts: int) -> list[Buffer]:
    """Return the buffers of the body that holds what `load_failure` returns. Never raises."""
    chain: list[_Raised] = []
    _carry(error, chain, {})
    try:
        text = "".join(traceback.format_exception(type(error), error, _trim(error.__traceback__)))
    except Exception as other:  # a __str__ or __notes__ that raises
        text = f"{chain[0].kind} ({type(other).__name__} when printing it)"
    try:
        named = pickle.dumps(key, _PROTOCOL)
    except Exception:
        named = pickle.dumps(repr(key), _PROTOCOL)
    return [msgspec.msgpack.encode(_Carried(chain, _clean(text), named, worker, attempts))]


def load_failure(body: Buffer) -> Failure:
    """Return the failure that `dump_failure` wrote."""
    carried = msgspec.msgpack.decode(body, type=_Carried)
    errors = [_revived(raised) for raised in carried.chain]
    for error, raised in zip(errors, carried.chain, strict=True):
        error.__cause__ = None if raised.cause is None else errors[raised.cause]
        error.__context__ = None if raised.context is None else errors[raised.context]
        error.__suppress_context__ = raised.suppress
        error.__traceback__ = _rebuild(raised.frames)
        for note in raised.notes[len(getattr(error, "__notes__", ())) :]:
            error.add_note(note)
    for error, raised in zip(errors, carried.chain, strict=True):
        if isinstance(error, BaseExceptionGroup) and len(raised.members) == len(error.exceptions):
            for member, number in zip(error.exceptions, raised.members, strict=True):
                member.__traceback__ = errors[number].__traceback__
    key = pickle.loads(carried.key)  # noqa: S301 - who may write the store may run code, see SECURITY.md
    remote = errors[0].__traceback__
    return Failure(errors[0], carried.traceback, key, carried.worker, carried.attempts, remote)


def _carry(error: BaseException | None, chain: list[_Raised], places: dict[int, int]) -> int | None:
    """Append `error` and what it was raised from to `chain`; return its place there."""
    if error is None:
        return None
    if id(error) in places:
        return places[id(error)]
    place = len(chain)
    if place >= _CHAIN:
        return None
    places[id(error)] = place
    kind = type(error)
    raised = _Raised(
        kind=f"{kind.__module__}.{kind.__qualname__}",
        text=_clean(_text(error)),
        pickle=_dump_exception(error),
        frames=_frames(error.__traceback__),
        suppress=error.__suppress_context__,
        notes=[_clean(str(note)) for note in getattr(error, "__notes__", ())],
    )
    chain.append(raised)
    links: dict[str, Any] = {
        "cause": _carry(error.__cause__, chain, places),
        "context": _carry(error.__context__, chain, places),
    }
    if isinstance(error, BaseExceptionGroup):
        members = [_carry(member, chain, places) for member in error.exceptions]
        links["members"] = [number for number in members if number is not None]
    chain[place] = msgspec.structs.replace(raised, **links)
    return place


def _dump_exception(error: BaseException) -> bytes:
    """Pickle an exception so that it can be loaded, or return b""."""
    for lossy in (False, True):
        try:
            data: bytes = cloudpickle.dumps(_recipe(error, lossy), _PROTOCOL)
            if type(_follow(pickle.loads(data))) is type(error):  # noqa: S301 - written a line above
                return data
        except Exception:  # noqa: S112 - whatever a user's class raises: the next way may do
            continue
    return b""


def _recipe(error: BaseException, lossy: bool) -> tuple[Any, ...]:
    """Return what `_follow` makes the exception of again.

    A class with a constructor of its own and no ``__reduce__`` is made without calling the
    constructor, which BaseException would call with what was passed on to it, as in
    ``super().__init__(f"code {code}")``: that fails, or says "code code 5".
    """
    kind = type(error)
    inherits = kind.__reduce__ in (BaseException.__reduce__, OSError.__reduce__)
    if not lossy and not (inherits and isinstance(kind.__init__, FunctionType)):
        # Asked here, not by pickle: distributed tells pickle to reduce exceptions its own way,
        # which loses the text of those with a constructor in C, such as UnicodeDecodeError.
        reduced: tuple[Any, ...] = error.__reduce_ex__(_PROTOCOL)  # type: ignore[assignment]
        return reduced[:3]
    args, attributes = error.args, dict(getattr(error, "__dict__", {}))
    if lossy:
        args = tuple(item if fault(item) is None else repr(item) for item in args)
        attributes = {name: value for name, value in attributes.items() if fault(value) is None}
    return _bare, (kind, args), attributes


def _bare(kind: type[BaseException], args: tuple[Any, ...]) -> BaseException:
    error: BaseException = kind.__new__(kind, *args)
    error.args = args
    return error


def _follow(recipe: tuple[Any, ...]) -> BaseException:
    make, args, *state = recipe
    error: BaseException = make(*args)
    if state and state[0]:
        error.__setstate__(state[0])
    return error


def _revived(raised: _Raised) -> BaseException:
    """Return the exception itself, or what stands in for it."""
    reason = "it could not be pickled by the worker"
    if raised.pickle:
        try:
            return _follow(pickle.loads(raised.pickle))  # noqa: S301 - who may write the store may run code, see SECURITY.md
        except Exception as error:  # a module that is not installed here, for one
            reason = f"it cannot be unpickled here ({type(error).__name__}: {error})"
    return RemoteTaskError(f"{raised.kind}: {raised.text} [stands in for the task's exception: {reason}]")


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "<its __str__ raises>"


def _clean(text: str) -> str:
    """Replace what UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


def _trim(tb: TracebackType | None) -> TracebackType | None:
    """Drop the frames that lead to the task's code; keep all when there are no others."""
    trimmed = tb
    while trimmed is not None and trimmed.tb_frame.f_globals.get("__name__", "").startswith(_OURS):
        trimmed = trimmed.tb_next
    return trimmed or tb


def _frames(tb: TracebackType | None) -> list[_Frame]:
    tb = _trim(tb)
    frames = []
    while tb is not None:
        code = tb.tb_frame.f_code
        module = str(tb.tb_frame.f_globals.get("__name__", ""))
        frames.append(_Frame(_clean(code.co_filename), code.co_name, tb.tb_lineno, module))
        tb = tb.tb_next
    return frames if len(frames) <= 2 * _FRAMES else frames[:_FRAMES] + frames[-_FRAMES:]


def _rebuild(frames: Sequence[_Frame]) -> TracebackType | None:
    """Return a traceback that prints and can be inspected like the one on the worker."""
    top: TracebackType | None = None
    for frame in reversed(frames):
        code = {"co_filename": frame.file, "co_name": frame.name}
        names = {"__file__": frame.file, "__name__": frame.module}
        fake = {"f_globals": names, "f_locals": {}, "f_code": code, "f_lineno": frame.line}
        tb = Traceback.from_dict({"tb_frame": fake, "tb_lineno": frame.line, "tb_next": None}).as_traceback()
        tb.tb_next = top
        top = tb
    return top
