"""Every record survives its bytes, and damage is noticed and named."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burst_dask.errors import CorruptObject
from burst_dask.protocol import frames
from burst_dask.protocol.bitmap import Bitmap
from burst_dask.protocol.keys import ShardId, WorkerId
from burst_dask.protocol.records import (
    Backup,
    Beat,
    Claim,
    Commit,
    Entry,
    Location,
    Logs,
    Outcomes,
    Place,
    Plan,
    Printed,
    Record,
    Release,
    ShardIndex,
    ShardInfo,
    Split,
    Takeover,
    TaskOutput,
    decode,
    decode_with_end,
    encode,
)

positions = st.integers(0, 1023)
bitmaps = st.builds(Bitmap.of, st.sets(positions, max_size=40))
names = st.text("abcdefgh", min_size=1, max_size=8)
outcomes = st.builds(
    Outcomes,
    done=bitmaps,
    failed=bitmaps,
    stored=st.dictionaries(positions, st.builds(Location, positions, positions, positions), max_size=20),
    upstream=st.dictionaries(st.integers(0, 10**9), bitmaps, max_size=3),
    seconds=st.floats(0, 1e6),
    ran=st.integers(0, 10**6),
    logs=st.dictionaries(names, bitmaps, max_size=3),
    tries=st.dictionaries(positions, st.integers(1, 9), max_size=3),
)
printed = st.builds(Printed, st.floats(0, 1e10), names, st.text(st.characters(exclude_categories=["Cs"])))
outputs = st.builds(TaskOutput, positions, st.binary(), positions, positions, st.lists(printed, max_size=3).map(tuple))
actions = st.one_of(
    st.builds(Claim, bitmaps),
    st.builds(Commit, outcomes, bitmaps, st.tuples(names)),
    st.builds(Release, outcomes, names, st.tuples()),
    st.builds(Takeover, names, names, bitmaps),
    st.builds(Split, names, bitmaps),
    st.builds(Backup, outcomes),
)
indexes = st.builds(
    ShardIndex,
    tasks=bitmaps,
    holder=st.none() | names,
    outcomes=outcomes,
    objects=st.lists(names, max_size=3).map(tuple),
    reserved=bitmaps,
    strikes=st.dictionaries(positions, st.integers(0, 9), max_size=3),
    children=st.dictionaries(names, bitmaps, max_size=3),
    cause=names,
)
INDEX = ShardIndex(tasks=Bitmap.full(4))
entries = st.builds(
    Entry, number=positions, writer=names, nonce=names, wrote=st.floats(0, 1e10), action=actions, index=indexes
)


@given(names, st.lists(outputs, max_size=3).map(tuple))
def test_logs_survive_their_bytes(worker: WorkerId, tasks: tuple[TaskOutput, ...]) -> None:
    logs = Logs(worker=worker, tasks=tasks)
    assert decode(Logs, "x", encode(logs)) == logs


def test_outcomes_without_output_or_tries_take_no_more_bytes_for_them() -> None:
    entry = Entry(
        number=0, writer=WorkerId("w"), nonce="n", wrote=0.0, action=Commit(Outcomes(), Bitmap()), index=INDEX
    )
    assert b"logs" not in encode(entry) and b"tries" not in encode(entry)


@given(entries, st.binary(max_size=50))
def test_an_entry_survives_its_bytes(entry: Entry, blobs: bytes) -> None:
    data = encode(entry) + blobs
    again, end = decode_with_end(Entry, "x", data)
    assert again == entry
    assert data[end:] == blobs


@given(entries, st.data())
def test_any_damage_to_the_header_is_noticed(entry: Entry, data: st.DataObject) -> None:
    good = encode(entry)
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptObject, match="the-name"):
        decode(Entry, "the-name", bad)


@given(entries, st.data())
def test_any_truncation_is_noticed(entry: Entry, data: st.DataObject) -> None:
    good = encode(entry)
    with pytest.raises(CorruptObject, match="the-name"):
        decode(Entry, "the-name", good[: data.draw(st.integers(0, len(good) - 1))])


plans = st.builds(
    Plan,
    run=names,
    tasks=positions,
    shards=st.lists(
        st.builds(
            ShardInfo,
            positions,
            positions,
            st.builds(Place, positions, positions, positions),
            st.lists(positions, max_size=3).map(tuple),
            positions,
            positions,
            st.lists(positions, max_size=3).map(tuple),
        ),
        max_size=3,
    ).map(tuple),
    outputs=st.binary(max_size=9),
    created=st.floats(0, 1e9),
    size=positions,
    priority=st.integers(-9, 9),
    externals=st.lists(st.tuples(names, st.integers(0, 10**9)), max_size=4).map(tuple),
    names=st.binary(max_size=9),
)


@given(plans)
def test_a_plan_survives_its_bytes(plan: Plan) -> None:
    assert decode(Plan, "p", encode(plan)) == plan


def test_a_plan_without_externals_is_written_and_read_as_before_there_were_any() -> None:
    old = msgspec.defstruct(
        "Plan",
        [("run", str), ("tasks", int), ("shards", tuple), ("outputs", bytes), ("created", float), ("size", int)],
        tag="plan",
    )(run="s.r", tasks=1, shards=((0, 1, (0, 0, 9), (), 1, 1),), outputs=b"", created=0.0, size=9)
    data = frames.pack(Plan.KIND, msgspec.msgpack.encode(old))
    plan = decode(Plan, "p", data)
    assert plan.externals == () and plan.shards == (ShardInfo(0, 1, Place(0, 0, 9), (), 1, 1),)
    assert b"externals" not in frames.unpack("p", Plan.KIND, encode(plan))[0]


def test_another_kind_of_record_is_refused() -> None:
    beat = Beat(worker=WorkerId("w"), host="h", pid=1, threads=1, started=0.0)
    with pytest.raises(CorruptObject, match="kind"):
        decode(Entry, "x", encode(beat))


def test_a_newer_format_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FORMAT", 2)
    data = encode(Beat(worker=WorkerId("w"), host="h", pid=1, threads=1, started=0.0))
    monkeypatch.undo()
    with pytest.raises(CorruptObject, match="upgrade"):
        decode(Beat, "x", data)


@given(st.lists(st.binary(max_size=40), max_size=4), st.data())
def test_a_blob_checks_itself(parts: list[bytes], data: st.DataObject) -> None:
    blob = b"".join(frames.seal(parts))
    assert bytes(frames.unseal("x", blob)) == b"".join(parts)
    bad = bytearray(blob)
    bad[data.draw(st.integers(0, len(blob) - 1))] ^= 1
    with pytest.raises(CorruptObject, match="the-name"):
        frames.unseal("the-name", bad)


def test_an_index_of_a_full_shard_stays_small() -> None:
    """PROTOCOL.md, "How much is written"."""
    stored = {i: Location(i // 300, i % 300 * 30, i % 300 * 30 + 30) for i in range(1024)}
    full = Outcomes(done=Bitmap.full(1024), stored=stored)
    index = ShardIndex(tasks=Bitmap.full(1024), outcomes=full, objects=("@1", "@2", "@3", "@4"))
    commit = Commit(outcomes=Outcomes(), reserved=Bitmap())
    entry = Entry(number=4, writer=WorkerId("w" * 12), nonce="n" * 12, wrote=1.0, action=commit, index=index)
    assert len(encode(entry)) < 8192


def test_ids_of_children_name_their_root() -> None:
    from burst_dask.protocol import keys

    child = keys.child_shard(keys.child_shard(keys.root_shard(12), 3), 5)
    assert child == "00012-3-5"
    assert keys.root_number(child) == 12
    assert keys.shard_of_entry(keys.entry(keys.shard_log(keys.RunId("s.r"), ShardId(child)), 7)) == child


def test_each_kind_of_record_has_a_number_of_its_own() -> None:
    kinds = [kind.KIND for kind in Record.__subclasses__()]
    assert len(kinds) == len(set(kinds)) == 10
