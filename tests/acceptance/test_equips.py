"""What tasks find around them: your own modules, packages that you ask for, and versions that fit.

A session remembers the versions of Python and of all packages that it was opened with. Workers on
the same machine have the same ones. Those elsewhere may not: a worker with another minor version of
Python, or of Dask, refuses; other differences are told once. What workers lack, a session brings.

Workers here are started as on another machine: they know the store, and no module of the test.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import dask
import msgspec
import pytest
from acting import QUICK

import burst_dask
from burst_dask import Session, attach, sync
from burst_dask.errors import EnvironmentFailed, VersionMismatch
from burst_dask.fleet import records
from burst_dask.protocol import keys
from burst_dask.protocol.records import Manifest, decode, encode

HERE = Path(burst_dask.__file__).parents[1]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Caches of workers are new, and pip has no index."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def sessions(tmp_path):
    """Makes sessions on one directory, and cleans them up."""
    made = []

    def make(**arguments):
        made.append(Session(**{"store": tmp_path / "store", "progress": False, **QUICK, **arguments}))
        return made[-1]

    yield make
    for session in made:
        session.cleanup(force=True)


def start_elsewhere(session, processes, count=1):
    """Start workers that can import what is installed, and nothing of this process."""
    command = ["burst_dask.worker", "--session", session.id, "--store", session.store, "--processes", str(count)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen([sys.executable, "-P", "-m", *command, "--threads", "1"], env=environment, cwd="/")
    processes.append(process)
    return process


def source(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


@pytest.fixture
def mypkg(tmp_path, monkeypatch):
    """A package below ``src`` that this process imports from there."""
    source(tmp_path / "src", "mypkg/__init__.py", "from mypkg.shapes import Square\n")
    source(
        tmp_path / "src", "mypkg/shapes.py", "class Square:\n    def __init__(self, side):\n        self.side = side\n"
    )
    source(tmp_path / "src", "mypkg/area.py", "def area(shape):\n    return shape.side ** 2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "src"))
    yield tmp_path / "src" / "mypkg"
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def test_local_packages_are_sent_to_workers(sessions, any_store, mypkg, external):
    """``code=["src/mypkg"]``: workers anywhere import it as it was when the session was opened."""
    from mypkg import Square
    from mypkg.area import area

    burst = sessions(store=any_store, fleet=None, code=[mypkg])
    (mypkg / "area.py").write_text("raise ImportError('changed since')")
    start_elsewhere(burst, external, count=2)
    squares = [dask.delayed(Square)(side) for side in range(4)]
    assert dask.compute(*map(dask.delayed(area), squares), scheduler=burst) == (0, 1, 4, 9)


def test_a_single_module_is_sent_too_and_wins_over_what_is_on_the_path(sessions, tmp_path, monkeypatch):
    """Workers on this machine take the session's code, too."""
    helpers = source(tmp_path, "helpers.py", "def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import helpers as ours

    burst = sessions(workers=1, code=[helpers])
    helpers.write_text("def answer():\n    return 'changed since'\n")
    assert burst.compute(dask.delayed(ours.answer)()).result(timeout=60) == (42,)


def test_code_for_workers_in_this_process(mypkg, monkeypatch):
    """Also on a store that only this process sees."""

    def by_name():
        import mypkg.area

        return mypkg.area.area(mypkg.Square(3))

    burst = Session("memory://environment", workers=1, code=[mypkg])
    monkeypatch.delitem(sys.modules, "mypkg", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(mypkg.parent)])
    try:
        assert burst.compute(dask.delayed(by_name)()).result(timeout=60) == (9,)
    finally:
        burst.cleanup(force=True)


def test_a_script_needs_nothing(tmp_path, external):
    """What ``__main__`` defines, classes too, goes with the tasks: a script and a notebook run as they are."""
    script = source(
        tmp_path,
        "script.py",
        """
        import sys
        from dataclasses import dataclass

        import dask
        from burst_dask import Session

        SCALE = 10

        @dataclass
        class Point:
            x: int

            def moved(self):
                return Point(self.x + helper(1))

        def helper(value):
            return value * SCALE

        def work(point):
            return point.moved().moved()

        burst = Session(sys.argv[1], fleet=None, progress=False)
        print(burst.id, flush=True)
        total = dask.delayed(lambda *points: sum(point.x for point in points))
        points = [dask.delayed(work)(Point(n)) for n in range(3)]
        result, first = dask.compute(total(*points), points[0], scheduler=burst)
        print(result, first, type(first) is Point, flush=True)
        burst.cleanup(force=True)
        """,
    )
    store = str(tmp_path / "store")
    process = subprocess.Popen([sys.executable, str(script), store], stdout=subprocess.PIPE, text=True)
    external.append(process)
    session = process.stdout.readline().strip()
    start_elsewhere(attach(session, store=store), external)
    assert process.communicate(timeout=60)[0].strip() == "63 Point(x=20) True"
    assert process.returncode == 0


