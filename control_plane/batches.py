"""Batches <-> stored values: what one decision emitted, in envelopes small enough for one transaction (PROTOCOL J1,
J2, J11).

Theory. A decision is atomic, whatever its size. Its `StoredBatch` is serialized once, compressed, and if it is too
large for one value cut into *parts* that lie in consecutive seqs. Parts before the last have no effect: a fold
applies the batch when it meets the last, and forgets parts whose rest never came (their owner died, or the batch was
discarded; J6). So a large decision is a sequence of transactions that is correct after every one of them, and no rule
ever sees half a decision.

The stamp of a batch carries the seq of its *first* part, for its number of parts is unknown while it is decided.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from google.protobuf.message import DecodeError

from baton.internal import events_pb2 as pb
from control_plane.codec import FEATURE_LEVEL, Interned, read_event, write_event
from control_plane.core.events import Event
from control_plane.core.model import Stamp
from control_plane.refusals import Corrupt, TooNew

FORMAT = 1
"""Version of the envelope and of what is in it."""

PLAIN, ZLIB = 0, 1

COMPRESS_FROM = 1024
"""Bytes from which a payload is compressed: below, zlib's header and 20 us cost more than they save."""

ZLIB_LEVEL = 1
"""Fastest: 256 KiB take about 3 ms of the cycle's time; level 6 saves a tenth more and takes three times as long."""


@dataclass(frozen=True, slots=True)
class Author:
    """Who asked for the next `events` events of a batch."""

    actor: str
    request_id: str
    events: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A batch as it is in the log. `stamp.actor` is empty; `stamped()` gives each event its own."""

    stamp: Stamp
    feature_level: int
    authors: tuple[Author, ...]
    events: tuple[Event, ...]

    def stamped(self) -> Iterator[tuple[Event, Stamp]]:
        """Each event with the stamp it was applied with when it was decided."""
        place = 0
        for author in self.authors:
            stamp = replace(self.stamp, actor=author.actor) if author.actor else self.stamp
            for event in self.events[place : place + author.events]:
                yield event, stamp
            place += author.events
        for event in self.events[place:]:
            yield event, self.stamp


class BatchWriter:
    """Serializes a batch while it is decided, so that its size is known before it is too large. `size` counts bytes
    before compression."""

    __slots__ = ("_message", "_written", "size")

    def __init__(self, stamp: Stamp, feature_level: int) -> None:
        self._message = pb.StoredBatch(
            nonce=stamp.nonce,
            seq=stamp.seq,
            wall=stamp.wall,
            incarnation=stamp.incarnation,
            feature_level=feature_level,
        )
        self._written = 0
        self.size = 0

    def add(self, events: Sequence[Event], actor: str, request_id: str) -> None:
        """Append what one command emitted. Raises TooNew (J11)."""
        for event in events:
            message = self._message.events.add()
            write_event(event, message, self._message.feature_level)
            self.size += message.ByteSize()
        authors = self._message.authors
        if actor or request_id:
            authors.add(actor=actor, request_id=request_id, events=len(events))
        elif authors and not authors[-1].actor and not authors[-1].request_id:
            authors[-1].events += len(events)
        else:
            authors.add(events=len(events))

    def values(self, most: int) -> list[bytes]:
        """The values of its parts, each with at most `most` bytes of payload."""
        return seal(self._message.SerializeToString(), self._message.nonce, most)


def seal(content: bytes, nonce: str, most: int) -> list[bytes]:
    """Envelopes that hold `content`, compressed if that pays, cut into payloads of at most `most` bytes."""
    compression = PLAIN
    if len(content) >= COMPRESS_FROM:
        packed = zlib.compress(content, ZLIB_LEVEL)
        if len(packed) < len(content):
            content, compression = packed, ZLIB
    parts = max(1, -(-len(content) // most))
    return [
        pb.Envelope(
            format=FORMAT,
            compression=compression,
            payload=content[part * most : (part + 1) * most],
            nonce=nonce,
            part=part,
            parts=parts,
        ).SerializeToString()
        for part in range(parts)
    ]


def open_envelope(value: bytes) -> pb.Envelope:
    """The envelope of a stored value. Raises TooNew, Corrupt."""
    try:
        envelope = pb.Envelope.FromString(value)
    except DecodeError as error:
        raise Corrupt(f"a stored value is no envelope: {error}") from error
    if envelope.format > FORMAT or envelope.compression > ZLIB or envelope.key_id:
        raise TooNew(
            f"a stored value has format {envelope.format}, compression {envelope.compression}, key {envelope.key_id!r}"
        )
    return envelope


def nonce_of(value: bytes) -> str:
    """The nonce of a stored value, without decoding its payload (PROTOCOL J6). Raises TooNew, Corrupt."""
    return open_envelope(value).nonce


def unpack(envelope: pb.Envelope, payload: bytes) -> bytes:
    """`payload`, decompressed as the envelope says. Raises Corrupt."""
    if envelope.compression == PLAIN:
        return payload
    try:
        return zlib.decompress(payload)
    except zlib.error as error:
        raise Corrupt(f"a stored value does not decompress: {error}") from error


def read_batch(content: bytes, interned: Interned) -> Stored:
    """The batch of serialized `content`. Raises TooNew, Corrupt."""
    try:
        message = pb.StoredBatch.FromString(content)
    except DecodeError as error:
        raise Corrupt(f"a stored batch does not parse: {error}") from error
    if message.feature_level > FEATURE_LEVEL:
        raise TooNew(f"a batch has feature level {message.feature_level}, this version reads up to {FEATURE_LEVEL}")
    return Stored(
        Stamp(message.wall, message.nonce, message.seq, message.incarnation),
        message.feature_level,
        tuple(Author(author.actor, author.request_id, author.events) for author in message.authors),
        tuple(read_event(event, interned) for event in message.events),
    )


class BatchReader:
    """Puts parts together again, seq by seq."""

    def __init__(self) -> None:
        self.interned = Interned()
        self._parts: list[bytes] = []
        self._nonce = ""

    @property
    def between(self) -> bool:
        """No batch is half read: what was folded so far is the fold at exactly this seq (PROTOCOL J9)."""
        return not self._parts

    def take(self, value: bytes) -> Stored | None:
        """The batch that `value` completes, None if it is a part before the last. Raises TooNew, Corrupt."""
        envelope = open_envelope(value)
        if envelope.part == 0:
            self._parts, self._nonce = [], envelope.nonce
        elif envelope.part != len(self._parts) or envelope.nonce != self._nonce:
            raise Corrupt(
                f"part {envelope.part} of batch {envelope.nonce} follows part {len(self._parts)} of {self._nonce}"
            )
        self._parts.append(envelope.payload)
        if len(self._parts) < envelope.parts:
            return None
        payload, self._parts = b"".join(self._parts), []
        return read_batch(unpack(envelope, payload), self.interned)
