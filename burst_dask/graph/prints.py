"""Fingerprints of tasks: whether the task of a key is the one that it was in an earlier process.

A key that holds a token of Dask's says so itself, as long as everything that it depends on does. For all others
there is a fingerprint: of the function as it is written, its arguments, and the fingerprints of what it needs.
"""

from __future__ import annotations

import functools
import re
import sys
import sysconfig
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import Enum, auto
from hashlib import blake2b
from pathlib import Path
from typing import Any

from dask._task_spec import Alias, DataNode, GraphNode, Task, TaskRef, _execute_subgraph
from dask.tokenize import tokenize

from burst_dask.graph.stored import Stored

#: Layers whose tasks get a coarse fingerprint, by which one that comes back under another token is known.
LAYERS = 1000
#: Tasks of a layer with a fingerprint of any precision are small; this many bytes tell one from another.
_BYTES = 12

_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")
_TOKEN = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
#: What Dask puts behind arrays and bags to make one value of them; its token is another one in each process.
_FINAL = "hlgfinalizecompute-"


class Kind(Enum):
    """What a key tells of its task."""

    #: it holds a token: the same key means the same task
    TOKEN = auto()
    #: somebody has chosen it
    NAMED = auto()
    #: it is another one in each process
    RANDOM = auto()
    #: it is another one in each process, and names only how Dask puts together what it depends on
    FINAL = auto()


def kind(key: Any) -> Kind:
    """Return what a key tells of its task.

    Examples
    --------
    >>> kind(("sum-0fd99f3cbd3cad544f6ce989db4f45b3", 0)), kind("model-3")
    (<Kind.TOKEN: 1>, <Kind.NAMED: 2>)
    >>> kind("inc-02c27ca5-8b80-4e37-8fe1-1e8cae2fa0d6")
    <Kind.RANDOM: 3>
    """
    text = _text(key)
    if _FINAL in text:
        return Kind.FINAL
    if _TOKEN.search(text):
        return Kind.TOKEN
    return Kind.RANDOM if _UUID.search(text) else Kind.NAMED


def layer(key: Any) -> str:
    """Return what people know a task by: its key without token and without indices.

    >>> layer(("sum-0fd99f3cbd3cad544f6ce989db4f45b3", 0)), layer("inc-02c27ca5-8b80-4e37-8fe1-1e8cae2fa0d6")
    ('sum', 'inc')
    """
    return _UUID.sub("", _TOKEN.sub("", _text(key))).strip("-_ ") or "a task"


def _text(key: Any) -> str:
    while type(key) is tuple and key:
        key = key[0]
    return key if isinstance(key, str) else str(key)


class Prints:
    """The fingerprints of a graph's tasks.

    Parameters
    ----------
    dsk
        The graph, culled.
    outer
        Those of results of other runs that it depends on, as far as they have any.
    random
        Keys that this process has drawn.
    """

    def __init__(
        self, dsk: Mapping[Any, GraphNode], outer: Mapping[Any, bytes] | None = None, random: Collection[Any] = ()
    ) -> None:
        self._dsk = dsk
        self._random = random
        self._writer = _Writer(self._ident)
        self._outer = outer or {}
        #: key -> fingerprint, of all tasks that their keys alone do not tell
        self.of: dict[Any, bytes] = {}
        #: those of them that hold what cannot be told apart from others of its type
        self.vague: set[Any] = set()
        for key in _upwards(dsk):
            self._add(key, dsk[key])

    def kind(self, key: Any) -> Kind:
        return Kind.RANDOM if key in self._random else kind(key)

    def _add(self, key: Any, node: GraphNode) -> None:
        if self.kind(key) is Kind.TOKEN and not any(need in self.of or need in self._outer for need in _needs(node)):
            return
        self._writer.vague = False
        self.of[key] = self._writer.digest(node)
        if self._writer.vague or any(need in self.vague for need in _needs(node)):
            self.vague.add(key)

    def _ident(self, key: Any) -> bytes:
        found = self.of.get(key) or self._outer.get(key)
        return found if found is not None else repr(key).encode()

    def layers(self) -> dict[Any, bytes]:
        """Return coarse fingerprints of tasks with tokens, one task of each layer: of function and plain arguments."""
        seen: set[str] = set()
        found: dict[Any, bytes] = {}
        writer = _Writer(lambda key: layer(key).encode(), coarse=True)
        for key, node in self._dsk.items():
            if len(seen) >= LAYERS:
                break
            name = _text(key)
            if name in seen or key in self.of or type(node) is not Task:
                continue
            seen.add(name)
            found[key] = writer.digest((layer(key), node))
        return found


def _upwards(dsk: Mapping[Any, GraphNode]) -> Iterator[Any]:
    """Yield keys, each after what it depends on; where there is a cycle, in any order."""
    begun: set[Any] = set()
    for start in dsk:
        stack = [(start, False)]
        while stack:
            key, ready = stack.pop()
            if ready:
                yield key
            elif key not in begun:
                begun.add(key)
                stack.append((key, True))
                stack.extend((need, False) for need in dsk[key].dependencies if need in dsk and need not in begun)


def _needs(node: GraphNode) -> Collection[Any]:
    needs: Collection[Any] = node.dependencies
    return needs


