"""`EtcdStore`: the Store port on an etcd cluster.

Theory: this adapter adds nothing to etcd's guarantees and hides nothing of its doubts. A write is sent once; what its
failure means is looked up in `codec` (PROTOCOL J6). A read is sent again, elsewhere if need be, until its time-out. All
keys live under one prefix, so that a shared etcd can serve others, and the prefix never leaves this package. Three
lanes (see `channel`) keep watches, leases and everything else from delaying each other.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

import grpc

from baton.clock import Clock
from baton.internal import etcdwire_pb2 as wire
from control_plane.store.base import (
    Compacted,
    Delete,
    Get,
    KeyValue,
    Lease,
    NoSpace,
    NotApplied,
    Put,
    RangeResult,
    StoreStatus,
    Txn,
    TxnResult,
    Unavailable,
    WatchBatch,
)
from control_plane.store.etcd import channel as rpc
from control_plane.store.etcd import codec
from control_plane.store.etcd.channel import Lane, TlsFiles, WireError
from control_plane.store.etcd.watch import STALL, EtcdWatch
from control_plane.store.rules import check_txn, granted_ttl

R = TypeVar("R")

PAGE_KEYS = 256
"""Keys asked for at once. More would make single answers huge, fewer cost round trips; an answer that is still too
large is asked for again with fewer."""

FIRST_PAUSE = 0.05
MAX_PAUSE = 0.5
"""Seconds between two tries of a read: doubled each time; an election takes about 1 s."""

_RETRIED = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


class EtcdStore:
    """See the module. `endpoints` are `host:port`; `key_prefix` must end in `/` (or be empty); `watch_stall` is
    `watch.STALL`, in seconds."""

    def __init__(
        self,
        endpoints: Sequence[str],
        *,
        tls: TlsFiles | None = None,
        key_prefix: str = "baton/",
        clock: Clock,
        watch_stall: float = STALL,
    ) -> None:
        if key_prefix and not key_prefix.endswith("/"):
            raise ValueError(f"key_prefix {key_prefix!r} must end in /, or it would also cover its siblings' keys")
        self._prefix = key_prefix.encode("ascii")
        self._clock = clock
        self._watch_stall = watch_stall
        self._kv = Lane(endpoints, tls)
        self._leases = Lane(endpoints, tls)
        self._watches = Lane(endpoints, tls)
        self._last_header: wire.EtcdHeader | None = None
        self._closed = False

    async def txn(self, txn: Txn, *, timeout: float) -> TxnResult:
        """See `base.Store.txn`."""
        check_txn(txn)
        request = codec.txn_request(txn, self._prefix)
        before, started = self._last_header, self._clock.boot()
        try:
            response = await self._kv.unary(rpc.TXN, request, timeout)
        except WireError as error:
            self._kv.failed(error)
            failure = codec.write_error("txn", error)
            if codec.is_no_space(error) and await self._had_no_effect(txn, before, started + timeout):
                failure = NoSpace(f"txn: {error}")
            raise failure from error
        self._note(response.header)
        return codec.txn_result(response, len(self._prefix))

    async def get(self, key: str, *, timeout: float) -> tuple[KeyValue | None, int]:
        """See `base.Store.get`."""
        request = wire.EtcdRangeRequest(key=self._key(key))
        response = await self._told("get", self._read("get", self._range_call(request), timeout))
        kv = codec.key_value(response.kvs[0], len(self._prefix)) if response.kvs else None
        return kv, response.header.revision

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
        """See `base.Store.range`. Asks in pages, all at the revision of the first."""
        deadline = self._clock.boot() + timeout
        request = wire.EtcdRangeRequest(
            key=self._key(max(prefix, start)),
            range_end=codec.prefix_end(self._key(prefix)),
            revision=revision,
            keys_only=keys_only,
        )
        if request.range_end != b"\x00" and request.key >= request.range_end:
            request.key = request.range_end  # nothing lies between: etcd answers an empty range
        found: list[KeyValue] = []
        page = PAGE_KEYS
        while True:
            request.limit = min(page, limit - len(found)) if limit else page
            try:
                response = await self._read("range", self._range_call(request), deadline - self._clock.boot())
            except WireError as error:
                if codec.is_compacted(error):
                    raise Compacted(await self._oldest_revision(request.revision)) from error
                if not codec.is_oversize(error) or page == 1:
                    raise codec.read_error("range", error) from error
                page = max(1, page // 8)
                continue
            request.revision = request.revision or response.header.revision
            found.extend(codec.key_value(kv, len(self._prefix)) for kv in response.kvs)
            if not response.more or (limit and len(found) >= limit):
                return RangeResult(tuple(found), request.revision, response.more)
            request.key = response.kvs[-1].key + b"\x00"

    async def watch(self, prefix: str, *, from_revision: int) -> AsyncGenerator[WatchBatch, None]:
        """See `base.Store.watch`."""
        async with aclosing(self._open_watch(prefix).batches(from_revision)) as batches:
            async for batch in batches:
                yield batch

    async def lease_grant(self, ttl: float, *, timeout: float) -> Lease:
        """See `base.Store.lease_grant`."""
        request = wire.EtcdLeaseGrantRequest(ttl=granted_ttl(ttl))
        try:
            response = await self._leases.unary(rpc.LEASE_GRANT, request, timeout)
        except WireError as error:
            self._leases.failed(error)
            raise codec.read_error("lease grant", error) from error
        if response.error:
            raise Unavailable(f"lease grant: {response.error}")
        return Lease(response.id, float(response.ttl))

    async def lease_keepalive(self, lease_id: int, *, timeout: float) -> float:
        """See `base.Store.lease_keepalive`."""
        request = wire.EtcdLeaseKeepAliveRequest(id=lease_id)
        try:
            response = await self._leases.first_answer(rpc.LEASE_KEEPALIVE, request, timeout)
        except WireError as error:
            self._leases.failed(error)
            raise codec.read_error("lease keepalive", error) from error
        return float(max(response.ttl, 0))

    async def lease_revoke(self, lease_id: int, *, timeout: float) -> None:
        """See `base.Store.lease_revoke`. A lease that is gone is no error."""
        try:
            await self._leases.unary(rpc.LEASE_REVOKE, wire.EtcdLeaseRevokeRequest(id=lease_id), timeout)
        except WireError as error:
            self._leases.failed(error)
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise codec.write_error("lease revoke", error) from error

    async def compact(self, revision: int, *, timeout: float) -> None:
        """See `base.Store.compact`. What is compacted already is no error; a future revision is NotApplied."""
        try:
            await self._kv.unary(rpc.COMPACT, wire.EtcdCompactionRequest(revision=revision), timeout)
        except WireError as error:
            self._kv.failed(error)
            if codec.is_compacted(error):
                return
            failure = codec.write_error("compact", error)
            raise failure if isinstance(failure, NotApplied) else codec.read_error("compact", error) from error

    async def status(self, *, timeout: float) -> StoreStatus:
        """See `base.Store.status`. `quota_bytes` is 0 on servers before 3.6, which do not tell."""

        async def ask(seconds: float) -> wire.EtcdStatusResponse:
            return await self._kv.unary(rpc.STATUS, wire.EtcdStatusRequest(), seconds)

        facts = await self._told("status", self._read("status", ask, timeout))
        return StoreStatus(
            version=facts.version,
            db_bytes=facts.db_size,
            in_use_bytes=facts.db_size_in_use,
            quota_bytes=facts.db_size_quota,
            cluster_id=f"{facts.header.cluster_id:016x}",
        )

    async def close(self) -> None:
        """Close all connections and end the watches; calls in flight fail as their contract says."""
        self._closed = True
        for lane in (self._kv, self._leases, self._watches):
            await lane.close()

    def _open_watch(self, prefix: str) -> EtcdWatch:
        return EtcdWatch(
            self._watches,
            self._clock,
            self._key(prefix),
            strip=len(self._prefix),
            stall=self._watch_stall,
            closed=lambda: self._closed,
        )

    # -- reads ---------------------------------------------------------------------------------------------------------

    def _key(self, key: str) -> bytes:
        return self._prefix + key.encode("ascii")

    def _range_call(self, request: wire.EtcdRangeRequest) -> Callable[[float], Awaitable[wire.EtcdRangeResponse]]:
        async def call(seconds: float) -> wire.EtcdRangeResponse:
            response = await self._kv.unary(rpc.RANGE, request, seconds)
            self._note(response.header)
            return response

        return call

    async def _read(self, what: str, call: Callable[[float], Awaitable[R]], timeout: float) -> R:
        """Try until `timeout`. With several endpoints one silent one gets only half of the time that is left. Raises
        WireError for an answer that no other try would better, else Unavailable."""
        deadline = self._clock.boot() + timeout
        pause = FIRST_PAUSE
        left = timeout
        while True:
            try:
                return await call(left / 2 if len(self._kv.targets) > 1 else left)
            except WireError as error:
                self._kv.failed(error)
                if error.code not in _RETRIED:
                    raise
                left = deadline - self._clock.boot()
                if left <= pause:
                    raise codec.read_error(what, error) from error
            await self._clock.sleep(pause)
            left -= pause
            pause = min(2 * pause, MAX_PAUSE)

    async def _told(self, what: str, reading: Awaitable[R]) -> R:
        """The result of `_read`, its last WireError too as Unavailable."""
        try:
            return await reading
        except WireError as error:
            raise codec.read_error(what, error) from error

    def _note(self, header: wire.EtcdHeader) -> None:
        """Remember the newest header. Answers of parallel calls come out of order; another cluster or term starts anew."""
        last = self._last_header
        same = last is not None and (last.cluster_id, last.raft_term) == (header.cluster_id, header.raft_term)
        if last is None or not same or header.revision >= last.revision:
            self._last_header = header

    async def _oldest_revision(self, wanted: int) -> int:
        """The oldest readable revision. A range's refusal does not name it, but that of a watch from the start does."""
        try:
            async with aclosing(self._open_watch("").batches(1)) as batches:
                await anext(batches, None)
        except Compacted as known:
            return known.revision
        return wanted + 1

    async def _had_no_effect(self, txn: Txn, before: wire.EtcdHeader | None, deadline: float) -> bool:
        """Whether a transaction that was answered with "no space" surely did nothing; see
        `codec.surely_not_applied`."""
        written = [op.key for op in txn.success if isinstance(op, Put) or (isinstance(op, Delete) and not op.prefix)]
        probe = codec.txn_request(Txn((), [Get(key) for key in written]), self._prefix)
        left = deadline - self._clock.boot()
        if left <= 0:
            return False
        try:
            response = await self._kv.unary(rpc.TXN, probe, left)
        except WireError:
            return False
        self._note(response.header)
        reads = codec.txn_result(response, len(self._prefix)).reads
        return codec.surely_not_applied(before, response.header, reads)
