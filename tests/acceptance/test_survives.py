"""Everything may die: nothing that was committed is lost, and each task has one outcome.

Tasks and tests tell each other what they do by files, so that a death comes at a known point.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import dask
import msgspec
import pytest
from acting import QUICK, agent_of, check, kill_all, start_worker

from burst_dask import Session, attach, sync
from burst_dask.errors import CorruptObject, VersionMismatch, WorkerLost
from burst_dask.protocol import keys
from burst_dask.protocol.records import Ended, Manifest, decode, encode


def step(marks, number, *inputs, gate=None, name="started"):
    """Leave a mark, wait at a gate, and return what proves that the inputs were the right ones."""
    (marks.directory / f"{name}.{number}.{os.urandom(4).hex()}").touch()
    while gate is not None and not (marks.directory / gate).exists():
        time.sleep(0.005)
    time.sleep(0.005)
    return number + sum(inputs)


def chains(marks, count, length, gate=None):
    """Return chains of steps, and what each gives."""
    found = []
    for chain in range(count):
        value = dask.delayed(step)(marks, chain, gate=gate)
        for number in range(1, length):
            value = dask.delayed(step)(marks, number, value)
        found.append(value)
    return found, tuple(chain + sum(range(length)) for chain in range(count))


def ended(session):
    """Return why workers ended, by worker."""

    async def read():
        store = session._link.store
        pages = [page async for page in store.list(keys.workers(session.id))]
        names = [meta.key for page in pages for meta in page if meta.key.endswith("/ended")]
        return {name: decode(Ended, name, await store.get(name)) for name in names}

    return sync.run(read())


@pytest.fixture
def sessions(tmp_path):
    """Makes sessions on one directory, and cleans them up."""
    made = []

    def make(**arguments):
        made.append(Session(tmp_path / "store", progress=False, **{**QUICK, **arguments}))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)


@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_random_points(sessions, marks, seed):
    chance = random.Random(seed)
    burst = sessions(workers=3)
    values, expected = chains(marks, 20, 10)
    run = burst.compute(*values)
    for point in sorted(chance.sample(range(1, 150), 4)):
        marks.wait("started", point)
        victims = burst._link.fleet.processes()
        if victims:
            os.kill(chance.choice(victims).pid, signal.SIGKILL)
    assert run.result(timeout=120) == expected
    run.wait(timeout=60)
    check(burst, run.id)


def test_all_workers_killed_and_others_started_later(sessions, marks):
    burst = sessions(workers=2)
    values, expected = chains(marks, 10, 10)
    run = burst.compute(*values)
    marks.wait("started", 40)
    kill_all(burst)
    done = attach(run.id, store=burst.store).status().completed
    later = attach(run.id, store=burst.store)  # which starts workers again, on the machine that had some
    assert later.result(timeout=120) == expected
    assert done < later.status().total == later.status().completed
    check(burst, run.id)


CLIENT = """
import sys, dask
sys.path[:0] = sys.argv[3:]
from test_survives import chains
from acting import Marks, QUICK, Path
from burst_dask import Session
burst = Session(sys.argv[1], workers=2, progress=False, **QUICK)
values, _ = chains(Marks(Path(sys.argv[2])), 6, 5, gate="gate")
print(burst.compute(*values).id, flush=True)
dask.compute(*values, scheduler=burst)
"""


def test_the_client_is_killed(marks, tmp_path, external):
    store = str(tmp_path / "store")
    command = [sys.executable, "-c", CLIENT, store, str(marks.directory), *sys.path]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    external.append(client)
    run_id = client.stdout.readline().strip()
    marks.wait("started", 2)
    client.kill()
    client.wait()
    marks.open("gate")
    run = attach(run_id, store=store)
    try:
        assert run.result(timeout=120) == chains(marks, 6, 5)[1]
    finally:
        attach(keys.session_of(run_id), store=store).cleanup(force=True)


def test_sigterm_hands_the_work_over(sessions, marks, external):
    """The lease is an hour: nobody takes over what was not handed over."""
    burst = sessions(fleet=None, lease=3600.0)
    values, expected = chains(marks, 6, 5, gate="gate")
    run = burst.compute(*values)
    first = start_worker(burst, external)
    marks.wait("started", 1)
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=30) == 0
    assert [record.reason for record in ended(burst).values()] == ["stopped"]
    marks.open("gate")
    start_worker(burst, external)
    assert run.result(timeout=60) == expected
    check(burst, run.id)


def test_a_worker_paused_past_its_lease_and_resumed(sessions, marks, external):
    burst = sessions(fleet=None)
    values, expected = chains(marks, 6, 5, gate="gate")
    run = burst.compute(*values)
    agent = agent_of(start_worker(burst, external))
    marks.wait("started", 1)
    agent.suspend()
    marks.open("gate")
    start_worker(burst, external)
    assert run.result(timeout=60) == expected
    agent.resume()
    # It finds that its shard is another's, drops its work, and goes on with what comes next.
    values, expected = chains(marks, 12, 3)
    assert burst.compute(*values).result(timeout=60) == expected
    run.wait(timeout=60)
    check(burst, run.id)
    assert agent.is_running() and not ended(burst)


def crash():
    os.kill(os.getpid(), signal.SIGSEGV)


def eat_memory():
    kept = []
    while True:
        kept.append(bytearray(os.urandom(1 << 20)) * 8)
        time.sleep(0.02)


@pytest.mark.parametrize("deadly", [crash, eat_memory])
def test_a_deadly_task_is_given_up_and_others_finish(sessions, marks, deadly):
    burst = sessions(workers=2, memory_limit=400_000_000, lost_workers=2)
    others, expected = chains(marks, 5, 3)
    run = burst.compute(*others, dask.delayed(deadly)())
    with pytest.raises(WorkerLost, match="Other tasks go on") as caught:
        run.result(timeout=120)
    assert deadly.__name__ in str(caught.value)
    run.wait(timeout=60)
    status = run.status()
    assert (status.state, status.failed, status.completed) == ("failed", 1, status.total - 1)
    assert burst.compute(*others).result(timeout=60) == expected
    check(burst, run.id)


def test_a_damaged_graph_is_named_by_the_tasks_that_needed_it(sessions, external):
    burst = sessions(fleet=None)
    run = burst.compute(dask.delayed(sum)([1, 2]))
    key = keys.pack(run.id, 0)
    data = sync.run(burst._link.store.get(key))
    sync.run(burst._link.store.put(key, data[:-1] + bytes([data[-1] ^ 1])))
    start_worker(burst, external)
    with pytest.raises(CorruptObject, match=key):
        run.result(timeout=60)


def test_a_worker_of_another_version_refuses(sessions, external):
    burst = sessions(fleet=None)
    key = keys.manifest(burst.id)
    manifest = decode(Manifest, key, sync.run(burst._link.store.get(key)))
    other = msgspec.structs.replace(manifest.versions, python="2.7")
    sync.run(burst._link.store.put(key, encode(msgspec.structs.replace(manifest, versions=other))))
    run = burst.compute(dask.delayed(1))
    assert start_worker(burst, external).wait(timeout=30) == 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 0.1)
        with pytest.raises(VersionMismatch, match=r"Python .* here, 2\.7 in the client"):
            run.result(timeout=30)
