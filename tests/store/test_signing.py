"""Signed objects: whatever was done to one it is refused, and what was not touched reads as if it were not signed."""

import asyncio

import pytest
from contract import StoreContract, in_loop, listed
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import bucket_url

from burst_dask.clock import Entropy
from burst_dask.errors import CorruptObject, UntrustedObject
from burst_dask.protocol import frames, keys
from burst_dask.protocol.keys import SessionId
from burst_dask.store import Key, Signed, Span, open_store, requests_of
from burst_dask.store.signing import CHUNK, TAG, key_in, signed_size, stored_size

SESSION = SessionId("k3w9x2mq")
BELOW = keys.session_prefix(SESSION)
NAME = BELOW + "runs/a/plan"
OURS, THEIRS = Key(bytes(range(32))), Key(bytes(32))


def pair():
    """A store as it is, and as the session's key signs it."""
    plain = open_store(f"memory://{Entropy().token()}")
    return plain, Signed(plain, {SESSION: OURS, "another": THEIRS})


class Inside:
    """The objects of the signed session as if they were a store of their own."""

    def __init__(self, store):
        self.inner, self.url = store, store.url

    def create(self, key, body):
        return self.inner.create(BELOW + key, body)

    def put(self, key, body):
        return self.inner.put(BELOW + key, body)

    def get(self, key):
        return self.inner.get(BELOW + key)

    def get_ranges(self, key, spans, *, clip=False):
        return self.inner.get_ranges(BELOW + key, spans, clip=clip)

    async def list(self, prefix, *, after=""):
        async for page in self.inner.list(BELOW + prefix, after=after and BELOW + after):
            yield [meta._replace(key=meta.key.removeprefix(BELOW)) for meta in page]

    def folders(self, prefix):
        return self.inner.folders(BELOW + prefix)

    def delete(self, keys):
        return self.inner.delete([BELOW + key for key in keys])

    def time(self, key):
        return self.inner.time(BELOW + key)


class TestContract(StoreContract):
    """What every store must do, a signed session does."""

    @pytest.fixture(params=["memory", "file", "moto"])
    def place(self, request, tmp_path_factory):
        if request.param == "moto":
            return bucket_url(request.getfixturevalue("moto_server")).replace("s3://contract", "s3://contract/{}")
        return {"memory": "memory://{}", "file": f"file://{tmp_path_factory.mktemp('signed')}/{{}}"}[request.param]

    @pytest.fixture
    def store(self, place):
        store = Inside(Signed(open_store(place.format(f"t{Entropy().token()}")), {SESSION: OURS}))
        yield store
        asyncio.run(self.clear(store))

    async def clear(self, store):
        await store.delete(await listed(store))

    @in_loop
    async def test_url_opens_the_same_store(self, store):
        await store.put("here", b"1")
        assert await Inside(Signed(open_store(store.url), {SESSION: OURS})).get("here") == b"1"


def test_the_layer_knows_where_objects_of_a_session_lie():
    plain, signed = pair()
    assert key_in(signed, SESSION) is OURS and key_in(plain, SESSION) is None and key_in(signed, "other") is None
    asyncio.run(signed.put(BELOW + "x", b"1"))
    assert len(asyncio.run(plain.get(BELOW + "x"))) == 1 + TAG


@in_loop
async def test_what_belongs_to_no_signed_session_passes_as_it_is():
    plain, signed = pair()
    for name in (keys.manifest(SESSION), "s/unsigned/log/00000000", "probe-v1"):
        await signed.put(name, b"as it is")
        assert await plain.get(name) == await signed.get(name) == b"as it is"
        assert [bytes(view) for view in await signed.get_ranges(name, [Span(1, 3)])] == [b"s "]


# ---------------------------------------------------------------------------- whatever is done to an object

SIZES = [0, 1, 31, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 77, 3 * CHUNK]
sizes = st.one_of(st.sampled_from(SIZES), st.integers(0, 4 * CHUNK))


