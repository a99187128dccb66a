"""Where keys of signed sessions are kept: files of this user, or AWS Secrets Manager. Never in a store.

A *reference* says where a key is, and is no secret: ``"file"`` is the file of that session in this user's folder of
keys, a path is that file, and ``"secretsmanager:<region>:<name>"`` is a secret of AWS. Manifests, command lines and
environments hold references.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

import platformdirs

from burst_dask.aws import secrets
from burst_dask.aws.clients import Clients
from burst_dask.clock import Entropy
from burst_dask.errors import AccessDenied, ConfigError, KeyMissing
from burst_dask.protocol.keys import SessionId, is_id
from burst_dask.store import Key
from burst_dask.store.files import sync, sync_folder

#: Names another folder of keys: an address, and no secret.
FOLDER_VARIABLE = "BURST_KEYS"
#: The reference of a key in the file of its session.
FILE = "file"
#: What a key file begins with; the key follows in hexadecimal digits.
_HEAD = "burst-session-key-1 "
_TRUSTED_RIGHTS = stat.S_IRWXG | stat.S_IRWXO


def folder() -> Path:
    """Return where this user's keys are: where platformdirs puts user data, unless ``BURST_KEYS`` says otherwise."""
    given = os.environ.get(FOLDER_VARIABLE)
    return Path(given).expanduser() if given else platformdirs.user_data_path("burst_dask") / "keys"


def is_reference(text: str) -> bool:
    """Tell whether `text` may say where a key is.

    >>> [is_reference(one) for one in ("file", "/mnt/key", "secretsmanager:eu-west-1:burst-dask/session/k3", "c2Vjcm")]
    [True, True, True, False]
    """
    return text == FILE or text.startswith(secrets.SCHEME) or os.sep in text


