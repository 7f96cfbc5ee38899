"""The Peers port over gRPC: each replica dials every other and sends on the stream it dialled, in batches (PROTOCOL O5).

A peer's queue is bounded; beyond it messages are dropped, which their senders' re-sends repair (J7). A broken stream is reported,
so that open calls end with an unknown outcome instead of waiting for their time-outs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from baton.clock import Clock
from baton.internal import peer_pb2 as pb
from baton.internal import peer_pb2_grpc
from control_plane.peers import MessageHandler

log = logging.getLogger(__name__)

QUEUE = 20_000
"""Messages waiting for one peer. Too small: a hiccup drops grants and reports; too large: a dead peer holds memory (20,000 small
messages are about 10 MB)."""

BATCH = 500
"""Messages per write, and `BATCH_BYTES` bytes: well under the receive limit."""

BATCH_BYTES = 1 << 20

REDIAL = 0.2
"""Seconds between dials of a peer that does not answer."""

UNKNOWN_PEER_WAIT = 5.0
"""Seconds a queue is kept for a replica whose registration we have not seen yet."""

MAX_MESSAGE = 48 << 20
"""Receive limit of peer streams: above the largest thing that travels in one piece, a dispatch with all inline results of a run
(16 MiB, DESIGN 14) as texts inside JSON. A message over it would break the stream again and again."""


Context = grpc.aio.ServicerContext[AsyncIterator[pb.ExchangeRequest], AsyncIterator[pb.ExchangeResponse]]


class GrpcPeers(peer_pb2_grpc.PeerServiceServicer):
    """The adapter: a servicer for what comes in, one link per peer for what goes out."""

    def __init__(
        self,
        replica: str,
        clock: Clock,
        address_of: Callable[[str], str | None],
        open_channel: Callable[[str], grpc.aio.Channel],
        peer_allowed: Callable[[Context], bool] = lambda _: True,
    ) -> None:
        self._replica, self._clock = replica, clock
        self._address_of, self._open_channel, self._peer_allowed = address_of, open_channel, peer_allowed
        self._handler: MessageHandler = lambda _replica, _message: None
        self._break: Callable[[str], None] = lambda _replica: None
        self._queues: dict[str, asyncio.Queue[pb.PeerMessage]] = {}
        self._links: dict[str, asyncio.Task[None]] = {}
        self.dropped = 0
        """Messages that found their peer's queue full."""

    def on_message(self, handler: MessageHandler) -> None:
        """See `Peers`."""
        self._handler = handler

    def on_break(self, handler: Callable[[str], None]) -> None:
        """See `Peers`."""
        self._break = handler

    def send(self, replica: str, message: pb.PeerMessage) -> bool:
        """See `Peers`."""
        queue = self._queues.get(replica)
        if queue is None:
            queue = self._queues[replica] = asyncio.Queue(QUEUE)
            self._links[replica] = asyncio.get_running_loop().create_task(self._link(replica, queue))
        try:
            queue.put_nowait(message)
        except asyncio.QueueFull:
            self.dropped += 1
            return False
        return True

    async def close(self) -> None:
        """End all links."""
        links = list(self._links.values())
        for link in links:
            link.cancel()
        await asyncio.gather(*links, return_exceptions=True)

    async def _link(self, replica: str, queue: asyncio.Queue[pb.PeerMessage]) -> None:
        """Dial while the peer is registered; end, and drop its queue, when it is gone."""
        try:
            unknown_since = self._clock.boot()
            while True:
                address = self._address_of(replica)
                if address is None:
                    if self._clock.boot() - unknown_since > UNKNOWN_PEER_WAIT:
                        return
                    await self._clock.sleep(REDIAL)
                    continue
                await self._session(address, queue)
                self._break(replica)
                unknown_since = self._clock.boot()
                await self._clock.sleep(REDIAL)
        finally:
            self._queues.pop(replica, None)
            self._links.pop(replica, None)
            self._break(replica)

    async def _session(self, address: str, queue: asyncio.Queue[pb.PeerMessage]) -> None:
        """One stream, to its end."""
        channel = self._open_channel(address)
        try:
            call = peer_pb2_grpc.PeerServiceStub(channel).Exchange()
            writer = asyncio.create_task(self._write(call, queue))
            reader = asyncio.create_task(self._drain(call))
            done, pending = await asyncio.wait({writer, reader}, return_when=asyncio.FIRST_COMPLETED)
            for task in pending:
                task.cancel()
            await asyncio.gather(*done, *pending, return_exceptions=True)
        finally:
            await channel.close(grace=None)

    async def _write(self, call: grpc.aio.StreamStreamCall, queue: asyncio.Queue[pb.PeerMessage]) -> None:  # type: ignore[type-arg]
        while True:
            messages = [await queue.get()]
            size = messages[0].ByteSize()
            while len(messages) < BATCH and size < BATCH_BYTES and not queue.empty():
                messages.append(queue.get_nowait())
                size += messages[-1].ByteSize()
            await call.write(pb.ExchangeRequest(replica=self._replica, messages=messages))

    @staticmethod
    async def _drain(call: grpc.aio.StreamStreamCall) -> None:  # type: ignore[type-arg]
        while await call.read() is not grpc.aio.EOF:
            pass

    async def Exchange(  # noqa: N802 - the name is the proto's
        self, request_iterator: AsyncIterator[pb.ExchangeRequest], context: Context
    ) -> AsyncIterator[pb.ExchangeResponse]:
        """A peer's stream."""
        if not self._peer_allowed(context):
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "only replicas may join the peer stream")
        sender = ""
        try:
            async for request in request_iterator:
                sender = request.replica
                for message in request.messages:
                    self._handler(sender, message)
        finally:
            if sender:
                self._break(sender)
        yield pb.ExchangeResponse()
