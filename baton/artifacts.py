"""The form of an artifact: chunks, the manifest that lists them, their hashes, and the rule for names.

Theory: content is cut into chunks of 1 MiB, each known by the sha-256 of its *content*; the manifest lists them, and the
artifact is known by the sha-256 of its manifest (`digest`). So a reader who was told one digest by a commit can prove every
byte, wherever it came from: digest -> manifest -> chunk. Packing (zlib, where it helps) belongs to the copy on the wire or in
the store and never enters a hash: two machines with different zlibs name equal content equally.

A digest also names the content independently of the attempt that made it, which is what caches want. Where an artifact *lies*
follows from the attempt's fence (`attempt_folder`), so that no attempt writes over another's (PROTOCOL F1).

Pure: agents, gateway and client read and write the same form. `baton/artifact_wire.py` knows its messages.
"""

from __future__ import annotations

import hashlib
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from baton.names import quote

CHUNK_BYTES = 1024 * 1024
"""Content of a chunk. Smaller costs a message and a request of the object store for little; larger holds the loop of a
gateway longer in one step, and every stream of it in memory."""

MAX_WIRE_BYTES = 2 * CHUNK_BYTES
"""A chunk's `data` as sent: never more than its content by rights, so more is refused unread."""

MAX_CHUNKS = 65_536
"""Of one artifact: its manifest (32 bytes each) still fits well into one message of 4 MiB."""

MAX_ARTIFACT_BYTES = MAX_CHUNKS * CHUNK_BYTES
"""64 GiB. Larger data belongs into a data store of its own, its address into the result."""

MAX_ARTIFACTS = 64
"""Of one attempt, checkpoints not counted: their refs ride in its report and in the journal."""

MAX_RESULT_BYTES = 1024 * CHUNK_BYTES
"""Of a JSON result that becomes an artifact by itself: a child loads it into memory as one value."""

MAX_CODE_PACK_BYTES = 10 * CHUNK_BYTES
"""Of a code archive that is stored rather than carried inline."""

RESULT = "result"
"""The artifact that stands for the task's result."""

PLAIN = 0
ZLIB = 1
"""`compression` of a chunk as packed."""

_LEVEL = 1
"""Of zlib: about 100 MB/s a core here. Level 6 gains a tenth in size for five times the time."""

_SAMPLE = 8 * 1024
_GAIN = 0.95
"""Bytes looked at in each of three places of a chunk, and what they must shrink to. Smaller samples miss what is there; a gain of
less than a twentieth is not worth the time."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_CHECKPOINT = re.compile(r"checkpoint-([1-9][0-9]{0,8})")
_HEAD = struct.Struct(">4sIQ")
_MAGIC = b"BAM1"
_HASH = 32


class CorruptArtifact(ValueError):
    """Bytes that are not those the digest names. Nobody may use them: fetch again, then blame the store."""


class TooLarge(ValueError):
    """Content over a limit: the application's fault; the message names the limit."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of content, packed. `sha256` is of the content, not of `data`."""

    index: int
    sha256: bytes
    data: bytes
    compression: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an artifact consists of: `size` bytes of content in chunks of `chunk_bytes` (the last may be shorter)."""

    size: int
    hashes: bytes
    """The chunks' sha-256, one after the other."""
    chunk_bytes: int = CHUNK_BYTES

    @property
    def count(self) -> int:
        """Number of chunks."""
        return len(self.hashes) // _HASH

    def sha256(self, index: int) -> bytes:
        """Hash of the content of chunk `index`."""
        return self.hashes[index * _HASH : (index + 1) * _HASH]

    def length(self, index: int) -> int:
        """Bytes of content in chunk `index`."""
        return min(self.chunk_bytes, self.size - index * self.chunk_bytes)

    def encode(self) -> bytes:
        """The manifest's only byte form."""
        return _HEAD.pack(_MAGIC, self.chunk_bytes, self.size) + self.hashes

    def digest(self) -> bytes:
        """Sha-256 of the encoded manifest: the artifact's identity."""
        return hashlib.sha256(self.encode()).digest()