class Keyring:
    """The keys that this user has, or may read.

    Parameters
    ----------
    folder
        Of the files; by default `folder`.
    clients
        Makes clients of AWS for a region.

    Examples
    --------
    >>> import tempfile
    >>> ring = Keyring(Path(tempfile.mkdtemp()))
    >>> key = ring.make(SessionId("k3w9x2mq"), "file", Entropy())
    >>> ring.read(SessionId("k3w9x2mq"), "file") == key
    True
    >>> ring.forget(SessionId("k3w9x2mq"), "file")
    >>> ring.read(SessionId("k3w9x2mq"), "file")
    Traceback (most recent call last):
    ...
    burst_dask.errors.KeyMissing: session k3w9x2mq is signed, and its key is not here: there is no ...
    """

    def __init__(self, folder: Path | None = None, clients: Callable[[str], Clients] = Clients.of) -> None:
        self._folder = folder
        self._clients = clients
        self._made: dict[str, Clients] = {}
        #: by reference: of secrets that were read
        self._read: dict[str, Key] = {}

    def path(self, session: SessionId) -> Path:
        """Return the file of a session's key."""
        return (self._folder or folder()) / session

    def make(self, session: SessionId, reference: str, entropy: Entropy) -> Key:
        """Make the key of a new session, and keep it where `reference` says.

        Raises
        ------
        ConfigError, CloudError
            It cannot be kept there.
        """
        key = Key(entropy.secret())
        if place := secrets.place_of(reference, session):
            region, name = place
            secrets.create(self._of(region), name, key.secret)
            # So that on this machine nobody passes the session off as one that is not signed, or signed by another key.
            with contextlib.suppress(OSError):
                _write(self.path(session), reference)
            return key
        path = self._path(session, reference)
        try:
            _write(path, _HEAD + key.secret.hex())
        except OSError as error:
            raise ConfigError(
                f"the key of a signed session cannot be kept in {path.parent}: {error}. Nothing was started. "
                f"{FOLDER_VARIABLE} names another folder"
            ) from None
        return key

    def known(self, session: SessionId) -> str:
        """Return where this machine knows the key of a session to be, whatever its store says; empty if it does not."""
        if not is_id(session):
            return ""
        path = self.path(session)
        if not os.path.lexists(path):
            return ""
        try:
            said = path.read_text()
        except (OSError, UnicodeDecodeError):  # it cannot be used, and still tells that the session is signed
            return FILE
        return said.strip() if said.startswith(secrets.SCHEME) else FILE

    def read(self, session: SessionId, reference: str) -> Key:
        """Return the key of a session.

        Raises
        ------
        KeyMissing
            It is not there, or may not be read.
        CloudError
            AWS does not answer, or the credentials have expired.
        """
        try:
            if reference.startswith(secrets.SCHEME):
                return self._secret(session, reference)
            return self._file(session, self._path(session, reference))
        except KeyMissing as error:
            error.reference = reference
            raise

    def forget(self, session: SessionId, reference: str) -> None:
        """Delete the key of a session; one that is not there is no error.

        Raises
        ------
        CloudError
            AWS refuses, or does not answer.
        """
        if place := secrets.place_of(reference, session):
            region, name = place
            secrets.delete(self._of(region), name)
        with contextlib.suppress(OSError):
            self.path(session).unlink(missing_ok=True)

    def _path(self, session: SessionId, reference: str) -> Path:
        return self.path(session) if reference == FILE else Path(reference).expanduser()

    def _of(self, region: str) -> Clients:
        if region not in self._made:
            self._made[region] = self._clients(region)
        return self._made[region]

    def _secret(self, session: SessionId, reference: str) -> Key:
        place = secrets.place_of(reference, session)
        if place is None:
            raise KeyMissing(f"{_SIGNED.format(session)}: {reference!r} is no place for it. {_UNREAD}")
        if reference in self._read:
            return self._read[reference]
        region, name = place
        try:
            found = secrets.read(self._of(region), name)
        except (AccessDenied, ConfigError) as error:  # the latter where boto3 is not installed
            raise KeyMissing(f"{_SIGNED.format(session)}, nor may it be read: {error}") from error
        if found is None:
            raise KeyMissing(
                f"{_SIGNED.format(session)}: there is no secret {name} in {region}, in the account of these "
                f"credentials; a cleanup has deleted it, or the session is another account's. {_UNREAD}"
            )
        self._read[reference] = _key(session, found, f"the secret {name}")
        return self._read[reference]

    def _file(self, session: SessionId, path: Path) -> Key:
        try:
            rights, text = path.stat().st_mode, path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            why = f"there is no {path}" if isinstance(error, FileNotFoundError) else f"{path}: {error}"
            raise KeyMissing(
                f"{_SIGNED.format(session)}: {why}. Copy that file from the machine that opened the session, for "
                f"yourself only (chmod 600); {FOLDER_VARIABLE} names another folder. {_UNREAD}"
            ) from None
        if rights & _TRUSTED_RIGHTS:
            raise KeyMissing(f"the key in {path} may be read by others: chmod 600 {path}. {_UNREAD}")
        if not text.startswith(_HEAD):
            raise KeyMissing(f"{path} is not the key of a session. {_UNREAD}")
        try:
            return _key(session, bytes.fromhex(text.removeprefix(_HEAD)), str(path))
        except ValueError:
            raise KeyMissing(f"{path} is damaged: copy it once more. {_UNREAD}") from None


_SIGNED = "session {} is signed, and its key is not here"
_UNREAD = "Nothing of the session was read"


def _key(session: SessionId, secret: bytes, where: str) -> Key:
    try:
        return Key(secret)
    except ValueError as error:
        raise KeyMissing(f"{where} is not the key of session {session}: {error}. {_UNREAD}") from None


def write_key(path: Path, key: Key) -> None:
    """Write a key file, for this user only; replaces what is there."""
    path.unlink(missing_ok=True)
    _write(path, _HEAD + key.secret.hex())


def _write(path: Path, text: str) -> None:
    """Write a new file that nobody else reads, in a folder that nobody else enters.

    It is on the disk before anything is signed: without it, what has survived a power loss in the store is lost.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text + "\n")
        file.flush()
        sync(file.fileno())
    sync_folder(path.parent)
