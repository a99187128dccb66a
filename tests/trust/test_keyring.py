"""Keys of signed sessions in files that nobody else reads; what is said when one is not here. tests/aws has secrets."""

from __future__ import annotations

import os

import pytest

from burst_dask.aws import secrets
from burst_dask.clock import Entropy
from burst_dask.errors import ConfigError, KeyMissing
from burst_dask.store import Key, files
from burst_dask.trust import keyring
from burst_dask.trust.keyring import FILE, Keyring, folder, is_reference, write_key

SESSION = "k3w9x2mq"
SECRET = secrets.reference("us-east-1", secrets.secret_name("burst-dask", SESSION))


@pytest.fixture
def ring(tmp_path):
    return Keyring(tmp_path / "keys")


def test_a_key_is_a_file_of_this_user_alone(ring, tmp_path):
    key = ring.make(SESSION, FILE, Entropy())
    file = tmp_path / "keys" / SESSION
    assert ring.read(SESSION, FILE) == ring.read(SESSION, str(file)) == key
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert ring.known(SESSION) == FILE
    ring.forget(SESSION, FILE)
    assert not file.exists() and ring.known(SESSION) == ""
    ring.forget(SESSION, FILE)


@pytest.mark.parametrize("content", [b"\xff\xfe", None])
def test_a_key_that_cannot_be_read_still_tells_that_its_session_is_signed(ring, tmp_path, content):
    """Else who replaces the session by one that is not signed would be believed."""
    file = tmp_path / "keys" / SESSION
    file.parent.mkdir()
    if content is None:
        file.mkdir()  # no rights keep the super-user, who may run this, from reading
    else:
        file.write_bytes(content)
    assert ring.known(SESSION) == FILE
    with pytest.raises(KeyMissing):
        ring.read(SESSION, FILE)


def test_a_key_is_on_the_disk_before_anything_is_signed_with_it(ring, tmp_path, monkeypatch):
    synced = []

    def recorded(descriptor):
        found = os.fstat(descriptor)
        synced.append((found.st_ino, found.st_size))

    monkeypatch.setattr(files, "sync", recorded)
    monkeypatch.setattr(keyring, "sync", recorded)
    ring.make(SESSION, FILE, Entropy())
    whole = [(tmp_path / "keys" / name).stat() for name in (SESSION, "")]
    assert synced == [(found.st_ino, found.st_size) for found in whole]


def test_every_session_has_a_key_of_its_own(ring):
    assert len({ring.make(f"session{number}", FILE, Entropy()).secret for number in range(20)}) == 20


def test_the_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.delenv("BURST_KEYS", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert folder() == tmp_path / "data" / "burst_dask" / "keys"
    monkeypatch.setenv("BURST_KEYS", str(tmp_path / "mine"))
    Keyring().make(SESSION, FILE, Entropy())
    assert (tmp_path / "mine" / SESSION).exists()


def test_a_missing_key_is_told_with_what_helps(ring, tmp_path):
    with pytest.raises(KeyMissing) as told:
        ring.read(SESSION, FILE)
    assert str(told.value) == (
        f"session {SESSION} is signed, and its key is not here: there is no {tmp_path}/keys/{SESSION}. Copy that file "
        "from the machine that opened the session, for yourself only (chmod 600); BURST_KEYS names another folder. "
        "Nothing of the session was read"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not the key of a session"),
        ("burst-session-key-1 zz", "is damaged"),
        ("burst-session-key-1 00ff", "32 bytes, not 2"),
        (SECRET, "is not the key of a session"),
    ],
)
def test_a_file_that_is_no_key(ring, tmp_path, text, words):
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / SESSION).write_text(text)
    (tmp_path / "keys" / SESSION).chmod(0o600)
    with pytest.raises(KeyMissing, match=words):
        ring.read(SESSION, FILE)


def test_a_file_that_others_may_read_is_refused(ring, tmp_path):
    ring.make(SESSION, FILE, Entropy())
    (tmp_path / "keys" / SESSION).chmod(0o640)
    with pytest.raises(KeyMissing, match=f"may be read by others: chmod 600 {tmp_path}/keys/{SESSION}"):
        ring.read(SESSION, FILE)


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(tmp_path):
    (tmp_path / "keys").write_text("a file")
    with pytest.raises(ConfigError, match=r"cannot be kept in .*keys: .*Nothing was started. BURST_KEYS names another"):
        Keyring(tmp_path / "keys").make(SESSION, FILE, Entropy())


def test_a_key_file_is_written_anew_for_this_user_alone(tmp_path):
    for key in (Key(bytes(32)), Key(bytes(range(32)))):
        write_key(tmp_path / "beside" / "key", key)
        assert Keyring(tmp_path).read(SESSION, str(tmp_path / "beside" / "key")) == key
    assert (tmp_path / "beside" / "key").stat().st_mode & 0o777 == 0o600


def test_a_reference_is_an_address_and_no_key():
    assert all(map(is_reference, (FILE, "/run/key", "./key", SECRET)))
    assert not any(map(is_reference, ("", "00" * 32, "burst-session-key-1 " + "00" * 32)))


def test_no_other_sessions_secret_and_no_arn_is_a_place():
    for name in (
        "burst-dask/session/another",
        "burst-dask/other/" + SESSION,
        "arn:aws:secretsmanager:x:1:secret:y",
        "",
    ):
        assert secrets.place_of(secrets.reference("us-east-1", name), SESSION) is None
        with pytest.raises(KeyMissing, match="is no place for it"):
            Keyring().read(SESSION, secrets.reference("us-east-1", name))
