"""Rebuilding a shard's state: snapshot plus log, everything read at one revision (PROTOCOL J1, J9, O4).

Theory. After a taking nobody else can write the shard (J4), but our own snapshot process may trim it while we read;
so one linearizable read fixes a revision, and manifest, chunks and log are read *at* it. If a compaction overtakes
us, we begin again. What is found must be whole: seqs without a gap from the snapshot to `head`, the same nonce at the
end. A log that contradicts itself stops its shard (`Corrupt`), as one that is too new does (`TooNew`, J11): a guess
would be a lie.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from baton.clock import Clock
from baton.internal import events_pb2 as pb
from control_plane.batches import BatchReader, open_envelope, unpack
from control_plane.codec import FEATURE_LEVEL, Interned, read_event, write_event
from control_plane.core.events import Event
from control_plane.core.machine import Machine
from control_plane.journal import Head
from control_plane.manifest import Manifest
from control_plane.refusals import Corrupt
from control_plane.store import keys
from control_plane.store.base import Compacted, KeyValue, Store, Unavailable
from control_plane.store_reads import RETRY_PAUSE, read_incarnation, read_keys

READ_TIMEOUT = 10.0
"""Seconds for one page. Pages are a few MB; larger would only delay noticing a dead store."""

PAGE_BYTES = 2 << 20
"""Wanted bytes of one page of the log. gRPC's limit is 4 MiB; far smaller pages cost round trips."""

FIRST_PAGE = 16
MAX_PAGE = 1024
"""Entries of the first page (at most 256 KiB each), and of later ones, whose size is then known."""

CHUNKS_PER_PAGE = 4
"""512 KiB each."""

OLDEST_LEVEL = 1
"""The feature level of a shard without a log (PROTOCOL J11): every program reads it."""

SLICE = 0.010
"""Seconds of work between two yields (O4). Longer delays keepalives and other shards; shorter costs loop turns."""


@dataclass(frozen=True, slots=True)
class Recovered:
    """A shard as it was at one revision. `head` may be beyond `folded` by parts of a batch that was never finished."""

    machine: Machine
    head: Head
    folded: Head
    incarnation: int
    owner: bytes | None
    manifest: Manifest | None
    manifest_revision: int
    """mod_revision of the manifest, 0 if there is none."""
    revision: int
    log_bytes: int
    """Bytes of log since the snapshot."""
    nonces: bytes
    """Nonces of the log since the snapshot up to `folded`."""
    level: int
    """Highest feature level of what is folded."""


class _Pace:
    """Yields to the loop every SLICE."""

    def __init__(self, clock: Clock) -> None:
        self._clock, self._since = clock, clock.boot()

    async def step(self) -> None:
        if self._clock.boot() - self._since >= SLICE:
            await self._clock.sleep(0)
            self._since = self._clock.boot()


async def recover(
    store: Store, clock: Clock, shard: str, make_machine: Callable[[str], Machine], *, timeout: float
) -> Recovered:
    """The shard's state as of now. Raises Unavailable after `timeout` seconds, TooNew, Corrupt."""
    give_up = clock.boot() + timeout
    while True:
        try:
            return await _attempt(store, clock, shard, make_machine)
        except (Unavailable, Compacted):
            if clock.boot() >= give_up:
                raise Unavailable(f"shard {shard} could not be read in {timeout} s") from None
            await clock.sleep(RETRY_PAUSE)


