"""Who wrote what: only owners write logs (I13; PROTOCOL J4, O1).

Theory. Owner keys and logs are in one store, so their changes have one order. Whoever writes a shard's log must be whom the owner key
names at that very revision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lab.checking.fold import Fold
from lab.checking.history import Owned, Record, Violation


def owners_write(record: Record, fold: Fold) -> Iterator[Violation]:
    """I13: every batch was written by the replica that owned the shard."""
    del fold
    changes: dict[str, list[Owned]] = defaultdict(list)
    for owned in record.owners:
        changes[owned.shard].append(owned)
    place: dict[str, int] = defaultdict(int)
    for written in record.journal:
        there = changes[written.shard]
        if not written.writer or not there:
            continue
        at = place[written.shard]
        while at < len(there) and _before(there[at], written.at, written.revision):
            at += 1
        place[written.shard] = at
        owner = there[at - 1].replica if at else ""
        if owner != written.writer:
            text = f"{written.writer} wrote seq {written.stamp.seq} of shard {written.shard}, which {owner or 'nobody'} owned"
            yield Violation("I13 owners write", written.at, text)


def seqs_are_whole(record: Record, fold: Fold) -> Iterator[Violation]:
    """I13, J4: a shard's log has no gap and no second batch at a seq, but for what a restore has undone."""
    del fold
    last: dict[str, tuple[int, str]] = {}
    for written in record.journal:
        if record.forgotten(written.at, written.revision):
            continue
        seq, nonce = last.get(written.shard, (0, ""))
        now = (written.stamp.seq, written.stamp.nonce)
        if now == (seq, nonce):
            continue
        if now[0] <= seq:
            text = f"shard {written.shard}: the batch {now[1]} at seq {now[0]} follows {nonce} at {seq}"
            yield Violation("I13 owners write", written.at, text)
        last[written.shard] = now


def _before(owned: Owned, at: float, revision: int) -> bool:
    """An owner key's change that a write at that place comes after. (Revisions rewind with a restore, true times do not.)"""
    return owned.at < at or (owned.at == at and owned.revision < revision)
