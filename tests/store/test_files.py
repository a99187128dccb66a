"""A directory store survives a power loss: what is synced when, and what a crash between two steps leaves."""

import asyncio
import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from contract import in_loop, listed

from burst_dask.errors import ConfigError, StoreError, StoreFull, StoreMissing, StoreUnavailable, StoreUnsuitable
from burst_dask.store import open_store
from burst_dask.store.files import Files

LEFTOVER = "new#77"
#: the calls that change what is on a disk, or see to it that it is there
CALLS = ("open", "fsync", "link", "replace", "rename", "unlink", "mkdir", "rmdir")


class Crash(BaseException):
    """The machine is gone: nothing that would clean up runs any more."""


class Disk:
    """Writes down the calls that matter, by what they are about; ends them all after a certain number."""

    def __init__(self, root, monkeypatch, inside=None):
        self.root, self.inside = root, inside or root
        self.calls, self.crash_at = [], None
        self.names = {}
        for name in CALLS:
            monkeypatch.setattr(os, name, self._recorded(name, getattr(os, name)))

    def _recorded(self, name, call):
        def recorded(target, *args, **options):
            if not self._is_ours(target):
                return call(target, *args, **options)
            if len(self.calls) == self.crash_at:
                raise Crash
            what = self._name(args[0] if name in ("link", "replace") else target)
            answer = call(target, *args, **options)
            if name != "open" or args[0] & os.O_CREAT:  # a folder is opened to be synced
                self.calls.append(f"{name} {what}")
            if name == "open":
                self.names[answer] = what
            return answer

        return recorded

    def _is_ours(self, target):
        return target in self.names if isinstance(target, int) else os.fspath(target).startswith(str(self.inside))

    def _name(self, target):
        if isinstance(target, int):
            return self.names[target]
        name = os.path.relpath(target, self.root)
        return re.sub(r"#\d+", "#", name)


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
def disk(root, monkeypatch):
    return Disk(root, monkeypatch)


def test_the_content_is_synced_before_the_name_appears_and_the_folder_before_the_answer(root, disk):
    files = Files(root)
    assert files.create("log/0", [b"first"])
    assert disk.calls == [
        *("mkdir log", "fsync ."),
        *("open log/new#", "fsync log/new#", "link log/0", "fsync log", "unlink log/new#"),
    ]
    disk.calls.clear()
    files.put("log/0", [b"second"])
    assert disk.calls == ["open log/new#", "fsync log/new#", "replace log/0", "fsync log"]


def test_each_new_folder_is_synced_into_the_one_above_it_once(root, disk):
    files = Files(root)
    files.put("a/b/c/1", [b"1"])
    files.put("a/b/d/1", [b"1"])
    synced = [call for call in disk.calls if call.startswith("fsync") and "#" not in call]
    assert synced == ["fsync a/b", "fsync a", "fsync .", "fsync a/b/c", "fsync a/b", "fsync a/b/d"]


def test_folders_that_another_process_made_may_not_be_synced_yet(root, disk):
    (root / "a/b").mkdir(parents=True)
    disk.calls.clear()
    Files(root).put("a/b/1", [b"1"])
    assert disk.calls[:2] == ["fsync a", "fsync ."]


def test_a_new_store_is_synced_into_the_directory_that_holds_it(tmp_path, monkeypatch):
    disk = Disk(tmp_path / "new" / "store", monkeypatch, tmp_path)
    Files(disk.root)
    assert [call for call in disk.calls if call.startswith("fsync")] == ["fsync ..", "fsync ../.."]


def test_without_durability_nothing_is_synced(root, disk):
    store = open_store(f"file://{root}?durable=false")
    assert store.url == f"file://{root}?durable=false"  # so workers do as the client
    asyncio.run(store.create("log/0", b"first"))
    asyncio.run(store.put("log/0", b"second"))
    assert not [call for call in disk.calls if call.startswith("fsync")]
    with pytest.raises(ConfigError, match="true or false"):
        open_store(f"file://{root}?durable=perhaps")


@pytest.mark.parametrize(("write", "before"), [("create", None), ("put", None), ("put", b"old")])
def test_a_crash_between_any_two_steps_leaves_no_object_or_the_whole_one(root, disk, write, before):
    whole = b"new" * 10_000
    steps = 0
    while True:
        key = f"f{steps}/sub/0"
        if before is not None:
            Files(root).put(key, [before])
        disk.calls.clear()
        disk.crash_at = steps
        try:
            getattr(Files(root), write)(key, [whole])
            break
        except Crash:
            disk.crash_at = None
        store = open_store(root)
        found = asyncio.run(store.get(key))
        assert found in (before, whole)
        assert asyncio.run(listed(store, f"f{steps}/")) == ([] if found is None else [key])
        # The next writer is not hindered, and a cleanup leaves nothing.
        assert asyncio.run(store.create(key, b"next")) == (found is None)
        asyncio.run(store.delete([key]))
        assert list(root.iterdir()) == []
        steps += 1
    assert steps >= 5


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_disk_that_is_full_is_told_and_nothing_is_left(root, disk, monkeypatch, call):
    works = getattr(os, call)

    def full(*args, **options):
        if "new#" in disk.calls[-1]:
            raise OSError(errno.ENOSPC, "No space left on device")
        return works(*args, **options)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(StoreFull, match="no space left"):
        asyncio.run(open_store(root).create("log/0", b"1"))
    assert list((root / "log").iterdir()) == []