def wheel(folder, name):
    """Write a wheel of one module."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", "def shout(text):\n    return text.upper() + '!'\n")
        file.writestr(f"{name}-1.0.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{name}-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n")
        file.writestr(f"{name}-1.0.dist-info/RECORD", "")
    return path


def shout(text):
    import loudly

    return loudly.shout(text)


shout.__module__ = "__main__"  # workers elsewhere have no module of this test: it is sent with the task


def test_packages_are_installed_when_workers_start(sessions, tmp_path, external):
    """``packages=["rasterio"]``: pip installs them before a worker begins, once for a machine."""
    burst = sessions(fleet=None, packages=[f"loudly @ {wheel(tmp_path / 'wheels', 'loudly').as_uri()}"])
    start_elsewhere(burst, external, count=2)
    values = [dask.delayed(shout)(text) for text in ("a", "b")]
    assert dask.compute(*values, scheduler=burst) == ("A!", "B!")
    folders = [path for path in (tmp_path / "cache" / "burst_dask" / "packages").iterdir() if path.is_dir()]
    assert [sorted(path.name for path in folder.glob("*.py")) for folder in folders] == [["loudly.py"]]


def test_packages_for_workers_in_this_process(tmp_path, monkeypatch):
    """They go to the end of this process's path: what it has already stays what it is."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    burst = Session(
        "memory://packages", workers=2, packages=[f"softly @ {wheel(tmp_path / 'wheels', 'softly').as_uri()}"]
    )

    def use():
        import softly

        return softly.shout("c")

    try:
        assert burst.compute(dask.delayed(use)()).result(timeout=60) == ("C!",)
    finally:
        burst.cleanup(force=True)


def test_a_worker_that_installs_is_alive_and_can_be_stopped(sessions, external, monkeypatch):
    """An installation may take minutes: the worker has its heartbeat, and SIGTERM ends it in order."""
    with socket.create_server(("127.0.0.1", 0)) as index:  # takes connections, and never answers
        monkeypatch.delenv("PIP_NO_INDEX")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{index.getsockname()[1]}/simple")
        burst = sessions(fleet=None, packages=["slowly"])
        supervisor = start_elsewhere(burst, external)
        index.settimeout(60)
        connection, _ = index.accept()
        with connection:
            assert burst.status().workers.alive == 1
            supervisor.terminate()
            assert supervisor.wait(60) == 0
    (worker,) = sync.run(burst._link.seen()).ended
    assert sync.run(burst._link.newest([worker])).reason == "stopped"


@pytest.mark.parametrize("fleet", ["local", None])
def test_packages_that_cannot_be_installed_are_told_to_who_waits(sessions, fleet, external, monkeypatch):
    """Nothing is lost and nobody tries for ever: the wait ends with what pip said, and so does the status."""
    monkeypatch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 1.0)
    monkeypatch.setattr("burst_dask.client.guard.CHECK_FLEET_EVERY", 1.0)
    burst = sessions(fleet=fleet, workers=3 if fleet else None, packages=["there-is-none"])
    supervisor = None if fleet else start_elsewhere(burst, external)
    run = burst.compute(dask.delayed(sum)([1, 2]))
    if supervisor is not None:
        assert supervisor.wait(60) == 3  # refused: not started again
    with pytest.raises(EnvironmentFailed, match="could not be prepared for it") as error:
        run.result(timeout=60)
    assert "pip said:\n" in str(error.value) and "No matching distribution found for there-is-none" in str(error.value)
    assert "What was submitted is kept." in str(error.value)
    assert "No matching distribution found for there-is-none" in str(burst.status())

    def ended():
        return set(sync.run(burst._link.seen()).ended)

    if fleet:  # others were started once more, and end as well
        directory = burst._link.fleet.directory
        while any(records.find(record.pid, path.name) for path, record in records.read_all(directory).items()):
            time.sleep(0.05)
    before = ended()
    with pytest.raises(EnvironmentFailed):
        run.result(timeout=60)  # without starting workers again
    assert ended() == before


