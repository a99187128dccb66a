"""A bitmap is a set of small numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from burst_dask.protocol.bitmap import Bitmap

sets = st.sets(st.integers(0, 300))


@given(sets, sets)
def test_it_is_a_set(one: set[int], other: set[int]) -> None:
    a, b = Bitmap.of(one), Bitmap.of(other)
    assert list(a) == sorted(one)
    assert len(a) == len(one)
    assert bool(a) == bool(one)
    assert set(a | b) == one | other
    assert set(a & b) == one & other
    assert set(a - b) == one - other
    assert (a <= b) == (one <= other)
    assert (a == b) == (one == other)
    assert all((i in a) == (i in one) for i in range(301))
    assert Bitmap.from_bytes(a.to_bytes()) == a


@given(sets, st.integers(0, 310))
def test_the_first_ones(members: set[int], count: int) -> None:
    ordered = sorted(members)
    assert list(Bitmap.of(members).first(count)) == ordered[:count]
