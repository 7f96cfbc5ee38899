"""The Store port and its contract. Two adapters keep it: `etcd` and `memory` (tests/contract/test_store.py runs on both).

The contract, in prose:

1. A transaction is atomic and linearizable. All compares are on the state right before it; `success` operations run if
   all hold, else `failure` operations run (reads only, by our own rule: PROTOCOL J6 judges a refused compare by what the
   else branch read).
2. Every write takes a new revision, greater than all before it. All writes of one transaction share it.
3. **Failure is one of two kinds.** `NotApplied`: the store never took the request (refused before it was sent, or refused by
   rule, e.g. too large, no space). `Ambiguous`: it may have been applied, or *may still be applied later* (measured: a
   put that timed out after 7 s landed afterwards). A time-out is always `Ambiguous`. Nothing is retried in here except
   reads (PROTOCOL J6).
4. A read (`get`, `range`) is linearizable unless it names a revision. `Compacted` if that revision is gone.
5. A watch delivers, per revision, all events of that revision under the prefix as one `WatchBatch`, in order, without
   gaps, resuming by itself over broken streams; `Compacted` ends it when it cannot (the caller lists again), be it that
   history was forgotten or that the store was restored and is not even where the watch was. (A restored store that has
   passed that place by then cannot be told from another: list again now and then.) A batch may be empty of events
   (progress). A watch is a feed for caches, never a proof.
6. A lease lives at least its TTL after the last renewal, and may live longer (a leader change restarts it). Keys put
   with `lease` vanish with it. `keepalive` returns the remaining TTL; 0 means that the lease is gone. Success of a
   keepalive is not ownership (PROTOCOL O2): only a fenced write is.

Keys are `str` (ASCII, `/`-separated), values `bytes`. No more than `MAX_TXN_OPS` compares, and as many operations.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

MAX_TXN_OPS = 128
"""etcd's default `--max-txn-ops`, counted per list. More: refused as NotApplied; raising it is an operator's job, not ours."""

MAX_REQUEST_BYTES = 1_400_000
"""Under etcd's 1.5 MiB request limit with room for framing. Larger: refused here, before it is sent."""


class StoreError(Exception):
    """Base of every failure that leaves the store. Never raised itself."""


class NotApplied(StoreError):
    """The request had no effect and never will (PROTOCOL J6)."""


class NoSpace(NotApplied):
    """The store's quota is exhausted; reads, deletes and keepalives still work."""


class Unsupported(NotApplied):
    """The server is not one we dare to run on (version gate, reliability.md 1.1)."""


class Ambiguous(StoreError):
    """The request may have been applied, or may be applied later (PROTOCOL J6)."""


class Unavailable(StoreError):
    """A *read* (or lease call without effect) got no answer. Says nothing about the state."""


class Compacted(StoreError):
    """The wanted revision is gone. `revision` is the oldest still readable."""

    def __init__(self, revision: int) -> None:
        super().__init__(f"compacted: oldest readable revision is {revision}")
        self.revision = revision


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One key as read. `lease` is 0 when none; `version` counts puts since creation."""

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int = 1
    lease: int = 0


class Target(Enum):
    """What a compare looks at."""

    VALUE = "value"
    MOD = "mod"
    CREATE = "create"


@dataclass(frozen=True, slots=True)
class Compare:
    """Equality of one field of one key. A missing key has MOD = CREATE = 0, and equals no VALUE."""

    key: str
    target: Target
    value: bytes = b""
    revision: int = 0

    @staticmethod
    def equals(key: str, value: bytes) -> Compare:
        """The key exists with exactly this value."""
        return Compare(key, Target.VALUE, value=value)

    @staticmethod
    def unchanged(key: str, mod_revision: int) -> Compare:
        """The key was last written at `mod_revision` (0: it is absent). Stays false once false (PROTOCOL J5)."""
        return Compare(key, Target.MOD, revision=mod_revision)

    @staticmethod
    def absent(key: str) -> Compare:
        """The key does not exist."""
        return Compare(key, Target.CREATE, revision=0)


@dataclass(frozen=True, slots=True)
class Put:
    """Write `value`; `lease` 0 detaches the key from any lease."""

    key: str
    value: bytes
    lease: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove `key`, or with `prefix` every key that starts with it."""

    key: str
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Get:
    """Read `key` inside a transaction."""

    key: str


