"""What can go wrong between a client and the memory store: values that a simulator hands in, call by call.

Theory: everything that was measured on a real etcd (reliability.md 1.1, 3.2, section 6) must be producible on demand,
and only on demand, so that a seed decides it and a replay repeats it. Nothing in here decides anything: a `StoreFaults`
is asked once per call, keepalive and watch batch, and answers with one of the values below. Faults of the server itself
(no quorum, a leader change, no space, a restore) are methods of `MemoryEtcd`. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Outcome(Enum):
    """The fate of one call."""

    OK = "ok"
    REFUSED = "refused"
    """Dropped before it was applied, and the client knows: NotApplied (reads: Unavailable)."""
    LOST_REQUEST = "lost request"
    """Never applied, and the client does not know: Ambiguous."""
    LOST_REPLY = "lost reply"
    """Applied on arrival, and the client does not know: Ambiguous."""
    LATE = "late"
    """The client has its Ambiguous long before the write is applied, `late` seconds after it would have arrived. A late
    read is only lost."""


@dataclass(frozen=True, slots=True)
class CallFault:
    """The fate of one call. `latency` and `reply_latency` (seconds) are the way there and back; a way longer than the
    call's time-out makes the answer a time-out, and the request still lands when it arrives."""

    outcome: Outcome = Outcome.OK
    latency: float = 0.0
    reply_latency: float = 0.0
    late: float = 0.0


class KeepaliveFault(Enum):
    """What a keepalive's answer is worth (PROTOCOL O2)."""

    HONEST = "honest"
    STALE_LEADER = "stale leader"
    """A leader that has lost its quorum acknowledges, and nothing was renewed."""
    ACKED_AFTER_REVOKE = "acknowledged after revoke"
    """The lease is gone, and the answer is its old TTL all the same (etcd issue 14758)."""


@dataclass(frozen=True, slots=True)
class WatchFault:
    """The fate of one watch batch. `delay` (seconds) comes first; then exactly one of the others, in this order:
    `compacted` ends the watch; `broken` drops the stream, which resumes by itself; `duplicate` delivers the batch twice
    (harsher than the contract, which a cache must survive all the same)."""

    delay: float = 0.0
    compacted: bool = False
    broken: bool = False
    duplicate: bool = False


NO_FAULT = CallFault()
NO_WATCH_FAULT = WatchFault()


class StoreFaults(Protocol):
    """One client's bad luck. Must be deterministic: the simulator seeds it."""

    def call(self, op: str, key: str) -> CallFault:
        """`op` is txn, get, range, grant, keepalive, revoke, compact or status; `key` the first key it touches."""
        ...

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        """Asked when a keepalive reaches the server."""
        ...

    def watch(self, prefix: str, revision: int) -> WatchFault:
        """Asked for each batch that is about to be delivered; `revision` is the batch's."""
        ...
