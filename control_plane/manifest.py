"""The manifest of a snapshot: which one is whole, and the nonces of the log it replaced (PROTOCOL J9, J12). Pure."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton.internal import events_pb2 as pb
from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import Stamp
from control_plane.refusals import Corrupt, TooNew

FORMAT = 1
"""Version of the manifest and of what its chunks hold."""

NONCE_BYTES = 8
"""Bytes of a batch's nonce: two equal ones among 4 billion batches of a shard are unlikely (40 %), at the same seq of a
restored store impossible in practice (5e-20). More would only cost room here."""

KEPT_NONCES = 10_000
"""Trimmed seqs whose nonces are kept: 80 KB a manifest, an hour and a half of a shard that commits twice a second.
Holders that cite older ones are only checked against the head."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """A whole snapshot. `nonces` are those of seqs `first_kept` to `seq`, NONCE_BYTES each."""

    seq: int
    nonce: str
    chunks: int
    size: int
    """Bytes of all chunks."""
    digest: bytes
    incarnation: int
    first_kept: int
    nonces: bytes
    wall: float
    level: int = FEATURE_LEVEL
    """The highest feature level of the batches it folds: while the federation is at an older level, programs of that level read
    it (PROTOCOL J11)."""

    @property
    def stamp(self) -> Stamp:
        """The stamp its events are applied with."""
        return Stamp(self.wall, self.nonce, self.seq, self.incarnation)

    def nonce_at(self, seq: int) -> str:
        """The nonce of the batch at `seq`; empty if it is not kept."""
        start = (seq - self.first_kept) * NONCE_BYTES
        return self.nonces[start : start + NONCE_BYTES].hex() if start >= 0 else ""

    def encode(self) -> bytes:
        """The stored form."""
        return pb.SnapshotManifest(
            format=FORMAT,
            seq=self.seq,
            nonce=self.nonce,
            chunks=self.chunks,
            bytes=self.size,
            digest=self.digest,
            feature_level=self.level,
            incarnation=self.incarnation,
            first_kept=self.first_kept,
            nonces=self.nonces,
            wall=self.wall,
        ).SerializeToString()

    @staticmethod
    def parse(value: bytes) -> Manifest:
        """Of a stored value. Raises TooNew (J11), Corrupt."""
        try:
            message = pb.SnapshotManifest.FromString(value)
        except DecodeError as error:
            raise Corrupt(f"a snapshot's manifest does not parse: {error}") from error
        if message.format > FORMAT or message.feature_level > FEATURE_LEVEL:
            raise TooNew(f"a snapshot has format {message.format}, feature level {message.feature_level}")
        return Manifest(
            seq=message.seq,
            nonce=message.nonce,
            chunks=message.chunks,
            size=message.bytes,
            digest=message.digest,
            incarnation=message.incarnation,
            first_kept=message.first_kept,
            nonces=message.nonces,
            wall=message.wall,
            level=message.feature_level,
        )


def keep_nonces(earlier: Manifest | None, since: bytes, seq: int) -> tuple[int, bytes]:
    """(first_kept, nonces) of a snapshot at `seq`, from the earlier manifest and the nonces of the log after it."""
    nonces = ((earlier.nonces if earlier else b"") + since)[-KEPT_NONCES * NONCE_BYTES :]
    return seq - len(nonces) // NONCE_BYTES + 1, nonces
