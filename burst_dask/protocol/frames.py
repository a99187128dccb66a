"""How bytes lie in an object: a checksummed header, then blobs that check themselves.

A record object is ``magic(4) kind(1) format(1) flags(2) length(4) crc32(4) header blobs``:
numbers are little-endian, the header is msgpack, compressed with zstd when that helps, and
the checksum covers what comes before it and the header. A blob is ``crc32(4) body``, so that
it can be read by range, out of an entry or a segment, and still be checked.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from zlib import crc32

import zstandard

from burst_dask.errors import CorruptObject, TornObject

#: Version of every format in this folder; readers refuse what is newer than they are.
FORMAT = 1
MAGIC = b"bDsk"
_HEAD = struct.Struct("<4sBBHI")
_CRC = struct.Struct("<I")
HEAD_SIZE = _HEAD.size + _CRC.size
BLOB_OVERHEAD = _CRC.size
_ZSTD = 1
#: Headers below this many bytes are not worth compressing.
_COMPRESS_FROM = 512
#: No header is larger; a length beyond it is damage, not data. Bytes.
_HEADER_LIMIT = 1 << 30

Buffer = bytes | bytearray | memoryview


def compress(data: bytes) -> bytes:
    """Compress with zstd level 1 (a pickled graph shrinks about ten times)."""
    return zstandard.ZstdCompressor(level=1).compress(data)


def decompress(data: Buffer) -> bytes:
    """Undo `compress`."""
    return zstandard.ZstdDecompressor().decompress(data)


def pack(kind: int, header: bytes) -> bytes:
    """Return the head and header of a record object; blobs may follow."""
    flags = 0
    if len(header) >= _COMPRESS_FROM:
        header, flags = compress(header), _ZSTD
    head = _HEAD.pack(MAGIC, kind, FORMAT, flags, len(header))
    return head + _CRC.pack(crc32(header, crc32(head))) + header


def unpack(name: str, kind: int, data: Buffer) -> tuple[bytes, int]:
    """Return the header of the record object in `data`, and where its blobs begin.

    Raises
    ------
    TornObject
        The object is truncated or altered.
    CorruptObject
        It is another kind of record, or of a newer format.
    """
    if len(data) < HEAD_SIZE:
        raise TornObject(f"{name}: truncated to {len(data)} bytes")
    magic, its_kind, version, flags, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise TornObject(f"{name}: not an object of burst_dask")
    if version > FORMAT:
        raise CorruptObject(
            f"{name}: written in format {version}, and this burst_dask reads up to {FORMAT}; upgrade it to read this"
        )
    end = HEAD_SIZE + length
    if length > _HEADER_LIMIT or end > len(data):
        raise TornObject(f"{name}: truncated, {len(data)} bytes of at least {end}")
    header = bytes(data[HEAD_SIZE:end])
    (expected,) = _CRC.unpack_from(data, _HEAD.size)
    if crc32(header, crc32(data[: _HEAD.size])) != expected:
        raise TornObject(f"{name}: checksum does not match")
    if its_kind != kind:
        raise CorruptObject(f"{name}: record of kind {its_kind}, expected {kind}")
    if flags & _ZSTD:
        try:
            header = decompress(header)
        except zstandard.ZstdError as error:
            raise CorruptObject(f"{name}: {error}") from error
    return header, end


def seal(body: Sequence[Buffer]) -> list[Buffer]:
    """Return the buffers of a blob that holds `body`."""
    crc = 0
    for part in body:
        crc = crc32(part, crc)
    return [_CRC.pack(crc), *body]


def unseal(name: str, blob: Buffer) -> memoryview:
    """Return the body of a blob.

    Raises
    ------
    CorruptObject
        The blob is truncated or altered.
    """
    view = memoryview(blob)
    if len(view) < BLOB_OVERHEAD or crc32(view[BLOB_OVERHEAD:]) != _CRC.unpack_from(view)[0]:
        raise CorruptObject(f"{name}: checksum of a blob of {len(view)} bytes does not match")
    return view[BLOB_OVERHEAD:]
