"""The supervisor with real processes and real signals; agents are stand-ins (`stand_in_agent`)."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Ended
from burst_dask.worker.supervisor import FAILED, ORDERLY, REFUSED, Options, Supervisor, describe_exit

HERE = Path(__file__).parent


def options(**changes) -> Options:
    standard = {"grace": 2.0, "poll": 0.01, "agent": "stand_in_agent"}
    return Options(session=SessionId("sess1"), store="memory://", **(standard | changes))


class Case:
    """A supervisor in this process, what it reported, and the agents that came up."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.ended: list[Ended] = []
        self.failing = False
        #: how many of those that end in order are missed
        self.missed = 0

    def supervisor(self, **changes) -> Supervisor:
        return Supervisor(options(spill_directory=str(self.directory), **changes), ends=self)

    async def tell(self, ended: Ended) -> None:
        if self.failing:
            raise OSError("the store is down")
        self.ended.append(ended)

    async def missed_news(self, worker: WorkerId) -> bool:
        if self.failing:
            raise OSError("the store is down")
        self.missed -= 1
        return self.missed >= 0

    def up(self) -> dict[str, int]:
        return {path.stem: int(path.read_text()) for path in self.directory.glob("*.up")}

    async def wait_up(self, count: int) -> dict[str, int]:
        while len(self.up()) < count:
            await asyncio.sleep(0.01)
        return self.up()