def edit_manifest(burst, **changes):
    """Make it look as if the session had been opened in another environment."""

    async def edit():
        store, key = burst._link.store, keys.manifest(burst.id)
        manifest = msgspec.structs.replace(decode(Manifest, key, await store.get(key)), **changes)
        await store.put(key, encode(manifest))

    sync.run(edit())
    return attach(burst.id, store=burst.store)


def test_another_dask_refuses(sessions, external, monkeypatch):
    """A worker whose pickles might not be understood takes no work; both versions are named."""
    monkeypatch.setattr("burst_dask.client.guard.CHECK_BEATS_EVERY", 1.0)
    burst = sessions(fleet=None)
    theirs = msgspec.structs.replace(burst._link.manifest.versions, dask="2020.1.0", python="3.9")
    burst = edit_manifest(burst, versions=theirs)
    run = burst.compute(dask.delayed(sum)([1, 2]))
    assert start_elsewhere(burst, external).wait(60) == 3
    ours = f"Python 3.{sys.version_info[1]} here, 3.9 in the client; Dask {dask.__version__} here, 2020.1.0"
    with pytest.raises(VersionMismatch, match=ours):
        run.result(timeout=60)
    assert ours in " ".join(burst.status().notes[0].split())


def test_other_differences_are_shown_once(sessions, external, monkeypatch):
    """The work goes on; a client that waits warns once, and the status shows the table."""
    burst = sessions(fleet=None)
    environment = burst._link.manifest.environment
    packages = {**environment.packages, "msgspec": "0.1", "rasterio": "1.4.3", "notebook": "7"}
    environment = msgspec.structs.replace(environment, packages=packages, imported=("msgspec", "rasterio"))
    burst = edit_manifest(burst, environment=environment)
    start_elsewhere(burst, external, count=2)
    assert burst.compute(dask.delayed(sum)([1, 2])).result(timeout=60) == (3,)
    ours = msgspec.__version__
    (note,) = burst.status().notes
    table = f"package   client  worker\nmsgspec   0.1     {ours}\nrasterio  1.4.3   not installed"
    assert note.endswith(f"the work goes on with what they have:\n{table}")

    monkeypatch.setattr("burst_dask.client.guard.COMPARE_AFTER", 0.0)  # however short the wait is
    again = attach(burst.id, store=burst.store)
    with pytest.warns(UserWarning, match="are not those that it was opened with") as caught:
        again.compute(dask.delayed(sum)([3, 4])).result(timeout=60)
    assert len(caught) == 1 and table in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again.compute(dask.delayed(sum)([5, 6])).result(timeout=60) == (11,)


FRESH = """
import sys
from burst_dask import attach
assert "mypkg" not in sys.modules and not any("src" in folder for folder in sys.path)
run = attach(sys.argv[1], store=sys.argv[2])
(square,), (same,) = run.result(timeout=60), run.collect().values()
print(type(square).__module__, square.side, same.side)
"""


def test_results_of_classes_that_were_sent_can_be_collected_anywhere(sessions, mypkg, external):
    """A process that has never seen the package gets the session's code when it collects. It installs no packages."""
    from mypkg import Square

    burst = sessions(fleet=None, code=[mypkg], packages=["no-such-package-anywhere"])
    plain = sessions(fleet=None, code=[mypkg])
    start_elsewhere(plain, external)
    run = plain.compute(dask.delayed(Square)(7))
    run.wait(timeout=60)
    command = [sys.executable, "-P", "-c", FRESH, run.id, plain.store]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "mypkg.shapes 7 7\n", done.stderr
    assert attach(burst.id, store=burst.store).collect().pending == 0  # asks for nothing that must be installed


def test_without_the_code_it_says_what_is_missing(sessions, mypkg):
    burst = sessions(fleet=None, code=[mypkg])
    run = burst.compute(dask.delayed(abs)(-1))
    there = attach(run.id, store=burst.store)
    sync.run(burst._link.store.delete([keys.code(burst.id, burst._link.manifest.environment.code)]))
    with pytest.warns(UserWarning, match="results of its classes cannot be loaded unless this process can import it"):
        assert there.collect().pending == 1
