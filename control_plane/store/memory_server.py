"""`MemoryEtcd`: the server that all `MemoryStore` clients of one simulation share.

Theory: one key space plus what time does to it. Leases live at least their TTL and die on the next sweep (0.5 s grid,
as measured on etcd); they do not die without a quorum, and a leader change restarts them (reliability.md 1.1). Requests
that arrive while there is no quorum wait, and land when it is back, long after their client has timed out: that is the
fact behind PROTOCOL J6. All time comes from the injected clock, so a virtual-time loop drives it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from baton.clock import Clock
from control_plane.store.base import (
    Compacted,
    Delete,
    Lease,
    NoSpace,
    NotApplied,
    Put,
    RangeResult,
    StoreError,
    StoreStatus,
    Txn,
    TxnResult,
    Unavailable,
)
from control_plane.store.memory_keyspace import Keyspace, KeyspaceImage
from control_plane.store.rules import check_txn, granted_ttl

T = TypeVar("T")

SWEEP = 0.5
"""Seconds between two looks of etcd's lessor for dead leases: a key outlives its lease by up to this."""

ELECTION = 1.0
"""etcd's default election time-out in seconds; a new leader adds it to every TTL it restarts."""


@dataclass(frozen=True, slots=True)
class MemorySnapshot:
    """A backup: the key space and the leases at one moment."""

    keyspace: KeyspaceImage
    leases: tuple[tuple[int, int], ...]


