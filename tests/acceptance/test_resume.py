"""A script that runs again goes on where it was, whatever died: on a directory and on S3 servers.

The script is what a user writes. It runs as a process of its own, is killed at points at which the test has it
wait, and runs again. Tasks leave a mark each time they run, so the test counts what was computed twice.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest
from acting import QUICK, kill_all

from burst_dask import attach, list_sessions

SCRIPT = """
import sys, time, os, pathlib
import dask, dask.array as da, numpy as np
from burst_dask import Session

marks = pathlib.Path(sys.argv[2])

def mark(name):
    (marks / f"{name}.{os.urandom(4).hex()}").touch()

def load(number):
    mark(f"load-{number}")
    if number == 3:  # the test lets it go on
        while not (marks / "gate").exists():
            time.sleep(0.005)
    return number

def block(values, block_id=None):
    mark(f"block-{block_id[0]}")
    return values + 1

def fit(parts):
    mark("fit")
    return sum(parts) * FACTOR

FACTOR = 10
"""
PARTS = """
parts = [dask.delayed(load)(number, dask_key_name=f"load-{number}") for number in range(COUNT)]
model = dask.delayed(fit)(parts, dask_key_name="model")
with Session(sys.argv[1], name="nightly", resume=True, workers=2, progress=False, **SETTINGS):
    print(dask.compute(model, parts))
"""


class Script:
    """A script and the place where it leaves its marks."""

    def __init__(self, folder, store, marks, text):
        self.file, self.store, self.marks = folder / "script.py", store, marks
        self.write(text)

    def write(self, text, count=5, head=SCRIPT):
        body = textwrap.dedent(text).replace("SETTINGS", repr(QUICK)).replace("COUNT", str(count))
        self.file.write_text(head + body)

    def start(self):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(self.file), self.store, str(self.marks.directory)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def run(self):
        """Return what the script prints, and its warnings, once it has ended well."""
        process = self.start()
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return out.strip(), err

    def session(self):
        return attach("nightly", store=self.store)

    def counts(self, name, numbers):
        return [self.marks.count(f"{name}-{number}") for number in numbers]


@pytest.fixture
def script(tmp_path, any_store, marks):
    made = Script(tmp_path, any_store, marks, PARTS)
    yield made
    for row in list_sessions(any_store):
        attach(row.id, store=any_store).cleanup(force=True)


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)


def run_to_the_gate(script):
    """Start the script, and return it when something is committed and another task waits."""
    process = script.start()
    script.marks.wait("load-3")
    session = script.session()
    while not session.collect():
        assert process.poll() is None, process.communicate()
    return process


# ---------------------------------------------------------------------------- what may die


def test_client_and_workers_die(script):
    process = run_to_the_gate(script)
    done = set(script.session().collect())
    kill(process)
    kill_all(script.session())
    script.marks.open("gate")
    assert script.run()[0] == "(100, [0, 1, 2, 3, 4])"
    # What was committed did not run again; what ran when its worker died did.
    assert all(script.marks.count(key) == 1 for key in done)
    assert script.marks.count("load-3") == 2
    assert len(script.session().status().runs) == 1  # it is the run of before that went on


def test_the_client_dies_and_the_work_goes_on_meanwhile(script):
    kill(run_to_the_gate(script))
    script.marks.open("gate")
    assert script.run()[0] == "(100, [0, 1, 2, 3, 4])"
    assert script.counts("load", range(5)) == [1, 1, 1, 1, 1] and script.marks.count("fit") == 1


def test_nothing_dies_and_nothing_is_computed(script):
    script.marks.open("gate")
    assert script.run()[0] == script.run()[0] == "(100, [0, 1, 2, 3, 4])"
    assert script.counts("load", range(5)) == [1, 1, 1, 1, 1] and script.marks.count("fit") == 1
    assert len(list_sessions(script.store)) == 1


# ---------------------------------------------------------------------------- what may change


def test_a_changed_graph(script):
    script.marks.open("gate")
    script.run()
    script.write(PARTS, count=7)  # more parts, so another model
    assert script.run()[0] == "(210, [0, 1, 2, 3, 4, 5, 6])"
    assert script.counts("load", range(7)) == [1] * 7 and script.marks.count("fit") == 2


def test_a_changed_function(script):
    script.marks.open("gate")
    script.run()
    script.write(PARTS, head="# it is said anew\n" + SCRIPT.replace("FACTOR = 10", "FACTOR = 100"))
    assert script.run()[0] == "(1000, [0, 1, 2, 3, 4])"
    assert script.counts("load", range(5)) == [1] * 5 and script.marks.count("fit") == 2


def test_arrays_and_calls(script):
    text = """
    with Session(sys.argv[1], name="nightly", resume=True, workers=2, progress=False, **SETTINGS) as burst:
        x = da.arange(8, chunks=2).map_blocks(block, meta=np.array((), "i8"))
        kept = burst.persist(x)
        futures = burst.map(load, range(3), key="call")
        print(x.compute(), kept.sum().compute(), burst.gather(futures), burst.submit(fit, futures, pure=True).result())
    """
    script.write(text)
    assert script.run()[0] == script.run()[0] == "[1 2 3 4 5 6 7 8] 36 [0, 1, 2] 30"
    # Two graphs have had each block in the first process; nothing ran in the second.
    assert script.counts("load", range(3)) == [1] * 3 and script.marks.count("fit") == 1
    assert sum(script.counts("block", range(4))) <= 8


# ---------------------------------------------------------------------------- what cannot be found again


def test_tasks_without_a_name_are_named(script):
    text = """
    with Session(sys.argv[1], name="nightly", resume=True, workers=2, progress=False, **SETTINGS):
        parts = [dask.delayed(load)(number) for number in range(2)]
        print(dask.compute(parts))
    """
    script.write(text)
    for times in (1, 2):
        printed, said = script.run()
        assert printed == "([0, 1],)" and script.counts("load", range(2)) == [times] * 2
        assert "ResumeWarning: 2 tasks have keys that are others in each process" in said
        assert re.search(r"'load' \(2, such as 'load-[0-9a-f]{8}-", said) and "pure=True" in said
