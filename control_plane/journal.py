"""Committing batches under the fence of the log, and never guessing what became of one (PROTOCOL J4, J5, J6).

Theory. A transaction carries one part of one batch for each of several shards. It compares, per shard, the owner
key's value (with the nonce of this taking) and `head` as we left it, and once `incarnation` and the absence of
`restored_suspected`. Whoever owns a shard is the only one that can write its log, so after an unclear answer one
question decides everything: what does a read *inside a refused copy of the same transaction* show?

* `log/seq` has our nonce, or `head` >= seq under our owner key: committed.
* the owner key is not ours: lost; and if `head` < seq in that same read, surely not applied.
* neither: it goes again, byte-identical, at the same seq. Absence proves nothing, for an old copy may still land.

A transaction is dead once one of its owner keys has changed, since no taking uses a nonce twice; its other shards
then go again in a transaction of their own. `incarnation` never comes back either, so a changed one kills a batch as
well; whether an early copy was applied before a restore cannot be known, so that is UNKNOWN.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.clock import Clock
from control_plane.batches import nonce_of
from control_plane.refusals import Corrupt
from control_plane.store import keys
from control_plane.store.base import Compare, Get, KeyValue, Put, Store, StoreError, Txn, TxnResult

log = logging.getLogger(__name__)

COMMIT_TIMEOUT = 5.0
"""Seconds for one try: several etcd elections. Too small: healthy slow commits are asked again for nothing; too
large: a lost answer holds the shards for that long."""

FIRST_PAUSE = 0.02
"""Seconds before the second try: a connection may just have been replaced."""

MAX_PAUSE = 1.0
"""Seconds between later tries: as often as etcd elects a leader."""


_HEAD = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: `json.dumps` with separators makes an encoder a call, two for each shard of a transaction."""


@dataclass(frozen=True, slots=True)
class Head:
    """The value of a shard's `head` key; seq 0 stands for an absent one."""

    seq: int = 0
    nonce: str = ""

    def encode(self) -> bytes:
        """The stored form."""
        return _HEAD({"seq": self.seq, "nonce": self.nonce}).encode()

    def compare(self, shard: str) -> Compare:
        """Holds while this is the shard's head."""
        key = keys.head(shard)
        return Compare.equals(key, self.encode()) if self.seq else Compare.absent(key)

    @staticmethod
    def parse(kv: KeyValue | None) -> Head:
        """Of a `head` key. Raises Corrupt."""
        if kv is None:
            return Head()
        try:
            value = json.loads(kv.value)
            return Head(int(value["seq"]), str(value["nonce"]))
        except (ValueError, KeyError, TypeError) as error:
            raise Corrupt(f"{kv.key} does not parse: {error}") from error


