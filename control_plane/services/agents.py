"""AgentService: agents' streams over gRPC, as `sessions.AgentStream` (PROTOCOL S1).

The identity of an agent is its certificate's (`identity`); Hello must name the same cluster. What goes down waits in a bounded
queue: an agent that does not read is cut off (`send` says so), for its session lives in the store and it may dial again. A
refusal is the last message of a stream: it is sent, then the stream ends.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from baton.bundles import BUNDLE_BYTES, BUNDLE_MESSAGES, join
from baton.clock import Entropy
from baton.errors import Denied, LimitExceeded
from baton.v1 import agent_pb2 as pb
from control_plane.services.edge import abort
from control_plane.services.failures import explain
from control_plane.services.identity import Identity, Role
from control_plane.services.methods import decode
from control_plane.sessions import Sessions, StreamClosed

log = logging.getLogger(__name__)

QUEUE = 5_000
"""Messages waiting for one agent. Batches of 500 attempts each, so this is far more than any agent can hold; too small would cut
off agents that pause, too large would let a dead link hold memory."""

QUEUE_BYTES = 64 << 20
"""Bytes waiting for one agent, for the same reasons."""

MAX_MESSAGE = 4 << 20
"""Bytes of one message from an agent, as many as agents send; the listener takes more, for the peer streams on it."""

SERVICE, SESSION = "baton.v1.AgentService", "Session"


class GrpcAgentStream:
    """One agent's stream. `requests` are raw messages."""

    def __init__(self, requests: AsyncIterator[bytes], peer_cluster: str | None) -> None:
        self.peer_cluster = peer_cluster
        self.broken: BaseException | None = None
        """Why the agent's side cannot be read, if it is the agent's fault."""
        self._requests = requests
        self._arrived: deque[pb.SessionRequest] = deque()
        self._bundles = False
        """The agent reads `more`."""
        self._waiting: deque[bytes] = deque()
        self._bytes = 0
        self._changed = asyncio.Event()
        self._ended = False

    async def receive(self) -> pb.SessionRequest:
        """See `sessions.AgentStream`."""
        if self._ended:
            raise StreamClosed
        if self._arrived:
            return self._arrived.popleft()
        try:
            payload = await anext(self._requests)
            if len(payload) > MAX_MESSAGE:
                raise LimitExceeded(f"the message holds {len(payload)} bytes, more than {MAX_MESSAGE}")
            message: pb.SessionRequest = decode(pb.SessionRequest, payload)
            if len(message.more) > BUNDLE_MESSAGES:
                raise LimitExceeded(f"the message bundles {len(message.more)} others, more than {BUNDLE_MESSAGES}")
        except StopAsyncIteration:
            raise StreamClosed from None
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self.broken = error
            raise StreamClosed from error
        if self._ended:
            raise StreamClosed
        self._arrived.extend(message.more)
        self._bundles |= message.hello.bundles
        return message

    def send(self, message: pb.SessionResponse) -> bool:
        """See `sessions.AgentStream`."""
        if self._ended:
            return False
        if message.HasField("welcome"):
            message.welcome.bundles = True
        payload = message.SerializeToString()
        if len(self._waiting) >= QUEUE or self._bytes + len(payload) > QUEUE_BYTES:
            self.end()
            return False
        self._waiting.append(payload)
        self._bytes += len(payload)
        if message.HasField("refusal"):
            self._ended = True
        self._changed.set()
        return True

    def end(self) -> None:
        """Nothing more goes down."""
        self._ended = True
        self._changed.set()

    async def outgoing(self) -> AsyncIterator[bytes]:
        """What goes down, in order, to the end."""
        while True:
            while self._waiting:
                yield self._next()
            if self._ended:
                return
            self._changed.clear()
            await self._changed.wait()
            # Acknowledgements follow the dispatches of their commit by a turn of the loop: they share a message.
            await asyncio.sleep(0)

    def _next(self) -> bytes:
        """The first that waits, with all that follow as far as one message may carry them."""
        payloads: list[bytes] = []
        size = 0
        while self._waiting and (not payloads or (self._bundles and size + len(self._waiting[0]) <= BUNDLE_BYTES)):
            payloads.append(self._waiting.popleft())
            size += len(payloads[-1])
            if len(payloads) >= BUNDLE_MESSAGES:
                break
        self._bytes -= size
        return join(pb.SessionResponse, payloads)


class Agents:
    """The service."""

    def __init__(
        self,
        sessions: Sessions,
        entropy: Entropy,
        identify: Callable[[grpc.aio.ServicerContext[bytes, bytes]], Identity],
    ) -> None:
        self._sessions, self._entropy, self._identify = sessions, entropy, identify

    def handler(self) -> grpc.GenericRpcHandler:
        """What a gRPC server is given. Raw bytes, for the reasons of `edge`."""
        method: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._session)
        return grpc.method_handlers_generic_handler(SERVICE, {SESSION: method})

    async def _session(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        identity = self._identify(context)
        if not identity.may_be_agent:
            log.warning("agent stream denied", extra={"principal": identity.principal})
            await abort(context, Denied(f"{identity.principal} may not open an agent's session"))
        stream = GrpcAgentStream(requests, identity.name if identity.role is Role.AGENT else None)
        serving = asyncio.get_running_loop().create_task(self._sessions.serve(stream))
        serving.add_done_callback(lambda _: stream.end())
        try:
            async for payload in stream.outgoing():
                yield payload
        finally:
            serving.cancel()
            await asyncio.wait({serving})
        fault = stream.broken or (None if serving.cancelled() else serving.exception())
        if fault is not None:
            await abort(context, explain(fault, lambda: self._entropy.token(6)))
