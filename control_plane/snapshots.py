"""Snapshots, trims and compaction: keeping the log short without ever looking at live state (PROTOCOL J9, J12).

Theory. A snapshot is the fold at exactly one seq, made from the previous snapshot and the log by somebody who is not
the owner: normally a process of its own, so that it costs the owner nothing. Its writes are the owner's, though:
every chunk, the manifest and every trim compare the owner key (the nonce of this taking) and the incarnation, so a
helper that outlives its owner can do no harm. The manifest is written last and makes the snapshot real; only then the
log up to its seq goes.

`write_snapshot` is that job. `Snapshots` decides when it is due and has it done by a `Snapshotter`: a process
(`HelperProcess`, in control_plane.snapshot_process) or, in the simulator, the same code in place
(`InPlaceSnapshotter`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.clock import Clock
from control_plane.batches import seal
from control_plane.controller import Controller
from control_plane.core.machine import Machine
from control_plane.core.model import FLEET
from control_plane.manifest import Manifest, keep_nonces
from control_plane.recovery import Recovered, chunks_digest, recover, snapshot_content
from control_plane.refusals import Corrupt, TooNew
from control_plane.slots import OwnedShard
from control_plane.store import keys
from control_plane.store.base import Compare, Delete, Put, Store, StoreError, Txn
from control_plane.store_reads import settle_txn

log = logging.getLogger(__name__)

CHUNK_BYTES = 512 * 1024
"""Payload of one chunk: a third of etcd's limit, so that a chunk never delays a commit much; smaller ones cost round
trips."""

TRIM_KEYS = 1000
"""Log entries that one trim deletes at most (a power of ten): etcd does them in one go while everybody waits, about
10 ms."""

WRITE_TIMEOUT = 10.0
"""Seconds for one write of a snapshot. Nobody waits for it; a failed job is done again later."""

RECOVER_TIMEOUT = 60.0
"""Seconds for reading the shard; see CycleConfig.recovery_seconds."""


class Superseded(Exception):
    """The shard has another owner or incarnation, or another job was quicker: nothing more may be written."""


@dataclass(frozen=True, slots=True)
class Job:
    """Make a snapshot of `shard` for the owner whose key holds `owner`, in `incarnation`."""

    shard: str
    owner: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Report:
    """What a job did: the snapshot's seq, its bytes, and the revision of its manifest."""

    seq: int
    size: int
    revision: int


class Snapshotter(Protocol):
    """Does a job somewhere."""

    async def snapshot(self, job: Job) -> Report:
        """Raises Superseded, Unavailable, TooNew or Corrupt; the last two stop nobody, the owner has read the same."""
        ...


class InPlaceSnapshotter:
    """A `Snapshotter` on this loop, for the simulator and for tests: the same code, without the process around it."""

    def __init__(self, store: Store, clock: Clock, make_machine: Callable[[str], Machine]) -> None:
        self._store, self._clock, self._make_machine = store, clock, make_machine

    async def snapshot(self, job: Job) -> Report:
        """See `Snapshotter.snapshot`."""
        return await write_snapshot(self._store, self._clock, job, self._make_machine)


