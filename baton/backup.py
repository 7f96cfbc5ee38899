"""A backup file, read without etcd: whether it is whole, and what it knows last (PROTOCOL J12).

Theory. A backup is etcd's own snapshot: its database file (bbolt) and, after it, the SHA-256 of that file. So a file that was cut
short, mixed up or damaged is told from a whole one before any tool sees it. When it was made need not be written beside it, where
a `cp` would lose it, nor into the store, which may be full when it is backed up: the newest batches of the journal in it carry
the wall time of their decision. That moment is also the exact one. A run is created, and ends, by a batch; so what the backup
knows is no later than its newest batch, and what is later it does not know, whatever the clocks of the host that wrote the file said.

Only what is needed of bbolt is read here: meta pages, branches, leaves, one bucket; keys from the newest revision backwards.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from baton.internal import events_pb2 as pb

CHECKSUM = 32
"""Bytes of SHA-256 after the database. etcd writes whole pages, multiples of 512 bytes, so a file without it is seen by its size."""

PAGE_SIZES = 512

NEWEST = 256
"""Batches whose times are compared: replicas' clocks differ, so the last batch need not have the latest time. Fewer than there are
shards (33): a replica whose clock runs late hides the others; many more: nothing but work."""

START = 256
"""Bytes of a batch's beginning that hold its wall time: a nonce and two numbers come before it."""

_MAGIC, _VERSION = 0xED0CDAED, 2
_BRANCH, _LEAF, _BUCKET = 0x01, 0x02, 0x01
_PAGE = struct.Struct("<QHHI")
_META = struct.Struct("<IIIIQQQQQQ")
_BRANCH_ELEMENT = struct.Struct("<IIQ")
_LEAF_ELEMENT = struct.Struct("<IIII")
_BUCKET_HEADER = struct.Struct("<QQ")
_LOG = re.compile(rb"(?:.*/)?shards/[^/]+/(log/[0-9]{16}|snapshot/manifest)")

DEPTH = 64
"""Levels of a tree at most: real ones have five. A damaged page that leads to itself ends here."""


class NotABackup(Exception):
    """The file is none, or not a whole one; the text says what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class Backup:
    """What a whole backup says of itself."""

    revision: int
    """etcd's, of its newest key."""
    wall: float
    """Wall seconds of the newest batch of the journal in it; 0 if it holds none: then nothing had ever happened."""
    size: int
    """Bytes of the file."""


def read_backup(path: Path) -> Backup:
    """What the backup at `path` knows last. Reads all of it. Raises NotABackup, OSError."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise NotABackup(f"{path} is empty: it was never written to its end; take another backup")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(path, data, size)
            try:
                return _newest(_Tree(data), size)
            except (struct.error, IndexError, ValueError, DecodeError) as error:
                told = f"{path} is a whole file of etcd's, but this version cannot read it ({error}): is it a backup of a federation?"
                raise NotABackup(told) from error


def _check(path: Path, data: mmap.mmap, size: int) -> None:
    """Whether it is etcd's, and all of it. Raises NotABackup."""
    if size < _PAGE.size + _META.size or _META.unpack_from(data, _PAGE.size)[:2] != (_MAGIC, _VERSION):
        raise NotABackup(
            f"{path} is no backup: it does not begin as a snapshot of etcd; name what `baton admin backup` wrote"
        )
    if size % PAGE_SIZES != CHECKSUM:
        told = f"{path} is not whole: its checksum is missing at the end ({size} bytes); copy it again, or take another backup"
        raise NotABackup(told)
    digest, view = hashlib.sha256(), memoryview(data)
    try:
        digest.update(view[:-CHECKSUM])
    finally:
        view.release()
    if digest.digest() != data[-CHECKSUM:]:
        raise NotABackup(
            f"{path} is damaged: its content does not match its checksum; copy it again, or take another backup"
        )


def _newest(tree: _Tree, size: int) -> Backup:
    revision, wall, batches = 0, 0.0, 0
    for key, value in tree.backwards(b"key"):
        revision = revision or int.from_bytes(key[:8], "big")
        fields = dict(_fields(value))
        name = fields.get(1, b"")
        if len(key) == _LIVE_KEY and isinstance(name, bytes) and (match := _LOG.fullmatch(name)):
            stored = fields.get(5, b"")
            if isinstance(stored, bytes):
                wall = max(wall, _wall(stored, manifest=not match[1].startswith(b"log")))
                batches += 1
            if batches == NEWEST:
                break
    return Backup(revision, wall, size)


