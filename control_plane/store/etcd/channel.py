"""Connections to etcd: endpoints, channel options, rotation, and grpc's failures as one plain exception.

Theory: a paused member keeps its TCP connections alive and swallows every request (reliability.md section 6, pitfall
20), so waiting for UNAVAILABLE is not enough: a time-out, too, must move the next try to another endpoint. And nothing
below us may repeat a request on its own, or a write that is unclear could run twice (PROTOCOL J6): channel retries are
off.

A `Lane` is one purpose's connection (writes and reads, leases, watches), with sockets of its own, so that a big watch
answer never delays a keepalive.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import grpc
import grpc.aio

from baton.internal import etcdwire_pb2 as wire

Q = TypeVar("Q")
R = TypeVar("R")

MAX_RECEIVE_BYTES = 32 << 20
"""Largest answer we take. etcd bounds requests, not answers; smaller would refuse a page of large values, larger would
let one answer take much memory. `client.py` shrinks its page when an answer does not fit."""

CLOSED = "the store is closed"
"""Detail of the error of a call that began after `Lane.close`; such a call surely sent nothing."""

RETIRE_GRACE = 30.0
"""Seconds that calls on a channel may go on after a rotation has left it; as long as the longest time-out in use."""

HAS_LEADER = (("hasleader", "true"),)
"""Metadata: a member without a leader ends the stream instead of keeping it silent."""

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.enable_retries", 0),  # also transparent ones: we must know whether a request was sent twice
    ("grpc.use_local_subchannel_pool", 1),  # else all lanes to one address would share one connection
    ("grpc.keepalive_time_ms", 10_000),  # etcd punishes pings under 5 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),  # etcd punishes pings without streams
    ("grpc.http2.max_pings_without_data", 0),  # an idle watch must be pinged for ever
    ("grpc.max_receive_message_length", MAX_RECEIVE_BYTES),
    ("grpc.max_send_message_length", -1),  # `rules.check_txn` bounds requests before they come here
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1_000),  # also bounds one connection attempt
    ("grpc.max_reconnect_backoff_ms", 2_000),  # the default of 2 min would outlive every lease after an outage
)


class WireError(Exception):
    """A call failed. `generation` says which channel of its lane it ran on."""

    def __init__(self, code: grpc.StatusCode, detail: str, generation: int = 0) -> None:
        super().__init__(f"{code.name}: {detail}")
        self.code = code
        self.detail = detail
        self.generation = generation


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files for mutual TLS. Read for each new connection's channel, so a rotated file is taken up by the next
    one."""

    ca: Path
    cert: Path
    key: Path

    def credentials(self) -> grpc.ChannelCredentials:
        """What grpc wants."""
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, R]):
    """One remote method: its path and both codecs."""

    path: str
    encode: Callable[[Q], bytes]
    decode: Callable[[bytes], R]


RANGE = Method("/etcdserverpb.KV/Range", wire.EtcdRangeRequest.SerializeToString, wire.EtcdRangeResponse.FromString)
TXN = Method("/etcdserverpb.KV/Txn", wire.EtcdTxnRequest.SerializeToString, wire.EtcdTxnResponse.FromString)
COMPACT = Method(
    "/etcdserverpb.KV/Compact", wire.EtcdCompactionRequest.SerializeToString, wire.EtcdCompactionResponse.FromString
)
LEASE_GRANT = Method(
    "/etcdserverpb.Lease/LeaseGrant",
    wire.EtcdLeaseGrantRequest.SerializeToString,
    wire.EtcdLeaseGrantResponse.FromString,
)
LEASE_REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke",
    wire.EtcdLeaseRevokeRequest.SerializeToString,
    wire.EtcdLeaseRevokeResponse.FromString,
)
LEASE_KEEPALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive",
    wire.EtcdLeaseKeepAliveRequest.SerializeToString,
    wire.EtcdLeaseKeepAliveResponse.FromString,
)
WATCH = Method("/etcdserverpb.Watch/Watch", wire.EtcdWatchRequest.SerializeToString, wire.EtcdWatchResponse.FromString)
STATUS = Method(
    "/etcdserverpb.Maintenance/Status", wire.EtcdStatusRequest.SerializeToString, wire.EtcdStatusResponse.FromString
)