async def write_snapshot(store: Store, clock: Clock, job: Job, make_machine: Callable[[str], Machine]) -> Report:
    """Do `job`. Raises Superseded, Unavailable, TooNew, Corrupt."""
    found = await recover(store, clock, job.shard, make_machine, timeout=RECOVER_TIMEOUT)
    if found.owner != job.owner.encode() or found.incarnation != job.incarnation:
        raise Superseded(f"shard {job.shard} has another owner or incarnation")
    if found.folded.seq == (found.manifest.seq if found.manifest else 0):
        size = found.manifest.size if found.manifest else 0
        return Report(found.folded.seq, size, found.revision)
    chunks = seal(snapshot_content(found.machine.dump()), found.folded.nonce, CHUNK_BYTES)
    writer = _Writer(store, clock, job)
    for number, chunk in enumerate(chunks):
        await writer.write((Put(keys.snapshot_chunk(job.shard, found.folded.seq, number), chunk),))
    manifest = _manifest(found, chunks, clock.wall())
    key = keys.snapshot_manifest(job.shard)
    unchanged = Compare.unchanged(key, found.manifest_revision)
    value = manifest.encode()
    try:
        revision = await writer.write((Put(key, value),), unchanged)
    except Superseded:
        # An earlier copy of this very write may have been applied (J6): then it is ours.
        kv, revision = await store.get(key, timeout=WRITE_TIMEOUT)
        if kv is None or kv.value != value:
            raise
    await _trim(store, writer, job.shard, manifest.seq)
    return Report(manifest.seq, manifest.size, revision)


def _manifest(found: Recovered, chunks: Sequence[bytes], wall: float) -> Manifest:
    first_kept, nonces = keep_nonces(found.manifest, found.nonces, found.folded.seq)
    return Manifest(
        seq=found.folded.seq,
        nonce=found.folded.nonce,
        chunks=len(chunks),
        size=sum(map(len, chunks)),
        digest=chunks_digest(chunks),
        incarnation=found.incarnation,
        first_kept=first_kept,
        nonces=nonces,
        wall=wall,
        level=found.level,
    )


class _Writer:
    """Writes under the owner's fence (J9)."""

    def __init__(self, store: Store, clock: Clock, job: Job) -> None:
        self._store, self._clock = store, clock
        self._fence = (
            Compare.equals(keys.owner(job.shard), job.owner.encode()),
            Compare.equals(keys.INCARNATION, str(job.incarnation).encode()),
            Compare.absent(keys.RESTORED_SUSPECTED),
        )

    async def write(self, ops: Sequence[Put | Delete], *more: Compare) -> int:
        """The write's revision. All of them may be applied twice without harm. Raises Superseded, Unavailable."""
        txn = Txn((*self._fence, *more), tuple(ops))
        result = await settle_txn(self._store, self._clock, txn, timeout=WRITE_TIMEOUT)
        if not result.succeeded:
            raise Superseded("the fence of a snapshot does not hold any more")
        return result.revision


async def _trim(store: Store, writer: _Writer, shard: str, seq: int) -> None:
    """Delete the log up to `seq`, and the chunks of every other snapshot. Raises Superseded, Unavailable."""
    page = await store.range(keys.log_prefix(shard), limit=1, keys_only=True, timeout=WRITE_TIMEOUT)
    oldest = keys.parse_log(page.kvs[0].key) if page.kvs else None
    if oldest is not None:
        for first, zeros in decimal_blocks(oldest[1], seq, TRIM_KEYS):
            key = keys.log(shard, first)
            await writer.write((Delete(key[: len(key) - zeros], prefix=True) if zeros else Delete(key),))
    start, prefix = "", keys.snapshot_prefix(shard)
    while True:
        page = await store.range(prefix, start=start, limit=1, keys_only=True, timeout=WRITE_TIMEOUT)
        chunk = keys.parse_snapshot_chunk(page.kvs[0].key) if page.kvs else None
        if chunk is None:
            return  # only the manifest is behind the chunks
        chunks = keys.snapshot_chunk_prefix(shard, chunk[1])
        if chunk[1] != seq:
            await writer.write((Delete(chunks, prefix=True),))
        start = chunks[:-1] + "0"  # "0" follows "/": behind all chunks of this snapshot


def decimal_blocks(first: int, last: int, most: int) -> Iterator[tuple[int, int]]:
    """`first` to `last` as blocks (start, zeros) of 10**zeros numbers that share all other digits, so that each block
    is one prefix of fixed-width keys. `most` numbers in a block at most."""
    while first <= last:
        zeros = 0
        while 10 ** (zeros + 1) <= most and first % 10 ** (zeros + 1) == 0 and first + 10 ** (zeros + 1) - 1 <= last:
            zeros += 1
        yield first, zeros
        first += 10**zeros