def gone(pid: int) -> bool:
    """Tell whether the process has ended, be it reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    monkeypatch.setenv("STAND_IN_DIRECTORY", str(tmp_path))
    case = Case(tmp_path)
    yield case
    for pid in case.up().values():
        assert gone(pid), "an agent was left behind"
    assert not list(tmp_path.glob("burst-spill-*"))


async def stop(supervisor: Supervisor, running: asyncio.Task) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    return await running


def test_an_agent_that_ends_so_as_to_end_a_task_is_replaced_at_once(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "restart " * 20 + "sleep")

    async def main():
        supervisor = case.supervisor(give_up_after=2)
        running = asyncio.ensure_future(supervisor.run())
        await case.wait_up(1)
        assert await stop(supervisor, running) == ORDERLY
        assert case.ended == []  # it has recorded its end itself

    asyncio.run(main())


def test_killed_agent_is_reported_and_replaced_under_a_new_id(case):
    async def main():
        supervisor = case.supervisor(processes=2)
        running = asyncio.ensure_future(supervisor.run())
        before = await case.wait_up(2)
        victim = next(iter(before))
        os.kill(before[victim], signal.SIGKILL)
        after = await case.wait_up(3)
        assert supervisor.slots == 2 and set(supervisor.children) == set(after) - {victim}
        assert await stop(supervisor, running) == ORDERLY
        return victim

    victim = asyncio.run(main())
    (ended,) = case.ended
    assert (ended.worker, ended.reason) == (victim, "died")
    assert ended.message.startswith("killed by SIGKILL (")


@pytest.mark.parametrize(
    ("what", "message"),
    [("crash", "exit code 1: OSError: the dog ate it"), ("segfault", "SIGSEGV: crashed in native code")],
)
def test_death_is_told_in_words(case, monkeypatch, what, message):
    monkeypatch.setenv("STAND_IN", f"{what} end")
    assert asyncio.run(case.supervisor().run()) == ORDERLY
    assert [ended.message for ended in case.ended] == [message]


def test_agent_over_its_memory_limit_is_replaced(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "eat end")
    assert asyncio.run(case.supervisor(memory_limit=100 * 2**20).run()) == ORDERLY
    assert case.ended[0].message.startswith("exceeded 95% of its memory limit of 100.0 MiB (")


def test_crash_loop_backs_off_and_gives_up(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "crash")
    assert asyncio.run(case.supervisor(give_up_after=2).run()) == FAILED
    assert len(case.ended) == 2 and len({ended.worker for ended in case.ended}) == 2


def test_agent_that_asks_for_it_is_replaced_however_often(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "lost lost lost end")
    assert asyncio.run(case.supervisor(give_up_after=2).run()) == ORDERLY
    assert case.ended == [] and len(list(case.directory.glob("turn-*"))) == 4


@pytest.mark.parametrize(("what", "code"), [("end", ORDERLY), ("refuse", REFUSED)])
def test_agent_that_ended_by_itself_is_not_restarted(case, monkeypatch, what, code):
    monkeypatch.setenv("STAND_IN", what)
    assert asyncio.run(case.supervisor(processes=2).run()) == code
    assert case.ended == [] and len(list(case.directory.glob("turn-*"))) == 2


def test_an_agent_that_is_missed_when_it_has_ended_is_followed_by_another(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "end")
    case.missed = 2
    slots = []
    supervisor = case.supervisor()
    supervisor._changed = lambda it: slots.append(it.slots)
    assert asyncio.run(supervisor.run()) == ORDERLY
    assert len(list(case.directory.glob("turn-*"))) == 3
    assert slots == [1, 0, 1] * 2 + [1, 0]  # counted out before the look


def test_whether_an_agent_is_missed_is_not_asked_for_ever(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "end")
    case.failing = True
    assert asyncio.run(case.supervisor().run()) == ORDERLY


def test_agent_that_does_not_stop_is_killed_after_the_grace(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "stubborn")

    async def main():
        supervisor = case.supervisor(grace=0.1)
        running = asyncio.ensure_future(supervisor.run())
        await case.wait_up(1)
        return await stop(supervisor, running)

    assert asyncio.run(main()) == ORDERLY
    assert case.ended[0].message == "had not ended 0.1 s after SIGTERM, killed"


def test_what_a_task_started_dies_with_its_agent(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "parent end")

    async def main():
        running = asyncio.ensure_future(case.supervisor().run())
        (pid,) = (await case.wait_up(1)).values()
        child = int((case.directory / "child").read_text())
        os.kill(pid, signal.SIGKILL)
        await running
        return child

    child = asyncio.run(main())
    while not gone(child):
        time.sleep(0.01)


def test_store_that_is_down_is_not_fatal(case, monkeypatch):
    monkeypatch.setenv("STAND_IN", "crash end")
    case.failing = True
    assert asyncio.run(case.supervisor().run()) == ORDERLY


def test_agent_that_cannot_be_started_is_tried_again(case, monkeypatch):
    """A file is where the spill directory goes, as if there were no room for it."""
    obstacle = case.directory / "obstacle"
    obstacle.touch()
    supervisor = Supervisor(options(spill_directory=str(obstacle), give_up_after=2), ends=case)
    assert asyncio.run(supervisor.run()) == FAILED
    assert case.ended == []


def test_agents_of_a_killed_supervisor_end(case):
    code = (
        "import sys, msgspec; from burst_dask.worker.supervisor import *;"
        "supervise(msgspec.json.decode(sys.argv[1], type=Options));"
    )
    told = msgspec.json.encode(options(processes=2, spill_directory=str(case.directory / "spill"))).decode()
    supervisor = subprocess.Popen([sys.executable, "-c", code, told])
    agents = asyncio.run(case.wait_up(2)).values()
    supervisor.kill()
    supervisor.wait()
    while not all(map(gone, agents)):
        time.sleep(0.01)


def test_command_line_starts_light_and_refuses_nonsense(case):
    code = "import sys, burst_dask.worker.__main__; print({'dask', 'numpy', 'obstore'} & set(sys.modules) or 'light')"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "light\n"
    command = [sys.executable, "-m", "burst_dask.worker", "--session", "no/id", "--store", "memory://"]
    refused = subprocess.run(command, check=False, capture_output=True, text=True)
    assert refused.returncode == 2 and "'no/id' is not a session id" in refused.stderr


def test_describe_exit_of_unknown_signal():
    assert describe_exit(-200, "", 0) == "killed by signal 200"