@dataclass(slots=True)
class _Lease:
    ttl: int
    expires: float


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What the server made of one request: a value or a refusal."""

    value: T | None
    error: StoreError | None

    def take(self) -> T:
        """The value. Raises the refusal."""
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # `error` is None exactly if `value` is a T


class MemoryEtcd:
    """See the module. `clock` is the server's own; clients may have others."""

    def __init__(self, clock: Clock, *, version: str = "3.7.3", quota_bytes: int = 2 << 30) -> None:
        self.clock = clock
        self.keyspace = Keyspace()
        self.nospace = False
        """The NOSPACE alarm: transactions with puts, and lease grants, are refused."""
        self._version, self._quota_bytes = version, quota_bytes
        self._quorum = True
        self.life = 0  # rises with every restore: requests sent to the former life never land
        self._leases: dict[int, _Lease] = {}
        self._ended: dict[int, int] = {}
        self._next_lease = 1
        self._parked: list[Callable[[], None]] = []
        self._waiters: dict[str, dict[asyncio.Future[int], None]] = {}
        """Watches that wait, by prefix, in the order of their coming."""
        self._tasks: set[asyncio.Task[None]] = set()

    # -- requests (synchronous: the moment of linearization) -----------------------------------------------------------

    def txn(self, txn: Txn) -> TxnResult:
        """Run one transaction. Raises NotApplied, NoSpace."""
        check_txn(txn)
        return self.run(txn)

    def run(self, txn: Txn) -> TxnResult:
        """`txn`, for a client that has checked it."""
        self._expire()
        if self.nospace and any(isinstance(op, Put) for op in txn.success):
            raise NoSpace("database space exceeded")
        branch = txn.success if self.keyspace.holds(txn.compares) else txn.failure
        for op in branch:
            if isinstance(op, Put) and op.lease and op.lease not in self._leases:
                raise NotApplied(f"lease {op.lease} not found")
        before = self.keyspace.revision
        result = self.keyspace.commit(txn)
        if self.keyspace.revision != before:
            self._told()
        return result

    def range(self, prefix: str, start: str, limit: int, revision: int, keys_only: bool) -> RangeResult:
        """Read a range. Raises Compacted, Unavailable."""
        self._expire()
        return self.keyspace.range(prefix, start, limit, revision, keys_only)

    def grant(self, ttl: float) -> Lease:
        """A new lease. Raises Unavailable when there is no space."""
        if self.nospace:
            raise Unavailable("database space exceeded")
        lease_id, seconds = self._next_lease, granted_ttl(ttl)
        self._next_lease += 1
        self._leases[lease_id] = _Lease(seconds, self.clock.boot() + seconds)
        self._start(self._reap(lease_id))
        return Lease(lease_id, float(seconds))

    def renew(self, lease_id: int) -> float:
        """The lease's TTL after renewing it; 0 if it is gone."""
        self._expire()
        lease = self._leases.get(lease_id)
        if lease is None:
            return 0.0
        lease.expires = self.clock.boot() + lease.ttl
        return float(lease.ttl)

    def known_ttl(self, lease_id: int) -> float:
        """The TTL a lease has or had, for faulty acknowledgements; 0 if there never was one."""
        lease = self._leases.get(lease_id)
        return float(lease.ttl if lease else self._ended.get(lease_id, 0))

    def revoke(self, lease_id: int) -> None:
        """End a lease and delete its keys in one revision. A lease that is gone is no error."""
        lease = self._leases.pop(lease_id, None)
        if lease is None:
            return
        self._ended[lease_id] = lease.ttl
        keys = sorted(key for key, kv in self.keyspace.live.items() if kv.lease == lease_id)
        if keys:
            self.keyspace.run([Delete(key) for key in keys], succeeded=True)
            self._told()

    def compact(self, revision: int) -> None:
        """Forget history. Raises NotApplied for a revision in the future."""
        if revision > self.keyspace.revision:
            raise NotApplied(f"revision {revision} is in the future of {self.keyspace.revision}")
        self.keyspace.compact(revision)
        self.wake()

    def status(self) -> StoreStatus:
        """Facts about this server."""
        size = self.keyspace.size()
        return StoreStatus(self._version, size, size, self._quota_bytes, "memory")

    # -- transport -----------------------------------------------------------------------------------------------------

    def deliver(self, delay: float, work: Callable[[], T]) -> asyncio.Future[Answer[T] | None]:
        """Carry a request to the server: `work` runs after `delay` seconds, later if there is no quorum then, and never
        if the store is restored in between. Goes on when the client dies: the request has left it. A client that gives
        up settles the future itself, with None."""
        future: asyncio.Future[Answer[T] | None] = asyncio.get_running_loop().create_future()
        life = self.life

        def land() -> None:
            if life != self.life:
                return
            try:
                answer = Answer(work(), None)
            except (NotApplied, Unavailable, Compacted) as refusal:
                answer = Answer(None, refusal)
            if not future.done():
                future.set_result(answer)

        def arrive() -> None:
            if self._quorum:
                land()
            else:
                self._parked.append(land)

        if delay <= 0:
            arrive()
        else:
            self._after(delay, arrive)
        return future

    async def changed(self, prefix: str, cursor: int) -> int:
        """Wait until something under `prefix` may have changed at or after revision `cursor`; the first revision that has to
        be looked at. Everything before it is surely not under `prefix`, so a compaction does not hurt a watch that is
        up to date (as etcd's synced watchers)."""
        if self.keyspace.revision >= cursor:
            return cursor
        waiter: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(prefix, {})[waiter] = None
        try:
            return max(cursor, await waiter)
        finally:
            self._waiters[prefix].pop(waiter, None)

    # -- faults of the server ------------------------------------------------------------------------------------------

    def lose_quorum(self) -> None:
        """From now on nothing is answered, and no lease dies."""
        self._quorum = False

    def regain_quorum(self, *, apply_parked: bool = True) -> None:
        """Serve again under a new leader. What arrived meanwhile is applied now (as measured), or dropped."""
        self._quorum = True
        self.change_leader()
        parked, self._parked = self._parked, []
        for land in parked if apply_parked else ():
            land()

    def change_leader(self) -> None:
        """A new leader restarts every TTL and adds an election time-out: a lease may live about twice its TTL."""
        now = self.clock.boot()
        for lease in self._leases.values():
            lease.expires = now + ELECTION + lease.ttl

    def snapshot(self) -> MemorySnapshot:
        """A backup of this moment."""
        return MemorySnapshot(self.keyspace.image(), tuple((id_, lease.ttl) for id_, lease in self._leases.items()))

    def restore(self, snapshot: MemorySnapshot, *, bump_revision: int = 0) -> None:
        """Become the backup (PROTOCOL J12): revisions rewind unless bumped, requests on their way are lost, TTLs
        restart, and lease ids given out since come again."""
        self.life += 1
        self._parked.clear()
        self.nospace = False
        self.keyspace.load(snapshot.keyspace, bump_revision)
        now = self.clock.boot()
        self._leases = {lease_id: _Lease(ttl, now + ELECTION + ttl) for lease_id, ttl in snapshot.leases}
        self._next_lease = max(self._leases, default=0) + 1
        self._ended = {}
        for lease_id in self._leases:
            self._start(self._reap(lease_id))
        self.wake()

    async def close(self) -> None:
        """Stop every task of the server."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- leases and tasks ----------------------------------------------------------------------------------------------

    def _death(self, lease: _Lease) -> float:
        return math.ceil(lease.expires / SWEEP) * SWEEP

    def _expire(self) -> None:
        now = self.clock.boot()
        if self._quorum:
            for lease_id in [id_ for id_, lease in self._leases.items() if self._death(lease) <= now]:
                self.revoke(lease_id)

    async def _reap(self, lease_id: int) -> None:
        """Make a lease die on time even if nobody asks, so that watchers hear of it."""
        mine = self._leases[lease_id]
        while self._leases.get(lease_id) is mine:
            left = self._death(mine) - self.clock.boot()
            if left <= 0:
                self._expire()
            if self._leases.get(lease_id) is mine:
                # Late without a quorum: look again at the next sweep. Never a sleep that rounds to nothing.
                await self.clock.sleep(max(left, SWEEP / 500) if left > 0 else SWEEP)

    def _after(self, delay: float, act: Callable[[], None]) -> None:
        """Something on its way: a timer of the server's."""
        self.clock.later(delay, act)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def wake(self) -> None:
        """Everybody looks again: the store was compacted, restored or closed."""
        for prefix in self._waiters:
            self._wake(prefix, self.keyspace.revision + 1)

    def _told(self) -> None:
        """A revision was written: tell those who wait for one of its keys."""
        watched = tuple(self._waiters)
        written = [key for key in self.keyspace.last_keys() if key.startswith(watched)]
        for prefix in watched if written else ():
            if any(key.startswith(prefix) for key in written):
                self._wake(prefix, self.keyspace.revision)

    def _wake(self, prefix: str, revision: int) -> None:
        for waiter in self._waiters[prefix]:
            if not waiter.done():
                waiter.set_result(revision)