def targets(endpoints: Sequence[str], secure: bool) -> tuple[str, ...]:
    """grpc targets to rotate over. Plain addresses of one family form lists, each with another first, so that grpc
    itself skips what does not connect; names, and everything under TLS (whose certificates are checked by name), go one
    by one.

    Raises ValueError for no endpoint, or one without a port.
    """
    bare = [endpoint.split("://", 1)[-1].rstrip("/") for endpoint in endpoints]
    if not bare or not all(":" in endpoint for endpoint in bare):
        raise ValueError(f"endpoints must be host:port, at least one, not {list(endpoints)!r}")
    families = [_family(endpoint) for endpoint in bare]
    if len(set(families)) == 1 and families[0] and not secure:
        rotations = (bare[first:] + bare[:first] for first in range(len(bare)))
        return tuple(f"{families[0]}:{','.join(rotation)}" for rotation in rotations)
    return tuple(f"{family or 'dns'}:{endpoint}" for family, endpoint in zip(families, bare, strict=True))


def _family(endpoint: str) -> str:
    try:
        return f"ipv{ipaddress.ip_address(endpoint.rpartition(':')[0].strip('[]')).version}"
    except ValueError:
        return ""


class Lane:
    """One purpose's connection. Opened on first use, on the loop that uses it."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles | None) -> None:
        self.targets = targets(endpoints, tls is not None)
        self._tls = tls
        self.generation = 0
        """Rises with each rotation; a failure speaks only against the generation it ran on."""
        self._channel: grpc.aio.Channel | None = None
        self._stubs: dict[str, Any] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._closed = False

    async def unary(self, method: Method[Q, R], request: Q, timeout: float) -> R:
        """One call. Raises WireError."""
        stub = self._stub(method, "unary_unary")
        with self.translated():
            answer: R = await stub(request, timeout=timeout)
            return answer

    async def first_answer(self, method: Method[Q, R], request: Q, timeout: float) -> R:
        """The first message of a stream opened with `request`. Raises WireError."""
        stub = self._stub(method, "stream_stream")
        with self.translated():
            call = stub(timeout=timeout, metadata=HAS_LEADER)
            try:
                await call.write(request)
                answer = await call.read()
            finally:
                call.cancel()
        if answer is grpc.aio.EOF:
            raise WireError(grpc.StatusCode.UNAVAILABLE, "the stream ended without an answer", self.generation)
        return answer  # type: ignore[no-any-return]  # grpc.aio types a stream's messages as Any

    def stream(self, method: Method[Q, R]) -> Any:
        """An open stream, to be used inside `translated`."""
        return self._stub(method, "stream_stream")(metadata=HAS_LEADER)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn what grpc raises into WireError. A channel that is closed under a call cancels it; that must not look
        like a cancellation of the calling task."""
        generation = self.generation
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise WireError(error.code(), error.details() or "", generation) from error
        except (grpc.aio.UsageError, asyncio.InvalidStateError) as error:
            raise WireError(grpc.StatusCode.CANCELLED, str(error), generation) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise WireError(grpc.StatusCode.CANCELLED, "the channel was closed", generation) from error

    def failed(self, error: WireError) -> None:
        """Move on to the next endpoint if `error` speaks against this one, unless another call has moved us already."""
        against = error.code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)
        if against and error.generation == self.generation and len(self.targets) > 1:
            self.generation += 1
            self._retire()

    async def close(self) -> None:
        """Close every channel; calls in flight fail."""
        self._closed = True
        channel, self._channel = self._channel, None
        self._stubs = {}
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        if channel is not None:
            await channel.close()

    def _stub(self, method: Method[Q, R], kind: str) -> Any:
        if self._closed:
            raise WireError(grpc.StatusCode.CANCELLED, CLOSED, self.generation)
        stub = self._stubs.get(method.path)
        if stub is None:
            if self._channel is None:
                self._channel = self._open()
            stub = getattr(self._channel, kind)(method.path, method.encode, method.decode)
            self._stubs[method.path] = stub
        return stub

    def _open(self) -> grpc.aio.Channel:
        target = self.targets[self.generation % len(self.targets)]
        if self._tls is None:
            return grpc.aio.insecure_channel(target, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(target, self._tls.credentials(), options=CHANNEL_OPTIONS)

    def _retire(self) -> None:
        channel, self._channel = self._channel, None
        self._stubs = {}
        if channel is not None:
            task = asyncio.get_running_loop().create_task(channel.close(RETIRE_GRACE))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
