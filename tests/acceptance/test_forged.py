"""Signed sessions: who may write to the store, and has not the key, runs no code on workers and clients.

Tasks and results are pickles. Here somebody plants some in a store: in a session that is not signed they go off, and in
one that is they are refused before anything is unpickled, by whoever reads them.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import dask
import msgspec
import psutil
import pytest
from acting import QUICK

from burst_dask import Session, attach, list_sessions, serialize, sync
from burst_dask.api.cleaning import sweep
from burst_dask.api.healing import heal_all
from burst_dask.clock import Entropy, SystemClock
from burst_dask.doctor import diagnose
from burst_dask.errors import EnvironmentFailed, KeyMissing, UnknownId, UntrustedObject
from burst_dask.protocol import frames, keys
from burst_dask.protocol.records import (
    Ended,
    Entry,
    Location,
    Logs,
    Manifest,
    Plan,
    ShardRecord,
    decode,
    decode_with_end,
    encode,
)
from burst_dask.protocol.session_records import AddRun, SessionEntry
from burst_dask.store import open_store
from burst_dask.trust.keyring import Keyring
from burst_dask.worker.process import run_agent


def explode(marker, _):
    Path(marker).touch()
    return ()


class Bomb:
    """A pickle that leaves a mark where it is loaded."""

    def __init__(self, marker, size=0):
        self.marker, self.size = str(marker), size

    def __reduce__(self):
        return explode, (self.marker, bytes(self.size))


def large(text):
    print("so large")
    return text.encode() * 40_000


class Scene:
    """A session in a store that somebody else may write, too; `work` is what a worker does there until it is idle."""

    def __init__(self, url, **settings):
        self.url, self.plain = url, open_store(url)
        self.session = Session(url, fleet=None, progress=False, idle_timeout=0.4, **QUICK, **settings)
        self.id = self.session.id

    def names(self, part):
        async def named():
            pages = self.plain.list(keys.session_prefix(self.id))
            return [meta.key async for page in pages for meta in page if part in meta.key]

        return sync.run(named())

    def read(self, name):
        """What was stored, without its signature."""
        return sync.run(self.session._link.store.get(name))

    def raw(self, name):
        return sync.run(self.plain.get(name))

    def write(self, name, body):
        sync.run(self.plain.put(name, body))

    def work(self, key="file"):
        """Run a worker; return the record of its end."""
        worker = Entropy().token()
        sync.run(run_agent(open_store(self.url), self.id, worker, threads=1, key=key))
        name = keys.ended(self.id, worker)
        return decode(Ended, name, self.read(name))


@pytest.fixture
def scene(tmp_path):
    scene = Scene(f"memory://{tmp_path.name}", signed=True)
    yield scene
    scene.session.cleanup(force=True)


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "it went off"


# ---------------------------------------------------------------------------- what a client refuses

KINDS = {
    "an entry of the session log": "/log/00000001",
    "a plan": "/plan",
    "an entry of a shard log": "/log/00000/00000001",
    "a segment": "/segments/",
    "what a task has printed": "/logs/",
    "a heartbeat": "/beat",
    "the end of a worker": "/ended",
}


def planted(kind, body, marker):
    """Return an object as somebody without the key would write it, with a pickle that goes off if it is loaded."""
    bomb = pickle.dumps(Bomb(marker))
    if kind == "a plan":
        return encode(msgspec.structs.replace(decode(Plan, kind, body), outputs=bomb, names=b""))
    if kind == "an entry of a shard log":
        entry, _ = decode_with_end(Entry, kind, body)
        blob = b"".join(frames.seal(serialize.dumps(Bomb(marker))))
        outcomes = entry.index.outcomes
        stored = dict.fromkeys(outcomes.stored, Location(0, 0, len(blob)))
        index = msgspec.structs.replace(
            entry.index, outcomes=msgspec.structs.replace(outcomes, stored=stored), objects=(f"@{entry.number}",)
        )
        return encode(msgspec.structs.replace(entry, index=index)) + blob
    if kind == "a segment":
        made = [b"".join(frames.seal(serialize.dumps(Bomb(marker, size)))) for size in (1000, 1000 + len(body))]
        size = 1000 + len(body) - len(made[0])
        return b"".join(frames.seal(serialize.dumps(Bomb(marker, size))))
    if kind == "what a task has printed":
        logs = decode(Logs, kind, body)
        return encode(msgspec.structs.replace(logs, tasks=(msgspec.structs.replace(logs.tasks[0], key=bomb),)))
    return body


def computed(scene):
    """Two runs, and all kinds of objects."""
    runs = [scene.session.compute(dask.delayed(large)(text), dask.delayed(len)(text)) for text in ("a", "b")]
    assert scene.work().reason == "idle"
    return runs[0].id


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    scene = Scene(f"memory://{tmp_path_factory.mktemp('finished').name}", signed=True)
    scene.run = computed(scene)
    yield scene
    scene.session.cleanup(force=True)


def read_all(scene, run):
    attach(run, store=scene.url).result(timeout=60)
    session = attach(scene.id, store=scene.url)
    session.logs()
    session.status()


def mine(scene, kind, run):
    """Return the name of an object of that kind, of `run` if it is one of a run, and that of another such object."""
    found = scene.names(KINDS[kind])
    first = [name for name in found if keys.run_prefix(run) in name] or found
    other = [name for name in found if name != first[0]] or scene.names("/log/00000000")
    return first[0], other[0]


@pytest.mark.parametrize("way", ["altered", "cut", "moved", "planted"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_refuses_what_was_done_to(kind, way, finished, marker):
    read_all(finished, finished.run)
    name, other = mine(finished, kind, finished.run)
    raw, body = finished.raw(name), finished.read(name)
    half = len(raw) // 2
    done = {
        "altered": raw[:half] + bytes([raw[half] ^ 1]) + raw[half + 1 :],
        "cut": raw[:-1],
        "moved": finished.raw(other),
        "planted": planted(kind, body, marker),
    }
    finished.write(name, done[way])
    try:
        with pytest.raises(UntrustedObject, match=f"{name} is not signed with the key of session {finished.id}"):
            read_all(finished, finished.run)
    finally:
        finished.write(name, raw)
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["a plan", "an entry of a shard log", "a segment", "what a task has printed"])
def test_the_same_goes_off_in_a_session_that_is_not_signed(kind, tmp_path, marker):
    scene = Scene(f"memory://{tmp_path.name}")
    scene.work = lambda: Scene.work(scene, key="")
    run = computed(scene)
    name, _ = mine(scene, kind, run)
    scene.write(name, planted(kind, scene.raw(name), marker))
    try:
        read_all(scene, run)
    except Exception as error:
        assert not isinstance(error, UntrustedObject)
    assert marker.exists()
    scene.session.cleanup(force=True)


def test_a_changed_manifest_is_refused(finished, marker):
    name = keys.manifest(finished.id)
    raw = finished.raw(name)
    manifest = decode(Manifest, name, raw)
    for changed in (
        msgspec.structs.replace(manifest, name="of another name"),
        msgspec.structs.replace(manifest, settings=manifest.settings | {"lease": 100.0}),
        msgspec.structs.replace(manifest, key="secretsmanager:us-east-1:burst-dask/session/" + finished.id),
    ):
        finished.write(name, encode(changed))
        with pytest.raises(UntrustedObject, match=r"is not the manifest that session .* was opened with"):
            attach(finished.id, store=finished.url)
        with pytest.raises(UntrustedObject, match="is not the manifest"):
            finished.work()
    (row,) = list_sessions(finished.url)
    assert row.state == "untrusted"
    finished.write(name, raw)


def test_a_session_that_was_replaced_by_one_that_is_not_signed_is_refused(scene, tmp_path, monkeypatch):
    name, log = keys.manifest(scene.id), keys.entry(keys.session_log(scene.id), 0)
    scene.write(name, encode(msgspec.structs.replace(scene.session._link.manifest, key="")))
    scene.write(log, scene.read(log))
    with pytest.raises(UntrustedObject, match="is not signed, and here is the key by which it was"):
        attach(scene.id, store=scene.url)
    monkeypatch.setenv("BURST_KEYS", str(tmp_path / "another machine"))
    with pytest.raises(UntrustedObject, match="is not signed, and only signed ones are wanted"):
        attach(scene.id, store=scene.url, signed=True)
    with pytest.raises(UntrustedObject, match="is not signed"):
        scene.work(key="file")
    assert attach(scene.id, store=scene.url).id == scene.id, "whoever neither has the key nor asks, is told nothing"


def test_without_its_log_a_signed_session_can_only_be_cleaned_up(tmp_path, marker):
    """As an interrupted cleanup leaves it, or somebody who wants unsigned entries to be believed."""
    scene = Scene(f"memory://{tmp_path.name}", signed=True)
    run = computed(scene)
    sync.run(scene.plain.delete(scene.names("/log/0000000")))
    plan = keys.plan(run)
    scene.write(plan, planted("a plan", scene.read(plan), marker))
    with pytest.raises(UntrustedObject):
        attach(run, store=scene.url).result()
    with pytest.raises(UnknownId):
        scene.work()
    attach(scene.id, store=scene.url).cleanup(force=True)
    assert not marker.exists() and scene.names("") == [] and Keyring().known(scene.id) == ""
    with pytest.raises(UnknownId):
        attach(scene.id, store=scene.url)


def test_a_cleanup_deletes_no_other_session_that_a_forged_manifest_names(tmp_path):
    mine, other = (Scene(f"memory://{tmp_path.name}", signed=True) for _ in range(2))
    there = other.names("")
    sync.run(mine.plain.delete(mine.names("/log/")))
    mine.write(keys.manifest(mine.id), mine.raw(keys.manifest(other.id)))
    with pytest.raises(UntrustedObject, match=f"is not the manifest of session {mine.id} but that of {other.id}"):
        attach(mine.id, store=mine.url).cleanup(force=True)
    sweep(open_store(mine.url), mine.id)
    assert mine.names("") == [] and Keyring().known(mine.id) == ""
    assert other.names("") == there and Keyring().known(other.id) != ""
    assert attach(other.id, store=other.url).id == other.id
    other.session.cleanup(force=True)


# ---------------------------------------------------------------------------- what a worker refuses


def test_a_forged_entry_of_the_session_log_ends_workers_with_the_reason(scene, marker):
    entry = SessionEntry(number=1, writer="x", nonce="n", wrote=0.0, action=AddRun(keys.RunId(f"{scene.id}.evil")))
    scene.write(keys.entry(keys.session_log(scene.id), 1), encode(entry))
    ended = scene.work()
    assert ended.reason == "untrusted" and "log/00000001 is not signed with the key" in ended.message
    scene.write(keys.entry(keys.session_log(scene.id), 1), b"")
    sync.run(scene.plain.delete([keys.entry(keys.session_log(scene.id), 1)]))
    assert any("refused it" in note for note in scene.session.status().notes)


@pytest.mark.parametrize("what", ["an entry", "the manifest"])
def test_a_session_that_somebody_has_written_to_can_still_be_removed(tmp_path, what):
    url = str(tmp_path / "store")
    burst = Session(url, workers=1, name="mine", progress=False, signed=True, **QUICK)
    assert burst.compute(dask.delayed(sum)([1, 2])).result(timeout=60) == (3,)
    agents = [agent.pid for agent in burst._link.fleet.processes()]
    plain = open_store(url)
    if what == "an entry":
        sync.run(plain.put(keys.entry(keys.session_log(burst.id), burst._link.state.next), b"forged"))
    else:  # it would have another key deleted, and other machines stopped
        manifest = msgspec.structs.replace(burst._link.manifest, key="secretsmanager:eu-west-1:another")
        sync.run(plain.put(keys.manifest(burst.id), encode(manifest)))

    def cleanup(*words):
        command = [sys.executable, "-m", "burst_dask.cli", "cleanup", *words, "--store", url]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    without_force = cleanup(burst.id)
    assert without_force.returncode == 1
    assert without_force.stderr.endswith("burst cleanup SESSION_ID --force deletes all of it, unread\n")
    assert cleanup(burst.id, "--force").returncode == 0
    assert agents and not any(map(psutil.pid_exists, agents))
    assert Keyring().known(burst.id) == ""

    async def left():
        return [meta.key async for page in plain.list("") for meta in page]

    assert sync.run(left()) == [keys.PROBED]
    assert "no session" in cleanup(burst.id, "--force").stderr


@pytest.mark.parametrize("what", ["plan", "log/00000/00000000"])
def test_a_worker_leaves_what_it_does_not_trust_alone_and_goes_on_with_other_work(scene, marker, what):
    bad, good = (scene.session.compute(dask.delayed(large)(text)) for text in ("a", "b"))
    name = keys.run_prefix(bad.id) + what
    body = planted("a plan", scene.read(name), marker) if what == "plan" else encode(scene.session._link.manifest)
    scene.write(name, body)
    ended = scene.work()
    assert ended.reason == "idle" and f"{name} is not signed with the key of session {scene.id}" in ended.message
    assert good.result(timeout=60) == (b"b" * 40_000,)
    with pytest.raises(UntrustedObject):
        attach(bad.id, store=scene.url).result(timeout=60)
    assert not marker.exists()
    sync.run(scene.plain.delete([name]))


def test_tasks_that_were_replaced_fail_and_are_not_run(scene, marker):
    run = scene.session.compute(dask.delayed(large)("a"))
    (name,) = scene.names("/packs/")
    body = scene.read(name)
    info = decode(Plan, "plan", scene.read(keys.plan(run.id))).shards[0]
    record = decode(ShardRecord, name, body[info.place.start : info.place.end])
    bomb = pickle.dumps(Bomb(marker))
    forged = encode(msgspec.structs.replace(record, keys=bomb, foreign_keys=bomb, payload=bomb))
    scene.write(name, forged.ljust(len(body), b"\0"))
    assert scene.work().reason == "idle"
    with pytest.raises(UntrustedObject, match="is not signed with the key"):
        run.result(timeout=60)
    assert not marker.exists()


def test_a_result_that_was_replaced_is_no_input(scene, marker):
    first = scene.session.persist(dask.delayed(large)("a"))
    scene.work()
    (name,) = scene.names("/segments/")
    raw, body = scene.raw(name), scene.read(name)
    scene.write(name, planted("a segment", body, marker))
    second = scene.session.compute(dask.delayed(len)(first))
    scene.work()
    with pytest.raises(UntrustedObject, match="is not signed with the key"):
        second.result(timeout=60)
    assert not marker.exists()
    scene.write(name, raw)


def test_code_that_was_replaced_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "mine.py").write_text("ANSWER = 42\n")
    scene = Scene(f"memory://{tmp_path.name}", signed=True, code=[tmp_path / "mine.py"])
    (name,) = scene.names("/code/")
    scene.write(name, scene.read(name))
    with pytest.raises(EnvironmentFailed, match="is not signed with the key"):
        scene.work()
    scene.session.cleanup(force=True)


def test_workers_without_the_key_take_nothing(scene, tmp_path, monkeypatch):
    scene.session.compute(dask.delayed(large)("a"))
    monkeypatch.setenv("BURST_KEYS", str(tmp_path / "another machine"))
    command = [sys.executable, "-m", "burst_dask.worker.process", "--session", scene.id, "--store"]
    for key in ("", "file"):
        with pytest.raises(KeyMissing, match="BURST_KEYS names another folder"):
            scene.work(key)
    assert scene.names("/workers/") == []
    directory = Session(str(tmp_path / "store"), fleet=None, progress=False, signed=True)
    command[4:] = [directory.id, "--store", directory.store]
    monkeypatch.setenv("BURST_KEYS", str(tmp_path / "yet another"))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 3 and "KeyMissing: session" in ended.stderr, "a supervisor does not start it again"


# ---------------------------------------------------------------------------- what else reads a session


def test_burst_doctor_verifies_every_object(finished, marker):
    def broken():
        found = sync.run(diagnose(open_store(finished.url), finished.id, SystemClock()))
        return [one.what for part in (found.session, *found.runs) for one in part.violations]

    assert broken() == []
    for kind in KINDS:
        name, _ = mine(finished, kind, finished.run)
        raw = finished.raw(name)
        finished.write(name, raw[:-1] + bytes([raw[-1] ^ 1]))
        assert any(f"{name} is not signed" in what for what in broken()), kind
        finished.write(name, raw)
    assert broken() == []


def test_burst_heal_leaves_sessions_of_others_alone_and_tells_of_forged_ones(scene, tmp_path, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setenv("BURST_KEYS", str(tmp_path / "another machine"))
        assert heal_all(open_store(scene.url)) == []
    name = keys.manifest(scene.id)
    raw = scene.raw(name)
    scene.write(name, encode(msgspec.structs.replace(decode(Manifest, name, raw), name="another")))
    (told,) = heal_all(open_store(scene.url))
    assert told.session == scene.id and "is not the manifest that session" in told.why
    scene.write(name, raw)