class _Writer:
    """Writes what a task is as plain data, to be hashed.

    Parameters
    ----------
    ident
        What stands for a dependency.
    coarse
        Whether data other than plain ones are told by their types alone.
    """

    def __init__(self, ident: Callable[[Any], bytes], coarse: bool = False) -> None:
        self._ident = ident
        self._coarse = coarse
        #: function or class -> how it is written, and itself, so that its id stays its own
        self._known: dict[int, tuple[Any, Any]] = {}
        self.vague = False

    def digest(self, value: Any) -> bytes:
        try:
            plain = repr(self.plain(value))
        except RecursionError:
            self.vague = True
            plain = type(value).__name__
        return blake2b(plain.encode(errors="surrogatepass"), digest_size=_BYTES).digest()

    def plain(self, value: Any) -> Any:
        """Return what a value is: nested tuples, lists and plain data whose `repr` tells them from others."""
        if value is None or isinstance(value, str | bytes | bool | int | float | complex):
            return type(value).__name__, value
        if isinstance(value, GraphNode):
            return self._node(value)
        if isinstance(value, TaskRef):
            return "ref", self._ident(value.key)
        if isinstance(value, dict | set | frozenset | list | tuple):
            return self._several(value)
        return self._callable(value) if callable(value) else self._object(value)

    def _several(self, value: Any) -> Any:
        if isinstance(value, dict):
            items: Any = sorted((repr(self.plain(name)), repr(self.plain(its))) for name, its in value.items())
        elif isinstance(value, set | frozenset):
            items = sorted(repr(self.plain(item)) for item in value)
        else:
            items = [self.plain(item) for item in value]
        return type(value).__name__, items

    def _callable(self, value: Any) -> Any:
        if isinstance(value, functools.partial):
            return "partial", self.plain(value.func), self.plain(value.args), self.plain(value.keywords)
        if isinstance(value, types.MethodType):
            return "method", self.plain(value.__self__), self.plain(value.__func__)
        return self._code(value) if isinstance(value, types.FunctionType | type) else self._object(value)

    def _node(self, node: GraphNode) -> Any:
        if isinstance(node, Task):
            return self._task(node)
        if isinstance(node, Alias):
            return "ref", self._ident(node.target)
        if isinstance(node, DataNode):
            return "data", self.plain(node.value)
        return ("stored", node.run, node.number) if isinstance(node, Stored) else self._object(node)

    def _task(self, node: Task) -> Any:
        if node.func is _execute_subgraph:
            return "fused", self._fused(*node.args[:2])
        args = [self.plain(item) for item in node.args]
        if not hasattr(node, "klass"):
            return "task", self.plain(node.func), args, self.plain(node.kwargs)
        return type(node).__name__, sorted(args, key=repr) if node.klass is set else args

    def _fused(self, inner: Mapping[Any, GraphNode], outkey: Any) -> bytes:
        """Return what stands for the result of tasks that are fused into one."""
        outer, memo = self._ident, dict[Any, bytes]()

        def tells(key: Any) -> bool:
            return kind(key) is Kind.TOKEN and all(tells(need) for need in _needs(inner[key]) if need in inner)

        def find(key: Any) -> bytes:
            if key not in inner:
                return outer(key)
            if key not in memo:
                memo[key] = repr(key).encode() if not self._coarse and tells(key) else self.digest(inner[key])
            return memo[key]

        self._ident = find
        try:
            # The last one has no key of its own any more.
            return self.digest(inner[outkey])
        finally:
            self._ident = outer

    def _object(self, value: Any) -> Any:
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, types.BuiltinFunctionType | types.ModuleType):
            return name, getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__)
        if self._coarse:
            return (name,)
        try:
            return name, tokenize(value, ensure_deterministic=True)
        except Exception:  # whatever pickling somebody's object raises
            self.vague = True
            return (name,)

    def _code(self, value: Any) -> Any:
        """Return a function or class as it is written, and with what it calls of the user's own."""
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        name = "code", value.__module__, value.__qualname__
        self._known[id(value)] = value, name  # where it refers to itself
        if _is_installed(value.__module__):
            return name
        if isinstance(value, type):
            members = ((key, its) for key, its in vars(value).items() if isinstance(its, types.FunctionType))
            said: Any = [(key, self._code(its)) for key, its in sorted(members)]
            bases = [self._code(base) for base in value.__bases__]
            found: Any = (*name, bases, said)
        else:
            closure = [self.plain(cell.cell_contents) for cell in value.__closure__ or () if not _is_empty(cell)]
            defaults = self.plain((value.__defaults__, value.__kwdefaults__))
            found = (*name, self._written(value.__code__), defaults, closure, self._called(value))
        self._known[id(value)] = value, found
        return found

    def _written(self, code: types.CodeType) -> Any:
        """Return code without where it stands: lines above it may come and go."""
        constants = [
            self._written(its) if isinstance(its, types.CodeType) else self.plain(its) for its in code.co_consts
        ]
        return code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars

    def _called(self, function: types.FunctionType) -> list[Any]:
        """Return the functions, classes and plain values among the globals that a function names."""
        found = []
        for name in sorted(_names(function.__code__)):
            value = function.__globals__.get(name)
            if isinstance(value, types.FunctionType | type | str | bytes | int | float):
                found.append((name, self.plain(value)))
        return found


def _names(code: types.CodeType) -> set[str]:
    inner = (its for its in code.co_consts if isinstance(its, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - only asking tells
    except ValueError:
        return True
    return False


@functools.cache
def _is_installed(module: str | None) -> bool:
    """Tell whether code is of a library, whose version and not whose text tells what it does."""
    if module == "__main__":
        return False
    file = getattr(sys.modules.get(module or ""), "__file__", None)
    if file is None:
        return True
    paths = sysconfig.get_paths()
    return any(Path(file).is_relative_to(paths[name]) for name in ("purelib", "platlib", "stdlib"))
