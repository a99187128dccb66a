"""Code in archives, versions in tables, packages by pip: the parts of `burst_dask.environment`."""

from __future__ import annotations

import asyncio
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from burst_dask.clock import SystemClock
from burst_dask.environment import archive, installing, preparing, versions
from burst_dask.environment.packing import check_requirements, pack
from burst_dask.errors import ConfigError, CorruptObject, EnvironmentFailed, StoreUnavailable
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Differences, Environment, Manifest, Versions, decode, encode
from burst_dask.store import open_store

SESSION = SessionId("sess1")


def write(root: Path, **files: str) -> Path:
    """Write files, named with ``__`` for slashes and without their ``.py``."""
    for name, text in files.items():
        path = root / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def package(root: Path, name: str = "mypkg") -> Path:
    (root / name / "sub").mkdir(parents=True)
    (root / name / "__init__.py").write_text("from mypkg.sub import other")
    (root / name / "sub" / "other.py").write_text("X = 1")
    (root / name / "table.csv").write_text("1,2")
    return root / name


def wheel(folder: Path, name: str, version: str = "1.0", text: str = "VALUE = 7\n", needs: Sequence[str] = ()) -> Path:
    """Write a wheel of one module."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    requires = "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{name}.py", text)
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


# ---------------------------------------------------------------------------- code


def test_what_is_sent_of_a_package(tmp_path):
    mypkg = package(tmp_path)
    for junk in ("__pycache__/x.pyc", ".git/config", "sub/.mypy_cache/y", "CVS/Root", "sub/old.pyc"):
        (mypkg / junk).parent.mkdir(exist_ok=True)
        (mypkg / junk).write_text("junk")
    (tmp_path / "helpers.py").write_text("Y = 2")
    found = archive.read_code([mypkg, str(tmp_path / "helpers.py")])
    assert {name: data.decode() for name, data in found.items()} == {
        "mypkg/__init__.py": "from mypkg.sub import other",
        "mypkg/sub/other.py": "X = 1",
        "mypkg/table.csv": "1,2",
        "helpers.py": "Y = 2",
    }


def test_links_are_followed_and_circles_end(tmp_path):
    mypkg = package(tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "more.py").write_text("Z = 3")
    (mypkg / "linked").symlink_to(elsewhere)
    (mypkg / "sub" / "up").symlink_to(mypkg)
    (tmp_path / "othername").symlink_to(mypkg)
    names = set(archive.read_code([tmp_path / "othername"]))
    assert names == {
        "othername/__init__.py",
        "othername/sub/other.py",
        "othername/table.csv",
        "othername/linked/more.py",
    }


def test_paths_that_cannot_be_imported_are_refused(tmp_path):
    mypkg = package(tmp_path / "src")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "my-script.py").write_text("")
    package(tmp_path / "other")
    for path, message in [
        (tmp_path / "none", "there is no"),
        (tmp_path / "notes.txt", "cannot be imported"),
        (tmp_path / "my-script.py", "cannot be imported"),
        (tmp_path / "src", r"is no package, it holds no module; did you mean '.*src/mypkg'\?"),
    ]:
        with pytest.raises(ConfigError, match=message):
            archive.read_code([path])
    with pytest.raises(ConfigError, match="have the same name"):
        archive.read_code([mypkg, tmp_path / "other" / "mypkg"])
    with pytest.raises(ConfigError, match=r"code='src/mypkg': must be a list, as in code=\['src/mypkg'\]"):
        pack("src/mypkg")


def test_data_is_not_code(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "CODE_BYTES", 100)
    mypkg = package(tmp_path)
    (mypkg / "big.bin").write_bytes(bytes(99))
    with pytest.raises(ConfigError, match=r"mypkg/big.bin has 99; at most 100 are sent. Put data"):
        archive.read_code([mypkg])


_names = st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), min_size=1, max_size=3).map(
    lambda parts: "/".join(["top", *parts, "file.py"])
)


@settings(deadline=None)
@given(st.dictionaries(_names, st.binary(max_size=50), max_size=8), st.randoms())
def test_any_files_come_back_and_have_one_digest(tmp_path_factory, files, chance):
    data = archive.pack(files)
    shuffled = list(files.items())
    chance.shuffle(shuffled)
    assert archive.pack(dict(shuffled)) == data
    folder = tmp_path_factory.mktemp("unpacked")
    archive.unpack("code", data, archive.digest(data), folder)
    assert {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == files


def test_the_digest_is_of_the_content_not_of_dates_or_places(tmp_path):
    one, two = package(tmp_path / "a"), package(tmp_path / "b" / "c")
    os.utime(one / "__init__.py", (0, 0))
    first, second = (archive.digest(archive.pack(archive.read_code([path]))) for path in (one, two))
    assert first == second
    (two / "table.csv").write_text("1,3")
    assert archive.digest(archive.pack(archive.read_code([two]))) != first


@pytest.mark.parametrize("name", ["../evil.py", "/evil.py", "a/../../evil.py", "c:evil.py", "a\\..\\..\\evil.py"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    data = archive.pack({"good.py": b"", name: b"evil"})
    inside = tmp_path / "inside"
    with pytest.raises(CorruptObject, match="would not be a file inside of the folder"):
        archive.unpack("code", data, archive.digest(data), inside)
    assert not list(tmp_path.rglob("*.py"))


def test_an_archive_holds_no_links(tmp_path):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        info = zipfile.ZipInfo("link")
        info.external_attr = 0o120777 << 16
        zipped.writestr(info, "/etc")
    data = file.getvalue()
    with pytest.raises(CorruptObject, match="'link' would not be a file"):
        archive.unpack("code", data, archive.digest(data), tmp_path)


def test_altered_code_is_refused(tmp_path):
    data = archive.pack({"a.py": b"1"})
    with pytest.raises(CorruptObject, match="not those that were uploaded"):
        archive.unpack("code", data[:-1], archive.digest(data), tmp_path)
    with pytest.raises(CorruptObject, match="not a zip"):
        archive.unpack("code", b"junk", archive.digest(b"junk"), tmp_path)


def fetch(store, digest, folder):
    return asyncio.run(preparing.fetch_code(store, SESSION, digest, folder))


def put_code(store, files):
    data = archive.pack(files)
    asyncio.run(store.put(keys.code(SESSION, archive.digest(data)), data))
    return archive.digest(data)


def test_code_is_fetched_once_for_a_machine(tmp_path):
    store = open_store(tmp_path / "store")
    digest = put_code(store, {"mypkg/__init__.py": b"X = 1"})
    folder = fetch(store, digest, tmp_path / "cache")
    assert (folder / "mypkg" / "__init__.py").read_text() == "X = 1"
    asyncio.run(store.delete([keys.code(SESSION, digest)]))
    assert fetch(store, digest, tmp_path / "cache") == folder  # without the store
    assert [path.name for path in folder.parent.iterdir()] == [digest]  # nothing half done is left


def test_workers_that_fetch_at_once_agree(tmp_path):
    store = open_store(tmp_path / "store")
    digest = put_code(store, {f"mypkg/m{n}.py": b"X = 1" for n in range(50)})

    async def race():
        return await asyncio.gather(
            *(preparing.fetch_code(store, SESSION, digest, tmp_path / "cache") for _ in range(8))
        )

    assert set(asyncio.run(race())) == {tmp_path / "cache" / digest}
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [digest]
    assert len(list((tmp_path / "cache" / digest / "mypkg").iterdir())) == 50


def test_code_that_is_damaged_or_gone_is_told_and_leaves_nothing(tmp_path):
    store = open_store(tmp_path / "store")
    digest = put_code(store, {"a.py": b"1"})
    asyncio.run(store.put(keys.code(SESSION, digest), b"junk"))
    with pytest.raises(EnvironmentFailed, match=r"its 4 bytes are not those that were uploaded\. Nothing was claimed"):
        fetch(store, digest, tmp_path / "cache")
    asyncio.run(store.delete([keys.code(SESSION, digest)]))
    with pytest.raises(EnvironmentFailed, match="the session was cleaned up"):
        fetch(store, digest, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_cache_that_cannot_be_written_is_told_a_store_that_is_away_is_not(tmp_path):
    store = open_store(tmp_path / "store")
    digest = put_code(store, {"a.py": b"1"})
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFailed, match=r"below .*/file: .*Set XDG_CACHE_HOME"):
        asyncio.run(preparing.prepare(store, SESSION, Environment(code=digest), SystemClock(), tmp_path / "file"))

    class Away:
        async def get(self, key):
            raise StoreUnavailable("no network")

    with pytest.raises(StoreUnavailable):  # which may pass: the supervisor tries again
        asyncio.run(preparing.prepare(Away(), SESSION, Environment(code=digest), SystemClock(), tmp_path / "cache"))


def test_the_path_of_a_process_and_of_what_it_starts(tmp_path):
    """The session's code comes before packages, and both before what is installed."""
    write(tmp_path / "code", colorsys="WHO = 'code'")
    write(tmp_path / "packages", colorsys="WHO = 'packages'", tinypkg="WHO = 'packages'")
    script = f"""
import subprocess, sys
from pathlib import Path
from burst_dask.environment.preparing import Prepared, use
use(Prepared(Path({str(tmp_path / "code")!r}), Path({str(tmp_path / "packages")!r})))
import colorsys, tinypkg
child = "import colorsys, tinypkg; print(colorsys.WHO, tinypkg.WHO)"
print(colorsys.WHO, tinypkg.WHO, subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["code", "packages"] * 2


# ---------------------------------------------------------------------------- versions


def test_a_manifest_says_what_was_installed():
    environment = versions.own_environment()
    import dask
    import numpy

    assert environment.packages["dask"] == dask.__version__ and environment.packages["numpy"] == numpy.__version__
    assert environment.packages["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"dask", "burst-dask"} <= set(environment.imported) <= set(environment.packages)
    assert versions.own_environment().packages == environment.packages


def test_a_manifest_stays_small_and_older_ones_are_read():
    old = Manifest(
        session=SESSION, name=None, created=0.0, host="h", versions=Versions("3.11", "2025.1", "0.1"), settings={}
    )
    assert decode(Manifest, "m", encode(old)).environment == Environment()
    new = Manifest(
        session=SESSION,
        name=None,
        created=0.0,
        host="h",
        versions=Versions("3.11", "2025.1", "0.1"),
        settings={},
        environment=Environment({f"package-{n}": f"{n}.2.3" for n in range(300)}, ("package-1",), "d" * 64, ("a",)),
    )
    data = encode(new)
    assert decode(Manifest, "m", data) == new and len(data) < 5000


def test_distributions_are_read_in_the_order_of_imports(tmp_path):
    for name in (
        "first/My_Thing-1.0.dist-info",
        "second/my.thing-2.0.dist-info",
        "second/debian_one-0.3.1-py3.11.egg-info",
        "second/~umpy-1.0.dist-info",
        "second/developed.egg-info",
        "second/my_thing/data-1.0.dist-info",
    ):
        (tmp_path / name).mkdir(parents=True)
    found = versions.installed_in([tmp_path / "first", tmp_path / "absent", tmp_path / "second"])
    assert found == {"debian-one": "0.3.1", "my-thing": "1.0"}


def test_names_of_directories_tell_what_the_metadata_tell():
    import importlib.metadata

    from packaging.utils import canonicalize_name

    told = {}
    for distribution in importlib.metadata.distributions():
        told.setdefault(canonicalize_name(distribution.metadata["Name"]), distribution.version)
    found = versions.installed_in(sys.path)
    assert found.items() <= told.items() and {"dask", "msgspec", "numpy"} <= set(found)


def test_what_counts_as_a_difference():
    client = Environment(
        {"python": "3.11.4", "numpy": "2.0", "pandas": "2.2", "pytest": "8", "shapely": "2.1"}, ("pandas", "shapely")
    )
    worker = {"python": "3.11.9", "numpy": "2.0", "pandas": "2.1", "boto3": "1"}
    found = versions.compare(client, worker)
    assert [tuple(getattr(row, name) for name in ("package", "client", "worker")) for row in found] == [
        ("pandas", "2.2", "2.1"),
        ("python", "3.11.4", "3.11.9"),
        ("shapely", "2.1", "not installed"),
    ]
    assert versions.compare(client, client.packages) == ()


def test_differences_are_recorded_once_for_all_workers_that_have_them(tmp_path, caplog):
    store = open_store(tmp_path / "store")
    client = Environment({**versions.installed(), "numpy": "0.1", "dask": versions.installed()["dask"]}, ("numpy",))

    async def tell():
        for worker in ("w1", "w2"):
            await preparing.tell_differences(store, SESSION, client, preparing.NOTHING, WorkerId(worker), "host1")
        same = Environment(dict(versions.installed()))
        await preparing.tell_differences(store, SESSION, same, preparing.NOTHING, WorkerId("w3"), "host1")
        found = [meta.key async for page in store.list(keys.differences(SESSION)) for meta in page]
        return [decode(Differences, key, await store.get(key)) for key in found]

    (told,) = asyncio.run(tell())
    assert (told.worker, told.host) == ("w1", "host1")
    assert [(row.package, row.client) for row in told.packages] == [("numpy", "0.1")]
    assert "numpy    0.1     " in caplog.text


# ---------------------------------------------------------------------------- packages


def test_requirements_are_checked_when_the_session_is_opened():
    given = ["B>=1", "a [x] ; python_version > '3'", "mine @ file:///w/mine-1.0-py3-none-any.whl", "B >=1"]
    assert check_requirements(given) == (
        "B>=1",
        'a[x]; python_version > "3"',
        "mine @ file:///w/mine-1.0-py3-none-any.whl",
    )
    for wrong in ("--index-url=https://x", "-r req.txt", "./mine.whl", "", "a b", None):
        with pytest.raises(ConfigError, match=r"packages: .* is no requirement such as 'rasterio'"):
            check_requirements([wrong])
    with pytest.raises(ConfigError, match=r"packages='rasterio': must be a list"):
        check_requirements("rasterio")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip finds only what lies in the directory that is returned."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    (tmp_path / "wheels").mkdir()
    return tmp_path / "wheels"


def install(requirements, folder):
    return asyncio.run(installing.install(requirements, folder, SystemClock()))


def test_only_what_is_missing_is_installed_and_once(offline, tmp_path, monkeypatch):
    wheel(offline, "tinydep")
    wheel(offline, "tinypkg", needs=["tinydep", "msgspec"])  # msgspec is there, and lies in no index
    ready = install(["tinypkg>=1"], tmp_path / "cache")
    assert {path.name for path in ready.glob("*.py")} == {"tinydep.py", "tinypkg.py"}
    assert not list(ready.glob("msgspec*")) and not (ready / "report.json").exists()
    monkeypatch.setattr(sys, "executable", "/nonexistent")  # so nothing is started
    assert install(["tinypkg>=1"], tmp_path / "cache") == ready


def test_a_file_is_installed_by_its_address(offline, tmp_path):
    path = wheel(tmp_path / "elsewhere", "tinypkg")
    ready = install([f"tinypkg @ {path.as_uri()}"], tmp_path / "cache")
    assert (ready / "tinypkg.py").read_text() == "VALUE = 7\n"


def test_what_is_there_already_needs_nothing(offline, tmp_path):
    assert list(install(["msgspec"], tmp_path / "cache").iterdir()) == []


def test_a_failure_tells_what_pip_said_and_leaves_nothing_half_done(offline, tmp_path):
    with pytest.raises(EnvironmentFailed) as caught:
        install(["there-is-none"], tmp_path / "cache")
    told = str(caught.value)
    assert told.startswith(
        "this worker could not install there-is-none, which packages=[…] asks for. Nothing was claimed"
    )
    assert told.endswith("ERROR: No matching distribution found for there-is-none")
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".failed", ".used"}
    wheel(offline, "there_is_none")
    assert (install(["there-is-none"], tmp_path / "cache") / "there_is_none.py").exists()  # a new try is a new try
    assert not list((tmp_path / "cache").glob("*.failed"))


def counting_pip(monkeypatch, tmp_path, body="exec(compile('pass', '', 'exec'))"):
    """Have a stand-in for the interpreter that notes each start."""
    fake = tmp_path / "python"
    fake.write_text(f"#!{sys.executable}\nimport os, sys\n{body}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    return fake


def test_workers_of_a_machine_install_one_after_another(offline, tmp_path, monkeypatch):
    """Of several that want the same, one asks pip, and the others take what it has installed, or why it could not."""
    starts = tmp_path / "starts"
    starts.mkdir()
    real = sys.executable
    note = f"open(os.path.join({str(starts)!r}, str(os.getpid())), 'w').close()"
    counting_pip(monkeypatch, tmp_path, f"{note}\nos.execv({real!r}, [{real!r}, *sys.argv[1:]])")

    async def several(requirement):
        jobs = [installing.install([requirement], tmp_path / "cache", SystemClock()) for _ in range(4)]
        return await asyncio.gather(*jobs, return_exceptions=True)

    wheel(offline, "tinypkg")
    (ready,) = set(asyncio.run(several("tinypkg")))
    assert (ready / "tinypkg.py").exists() and len(list(starts.iterdir())) == 2  # what is missing, and that
    failures = asyncio.run(several("there-is-none"))
    assert all(isinstance(failure, EnvironmentFailed) for failure in failures)
    assert len({str(failure) for failure in failures}) == 1 and len(list(starts.iterdir())) == 3


def test_a_worker_that_is_stopped_ends_pip(tmp_path, monkeypatch):
    up = tmp_path / "up"
    counting_pip(
        monkeypatch, tmp_path, f"import signal\nopen({str(up)!r}, 'w').write(str(os.getpid()))\nsignal.pause()"
    )

    async def main():
        job = asyncio.ensure_future(installing.install(["x"], tmp_path / "cache", SystemClock()))
        while not up.exists() or not up.read_text():
            await asyncio.sleep(0.01)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job

    asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(int(up.read_text()), 0)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {".lock", ".used"}


def test_a_pip_that_hangs_is_given_up(tmp_path, monkeypatch):
    counting_pip(monkeypatch, tmp_path, "import signal\nsignal.pause()")
    monkeypatch.setattr(installing, "PIP_TIMEOUT", 0.2)
    with pytest.raises(EnvironmentFailed, match=r"pip had not ended after 0.2 s, and was killed$"):
        install(["x"], tmp_path / "cache")


def test_what_a_killed_worker_left_is_cleared_away(offline, tmp_path):
    ready = install(["msgspec"], tmp_path / "cache")
    ready.rename(ready.with_name(f"{ready.name}.new-killed"))
    assert install(["msgspec"], tmp_path / "cache") == ready
    assert not list((tmp_path / "cache").glob("*.new-*"))


def test_an_interpreter_without_pip_says_so(tmp_path, monkeypatch):
    counting_pip(monkeypatch, tmp_path, "sys.exit(sys.argv[0] + ': No module named pip')")
    with pytest.raises(EnvironmentFailed, match="No module named pip"):
        install(["x"], tmp_path / "cache")


def test_a_directory_is_of_one_set_of_packages_one_interpreter_and_one_environment():
    base = (["a", "b"], {"numpy": "2.0"}, "cpython-311-linux-x86_64")
    digests = {
        installing.install_digest(*base),
        installing.install_digest(["a"], *base[1:]),
        installing.install_digest(base[0], {"numpy": "1.26"}, base[2]),
        installing.install_digest(*base[:2], "cpython-312-linux-x86_64"),
    }
    assert len(digests) == 4 and installing.install_digest(["b", "a"], *base[1:]) == installing.install_digest(*base)


def test_a_report_with_a_folder_of_a_repository():
    source = {"url": "https://h/r.git", "vcs_info": {"vcs": "git", "commit_id": "c0"}, "subdirectory": "py"}
    report = {"install": [{"metadata": {"name": "a", "version": "1"}, "is_direct": True, "download_info": source}]}
    assert installing.missing(json.loads(json.dumps(report))) == ["a @ git+https://h/r.git@c0#subdirectory=py"]
