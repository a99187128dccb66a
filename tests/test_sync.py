"""One loop for all blocking calls: from any thread, beside a running loop, after a fork, interruptible."""

import asyncio
import os
import signal
import threading

import pytest

from burst_dask import sync
from burst_dask.errors import ConfigError


async def add(a, b):
    await asyncio.sleep(0)
    return a + b


def test_runs_from_several_threads():
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append(sync.run(add(n, 1)))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(1, 9))


def test_runs_beside_a_running_loop():
    async def cell():
        return sync.run(add(1, 2))

    assert asyncio.run(cell()) == 3


def test_errors_come_through():
    async def fail():
        raise KeyError("as it was raised")

    with pytest.raises(KeyError, match="as it was raised"):
        sync.run(fail())


def test_a_call_from_the_loop_itself_is_refused():
    async def outer():
        return sync.run(add(1, 2))

    with pytest.raises(RuntimeError, match="bug in burst_dask"):
        sync.run(outer())


def test_ctrl_c_cancels_and_is_raised():
    started, cancelled = threading.Event(), threading.Event()

    async def wait():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    def interrupt():
        started.wait()
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        sync.run(wait())
    assert cancelled.wait(10)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_is_told_so_at_once():
    """It would wait for threads that only its parent has."""
    sync.run(add(1, 2))
    pid = os.fork()
    if not pid:
        try:
            sync.run(add(20, 22))
        except ConfigError:
            os._exit(42)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