@dataclass(frozen=True, slots=True)
class Txn:
    """if all `compares` hold then `success` else `failure` (reads only). No key may be written twice."""

    compares: Sequence[Compare]
    success: Sequence[Put | Delete | Get]
    failure: Sequence[Get] = ()


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`reads` holds one entry per `Get` of the branch that ran, in order (None: no such key)."""

    succeeded: bool
    revision: int
    reads: Sequence[KeyValue | None] = ()


@dataclass(frozen=True, slots=True)
class RangeResult:
    """Keys in order; `revision` is that of the read; `more` if `limit` cut it."""

    kvs: Sequence[KeyValue]
    revision: int
    more: bool = False


class EventKind(Enum):
    """What happened to a key."""

    PUT = "put"
    DELETE = "delete"


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """One change. For DELETE `kv.value` is empty and `kv.mod_revision` that of the deletion."""

    kind: EventKind
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class WatchBatch:
    """All events of one or more whole revisions, up to and including `revision`."""

    revision: int
    events: Sequence[WatchEvent]


@dataclass(frozen=True, slots=True)
class Lease:
    """A granted lease. `ttl` is what the server granted (seconds), which may be more than asked."""

    id: int
    ttl: float


@dataclass(frozen=True, slots=True)
class StoreStatus:
    """Facts for gates and metrics. `db_bytes` is the file, `in_use_bytes` what of it holds data; `quota_bytes` is 0 if the server
    does not tell, negative if it has none."""

    version: str
    db_bytes: int
    in_use_bytes: int
    quota_bytes: int
    cluster_id: str


class Store(Protocol):
    """See the module's contract. Every call has a `timeout` in seconds; none waits for ever."""

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        """Run one transaction. Raises NotApplied, NoSpace or Ambiguous."""
        ...

    async def get(self, key: str, *, timeout: float) -> tuple[KeyValue | None, int]:
        """One key and the revision of the read; linearizable. Raises Unavailable."""
        ...

    async def range(
        self,
        prefix: str,
        *,
        timeout: float,
        start: str = "",
        limit: int = 0,
        revision: int = 0,
        keys_only: bool = False,
    ) -> RangeResult:
        """Keys under `prefix`, from `start` (a full key; default: the first), in order. Raises Unavailable, Compacted."""
        ...

    def watch(self, prefix: str, *, from_revision: int) -> AsyncIterator[WatchBatch]:
        """Changes under `prefix` at or after `from_revision` (> 0). Raises Compacted, also when the store is not even at
        the revision before it: it was restored. Close it with `aclose()`."""
        ...

    async def lease_grant(self, ttl: float, *, timeout: float) -> Lease:
        """A new lease. Raises Unavailable (an unknown lease may be left behind; it expires by itself)."""
        ...

    async def lease_keepalive(self, lease_id: int, *, timeout: float) -> float:
        """Renew; the granted TTL in seconds, 0 if the lease is gone. Raises Unavailable."""
        ...

    async def lease_revoke(self, lease_id: int, *, timeout: float) -> None:
        """End a lease and its keys. Raises Ambiguous."""
        ...

    async def compact(self, revision: int, *, timeout: float) -> None:
        """Forget history before `revision`. Raises Unavailable."""
        ...

    async def status(self, *, timeout: float) -> StoreStatus:
        """Version and size. Raises Unavailable."""
        ...

    async def close(self) -> None:
        """Release sockets and tasks."""
        ...