def body_of(size):
    return bytes(Entropy(size).secret(size))


def is_refused(plain, signed, stored, name=NAME):
    """Whether both ways to read the whole object refuse it, and so does reading any part of it that was changed."""
    asyncio.run(plain.put(name, stored))
    with pytest.raises(UntrustedObject, match="not signed with the key of session k3w9x2mq"):
        asyncio.run(signed.get(name))
    return True


@given(size=sizes, at=st.floats(0, 1, exclude_max=True), by=st.integers(1, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte(size, at, by):
    plain, signed = pair()
    asyncio.run(signed.put(NAME, body_of(size)))
    stored = bytearray(asyncio.run(plain.get(NAME)))
    stored[int(at * len(stored))] ^= by
    assert is_refused(plain, signed, bytes(stored))


@given(size=sizes, left=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None)
def test_a_truncated_object(size, left):
    plain, signed = pair()
    asyncio.run(signed.put(NAME, body_of(size)))
    stored = asyncio.run(plain.get(NAME))
    assert is_refused(plain, signed, stored[: int(left * len(stored))])


@pytest.mark.parametrize("chunks", [1, 2])
def test_an_object_cut_between_chunks_is_refused_also_when_its_end_is_read_by_range(chunks):
    plain, signed = pair()
    asyncio.run(signed.put(NAME, body_of(3 * CHUNK)))
    stored = asyncio.run(plain.get(NAME))
    assert is_refused(plain, signed, stored[: chunks * (CHUNK + TAG)])
    with pytest.raises(CorruptObject):
        asyncio.run(signed.get_ranges(NAME, [Span(0, 3 * CHUNK)]))
    with pytest.raises(CorruptObject):
        asyncio.run(signed.get_ranges(NAME, [Span(2 * CHUNK, 2 * CHUNK + 5)]))


@given(size=sizes, more=st.binary(min_size=1, max_size=200))
@settings(max_examples=40, deadline=None)
def test_an_extended_object(size, more):
    plain, signed = pair()
    asyncio.run(signed.put(NAME, body_of(size)))
    assert is_refused(plain, signed, asyncio.run(plain.get(NAME)) + more)


@given(order=st.lists(st.integers(0, 3), min_size=1, max_size=5), rest=st.booleans())
@settings(max_examples=60, deadline=None)
def test_chunks_in_another_order_number_or_with_some_left_out(order, rest):
    plain, signed = pair()
    asyncio.run(signed.put(NAME, body_of(4 * CHUNK)))
    stored = asyncio.run(plain.get(NAME))
    chunks = [stored[start : start + CHUNK + TAG] for start in range(0, len(stored), CHUNK + TAG)]
    if order != [0, 1, 2, 3]:
        assert is_refused(plain, signed, b"".join(chunks[number] for number in order))


def test_an_object_that_was_moved_or_comes_from_another_session_or_another_key():
    plain, signed = pair()
    other_run, other_session = BELOW + "runs/b/plan", "s/another/runs/a/plan"
    for name in (other_run, other_session):
        asyncio.run(signed.put(name, b"the same"))
        assert is_refused(plain, signed, asyncio.run(plain.get(name)))
    asyncio.run(Signed(plain, {SESSION: THEIRS}).put(NAME, b"the same"))
    assert is_refused(plain, signed, asyncio.run(plain.get(NAME)))


def test_an_object_that_is_not_signed():
    plain, signed = pair()
    for stored in (b"", b"a pickle", body_of(2 * CHUNK), bytes(TAG)):
        assert is_refused(plain, signed, stored)


# ---------------------------------------------------------------------------- ranges


@given(data=st.data(), size=st.one_of(sizes, st.just(40 * CHUNK)))
@settings(max_examples=80, deadline=None)
def test_any_spans_read_as_of_an_object_that_is_not_signed(data, size):
    plain, signed = pair()
    body = body_of(size)
    asyncio.run(signed.put(NAME, body))
    asyncio.run(plain.put("plain", body))
    border = st.one_of(st.integers(0, size), st.sampled_from([n * CHUNK for n in range(size // CHUNK + 1)]))
    ends = data.draw(st.lists(st.tuples(border, border), max_size=6))
    spans = [Span(*sorted(pair)) for pair in ends]
    assert asyncio.run(signed.get_ranges(NAME, spans)) == asyncio.run(plain.get_ranges("plain", spans))


@given(data=st.data(), size=sizes)
@settings(max_examples=40, deadline=None)
def test_a_range_that_touches_a_changed_chunk_is_refused_and_others_are_not(data, size):
    plain, signed = pair()
    body = body_of(size)
    asyncio.run(signed.put(NAME, body))
    stored = bytearray(asyncio.run(plain.get(NAME)))
    at = data.draw(st.integers(0, len(stored) - 1))
    stored[at] ^= 1
    asyncio.run(plain.put(NAME, bytes(stored)))
    changed = at // (CHUNK + TAG)
    for chunk in range(-(-size // CHUNK)):
        span = Span(chunk * CHUNK, min(size, chunk * CHUNK + 10))
        if chunk == changed:
            with pytest.raises(UntrustedObject):
                asyncio.run(signed.get_ranges(NAME, [span]))
        else:
            assert asyncio.run(signed.get_ranges(NAME, [span])) == [body[span.start : span.end]]


@in_loop
async def test_near_spans_are_still_read_in_one_request():
    _, signed = pair()
    await signed.put(NAME, body_of(10 * CHUNK))
    before = requests_of(signed)["get"]
    await signed.get_ranges(NAME, [Span(n * CHUNK, n * CHUNK + 7) for n in (0, 3, 9)])
    assert requests_of(signed)["get"] - before == 1


@in_loop
async def test_sizes_are_those_of_what_was_signed():
    _, signed = pair()
    for size in SIZES:
        await signed.put(f"{BELOW}sizes/{size}", body_of(size))
    found = {meta.key: meta.size async for page in signed.list(f"{BELOW}sizes/") for meta in page}
    assert found == {f"{BELOW}sizes/{size}": size for size in SIZES}
    assert all(signed_size(stored_size(size)) == size for size in range(3 * CHUNK))


# ---------------------------------------------------------------------------- the format


def test_the_format_is_that_of_the_protocol_page():
    """Written down independently: a stored object is verified by whoever reads PROTOCOL.md."""
    import hashlib
    import hmac

    plain, signed = pair()
    body, name = body_of(CHUNK + 3), NAME.encode()
    asyncio.run(signed.put(NAME, body))
    expected = b""
    for number, chunk in enumerate((body[:CHUNK], body[CHUNK:])):
        text = b"burst_dask signed object 1\0" + len(name).to_bytes(4, "big") + name
        text += number.to_bytes(8, "big") + bytes([number == 1]) + chunk
        expected += hmac.digest(OURS.secret, text, hashlib.sha256) + chunk
    assert asyncio.run(plain.get(NAME)) == expected


def test_who_does_not_verify_reads_nothing():
    """So what is signed is never taken for what is not, be it by an older version."""
    plain, signed = pair()
    asyncio.run(signed.put(NAME, frames.pack(1, b"header")))
    with pytest.raises(CorruptObject, match="not an object of burst_dask"):
        frames.unpack(NAME, 1, asyncio.run(plain.get(NAME)))


def test_a_key_is_not_shown():
    key = Key(b"0123456789abcdef0123456789abcdef")
    for shown in (repr(key), str(key), f"{key}", repr([key]), repr(Signed(open_store("memory://x"), {SESSION: key}))):
        assert "0123" not in shown and "3031" not in shown
    with pytest.raises(ValueError, match="32 bytes, not 3"):
        Key(b"abc")
