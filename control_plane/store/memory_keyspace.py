"""The multi-version key space of the memory store: revisions, history, transactions. No clock, no tasks, no leases.

Theory: etcd is a fold of transactions. Each one that changes something takes the next revision; old versions stay
readable until a compaction forgets them; a watch is nothing but a reader of the change list at its own pace. This
module is that fold and no more, so the nasty parts (time, faults) stay outside it (reliability.md 3.2, "fake etcd").
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.store.base import (
    Compacted,
    Compare,
    Delete,
    EventKind,
    Get,
    KeyValue,
    Put,
    RangeResult,
    Target,
    Txn,
    TxnResult,
    Unavailable,
    WatchBatch,
    WatchEvent,
)

FIRST_REVISION = 1
"""The revision of an empty etcd; its first write is revision 2."""

BATCH_REVISIONS = 1_000
"""Revisions that one watch batch may span, as in etcd: more starves other watchers, fewer slows catching up."""


@dataclass(frozen=True, slots=True)
class KeyspaceImage:
    """Everything of a key space at one moment. Values are immutable, so it shares them."""

    revision: int
    compacted: int
    versions: dict[str, list[KeyValue]]
    history: list[list[WatchEvent]]


class Keyspace:
    """See the module. Deletions are kept as versions with `version` 0."""

    def __init__(self) -> None:
        self.revision = FIRST_REVISION
        self.compacted = 0
        """Oldest revision that can still be read; 0 and 1 both mean: all."""
        self.live: dict[str, KeyValue] = {}
        self._versions: dict[str, list[KeyValue]] = {}
        self._order: list[str] = []
        self._history: list[list[WatchEvent]] = []
        self._bytes = 0

    # -- reading -----------------------------------------------------------------------------------------------------

    def range(self, prefix: str, start: str, limit: int, revision: int, keys_only: bool) -> RangeResult:
        """Keys under `prefix` from `start`. Raises Compacted, or Unavailable for a revision that is not there yet."""
        if revision > self.revision:
            raise Unavailable(f"revision {revision} is in the future of {self.revision}")
        if revision and revision < self.compacted:
            raise Compacted(self.compacted)
        found: list[KeyValue] = []
        for place in range(bisect_left(self._order, max(prefix, start)), len(self._order)):
            key = self._order[place]
            if not key.startswith(prefix):
                break
            kv = self._at(key, revision) if revision else self.live.get(key)
            if kv is None:
                continue
            if limit and len(found) == limit:
                return RangeResult(tuple(found), revision or self.revision, more=True)
            found.append(_without_value(kv) if keys_only else kv)
        return RangeResult(tuple(found), revision or self.revision)

    def changes(self, prefix: str, start: int) -> tuple[int, WatchBatch | None]:
        """The next changes under `prefix` at or after revision `start`, and the first revision not looked at yet.

        Raises Compacted if `start` was forgotten.
        """
        if start < self.compacted:
            raise Compacted(self.compacted)
        first_kept = self.revision - len(self._history) + 1
        stop = min(self.revision + 1, max(start, first_kept) + BATCH_REVISIONS)
        events: list[WatchEvent] = []
        for revision in range(max(start, first_kept), stop):
            events.extend(e for e in self._history[revision - first_kept] if e.kv.key.startswith(prefix))
        batch = WatchBatch(events[-1].kv.mod_revision, tuple(events)) if events else None
        return max(start, stop), batch

    def last_keys(self) -> list[str]:
        """Keys that the newest revision changed."""
        return [event.kv.key for event in self._history[-1]] if self._history else []

    def size(self) -> int:
        """Bytes of all kept versions, keys included."""
        return self._bytes

    # -- writing -----------------------------------------------------------------------------------------------------

    def holds(self, compares: Iterable[Compare]) -> bool:
        """Whether every compare is true now."""
        return all(self._holds(compare) for compare in compares)

    def run(self, ops: Iterable[Put | Delete | Get], succeeded: bool) -> TxnResult:
        """Run one branch in order; a read sees the writes before it. Takes a revision only if something changed."""
        revision = self.revision + 1
        events: list[WatchEvent] = []
        reads: list[KeyValue | None] = []
        for op in ops:
            if isinstance(op, Get):
                reads.append(self.live.get(op.key))
            elif isinstance(op, Put):
                events.append(self._put(op, revision))
            else:
                keys = self._live_under(op.key) if op.prefix else [op.key]
                events.extend(self._delete(key, revision) for key in keys if key in self.live)
        if events:
            self.revision = revision
            self._history.append(events)
        return TxnResult(succeeded, self.revision, tuple(reads))

    def commit(self, txn: Txn) -> TxnResult:
        """Compare, choose a branch, run it."""
        succeeded = self.holds(txn.compares)
        return self.run(txn.success if succeeded else txn.failure, succeeded)

    def compact(self, revision: int) -> None:
        """Forget what only revisions before `revision` could see."""
        if revision <= self.compacted:
            return
        self.compacted = revision
        for key in list(self._versions):
            versions = self._versions[key]
            newest_old = bisect_right(versions, revision, key=_mod) - 1
            kept = versions[max(newest_old, 0) :]
            # A deletion at or before the floor can be forgotten: nobody can read the state before it any more.
            if newest_old >= 0 and kept[0].version == 0:
                kept = kept[1:]
            self._bytes -= sum(map(_bytes, versions[: len(versions) - len(kept)]))
            if kept:
                self._versions[key] = kept
            else:
                del self._versions[key]
                del self._order[bisect_left(self._order, key)]
        forgotten = revision - (self.revision - len(self._history) + 1)
        del self._history[: max(forgotten, 0)]

    # -- images ------------------------------------------------------------------------------------------------------

    def image(self) -> KeyspaceImage:
        """A copy that later writes do not touch."""
        versions = {key: list(kept) for key, kept in self._versions.items()}
        return KeyspaceImage(self.revision, self.compacted, versions, [list(events) for events in self._history])

    def load(self, image: KeyspaceImage, bump_revision: int) -> None:
        """Become `image`. With a bump, revisions jump ahead and everything before counts as compacted."""
        self._versions = {key: list(kept) for key, kept in image.versions.items()}
        self._order = sorted(self._versions)
        self._bytes = sum(_bytes(kv) for kept in self._versions.values() for kv in kept)
        self.live = {key: kept[-1] for key, kept in self._versions.items() if kept[-1].version}
        self._history = [list(events) for events in image.history]
        self.revision, self.compacted = image.revision, image.compacted
        if bump_revision:
            self.revision += bump_revision
            self._history = []
            self.compacted = self.revision

    # -- helpers -----------------------------------------------------------------------------------------------------

    def _holds(self, compare: Compare) -> bool:
        kv = self.live.get(compare.key)
        if compare.target is Target.VALUE:
            return kv is not None and kv.value == compare.value
        if kv is None:
            return compare.revision == 0
        return compare.revision == (kv.mod_revision if compare.target is Target.MOD else kv.create_revision)

    def _put(self, op: Put, revision: int) -> WatchEvent:
        old = self.live.get(op.key)
        created = old.create_revision if old else revision
        kv = KeyValue(op.key, op.value, created, revision, (old.version if old else 0) + 1, op.lease)
        self.live[op.key] = kv
        self._remember(kv)
        return WatchEvent(EventKind.PUT, kv)

    def _delete(self, key: str, revision: int) -> WatchEvent:
        del self.live[key]
        kv = KeyValue(key, b"", create_revision=0, mod_revision=revision, version=0)
        self._remember(kv)
        return WatchEvent(EventKind.DELETE, kv)

    def _remember(self, kv: KeyValue) -> None:
        if kv.key not in self._versions:
            self._versions[kv.key] = []
            insort(self._order, kv.key)
        self._versions[kv.key].append(kv)
        self._bytes += _bytes(kv)

    def _at(self, key: str, revision: int) -> KeyValue | None:
        versions = self._versions[key]
        place = bisect_right(versions, revision, key=_mod) - 1
        return versions[place] if place >= 0 and versions[place].version else None

    def _live_under(self, prefix: str) -> list[str]:
        found = []
        for place in range(bisect_left(self._order, prefix), len(self._order)):
            if not self._order[place].startswith(prefix):
                break
            if self._order[place] in self.live:
                found.append(self._order[place])
        return found


def _bytes(kv: KeyValue) -> int:
    return len(kv.key) + len(kv.value)


def _mod(kv: KeyValue) -> int:
    return kv.mod_revision


def _without_value(kv: KeyValue) -> KeyValue:
    return KeyValue(kv.key, b"", kv.create_revision, kv.mod_revision, kv.version, kv.lease)
