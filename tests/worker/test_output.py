"""What tasks print is kept with them, and still reaches the worker's own streams."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import io
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from burst_dask.protocol.records import TaskOutput
from burst_dask.worker import output
from burst_dask.worker.execution import Call, ThreadExecutor, run_calls
from burst_dask.worker.memory import Memory
from burst_dask.worker.output import LIMIT, Capture


@contextlib.contextmanager
def own_streams() -> Iterator[dict[str, io.StringIO]]:
    """The worker's own streams, with ours in front of them. No fixture: pytest has streams of its own for those."""
    own = {name: io.StringIO() for name in ("stdout", "stderr")}
    with contextlib.redirect_stdout(own["stdout"]), contextlib.redirect_stderr(own["stderr"]):
        output.add_user()
        output.install()
        try:
            yield own
        finally:
            output.remove_user()
        assert (sys.stdout, sys.stderr) == (own["stdout"], own["stderr"])


def call(function: Callable[[], Any], position: int = 0, key: Any = "k", attempt: int = 1) -> Call:
    return Call(position, position, key, lambda _: function(), (), True, False, attempt)


def run(*functions: Callable[[], Any]) -> list[TaskOutput | None]:
    calls = [call(function, position) for position, function in enumerate(functions)]
    return [ran.output for ran in run_calls(calls, Memory().scope(), 60.0, "w")]


def text(printed: TaskOutput | None) -> str:
    return "" if printed is None else "".join(piece.text for piece in printed.printed)


def test_each_task_gets_what_it_printed():
    with own_streams() as streams:
        first, silent, last = run(
            lambda: print("one"), lambda: None, lambda: (print("two"), print("bad", file=sys.stderr))
        )
        assert silent is None
        assert (first.position, first.attempt, pickle.loads(first.key), first.dropped) == (0, 1, "k", 0)
        assert [(p.stream, p.text) for p in first.printed] == [("stdout", "one\n")]
        assert [(p.stream, p.text) for p in last.printed] == [("stdout", "two\n"), ("stderr", "bad\n")]
        print("after all")
        assert streams["stdout"].getvalue() == "one\ntwo\nafter all\n" and streams["stderr"].getvalue() == "bad\n"


def test_a_task_that_fails_keeps_what_it_printed():
    with own_streams():

        def fail():
            print("on the way")
            raise SystemExit(3)

        (ran,) = run_calls([call(fail)], Memory().scope(), 60.0, "w")
        assert ran.failed and text(ran.output) == "on the way\n"


def test_logging_records_carry_their_level_logger_and_traceback():
    with own_streams():

        def work():
            logging.getLogger("lab").warning("%d left", 3)
            try:
                raise OSError("disk")
            except OSError:
                logging.getLogger("lab.disk").exception("no luck")

        (printed,) = run(work)
        warning, error = printed.printed
        assert (warning.stream, warning.text) == ("WARNING", "lab: 3 left\n")
        assert error.stream == "ERROR"
        assert error.text.startswith("lab.disk: no luck\nTraceback") and error.text.endswith("OSError: disk\n")


def test_a_record_that_cannot_be_formatted_does_not_fail_the_task(monkeypatch):
    with own_streams(), monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [output._handler])  # pytest's fails the test
        (ran,) = run_calls([call(lambda: logging.getLogger("lab").error("%d", "x"))], Memory().scope(), 60.0, "w")
        assert not ran.failed


def test_without_other_handlers_warnings_reach_stderr_as_ever(monkeypatch):
    with own_streams() as streams, monkeypatch.context() as patch:
        patch.setattr(logging.root, "handlers", [output._handler])
        (printed,) = run(lambda: logging.getLogger("lab").warning("look"))
        assert text(printed) == "lab: look\n"  # once
        assert streams["stderr"].getvalue() == "look\n"
        other = logging.StreamHandler(io.StringIO())
        patch.setattr(logging.root, "handlers", [output._handler, other])
        run(lambda: logging.getLogger("lab").warning("again"))
        assert other.stream.getvalue() == "again\n" and "again" not in streams["stderr"].getvalue()


