"""`ThreadedLeaseKeeper`: a replica's lease, renewed from a thread with a connection of its own (PROTOCOL O2).

Theory: the main loop can stall for longer than is healthy (a garbage collection, a big message) without being dead, and
a renewal must neither wait for it nor hide that it is gone. So renewals run beside it, and stop when its ticks stop.
The channel is a synchronous one: a second grpc.aio loop in one process misbehaves.

Shared with the main loop: the `Renewal`, whose fields are single floats and flags, each written by one side only.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import grpc

from baton.clock import Clock
from baton.internal import etcdwire_pb2 as wire
from control_plane.store.base import Lease
from control_plane.store.etcd.channel import CHANNEL_OPTIONS, HAS_LEADER, LEASE_KEEPALIVE, TlsFiles, targets
from control_plane.store.keeper import NEVER, Renewal

JOIN_TIMEOUT = 5.0
"""Seconds that `stop` waits for the thread; the call in flight is cut off when its channel closes, so it takes far
less."""


class ThreadedLeaseKeeper:
    """A `LeaseKeeper` in a thread. `max_tick_age` (seconds): with an older tick of the main loop nothing is renewed."""

    def __init__(
        self, endpoints: Sequence[str], *, tls: TlsFiles | None = None, clock: Clock, max_tick_age: float = 2.0
    ) -> None:
        self._targets = targets(endpoints, tls is not None)
        self._tls = tls
        self._clock = clock
        self._max_tick_age = max_tick_age
        self._renewal: Renewal | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._channel: grpc.Channel | None = None

    def start(self, lease: Lease) -> None:
        """See `LeaseKeeper.start`."""
        if self._renewal is not None:
            raise RuntimeError("a keeper keeps one lease")
        self._renewal = Renewal(lease, self._clock.boot(), self._max_tick_age)
        self._thread = threading.Thread(target=self._run, args=(self._renewal,), name="lease-keeper", daemon=True)
        self._thread.start()

    def tick(self) -> None:
        """See `LeaseKeeper.tick`."""
        if self._renewal is not None:
            self._renewal.tick(self._clock.boot())

    @property
    def last_ack_sent(self) -> float:
        """See `LeaseKeeper.last_ack_sent`."""
        return self._renewal.last_ack_sent if self._renewal else NEVER

    @property
    def lost(self) -> bool:
        """See `LeaseKeeper.lost`."""
        return self._renewal is not None and self._renewal.lost

    async def stop(self) -> None:
        """See `LeaseKeeper.stop`."""
        self._stopping.set()
        if self._channel is not None:
            self._channel.close()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, JOIN_TIMEOUT)

    def _run(self, renewal: Renewal) -> None:
        generation = 0
        try:
            while not self._stopping.is_set() and not renewal.lost:
                wait = renewal.wait(self._clock.boot())
                if wait > 0:
                    self._stopping.wait(wait)
                    continue
                if self._channel is None:
                    self._channel = self._open(generation)
                if not self._renew(renewal, self._channel) and len(self._targets) > 1:
                    generation += 1
                    self._channel.close()
                    self._channel = None
        finally:
            if self._channel is not None:
                self._channel.close()

    def _renew(self, renewal: Renewal, channel: grpc.Channel) -> bool:
        """One renewal on a stream of its own; whether it was answered."""
        sent = self._clock.boot()
        try:
            stub = channel.stream_stream(LEASE_KEEPALIVE.path, LEASE_KEEPALIVE.encode, LEASE_KEEPALIVE.decode)
            request = wire.EtcdLeaseKeepAliveRequest(id=renewal.lease_id)
            call = stub(iter((request,)), timeout=renewal.timeout, metadata=HAS_LEADER)
            response = next(iter(call), None)
            call.cancel()
        except (grpc.RpcError, ValueError):  # ValueError: `stop` closed the channel under us
            response = None
        if response is None:
            renewal.failed(self._clock.boot())
            return False
        renewal.answered(sent, float(response.ttl))
        return True

    def _open(self, generation: int) -> grpc.Channel:
        target = self._targets[generation % len(self._targets)]
        if self._tls is None:
            return grpc.insecure_channel(target, options=CHANNEL_OPTIONS)
        return grpc.secure_channel(target, self._tls.credentials(), options=CHANNEL_OPTIONS)