def owner_value(replica: str, nonce: str) -> bytes:
    """The value of an owner key: who took the shard, and the fresh nonce of this taking (PROTOCOL J4, O1)."""
    return json.dumps({"replica": replica, "nonce": nonce}, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Entry:
    """One part of a shard's batch, with the fence it is written under. Never changes: a repeat is byte-identical
    (J6)."""

    shard: str
    owner: bytes
    before: Head
    nonce: str
    value: bytes
    incarnation: int
    side_puts: tuple[Put, ...] = ()

    @property
    def after(self) -> Head:
        """The head that this entry makes."""
        return Head(self.before.seq + 1, self.nonce)

    @property
    def size(self) -> int:
        """Bytes it adds to a transaction, keys and framing estimated."""
        return len(self.value) + sum(len(put.value) + 128 for put in self.side_puts) + 768

    @property
    def puts(self) -> int:
        """Operations it adds to a transaction's success list."""
        return 2 + len(self.side_puts)


class Verdict(Enum):
    """What became of an entry."""

    COMMITTED = "committed"
    COMMITTED_THEN_LOST = "committed, and the shard has another owner now"
    LOST = "lost, outcome unknown"
    NOT_APPLIED = "lost, and surely not applied"
    CONDITION_FAILED = "its condition fails for ever"


Resolved = Callable[[Entry, Verdict], None]


@dataclass(frozen=True, slots=True)
class Reading:
    """What the else branch of a refused transaction read of one shard, and of the federation; all at one revision."""

    owner: bytes | None
    head: Head
    entry_nonce: str
    incarnation: str
    suspected: bool


def transaction(entries: Sequence[Entry], condition: Compare | None = None) -> Txn:
    """J4: 2 compares a shard and 2 once, 2 puts a shard; the else branch reads what J6 judges by."""
    compares = [
        Compare.equals(keys.INCARNATION, str(entries[0].incarnation).encode()),
        Compare.absent(keys.RESTORED_SUSPECTED),
    ]
    success: list[Put] = []
    failure = [Get(keys.INCARNATION), Get(keys.RESTORED_SUSPECTED)]
    for entry in entries:
        shard, seq = entry.shard, entry.before.seq + 1
        compares += (Compare.equals(keys.owner(shard), entry.owner), entry.before.compare(shard))
        success += (Put(keys.log(shard, seq), entry.value), Put(keys.head(shard), entry.after.encode()))
        success += entry.side_puts
        failure += (Get(keys.owner(shard)), Get(keys.head(shard)), Get(keys.log(shard, seq)))
    if condition is not None:
        compares.append(condition)
    return Txn(tuple(compares), tuple(success), tuple(failure))


def readings(result: TxnResult, entries: Sequence[Entry]) -> list[Reading]:
    """The else branch of `transaction(entries)`, shard by shard. Raises Corrupt, TooNew."""
    incarnation, suspected = result.reads[0], result.reads[1]
    found: list[Reading] = []
    for place in range(len(entries)):
        owner, head, entry = result.reads[2 + 3 * place : 5 + 3 * place]
        found.append(
            Reading(
                owner.value if owner else None,
                Head.parse(head),
                nonce_of(entry.value) if entry else "",
                incarnation.value.decode("ascii", "replace") if incarnation else "",
                suspected is not None,
            )
        )
    return found


def judge(entry: Entry, reading: Reading) -> Verdict | None:
    """J6, literally. None: nothing is proved, it goes again."""
    ours = reading.owner == entry.owner
    if reading.entry_nonce == entry.nonce:
        return Verdict.COMMITTED if ours else Verdict.COMMITTED_THEN_LOST
    if ours and reading.head.seq >= entry.after.seq:
        return Verdict.COMMITTED
    if not ours:
        return Verdict.NOT_APPLIED if reading.head.seq < entry.after.seq else Verdict.LOST
    if reading.incarnation != str(entry.incarnation):
        return Verdict.LOST
    return None


def rewound(entry: Entry, reading: Reading) -> str:
    """Why this reading under our own owner key can only come from a restored store (J12); empty if it need not."""
    before = entry.before
    if reading.head.seq < before.seq or (reading.head.seq == before.seq and reading.head.nonce != before.nonce):
        return f"shard {entry.shard}: we committed {before}, the store has {reading.head} under our own owner key"
    return ""


class Journal:
    """The only writer of logs. `suspect(incarnation, problem)` is told of a restored store (J12)."""

    def __init__(self, store: Store, clock: Clock, suspect: Callable[[int, str], Awaitable[None]]) -> None:
        self._store, self._clock, self._suspect = store, clock, suspect

    async def commit(self, entries: Sequence[Entry], condition: Compare | None, resolved: Resolved) -> None:
        """Write `entries` in one transaction; returns when the fate of each is known, after calling `resolved` once for
        each as soon as it is. `condition` (J5) only with a single entry. Does not give up by itself: cancel it."""
        left = list(entries)
        txn = transaction(left, condition)
        pause = FIRST_PAUSE
        while left:
            try:
                result = await self._store.txn(txn, timeout=COMMIT_TIMEOUT)
            except StoreError as error:
                log.warning("commit is unclear, sending it again", extra={"shards": _names(left), "error": str(error)})
                await self._clock.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE)
                continue
            if result.succeeded:
                for entry in left:
                    resolved(entry, Verdict.COMMITTED)
                return
            found = readings(result, left)
            rest = self._resolve(left, found, condition, resolved)
            if len(rest) < len(left):
                # The transaction is dead or done; what is left goes again in one of its own, the same bytes a shard.
                left, pause = rest, FIRST_PAUSE
                if left:
                    txn = transaction(left, condition)
                continue
            await self._explain(left, found)
            await self._clock.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    def _resolve(
        self, left: list[Entry], found: list[Reading], condition: Compare | None, resolved: Resolved
    ) -> list[Entry]:
        """Tell what is decided; the entries that are not."""
        rest: list[Entry] = []
        for entry, reading in zip(left, found, strict=True):
            verdict = judge(entry, reading)
            if verdict is None and condition is not None and _only_condition_failed(entry, reading):
                verdict = Verdict.CONDITION_FAILED
            if verdict is None:
                rest.append(entry)
            else:
                resolved(entry, verdict)
        return rest

    async def _explain(self, left: list[Entry], found: list[Reading]) -> None:
        """Nothing was proved: either the store is stopped (J12), or it must be, or an old copy is on its way."""
        if found[0].suspected:
            log.error("the store may have been restored: run `baton admin restored`", extra={"shards": _names(left)})
            return
        for entry, reading in zip(left, found, strict=True):
            problem = rewound(entry, reading)
            if problem:
                try:
                    await self._suspect(entry.incarnation, problem)
                except StoreError as error:
                    log.warning("could not tell of a restored store yet", extra={"error": str(error)})
                return


def _only_condition_failed(entry: Entry, reading: Reading) -> bool:
    """Every compare of the fence holds in the reading, so it was the condition that did not (J5)."""
    return reading.head == entry.before and not reading.suspected


def _names(entries: Sequence[Entry]) -> list[str]:
    return [entry.shard for entry in entries]