def test_only_the_end_of_a_long_output_is_kept():
    with own_streams():

        def chatter():
            for number in range(50_000):
                print(f"line {number:06d}")

        (printed,) = run(chatter)
        kept = text(printed)
        assert len(kept) == LIMIT and printed.dropped == 50_000 * 12 - LIMIT
        assert kept.endswith("line 049998\nline 049999\n")
        (at_once,) = run(lambda: print("x" * 10 * LIMIT + "end"))
        assert text(at_once).endswith("xend\n") and len(text(at_once)) == LIMIT
        assert at_once.dropped == 10 * LIMIT + 4 - LIMIT


def test_memory_is_bounded_while_a_task_prints():
    with own_streams():
        capture = Capture()
        for _ in range(10 * LIMIT):
            capture.add("stdout", "yes\n")
            assert sum(len(part) for _, _, parts in capture.printed[-1:] for part in parts[-1:]) <= LIMIT
        assert sum(len(part) for _, _, parts in capture.printed for part in parts) <= 2 * LIMIT + 4
        assert capture.take(0, "k", 1).dropped == 40 * LIMIT - LIMIT


def test_what_utf8_cannot_hold_is_replaced():
    with own_streams():
        (printed,) = run(lambda: sys.stdout.write("a\udcffb"))
        assert text(printed) == "a\\udcffb"


def test_threads_with_the_tasks_context_are_kept_and_others_are_not():
    with own_streams() as streams:

        def work():
            context = contextvars.copy_context()
            threads = [
                threading.Thread(target=context.run, args=(print, "inherits")),
                threading.Thread(target=print, args=("does not",)),
            ]
            for thread in threads:
                thread.start()
                thread.join()
            asyncio.run(asyncio.to_thread(print, "as asyncio does"))

        (printed,) = run(work)
        assert text(printed) == "inherits\nas asyncio does\n"
        assert streams["stdout"].getvalue() == "inherits\ndoes not\nas asyncio does\n"


def test_tasks_in_several_threads_are_kept_apart():
    with own_streams():
        both = threading.Barrier(2, timeout=60)

        def work(word: str) -> None:
            for _ in range(20):
                both.wait()
                print(word)

        async def main() -> list[Any]:
            executor = ThreadExecutor(2, "w")
            batches = (executor.run([call(lambda w=w: work(w))], Memory().scope(), 60.0) for w in ("ham", "egg"))
            found = await asyncio.gather(*batches)
            executor.close()
            return found

        (ham,), (egg,) = asyncio.run(main())
        assert (text(ham.output), text(egg.output)) == ("ham\n" * 20, "egg\n" * 20)


def test_streams_put_in_place_later_are_followed():
    """As notebooks and test runners do."""
    with own_streams():
        newer = io.StringIO()
        before = sys.stdout
        sys.stdout = newer
        assert not output.installed()
        output.install()
        assert output.installed()
        (printed,) = run(lambda: print("where"))
        assert text(printed) == newer.getvalue() == "where\n"
        sys.stdout = before


def test_a_stream_that_leads_to_ours_does_not_double_what_is_kept():
    with own_streams():

        class Tee:
            def __init__(self, inner: Any) -> None:
                self.inner = inner

            def write(self, text: str) -> int:
                return self.inner.write(text)

        ours = sys.stdout
        sys.stdout = Tee(ours)
        output.install()
        (printed,) = run(lambda: print("once"))
        assert text(printed) == "once\n"
        sys.stdout = ours


def test_the_rest_of_a_stream_is_that_of_the_one_behind_it():
    with own_streams() as streams:
        assert sys.stdout.getvalue() == ""
        sys.stdout.writelines(["a", "b"])
        sys.stdout.flush()
        assert streams["stdout"].getvalue() == "ab"