async def _attempt(store: Store, clock: Clock, shard: str, make_machine: Callable[[str], Machine]) -> Recovered:
    wanted = [keys.owner(shard), keys.head(shard), keys.snapshot_manifest(shard), keys.INCARNATION]
    (owner, head_kv, manifest_kv, incarnation), revision = await read_keys(store, wanted, timeout=READ_TIMEOUT)
    head = Head.parse(head_kv)
    manifest = Manifest.parse(manifest_kv.value) if manifest_kv else None
    machine, reader, pace = make_machine(shard), BatchReader(), _Pace(clock)
    if manifest is not None:
        content = await _snapshot_content(store, shard, manifest, revision)
        for event in snapshot_events(content, reader.interned):
            machine.apply(event, manifest.stamp)
            await pace.step()
    at = folded = Head(manifest.seq, manifest.nonce) if manifest else Head()
    log_bytes, nonces, waiting = 0, bytearray(), bytearray()
    level = manifest.level if manifest else OLDEST_LEVEL
    async for kv in _log(store, shard, at.seq + 1, head.seq, revision):
        parsed = keys.parse_log(kv.key)
        if parsed is None or parsed[1] != at.seq + 1:
            raise Corrupt(f"shard {shard}: {kv.key} follows seq {at.seq}")
        nonce = open_envelope(kv.value).nonce
        batch = reader.take(kv.value)
        at = Head(at.seq + 1, nonce)
        log_bytes += len(kv.value)
        waiting += bytes.fromhex(nonce)
        if batch is not None:
            for event, stamp in batch.stamped():
                machine.apply(event, stamp)
            folded = at
            level = max(level, batch.feature_level)
            nonces += waiting
            waiting.clear()
        await pace.step()
    if at != head:
        raise Corrupt(f"shard {shard}: the log ends with {at}, the head is {head}")
    return Recovered(
        machine=machine,
        head=head,
        folded=folded,
        incarnation=read_incarnation(incarnation),
        owner=owner.value if owner else None,
        manifest=manifest,
        manifest_revision=manifest_kv.mod_revision if manifest_kv else 0,
        revision=revision,
        log_bytes=log_bytes,
        nonces=bytes(nonces),
        level=level,
    )


async def _snapshot_content(store: Store, shard: str, manifest: Manifest, revision: int) -> bytes:
    """All chunks together, decompressed. Raises Corrupt."""
    prefix = keys.snapshot_chunk_prefix(shard, manifest.seq)
    values: list[bytes] = []
    for first in range(0, manifest.chunks, CHUNKS_PER_PAGE):
        start = keys.snapshot_chunk(shard, manifest.seq, first)
        limit = min(CHUNKS_PER_PAGE, manifest.chunks - first)
        page = await store.range(prefix, start=start, limit=limit, revision=revision, timeout=READ_TIMEOUT)
        values += (kv.value for kv in page.kvs)
    if len(values) != manifest.chunks or chunks_digest(values) != manifest.digest:
        raise Corrupt(f"shard {shard}: the snapshot at {manifest.seq} is not whole")
    envelopes = [open_envelope(value) for value in values]
    return unpack(envelopes[0], b"".join(envelope.payload for envelope in envelopes))


async def _log(store: Store, shard: str, first: int, last: int, revision: int) -> AsyncIterator[KeyValue]:
    """Entries `first` to `last` as of `revision`, in pages of about PAGE_BYTES."""
    prefix, limit = keys.log_prefix(shard), FIRST_PAGE
    while first <= last:
        start = keys.log(shard, first)
        limit = min(limit, last - first + 1)
        page = await store.range(prefix, start=start, limit=limit, revision=revision, timeout=READ_TIMEOUT)
        if not page.kvs:
            raise Corrupt(f"shard {shard}: seq {first} is missing, the head is at {last}")
        for kv in page.kvs:
            yield kv
        first += len(page.kvs)
        size = sum(len(kv.value) for kv in page.kvs) // len(page.kvs) + 1
        limit = min(max(PAGE_BYTES // size, FIRST_PAGE), MAX_PAGE)


# -- the content of a snapshot -----------------------------------------------------------------------------------------

_LENGTH = struct.Struct(">I")


def snapshot_content(events: Iterable[Event]) -> bytes:
    """A machine's dump as bytes: each event with its length before it."""
    content = bytearray()
    for event in events:
        message = pb.Event()
        write_event(event, message, FEATURE_LEVEL)
        body = message.SerializeToString()
        content += _LENGTH.pack(len(body))
        content += body
    return bytes(content)


def snapshot_events(content: bytes, interned: Interned) -> Iterable[Event]:
    """The events of `snapshot_content`. Raises Corrupt, TooNew."""
    place = 0
    try:
        while place < len(content):
            (length,) = _LENGTH.unpack_from(content, place)
            place += _LENGTH.size
            yield read_event(pb.Event.FromString(content[place : place + length]), interned)
            place += length
    except (struct.error, DecodeError) as error:
        raise Corrupt(f"a snapshot does not parse at byte {place}: {error}") from error


def chunks_digest(values: Iterable[bytes]) -> bytes:
    """BLAKE2b-256 of all chunks in order."""
    digest = hashlib.blake2b(digest_size=32)
    for value in values:
        digest.update(value)
    return digest.digest()