def decode_manifest(data: bytes, digest: bytes = b"") -> Manifest:
    """Reads a manifest and proves it against `digest` (if given). Raises CorruptArtifact."""
    if digest and hashlib.sha256(data).digest() != digest:
        raise CorruptArtifact("the manifest does not match the artifact's digest")
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise CorruptArtifact("the manifest is not in a form this version knows")
    _, chunk_bytes, size = _HEAD.unpack_from(data)
    hashes = data[_HEAD.size :]
    if (
        not 0 < chunk_bytes <= CHUNK_BYTES
        or len(hashes) != _HASH * -(-size // chunk_bytes)
        or size > MAX_ARTIFACT_BYTES
    ):
        raise CorruptArtifact("the manifest's size and chunks do not agree")
    return Manifest(size=size, hashes=hashes, chunk_bytes=chunk_bytes)


class ManifestBuilder:
    """Collects the chunks of one artifact, in order; refuses what no reader could put together again."""

    def __init__(self, limit: int = MAX_ARTIFACT_BYTES) -> None:
        self._limit = limit
        self._size = 0
        self._hashes: list[bytes] = []

    @property
    def count(self) -> int:
        """Chunks so far, which is also the index of the next."""
        return len(self._hashes)

    def add(self, sha256: bytes, length: int) -> None:
        """The next chunk. Raises CorruptArtifact for one that cannot follow, TooLarge over the limit."""
        if len(sha256) != _HASH or not 0 < length <= CHUNK_BYTES:
            raise CorruptArtifact(f"chunk {self.count} holds {length} bytes; 1 to {CHUNK_BYTES} are allowed")
        if self._size != self.count * CHUNK_BYTES:
            raise CorruptArtifact(
                f"chunk {self.count} follows one that is not full: chunks are {CHUNK_BYTES} bytes each"
            )
        self._size += length
        if self._size > self._limit:
            raise TooLarge(f"more than {self._limit} bytes, the limit of one artifact")
        self._hashes.append(sha256)

    def manifest(self) -> Manifest:
        """What was added."""
        return Manifest(size=self._size, hashes=b"".join(self._hashes))


def pack(index: int, content: bytes) -> Chunk:
    """One chunk of at most CHUNK_BYTES, compressed if that makes it smaller."""
    squeezed = zlib.compress(content, _LEVEL) if _may_shrink(content) else content
    smaller = len(squeezed) < len(content)
    return Chunk(
        index=index,
        sha256=hashlib.sha256(content).digest(),
        data=squeezed if smaller else content,
        compression=ZLIB if smaller else PLAIN,
    )


def _may_shrink(content: bytes) -> bool:
    """A look at three places: images, archives and random numbers cost ten times the time to compress, for nothing."""
    if len(content) <= 3 * _SAMPLE:
        return True
    middle = len(content) // 2
    sample = content[:_SAMPLE] + content[middle : middle + _SAMPLE] + content[-_SAMPLE:]
    return len(zlib.compress(sample, _LEVEL)) < _GAIN * len(sample)


def unpack(chunk: Chunk) -> bytes:
    """The content of a chunk, proved against its own hash. Raises CorruptArtifact. Memory is bounded by CHUNK_BYTES."""
    content = _inflated(chunk)
    if hashlib.sha256(content).digest() != chunk.sha256:
        raise CorruptArtifact(f"chunk {chunk.index} does not match its hash")
    return content


def unpack_listed(chunk: Chunk, manifest: Manifest) -> bytes:
    """`unpack`, for a chunk that must be the one the manifest lists at its index. Raises CorruptArtifact."""
    if not 0 <= chunk.index < manifest.count or chunk.sha256 != manifest.sha256(chunk.index):
        raise CorruptArtifact(f"chunk {chunk.index} is not the one that the manifest lists")
    content = unpack(chunk)
    if len(content) != manifest.length(chunk.index):
        raise CorruptArtifact(f"chunk {chunk.index} holds {len(content)} bytes, not {manifest.length(chunk.index)}")
    return content


def _inflated(chunk: Chunk) -> bytes:
    if chunk.compression == PLAIN and len(chunk.data) <= CHUNK_BYTES:
        return chunk.data
    if chunk.compression != ZLIB or len(chunk.data) > MAX_WIRE_BYTES:
        raise CorruptArtifact(f"chunk {chunk.index} is packed in no way that this version knows")
    unzip = zlib.decompressobj()
    try:
        content = unzip.decompress(chunk.data, CHUNK_BYTES + 1)  # bounded: a small bomb must not fill the memory
    except zlib.error as error:
        raise CorruptArtifact(f"chunk {chunk.index} cannot be unpacked: {error}") from error
    if len(content) > CHUNK_BYTES or not unzip.eof or unzip.unused_data:
        raise CorruptArtifact(f"chunk {chunk.index} does not unpack to one chunk")
    return content


def read_chunks(file: BinaryIO, first: int = 0) -> Iterator[Chunk]:
    """The chunks of an open file from its current place on, numbered from `first`; one in memory at a time. Blocks on
    reads and packs on the caller's thread: on an event loop, take each step in a thread."""
    index = first
    while content := _full(file):
        yield pack(index, content)
        index += 1


def manifest_of(file: BinaryIO, limit: int = MAX_ARTIFACT_BYTES) -> Manifest:
    """The manifest of an open file from its current place on, without packing anything. Raises TooLarge. Blocks."""
    builder = ManifestBuilder(limit)
    while content := _full(file):
        builder.add(hashlib.sha256(content).digest(), len(content))
    return builder.manifest()


def _full(file: BinaryIO) -> bytes:
    """Exactly CHUNK_BYTES unless the file ends: a short read of a pipe must not make a short chunk in the middle."""
    content = file.read(CHUNK_BYTES)
    while content and len(content) < CHUNK_BYTES and (more := file.read(CHUNK_BYTES - len(content))):
        content += more
    return content


def name_problem(name: str) -> str | None:
    """What is wrong with an artifact's name; None if nothing is."""
    if _NAME.fullmatch(name):
        return None
    return f"{quote(name)}: use 1 to 128 letters, digits, '.', '_' and '-', beginning with a letter or digit"


def checkpoint_name(number: int) -> str:
    """Name of an attempt's checkpoint `number` (from 1)."""
    return f"checkpoint-{number}"


def checkpoint_number(name: str) -> int:
    """The number in a checkpoint's name; 0 if it is none."""
    match = _CHECKPOINT.fullmatch(name)
    return int(match[1]) if match else 0


def attempt_folder(*, namespace: str, run: str, task: int, n: int, nonce: str, cluster: str) -> str:
    """Where an attempt's artifacts lie, by its fence and its cluster's uid (PROTOCOL F1); ends with a slash."""
    return f"{namespace}/{run}/{task}/{n}-{nonce}-{cluster}/"
