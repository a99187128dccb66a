"""Signed sessions: what they are like to use, and where their key is. test_forged.py has what they refuse."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import warnings

import dask
import psutil
import pytest
from acting import QUICK, children, until
from servers import REGION

from burst_dask import Session, attach, list_sessions, sync
from burst_dask.client.ending import close
from burst_dask.errors import KeyMissing
from burst_dask.fleet import records
from burst_dask.protocol import keys
from burst_dask.store import open_store
from burst_dask.store.signing import key_in
from burst_dask.trust.keyring import Keyring


def large(text):
    return text.encode() * 40_000


@pytest.fixture(params=["directory", "moto"])
def store(request, tmp_path):
    if request.param == "directory":
        return str(tmp_path / "store")
    import boto3

    endpoint = request.getfixturevalue("moto_server")
    boto3.client("s3", endpoint_url=endpoint, region_name=REGION).create_bucket(Bucket="signed")
    return f"s3://signed/{tmp_path.name}?endpoint_url={endpoint}&region={REGION}"


def test_a_signed_session_is_come_back_to_by_who_has_the_key(store, tmp_path, monkeypatch):
    burst = Session(store, workers=1, progress=False, signed=True, **QUICK)
    run = burst.compute(dask.delayed(large)("a"), dask.delayed(sum)([1, 2]))
    assert run.result(timeout=60) == (b"a" * 40_000, 3)
    assert "signed=True" in repr(burst) and "with the key in a file" in str(burst.status())

    script = f"from burst_dask import attach; print(attach({run.id!r}, store={burst.store!r}, signed=True).result()[1])"
    with_the_key = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert with_the_key.stdout == "3\n"

    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("BURST_KEYS", str(tmp_path / "another machine"))
        with pytest.raises(KeyMissing, match=r"there is no .*another machine.* Copy that file"):
            attach(run.id, store=burst.store)
        (row,) = [row for row in list_sessions(burst.store) if row.id == burst.id]
        assert (row.state, row.signed) == ("no key", True)

    assert next(row for row in list_sessions(burst.store) if row.id == burst.id).state == "open"
    burst.cleanup()
    assert attach(run.id, store=burst.store).result()[1] == 3, "results are kept, and so is the key"
    burst.cleanup(force=True)
    assert Keyring().known(burst.id) == ""


def test_the_end_of_a_killed_worker_is_told_by_its_supervisor_who_has_the_key(tmp_path):
    burst = Session(str(tmp_path / "store"), workers=1, progress=False, signed=True, **QUICK)
    until(lambda: burst.status().workers.alive)
    (worker,) = burst._link.fleet.processes()
    os.kill(worker.pid, signal.SIGKILL)
    link = burst._link
    until(lambda: sync.run(link.store.get(keys.ended(link.session, worker.worker))))
    assert sync.run(link.newest([worker.worker])).message.startswith("killed by SIGKILL")
    assert burst.compute(dask.delayed(sum)([1, 2])).result(timeout=60) == (3,)
    burst.cleanup(force=True)


def test_the_key_is_nowhere_else(store, tmp_path):
    """Neither in the store, nor on command lines, in environments, logs, or what is printed."""
    burst = Session(store, workers=1, progress=False, signed=True, **QUICK)
    assert burst.compute(dask.delayed(large)("a")).result(timeout=60)
    fleet, secret = burst._link.fleet, key_in(burst._link.store, burst.id).secret
    told = [repr(burst), str(burst.status()), repr(burst._link.store), repr(burst._link.manifest)]
    processes = [psutil.Process(record.pid) for record in _records(fleet)]
    for process in [*processes, *(each for one in processes for each in children(one.pid))]:
        told += [str(process.environ()), str(process.cmdline())]
    assert len(told) >= 8, "a supervisor and a worker at least"
    told += [log.text for log in burst.worker_logs()]
    raw = open_store(burst.store)

    async def objects():
        return [await raw.get(meta.key) async for page in raw.list("") for meta in page]

    for written in (secret, secret.hex().encode(), base64.b64encode(secret), base64.urlsafe_b64encode(secret)):
        assert not [body for body in sync.run(objects()) if written in body]
        assert not [text for text in told if written.decode(errors="replace") in text]
    assert any("BURST" in text or "--key" in text for text in told)
    burst.cleanup(force=True)


def _records(fleet):
    return records.read_all(fleet.directory).values()


def test_a_signed_session_is_resumed_and_one_that_is_not_is_not(tmp_path):
    url = f"memory://{tmp_path.name}"
    plain = Session(url, name="nightly", workers=1, progress=False, **QUICK)
    with pytest.warns(UserWarning, match=r"is not signed, so a new session is opened, and nothing of it is used"):
        burst = Session(url, name="nightly", resume=True, signed=True, workers=1, progress=False, **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Session(url, name="nightly", resume=True, signed=True, workers=1, progress=False, **QUICK)
    assert again.id == burst.id != plain.id
    for session in (plain, burst):
        session.cleanup(force=True)


def test_a_new_session_reads_results_of_a_signed_one_before_it(tmp_path):
    url = f"memory://{tmp_path.name}"
    options = {"name": "nightly", "resume": True, "signed": True, "workers": 1, "progress": False, **QUICK}
    slow = dask.delayed(large, pure=True)("a")
    before = Session(url, absolute_timeout=1000, **options)
    before.compute(slow).result(timeout=60)
    sync.run(close(before._link))
    after = Session(url, **options)
    assert after.id != before.id
    assert after.compute(dask.delayed(len, pure=True)(slow)).result(timeout=60) == (40_000,)
    for session in (after, before):
        session.cleanup(force=True)


def test_burst_worker_takes_no_key_itself():
    secret = "00" * 32
    command = [sys.executable, "-m", "burst_dask.worker", "--session", "k3w9x2mq", "--store", "memory://x"]
    ended = subprocess.run([*command, "--key", secret], capture_output=True, text=True, check=False)
    assert ended.returncode == 2 and "--key takes where the key is" in ended.stderr and secret not in ended.stderr


def test_commands_take_signed_sessions_and_say_so(tmp_path):
    store = str(tmp_path / "store")
    burst = Session(store, workers=1, progress=False, signed=True, **QUICK)
    run = burst.compute(dask.delayed(sum)([1, 2], dask_key_name="answer"))
    run.result(timeout=60)

    def said(*words):
        command = [sys.executable, "-m", "burst_dask.cli", "--signed", *words, "--store", store]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout

    assert "signed, with" in said("status", burst.id).replace("signed            with", "signed, with")
    assert "open, signed" in said("ls")
    assert "healthy" in said("doctor", run.id) and "done" in said("watch", run.id) and "commit" in said("story", run.id)
    said("extend", burst.id, "2h"), said("scale", burst.id, "1"), said("cancel", burst.id), said("logs", burst.id)
    said("cleanup", burst.id, "--force")
    assert "0 sessions" in said("ls")
