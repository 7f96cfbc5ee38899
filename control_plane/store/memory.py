"""The Store port in memory: `MemoryStore` is one client's view of a shared `MemoryEtcd`.

Theory: the simulator needs a store that keeps the contract of `base` to the letter, whose misfortunes are values, and
that costs microseconds. The client below is the network: it asks its `StoreFaults` for the fate of each call, carries
the request to the server, and tells the caller no more than a real client could know (PROTOCOL J6, O2).
Cancelling a call that has left does not call it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TypeVar

from baton.clock import Clock
from control_plane.store.base import (
    Ambiguous,
    Compacted,
    KeyValue,
    Lease,
    NotApplied,
    RangeResult,
    StoreError,
    StoreStatus,
    Txn,
    TxnResult,
    Unavailable,
    WatchBatch,
)
from control_plane.store.memory_faults import (
    NO_FAULT,
    NO_WATCH_FAULT,
    CallFault,
    KeepaliveFault,
    Outcome,
    StoreFaults,
    WatchFault,
)
from control_plane.store.memory_server import Answer, MemoryEtcd, MemorySnapshot
from control_plane.store.rules import check_txn

__all__ = [
    "CallFault",
    "KeepaliveFault",
    "MemoryEtcd",
    "MemorySnapshot",
    "MemoryStore",
    "Outcome",
    "StoreFaults",
    "WatchFault",
]

T = TypeVar("T")


class MemoryStore:
    """One client. `clock` is the client's (time-outs, watch delays); by default the server's."""

    def __init__(self, server: MemoryEtcd, *, faults: StoreFaults | None = None, clock: Clock | None = None) -> None:
        self._server = server
        self._faults = faults
        self._clock = clock or server.clock
        self._closed = False

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        """See `base.Store.txn`."""
        check_txn(txn)
        key = next((op.key for op in (*txn.success, *txn.failure)), "")
        return await self._call("txn", key, timeout, lambda: self._server.run(txn), NotApplied, Ambiguous)

    async def get(self, key: str, *, timeout: float) -> tuple[KeyValue | None, int]:
        """See `base.Store.get`."""

        def read() -> tuple[KeyValue | None, int]:
            found = self._server.range(key, key, 1, 0, False)
            kv = found.kvs[0] if found.kvs and found.kvs[0].key == key else None
            return kv, found.revision

        return await self._call("get", key, timeout, read, Unavailable, Unavailable)

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
        """See `base.Store.range`."""

        def read() -> RangeResult:
            return self._server.range(prefix, start, limit, revision, keys_only)

        return await self._call("range", prefix, timeout, read, Unavailable, Unavailable)

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """See `base.Store.watch`."""
        cursor, life = from_revision, -1
        while not self._closed:
            if life != self._server.life and self._server.keyspace.revision < cursor - 1:
                raise Compacted(self._server.keyspace.revision)  # restored: it is not where we were
            life = self._server.life
            after, batch = self._server.keyspace.changes(prefix, cursor)
            if batch is None:
                cursor = after
                cursor = await self._server.changed(prefix, cursor)
                continue
            fault = self._faults.watch(prefix, batch.revision) if self._faults else NO_WATCH_FAULT
            if fault.delay:
                await self._clock.sleep(fault.delay)
            if fault.compacted:
                raise Compacted(self._server.keyspace.revision)
            if fault.broken:
                await self._clock.sleep(0)  # a new stream, from the same revision: it may be compacted by now
                continue
            cursor = after
            yield batch
            if fault.duplicate:
                yield batch

    async def lease_grant(self, ttl: float, *, timeout: float) -> Lease:
        """See `base.Store.lease_grant`."""
        return await self._call("grant", "", timeout, lambda: self._server.grant(ttl), Unavailable, Unavailable)

    async def lease_keepalive(self, lease_id: int, *, timeout: float) -> float:
        """See `base.Store.lease_keepalive`."""

        def renew() -> float:
            fault = self._faults.keepalive(lease_id) if self._faults else KeepaliveFault.HONEST
            if fault is KeepaliveFault.STALE_LEADER:
                return self._server.known_ttl(lease_id)
            remaining = self._server.renew(lease_id)
            if fault is KeepaliveFault.ACKED_AFTER_REVOKE and remaining == 0:
                return self._server.known_ttl(lease_id)
            return remaining

        return await self._call("keepalive", "", timeout, renew, Unavailable, Unavailable)

    async def lease_revoke(self, lease_id: int, *, timeout: float) -> None:
        """See `base.Store.lease_revoke`."""
        await self._call("revoke", "", timeout, lambda: self._server.revoke(lease_id), Ambiguous, Ambiguous)

    async def compact(self, revision: int, *, timeout: float) -> None:
        """See `base.Store.compact`."""
        await self._call("compact", "", timeout, lambda: self._server.compact(revision), Unavailable, Unavailable)

    async def status(self, *, timeout: float) -> StoreStatus:
        """See `base.Store.status`."""
        return await self._call("status", "", timeout, self._server.status, Unavailable, Unavailable)

    async def close(self) -> None:
        """Refuse every later call and end the watches. Requests on their way still land."""
        self._closed = True
        self._server.wake()

    async def _call(
        self,
        op: str,
        key: str,
        timeout: float,
        work: Callable[[], T],
        refused: type[StoreError],
        unknown: type[StoreError],
    ) -> T:
        """Carry one request. `refused` is raised if it surely had no effect, `unknown` if nobody can tell."""
        if self._closed:
            raise refused(f"{op}: the store is closed")
        fault = self._faults.call(op, key) if self._faults else NO_FAULT
        if fault.outcome is Outcome.REFUSED:
            await self._clock.sleep(min(fault.latency, timeout))
            raise refused(f"{op}: failed to connect")
        if not fault.latency:
            await self._clock.sleep(0)  # a real store always lets others run
        if fault.outcome is Outcome.OK:
            answering = self._server.deliver(fault.latency, work)
            return await self._answer(op, answering, fault.reply_latency, timeout, unknown)
        if fault.outcome is not Outcome.LOST_REQUEST:
            late = fault.late if fault.outcome is Outcome.LATE else 0.0
            _unheard = self._server.deliver(fault.latency + late, work)
        await self._clock.sleep(min(fault.latency + fault.reply_latency, timeout))
        raise unknown(f"{op}: no answer")

    async def _answer(
        self,
        op: str,
        answering: asyncio.Future[Answer[T] | None],
        reply_latency: float,
        timeout: float,
        unknown: type[StoreError],
    ) -> T:
        sent = self._clock.boot()
        alarm = self._clock.later(timeout, partial(_give_up, answering))
        try:
            answer = await answering
        finally:
            alarm.cancel()
        left = timeout - (self._clock.boot() - sent)
        if answer is None or reply_latency > left:
            await self._clock.sleep(0 if answer is None else max(left, 0.0))
            raise unknown(f"{op}: timed out after {timeout} s")
        if reply_latency:
            await self._clock.sleep(reply_latency)
        return answer.take()


def _give_up(answering: asyncio.Future[Answer[T] | None]) -> None:
    """The client waits no longer. What the server makes of the request is told to nobody."""
    if not answering.done():
        answering.set_result(None)
