"""Noticing that the store was restored from a backup, and stopping everybody until a person has looked (PROTOCOL J12).

Theory. A restore rewinds seqs, revisions and owner keys alike, so nothing in the store can tell. Memory outside it
can: every replica and agent keeps, per shard, the highest seq it was told of and the nonce of the batch there (a
*mark*). A mark is made only after its commit, so a later linearizable read that finds `head` below the seq, or
another nonce at it, in the same incarnation of the same federation, proves a restore. The finder puts
`restored_suspected`, which fails every transaction of every replica (J4), until an operator confirms: that raises
`incarnation` and deletes the key, in one.

A seq trimmed longer ago than the manifest remembers proves nothing: then only "head below it" is looked at.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Protocol

from baton.clock import Clock
from control_plane.batches import nonce_of
from control_plane.core.model import ALL_SHARDS
from control_plane.journal import Head
from control_plane.manifest import Manifest
from control_plane.store import keys
from control_plane.store.base import Compare, Delete, Get, KeyValue, Put, Store, Txn
from control_plane.store_reads import read_incarnation, read_keys, settle_txn

CHECK_TIMEOUT = 5.0
"""Seconds for one read of a check: an etcd failover takes about 1 s. Too small: checks fail for nothing; too large: an
agent's Hello waits."""


def in_words(suspicion: str) -> str:
    """What `restored_suspected` holds, for people; a value of an unknown form as it is."""
    try:
        told = json.loads(suspicion)
        moment = datetime.fromtimestamp(float(told["wall"]), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        return f"{told['replica']} found at {moment} that the store knows less than was acknowledged ({told['detail']})"
    except (ValueError, KeyError, TypeError, OverflowError, OSError):
        return suspicion


class MarkLike(Protocol):
    """Anything that cites a place in a shard's log: a `Mark`, or baton.v1.ShardMark."""

    @property
    def shard(self) -> str: ...
    @property
    def incarnation(self) -> int: ...
    @property
    def seq(self) -> int: ...
    @property
    def nonce(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Mark:
    """The batch at `seq` of `shard` has `nonce`: somebody was told so after its commit."""

    shard: str
    incarnation: int
    seq: int
    nonce: str


class Marks:
    """The highest mark of every shard this process has ever seen. Memory only; bounded by the number of shards."""

    def __init__(self) -> None:
        self._highest: dict[str, Mark] = {}

    def observe(self, mark: Mark) -> None:
        """Remember `mark` if it is newer than what is known of its shard."""
        known = self._highest.get(mark.shard)
        if known is None or (mark.incarnation, mark.seq) > (known.incarnation, known.seq):
            self._highest[mark.shard] = mark

    def of(self, shards: Iterable[str]) -> list[Mark]:
        """What is known of these shards."""
        return [self._highest[shard] for shard in shards if shard in self._highest]


class RestoreDetector:
    """One replica's eye on restores. `federation_uid` is set when the replica has joined its federation."""

    def __init__(self, store: Store, clock: Clock, replica: str) -> None:
        self._store, self._clock, self._replica = store, clock, replica
        self.marks = Marks()
        self.federation_uid = ""

    async def check_marks(self, marks: Sequence[MarkLike], federation_uid: str) -> bool:
        """Whether these marks show that the store was restored; if so it is said in the store before this returns.
        Raises Unavailable if the store does not answer."""
        if not marks or federation_uid != self.federation_uid:
            return False
        cited = [mark for mark in marks if mark.seq > 0 and mark.shard in ALL_SHARDS]
        shards = sorted({mark.shard for mark in cited})
        found, _ = await read_keys(self._store, [keys.INCARNATION, *map(keys.head, shards)], timeout=CHECK_TIMEOUT)
        incarnation = read_incarnation(found[0])
        heads = {shard: Head.parse(kv) for shard, kv in zip(shards, found[1:], strict=True)}
        for mark in cited:
            if mark.incarnation != incarnation:
                continue
            problem = await self._contradiction(mark, heads[mark.shard])
            if problem:
                await self.suspect(incarnation, problem)
                return True
        return False

    async def check_own(self, shards: Iterable[str]) -> bool:
        """`check_marks` with what this replica itself has seen: on taking a shard, and on resuming (O3)."""
        return await self.check_marks(self.marks.of(shards), self.federation_uid)

    async def suspect(self, incarnation: int, problem: str) -> None:
        """Stop every transaction of every replica (J4). A suspicion that is already there stays as it is. Raises
        Unavailable."""
        detail = {"replica": self._replica, "detail": problem, "wall": self._clock.wall()}
        stop = Txn(
            (
                Compare.absent(keys.RESTORED_SUSPECTED),
                Compare.equals(keys.INCARNATION, str(incarnation).encode()),
            ),
            (Put(keys.RESTORED_SUSPECTED, json.dumps(detail).encode()),),
            (Get(keys.RESTORED_SUSPECTED), Get(keys.INCARNATION)),
        )
        await settle_txn(self._store, self._clock, stop, timeout=CHECK_TIMEOUT)

    async def confirm_restored(self, may_lift: Callable[[str], None] | None = None) -> int:
        """An operator has looked: raise the incarnation and lift the stop, in one transaction. The incarnation that is
        then in force; unchanged if nothing was suspected. `may_lift` is asked with the suspicion before each try, and
        what it raises is raised. Raises Unavailable."""
        while True:
            found, _ = await read_keys(self._store, [keys.INCARNATION, keys.RESTORED_SUSPECTED], timeout=CHECK_TIMEOUT)
            incarnation = read_incarnation(found[0])
            if found[1] is None:
                return incarnation
            if may_lift is not None:
                may_lift(found[1].value.decode())
            lift = Txn(
                (
                    Compare.equals(keys.INCARNATION, str(incarnation).encode()),
                    Compare.unchanged(keys.RESTORED_SUSPECTED, found[1].mod_revision),
                ),
                (Put(keys.INCARNATION, str(incarnation + 1).encode()), Delete(keys.RESTORED_SUSPECTED)),
            )
            if (await settle_txn(self._store, self._clock, lift, timeout=CHECK_TIMEOUT)).succeeded:
                return incarnation + 1

    async def _contradiction(self, mark: MarkLike, head: Head) -> str:
        """What is wrong with `mark`, empty if nothing. `head` was read after the mark was known."""
        where = f"shard {mark.shard}, incarnation {mark.incarnation}, seq {mark.seq}"
        if head.seq < mark.seq:
            return f"{where} was acknowledged, and the head is at {head.seq}"
        nonce = head.nonce if head.seq == mark.seq else await self._nonce_at(mark.shard, mark.seq)
        if nonce and nonce != mark.nonce:
            return f"{where} was acknowledged as batch {mark.nonce}, and the log has {nonce} there"
        return ""

    async def _nonce_at(self, shard: str, seq: int) -> str:
        """The nonce at `seq`, empty if it was trimmed too long ago to know."""
        wanted = [keys.log(shard, seq), keys.snapshot_manifest(shard)]
        (entry, manifest), _ = await read_keys(self._store, wanted, timeout=CHECK_TIMEOUT)
        if entry is not None:
            return nonce_of(entry.value)
        return _kept_nonce(manifest, seq)


def _kept_nonce(manifest: KeyValue | None, seq: int) -> str:
    return Manifest.parse(manifest.value).nonce_at(seq) if manifest is not None else ""