def test_a_sync_that_fails_is_an_error(root, monkeypatch):
    def broken(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    store = open_store(root)
    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(StoreError, match=r"put log/0 failed: Input/output error \(os error 5\)"):
        asyncio.run(store.put("log/0", b"1"))


def test_folders_that_cannot_be_synced_need_not_be(root, monkeypatch):
    works = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        works(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    assert asyncio.run(open_store(root).create("log/0", b"1"))


def test_a_file_system_without_hard_links_is_refused(root, monkeypatch):
    def without(*args, **options):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", without)
    with pytest.raises(StoreUnsuitable, match="hard links"):
        asyncio.run(open_store(root).create("log/0", b"1"))


def test_a_link_whose_answer_was_lost_is_settled(root, monkeypatch):
    """A network file system sends the call again, and hears that the name is taken: by this very file."""
    works = os.link

    def twice(*args, **options):
        works(*args, **options)
        works(*args, **options)

    monkeypatch.setattr(os, "link", twice)
    assert Files(root).create("log/0", [b"1"])
    assert not Files(root).create("log/0", [b"2"])


def test_a_folder_that_is_tidied_away_meanwhile_is_made_again(root, monkeypatch):
    files, works = Files(root), os.open
    files.put("log/0", [b"1"])
    others = [lambda: Files(root).delete(["log/0"])] * 2

    def late(path, flags, *args, **options):
        if flags & os.O_CREAT and others:
            others.pop()()
        return works(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", late)
    assert files.create("log/1", [b"2"])
    assert sorted(path.name for path in (root / "log").iterdir()) == ["1"]

    others[:] = [lambda: (root / "log/1").unlink(missing_ok=True), *[lambda: Files(root).delete(["log/1"])] * 20]
    with pytest.raises(StoreUnavailable, match="removed each time"):
        files.put("log/2", [b"3"])


def test_a_folder_that_is_tidied_away_while_it_is_made_is_made_again(root, monkeypatch):
    files, works = Files(root), os.mkdir
    times = iter(["there", "gone"])

    def late(path, *args, **options):
        if next(times, None) == "there":
            raise FileExistsError(errno.EEXIST, "File exists")  # of another writer, and removed before it is looked at
        works(path, *args, **options)

    monkeypatch.setattr(os, "mkdir", late)
    files.put("log/0", [b"1"])
    assert (root / "log/0").read_bytes() == b"1"


def test_an_object_is_no_folder(root):
    store = open_store(root)
    asyncio.run(store.put("log", b"1"))
    with pytest.raises(StoreMissing, match="Not a directory"):
        asyncio.run(store.create("log/0", b"1"))


def test_what_dead_writers_left_is_hidden_and_goes_with_the_last_object(root):
    store = open_store(root)
    asyncio.run(store.put("log/00012/0", b"1"))
    (root / "log/00012" / LEFTOVER).write_bytes(b"half of an en")
    (root / "log/00012/1#1").write_bytes(b"obstore names them so")
    assert asyncio.run(listed(store)) == ["log/00012/0"]
    asyncio.run(store.delete(["log/00012/0", "absent/0"]))
    assert list(root.iterdir()) == []


def test_what_a_living_writer_has_not_finished_stays(root):
    files = Files(root)
    files.put("log/0", [b"1"])
    new = root / "log" / LEFTOVER
    program = "import fcntl, sys; f = open(sys.argv[1], 'wb'); fcntl.flock(f, fcntl.LOCK_EX); print(); input()"
    writer = subprocess.Popen([sys.executable, "-c", program, new], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        writer.stdout.readline()
        files.delete(["log/0"])
        assert new.exists()
    finally:
        writer.kill()
        writer.wait()
        writer.stdin.close()
        writer.stdout.close()
    files.delete(["log/0"])
    assert not (root / "log").exists()


def test_without_locks_objects_are_written_all_the_same(root, monkeypatch):
    def without(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without)
    files = Files(root)
    files.put("log/0", [b"1"])
    (root / "log" / LEFTOVER).touch()
    files.delete(["log/0"])
    assert [path.name for path in (root / "log").iterdir()] == [LEFTOVER]  # its writer may live


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "a/../b", "./a", "a\0b", "a\nb", "log/0#1"])
@in_loop
async def test_keys_that_are_no_names_of_files_are_refused(root, key):
    store = open_store(root)
    for call in (store.create(key, b"1"), store.put(key, b"1"), store.delete([key])):
        with pytest.raises(ConfigError, match="name of a file"):
            await call


async def test_writes_that_wait_for_the_disk_keep_no_thread_from_others(root, monkeypatch):
    """They have threads of their own: asyncio's are few, and a session's fleet and keys need them, too."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    syncs, gate = os.fsync, threading.Event()

    def slow(descriptor):
        if not gate.wait(10):
            raise OSError(errno.EIO, "nobody could open the gate")
        syncs(descriptor)

    store = open_store(f"file://{root}")
    monkeypatch.setattr(os, "fsync", slow)
    writes = [asyncio.create_task(store.put(f"log/{number}", b"x")) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.to_thread(gate.set)
    await asyncio.gather(*writes)
    assert await store.get("log/1") == b"x"
