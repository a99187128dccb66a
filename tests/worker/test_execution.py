"""Running tasks in threads: time limits. What tasks print is in `test_output`."""

from __future__ import annotations

import asyncio
import threading

from burst_dask.errors import TaskTimeout
from burst_dask.serialize import load_failure
from burst_dask.worker.execution import Call, ThreadExecutor
from burst_dask.worker.memory import Memory

GATE = threading.Event()


def wait_for_the_gate(_):
    print("waiting")
    GATE.wait(60)
    return 1


def call(node, timeout=None):
    return Call(0, 0, ("x", 1), node, (), True, False, 2, timeout)


def run(node, timeout):
    async def main():
        executor = ThreadExecutor(1, "w7")
        try:
            (ran,) = await executor.run([call(node, timeout)], Memory().scope(), 60.0)
            if ran.stuck is not None:
                assert not ran.stuck.done()
                GATE.set()
                await ran.stuck
        finally:
            GATE.set()
            executor.close()
        return ran

    GATE.clear()
    return asyncio.run(main())


def test_a_call_past_its_limit_is_given_up_and_says_where_it_was():
    ran = run(wait_for_the_gate, 0.05)
    assert ran.failed and ran.seconds == 0.05
    failure = load_failure(b"".join(ran.body))
    error = failure.exception
    assert isinstance(error, TaskTimeout) and isinstance(error, TimeoutError)
    assert "task ('x', 1) ran for longer than its time limit of 0.05 s" in str(error)
    (note,) = error.__notes__
    assert "GATE.wait(60)" in note and "run_calls" not in note
    assert (failure.worker, failure.attempts) == ("w7", 2)
    assert [piece.text for piece in ran.output.printed] == ["waiting\n"]
    assert "builtins.TimeoutError" in ran.raised


def test_a_call_within_its_limit_is_as_any_other():
    ran = run(lambda _: 5, 60.0)
    assert (ran.failed, ran.stuck, ran.raised) == (False, None, ())


def test_what_a_call_raises_is_named_with_its_bases():
    ran = run(lambda _: {}["x"], None)
    assert ran.raised == (
        "builtins.KeyError",
        "builtins.LookupError",
        "builtins.Exception",
        "builtins.BaseException",
    )
