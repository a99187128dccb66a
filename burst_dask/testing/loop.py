"""An event loop under virtual time, in which simulated processes can be killed and paused.

Next to no time passes while code runs: when nothing is left to do at one moment, the loop jumps
to the next timer. So an hour takes as long as what happens in it, and the same seed gives the same
run. Each callback belongs to the `Process` whose code scheduled it (a context variable follows
it through tasks and timers): the callbacks of a dead process are dropped, as after SIGKILL, and
those of a paused one wait, as after SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

#: Seconds that a turn of the loop takes: in no time at all, code that waits for time to pass would spin.
TURN = 1e-6

_current: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class Process:
    """What dies and pauses together.

    Attributes
    ----------
    name : str
        For people.
    alive : bool
        False after `kill`: none of its code will run again.
    """

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.name = name
        self.alive = True
        self._loop = loop
        self._parked: list[_Handle] | None = None
        #: kept, or the clean-up code of a dead process would run when its tasks are collected
        self._tasks: list[asyncio.Task[Any]] = []

    def start(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run `coroutine` as code of this process."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        task = self._loop.create_task(coroutine, context=context)
        self._tasks.append(task)
        return task

    def call(self, function: Callable[[], Any]) -> None:
        """Call `function` soon, as a signal handler of this process."""
        context = contextvars.copy_context()
        context.run(_current.set, self)
        self._loop.call_soon(function, context=context)

    def kill(self) -> None:
        """End it as SIGKILL does: between two awaits, with no clean-up."""
        self.pause()
        self.alive = False

    @property
    def paused(self) -> bool:
        return self._parked is not None

    def pause(self) -> None:
        """Stop it as SIGSTOP does: its timers run on, its code does not."""
        if self._parked is None:
            self._parked = []

    def resume(self) -> None:
        """Let it go on, with all that has come due meanwhile; a dead one stays dead."""
        if self.alive:
            self.release()

    def release(self) -> None:
        """Put back what was held back."""
        parked, self._parked = self._parked or [], None
        self._loop.put_back(parked)

    def holds_back(self, handle: _Handle) -> bool:
        """Tell whether `handle` must not run now, but be kept."""
        if self._parked is None:
            return False
        self._parked.append(handle)
        return True


class _Handle:
    """A callback to run, now or at `due`."""

    __slots__ = ("_cancelled", "args", "callback", "context", "due")

    def __init__(
        self, due: float, callback: Callable[..., Any], args: tuple[Any, ...], context: contextvars.Context
    ) -> None:
        self.due = due
        self.callback = callback
        self.args = args
        self.context = context
        self._cancelled = False

    def cancel(self) -> None:
        self._cancelled = True

    def cancelled(self) -> bool:
        return self._cancelled

    def when(self) -> float:
        return self.due


def _given(context: contextvars.Context | None) -> contextvars.Context:
    """Return the context that a caller gave, an empty one too, or that of the caller."""
    return contextvars.copy_context() if context is None else context


class Deadlock(RuntimeError):
    """Nothing is left to happen, and what was waited for has not happened."""


class VirtualLoop(asyncio.AbstractEventLoop):  # what is not here raises NotImplementedError
    """A single-threaded event loop whose clock is moved by its timers alone.

    Examples
    --------
    >>> loop = VirtualLoop()
    >>> loop.run_until_complete(asyncio.sleep(3600, "an hour later")), round(loop.time())
    ('an hour later', 3600)
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._ready: deque[_Handle] = deque()
        self._timers: list[tuple[float, int, _Handle]] = []
        self._count = 0
        self._processes: list[Process] = []
        #: callbacks run so far: the same seed gives the same number
        self.steps = 0

    # ------------------------------------------------------------------ what asyncio asks for

    def time(self) -> float:
        return self._now

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return asyncio._get_running_loop() is self

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(self._now, callback, args, _given(context))
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        return self.call_at(self._now + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: contextvars.Context | None = None
    ) -> _Handle:
        handle = _Handle(when, callback, args, _given(context))
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, T], *, name: str | None = None, context: contextvars.Context | None = None
    ) -> asyncio.Task[T]:
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        """Call `func` at once: there are no threads here."""
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Nobody took the error of a future: of a request whose sender is dead, or of a task that failed as a whole."""

    # ------------------------------------------------------------------ running

    def process(self, name: str) -> Process:
        """Return a new process."""
        process = Process(self, name)
        self._processes.append(process)
        return process

    def finish(self) -> None:
        """Cancel whatever has not ended, in dead processes too, so that nothing is left to run later."""
        for process in self._processes:
            process.release()
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            task.cancel()
        if tasks:
            with contextlib.suppress(Deadlock):
                self.run_until_complete(asyncio.wait(tasks))
        self._ready.clear()
        self._timers.clear()

    def put_back(self, handles: list[_Handle]) -> None:
        """Queue handles that had been held back."""
        self._ready.extend(handles)

    def run_until_complete(self, future: Any) -> Any:
        """Run until `future`, a coroutine or a future, is done; return its result.

        Raises
        ------
        Deadlock
            It can never be done.
        """
        outer = asyncio._get_running_loop()
        hooks = sys.get_asyncgen_hooks()
        asyncio._set_running_loop(self)
        # Generators of dead processes are collected at some time: their clean-up must not run then.
        sys.set_asyncgen_hooks(firstiter=lambda generator: None, finalizer=lambda generator: None)
        try:
            task: asyncio.Future[Any] = asyncio.ensure_future(future, loop=self)
            while not task.done():
                if not self._advance():
                    raise Deadlock("nothing is left to happen, and what was waited for has not happened")
                self._run_ready()
            return task.result()
        finally:
            sys.set_asyncgen_hooks(*hooks)
            asyncio._set_running_loop(outer)

    def _advance(self) -> bool:
        """Begin a turn: queue what is due; with nothing to run, jump to what comes next."""
        timers = self._timers
        self._now += TURN
        while timers and (timers[0][0] <= self._now or not self._ready):
            due, _, handle = heapq.heappop(timers)
            self._now = max(self._now, due)
            if not handle.cancelled():
                self._ready.append(handle)
        return bool(self._ready)

    def _run_ready(self) -> None:
        ready = self._ready
        for _ in range(len(ready)):
            handle = ready.popleft()
            if handle.cancelled():
                continue
            process = handle.context.get(_current)
            if process is not None and process.holds_back(handle):
                continue
            self.steps += 1
            handle.context.run(handle.callback, *handle.args)
