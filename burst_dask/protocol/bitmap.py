"""A set of small numbers as one integer: bit *i* is set when *i* is in the set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator


class Bitmap:
    """An immutable set of non-negative integers, 1 bit each.

    Here the numbers are positions of tasks in a shard, in `dask.order` order.

    Examples
    --------
    >>> done = Bitmap.of([0, 2, 3])
    >>> list(done), len(done), 2 in done
    ([0, 2, 3], 3, True)
    >>> Bitmap.full(4) - done
    Bitmap.of([1])
    """

    __slots__ = ("bits",)

    def __init__(self, bits: int = 0) -> None:
        self.bits = bits

    @classmethod
    def of(cls, members: Iterable[int]) -> Bitmap:
        """Return the set of `members`."""
        bits = 0
        for member in members:
            bits |= 1 << member
        return cls(bits)

    @classmethod
    def full(cls, count: int) -> Bitmap:
        """Return the set of 0 … `count` - 1."""
        return cls((1 << count) - 1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Bitmap:
        return cls(int.from_bytes(data, "little"))

    def to_bytes(self) -> bytes:
        return self.bits.to_bytes((self.bits.bit_length() + 7) // 8, "little")

    def first(self, count: int) -> Bitmap:
        """Return the `count` smallest members."""
        if count >= len(self):
            return self
        members = iter(self)
        return Bitmap.of(next(members) for _ in range(count))

    def __or__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.bits | other.bits)

    def __and__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.bits & other.bits)

    def __sub__(self, other: Bitmap) -> Bitmap:
        return Bitmap(self.bits & ~other.bits)

    def __le__(self, other: Bitmap) -> bool:
        return not self.bits & ~other.bits

    def __contains__(self, member: int) -> bool:
        return member >= 0 and bool(self.bits >> member & 1)

    def __iter__(self) -> Iterator[int]:
        # Through the text form: one pass in C, where shifting bit by bit is quadratic.
        for member, bit in enumerate(reversed(bin(self.bits))):
            if bit == "1":
                yield member
            elif bit == "b":
                return

    def __len__(self) -> int:
        return self.bits.bit_count()

    def __bool__(self) -> bool:
        return self.bits != 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Bitmap) and self.bits == other.bits

    def __hash__(self) -> int:
        return hash(self.bits)

    def __repr__(self) -> str:
        return f"Bitmap.of({list(self)})"


EMPTY = Bitmap()
