"""Backups made by hand: a bbolt file of one bucket, and etcd's checksum after it, as `baton.backup` reads them."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

from baton.internal import events_pb2 as pb

PAGE = 4096
MAGIC, VERSION, LEAF, META, BUCKET = 0xED0CDAED, 2, 0x02, 0x04, 0x01


def backup(*changes: tuple[str, bytes]) -> bytes:
    """A whole backup in which each change (key, value) is a revision of its own, from 2 on; all together in one page."""
    elements = [(_revision(number), _key_value(key, value), 0) for number, (key, value) in enumerate(changes, 2)]
    pages = [
        _meta(0, transaction=1, root=9),  # the older of the two: what it says is not so any more
        _meta(1, transaction=2, root=2),
        _leaf(2, [(b"key", struct.pack("<QQ", 3, 0), BUCKET), (b"meta", b"", 0)]),
        _leaf(3, elements),
    ]
    data = b"".join(page.ljust(PAGE, b"\0") for page in pages)
    return data + hashlib.sha256(data).digest()


def batch(wall: float, prefix: str = "baton/", shard: str = "00", seq: int = 1) -> tuple[str, bytes]:
    """A change: one batch of a shard's journal, decided at that wall time."""
    content = pb.StoredBatch(nonce="00" * 8, seq=seq, wall=wall, incarnation=1).SerializeToString()
    return f"{prefix}shards/{shard}/log/{seq:016}", pb.Envelope(format=1, payload=content, parts=1).SerializeToString()


def _meta(number: int, transaction: int, root: int) -> bytes:
    header = struct.pack("<QHHI", number, META, 0, 0)
    return header + struct.pack("<IIIIQQQQQQ", MAGIC, VERSION, PAGE, 0, root, 0, 0, 4, transaction, 0)


def _leaf(number: int, elements: Sequence[tuple[bytes, bytes, int]]) -> bytes:
    heads, bodies = b"", b""
    for index, (key, value, flags) in enumerate(elements):
        offset = (len(elements) - index) * 16 + len(bodies)
        heads += struct.pack("<IIII", flags, offset, len(key), len(value))
        bodies += key + value
    return struct.pack("<QHHI", number, LEAF, len(elements), 0) + heads + bodies


def _revision(number: int) -> bytes:
    return struct.pack(">Q", number) + b"_" + struct.pack(">Q", 0)


def _key_value(key: str, value: bytes) -> bytes:
    """mvccpb.KeyValue: key = 1, value = 5."""
    name = key.encode()
    return b"\x0a" + _varint(len(name)) + name + b"\x2a" + _varint(len(value)) + value


def _varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found, number = found + bytes([number & 0x7F | 0x80]), number >> 7
    return found + bytes([number])