_LIVE_KEY = 17
"""Bytes of a revision's key; that of a deletion is one longer, and has no value."""


def _wall(stored: bytes, *, manifest: bool) -> float:
    """The wall time in a log entry or in the manifest of a snapshot; 0 if it does not say (a later part of a large batch)."""
    if manifest:
        return pb.SnapshotManifest.FromString(stored).wall
    envelope = pb.Envelope.FromString(stored)
    if envelope.part or envelope.key_id:
        return 0.0
    start = envelope.payload
    if envelope.compression:
        try:
            start = zlib.decompressobj().decompress(start, START)
        except zlib.error:
            return 0.0
    for number, value in _fields(start[:START]):
        if number == pb.StoredBatch.WALL_FIELD_NUMBER and isinstance(value, float):
            return value
    return 0.0


def _fields(message: bytes) -> Iterator[tuple[int, bytes | float | int]]:
    """The fields of a protobuf message, as far as they are whole: a double, a number, or bytes."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        if tag & 7 == 0:
            number, place = _varint(message, place)
            yield tag >> 3, number
        elif tag & 7 == 1 and place + 8 <= len(message):
            yield tag >> 3, struct.unpack_from("<d", message, place)[0]
            place += 8
        elif tag & 7 == 2:
            length, place = _varint(message, place)
            if place + length > len(message):
                return
            yield tag >> 3, message[place : place + length]
            place += length
        else:
            return


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number and the place after it; at the end of what is there it counts as 0."""
    number = shift = 0
    while place < len(message):
        byte = message[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
        shift += 7
    return 0, place


class _Tree:
    """bbolt's pages, as of the newest whole transaction. Raises struct.error, IndexError and ValueError where they are not."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        metas = [self._meta(0)]
        self._size: int = metas[0][2]
        metas.append(self._meta(self._size))
        self._root: int = max((meta for meta in metas if meta[0] == _MAGIC), key=lambda meta: int(meta[8]))[4]

    def _meta(self, at: int) -> tuple[int, ...]:
        """magic, version, page size, flags, root, its sequence, freelist, pages, transaction, checksum."""
        return _META.unpack_from(self._data, at + _PAGE.size)

    def backwards(self, bucket: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All keys and values of a bucket of the root, the greatest key first."""
        for name, value, flags in self._leaves(self._root * self._size):
            if name == bucket and flags & _BUCKET:
                root, _ = _BUCKET_HEADER.unpack_from(value)
                found = self._inline(value) if root == 0 else self._leaves(root * self._size)
                yield from ((key, content) for key, content, _ in found)

    def _inline(self, value: bytes) -> Iterator[tuple[bytes, bytes, int]]:
        """A bucket so small that its one page is its value."""
        yield from _page_elements(value, _BUCKET_HEADER.size)

    def _leaves(self, at: int, depth: int = 0) -> Iterator[tuple[bytes, bytes, int]]:
        _, flags, count, _ = _PAGE.unpack_from(self._data, at)
        if flags & _LEAF:
            yield from _page_elements(self._data, at)
        elif flags & _BRANCH and depth < DEPTH:
            for index in range(count - 1, -1, -1):
                _, _, child = _BRANCH_ELEMENT.unpack_from(self._data, at + _PAGE.size + index * _BRANCH_ELEMENT.size)
                yield from self._leaves(child * self._size, depth + 1)
        else:
            raise ValueError(f"page at {at} has flags {flags}")


def _page_elements(data: mmap.mmap | bytes, at: int) -> Iterator[tuple[bytes, bytes, int]]:
    """Key, value and flags of a leaf's elements, backwards."""
    _, _, count, _ = _PAGE.unpack_from(data, at)
    for index in range(count - 1, -1, -1):
        place = at + _PAGE.size + index * _LEAF_ELEMENT.size
        flags, offset, key_size, value_size = _LEAF_ELEMENT.unpack_from(data, place)
        start = place + offset
        yield data[start : start + key_size], data[start + key_size : start + key_size + value_size], flags