# -- when --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SnapshotsConfig:
    """When a shard's snapshot is due (J9: by bytes or time, not by the hour)."""

    log_bytes: int = 4 << 20
    """Of log since the last one: what a takeover has to fold at most, about half a second. Less makes snapshots of big
    shards too often; 33 shards of it are far under the protocol's 256 MB."""
    seconds: float = 60.0
    """Since the last one, if anything was written."""
    poll: float = 1.0
    """Between two looks."""
    keep_history: float = 60.0
    """Seconds of etcd's history that a compaction leaves: watches and recoveries that are slower begin again."""


@dataclass(slots=True)
class _Progress:
    """What is known of one owned shard's snapshots. `owned` tells a new taking from the one before."""

    owned: OwnedShard
    log_bytes: int
    since: float
    seq: int


class Snapshots:
    """Has snapshots made of this replica's shards, one at a time, and compacts the store where `fleet` is owned."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        controller: Controller,
        snapshotter: Snapshotter,
        config: SnapshotsConfig | None = None,
    ) -> None:
        self._store, self._clock, self._controller = store, clock, controller
        self._snapshotter, self._config = snapshotter, config or SnapshotsConfig()
        self._progress: dict[str, _Progress] = {}
        self._revisions: deque[tuple[float, int]] = deque()
        self._compacted = 0

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(self._config.poll)
            for owned in self.due():
                await self._make(owned)
            if FLEET in self._controller.owned():
                await self._compact()

    def due(self) -> list[OwnedShard]:
        """Shards whose snapshot is due, the longest log first."""
        now, shown = self._clock.boot(), self._controller.owned()
        self._progress = {shard: p for shard, p in self._progress.items() if shown.get(shard) is p.owned}
        waiting: list[tuple[int, OwnedShard]] = []
        for shard, owned in shown.items():
            progress = self._progress.setdefault(shard, _Progress(owned, 0, now, 0))
            grown = owned.log_bytes - progress.log_bytes
            old = now - progress.since >= self._config.seconds and owned.seq > progress.seq
            if grown >= self._config.log_bytes or (old and grown):
                waiting.append((grown, owned))
        return [owned for _, owned in sorted(waiting, key=lambda pair: (-pair[0], pair[1].id))]

    async def _make(self, owned: OwnedShard) -> None:
        if owned.lost:
            return
        progress, log_bytes = self._progress[owned.id], owned.log_bytes
        try:
            report = await self._snapshotter.snapshot(Job(owned.id, owned.owner_value.decode(), owned.incarnation))
        except (StoreError, Superseded, TooNew, Corrupt) as error:
            log.warning("a snapshot failed, it is made again later", extra={"shard": owned.id, "error": str(error)})
            progress.since = self._clock.boot()
            progress.log_bytes = max(progress.log_bytes, log_bytes - self._config.log_bytes // 2)
            return
        progress.log_bytes, progress.since, progress.seq = log_bytes, self._clock.boot(), report.seq

    async def _compact(self) -> None:
        """Forget etcd's history up to what was current `keep_history` ago."""
        now = self._clock.boot()
        try:
            _, revision = await self._store.get(keys.INCARNATION, timeout=WRITE_TIMEOUT)
            if not self._revisions or now - self._revisions[-1][0] >= self._config.keep_history / 4:
                self._revisions.append((now, revision))
            while len(self._revisions) > 1 and now - self._revisions[1][0] >= self._config.keep_history:
                self._revisions.popleft()
            seen, target = self._revisions[0]
            if now - seen >= self._config.keep_history and target > self._compacted:
                await self._store.compact(target, timeout=WRITE_TIMEOUT)
                self._compacted = target
        except StoreError as error:
            log.warning("could not compact the store", extra={"error": str(error)})
