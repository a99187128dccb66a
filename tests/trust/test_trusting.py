"""What is believed of a session before anything else of it is read, and what that costs."""

from __future__ import annotations

import pytest

from burst_dask.clock import Entropy
from burst_dask.environment.versions import own_versions
from burst_dask.errors import KeyMissing, UntrustedObject
from burst_dask.protocol import keys
from burst_dask.protocol.keys import SessionId, WorkerId
from burst_dask.protocol.records import Manifest, encode
from burst_dask.protocol.session_records import Open, SessionEntry
from burst_dask.store import Signed, Store, open_store, requests_of
from burst_dask.trust.keyring import FILE, Keyring
from burst_dask.trust.trusting import digest, trusted

SESSION = SessionId("k3w9x2mq")


def manifest_of(session: str, key: str = "") -> Manifest:
    return Manifest(
        session=SessionId(session), name=None, created=0.0, host="h", versions=own_versions(), settings={}, key=key
    )


@pytest.fixture
def ring(tmp_path) -> Keyring:
    return Keyring(tmp_path / "keys")


@pytest.fixture
def plain(tmp_path) -> Store:
    return open_store(f"memory://{tmp_path.name}")


async def opened(plain: Store, ring: Keyring) -> Store:
    store = Signed(plain, {SESSION: ring.make(SESSION, FILE, Entropy())})
    manifest = encode(manifest_of(SESSION, FILE))
    action = Open(digest(manifest))
    entry = SessionEntry(number=0, writer=WorkerId("w"), nonce="n", wrote=0.0, action=action)
    await store.create(keys.entry(keys.session_log(SESSION), 0), encode(entry))
    await store.create(keys.manifest(SESSION), manifest)
    return store


async def test_a_signed_session_costs_one_read_more_than_another(plain, ring):
    await opened(plain, ring)
    before = requests_of(plain)["get"]
    found = await trusted(plain, SESSION, ring=ring)
    assert found is not None and not found.swept
    assert requests_of(plain)["get"] - before == 2, "the manifest, and the entry that vouches for it"
    await plain.put(keys.manifest(SessionId("another")), encode(manifest_of("another")))
    before = requests_of(plain)["get"]
    assert (await trusted(plain, SessionId("another"), ring=ring)).store is plain
    assert requests_of(plain)["get"] - before == 1


async def test_without_key_and_log_a_session_is_what_a_cleanup_has_left(plain, ring, tmp_path):
    await opened(plain, ring)
    elsewhere = Keyring(tmp_path / "another machine")
    with pytest.raises(KeyMissing):
        await trusted(plain, SESSION, ring=elsewhere)
    await plain.delete([keys.entry(keys.session_log(SESSION), 0)])
    for one in (ring, elsewhere):
        found = await trusted(plain, SESSION, ring=one)
        assert found is not None and found.swept


@pytest.mark.parametrize("key", ["", FILE])
async def test_the_manifest_of_another_session_is_not_this_ones(plain, ring, key):
    """A cleanup of this session would delete that one, which it names."""
    await plain.put(keys.manifest(SESSION), encode(manifest_of("another", key)))
    with pytest.raises(UntrustedObject, match=f"is not the manifest of session {SESSION} but that of another"):
        await trusted(plain, SESSION, ring=ring)
