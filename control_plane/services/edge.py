"""The gRPC edge: raw bytes in, raw bytes or one honest failure out.

Theory. The library decodes requests before we see them, and answers what it cannot decode, or what a handler raises, with UNKNOWN
and the exception's text (reliability.md 4). So every method is registered for raw bytes, and everything from there on is ours:
identity, decoding, checking, routing, and failures as google.rpc.Status with reason, fields and `applied` (PROTOCOL J6, I5).

The replica that is asked runs `answers`; the owner, reached through the peer stream, runs the same method's handler and never
forwards again (O5): that is the loop guard.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing

import grpc
import grpc.aio
from google.protobuf.message import Message

from baton.clock import Clock, Entropy
from baton.errors import BatonError, Denied, Draining, LimitExceeded, to_status
from control_plane.peers import CallContext, CallHandler, Calls
from control_plane.services.failures import explain
from control_plane.services.forward import Forwarder, OnAnswer
from control_plane.services.identity import Identity
from control_plane.services.methods import Asked, Kind, Method, decode

log = logging.getLogger(__name__)

UNARY_CAP = 60.0
"""Seconds a call may take when its caller set no deadline, or a longer one. Too small: parked calls fail during a takeover; too
large: a forgotten caller holds memory."""

STREAM_CAP = 3600.0
"""Seconds a stream may last; then it ends and the client resumes by number. Bounds how long a revoked role goes on reading."""

MARGIN = 0.2
"""Seconds before the caller's deadline at which we answer what we know: an honest "not applied" that arrives is worth more than
a deadline that says nothing. At most a tenth of the time given."""

MAX_CALLS = 4096
"""Calls under way at one time, streams included; beyond it a caller is told to come back. About 40 MB of parked requests."""

PUSHBACK = 1.0
"""Seconds after which a caller turned away for load should come back."""

MAX_ANSWER = 4 << 20
"""Bytes of an answer: what clients receive by default. Larger ones fail here, with a reason, instead of in their library."""

MAX_REQUEST = 4 << 20
"""Bytes of one request message. The listener takes more, for the peer streams on it; a larger graph comes in pieces."""

STATUS_KEY = "grpc-status-details-bin"
"""Where google.rpc.Status travels: gRPC's own name for it."""

Bytes = AsyncIterator[bytes]


class Edge:
    """The public methods of one replica."""

    def __init__(
        self,
        methods: Sequence[Method],
        forwarder: Forwarder,
        clock: Clock,
        entropy: Entropy,
        identify: Callable[[grpc.aio.ServicerContext[bytes, bytes]], Identity],
    ) -> None:
        self._methods = {method.name: method for method in methods}
        self._forwarder, self._clock, self._entropy, self._identify = forwarder, clock, entropy, identify
        self._calls = 0
        self.draining = False
        """The replica is leaving: new calls are sent elsewhere."""

    def serve_peers(self, calls: Calls) -> None:
        """Answer forwarded calls: the same handlers, at the owner."""
        for method in self._methods.values():
            if method.route is not None:
                calls.register(method.name, at_owner(method, self._clock))

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """What a gRPC server is given, one per service."""
        services: dict[str, dict[str, grpc.RpcMethodHandler[bytes, bytes]]] = {}
        for method in self._methods.values():
            services.setdefault(method.service, {})[method.short] = self._handler(method)
        return [grpc.method_handlers_generic_handler(name, table) for name, table in services.items()]

    def _handler(self, method: Method) -> grpc.RpcMethodHandler[bytes, bytes]:
        async def unary(payload: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await self._one(method, payload, context)

        async def stream_out(payload: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> Bytes:
            async with aclosing(self._told(method, payload, context)) as answers:
                async for answer in answers:
                    yield answer

        async def stream_in(pieces: Bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            return await self._one(method, pieces, context)

        if method.kind is Kind.STREAM_OUT:
            return grpc.unary_stream_rpc_method_handler(stream_out)
        if method.kind is Kind.STREAM_IN:
            return grpc.stream_unary_rpc_method_handler(stream_in)
        return grpc.unary_unary_rpc_method_handler(unary)

    async def _one(
        self, method: Method, request: bytes | Bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> bytes:
        async with aclosing(self._told(method, request, context)) as answers:
            async for answer in answers:
                return answer
        raise AssertionError(f"{method.name} gave no answer")

    async def _told(
        self, method: Method, request: bytes | Bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncGenerator[bytes, None]:
        """`answers`, with every failure told as a status."""
        try:
            async with aclosing(self._counted(method, request, context)) as answers:
                async for answer in answers:
                    if len(answer) > MAX_ANSWER:
                        raise LimitExceeded(
                            f"the answer holds {len(answer)} bytes, more than {MAX_ANSWER}: ask for less"
                        )
                    yield answer
            return
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except Exception as error:  # noqa: BLE001 - nothing that is raised in here may reach the library
            told = explain(error, lambda: self._entropy.token(6))
        await abort(context, told)

    async def _counted(
        self, method: Method, request: bytes | Bytes, context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncGenerator[bytes, None]:
        identity = self._identify(context)
        if not (identity.may_use_api or (method.agents and identity.may_be_agent)):
            log.warning("call denied", extra={"method": method.name, "principal": identity.principal})
            raise Denied(f"{identity.principal} may not use {method.service}")
        if self.draining:
            raise Draining("this replica is shutting down; use another", retry_after=0.0)
        if self._calls >= MAX_CALLS:
            raise LimitExceeded(f"{MAX_CALLS} calls are under way on this replica", retry_after=PUSHBACK)
        self._calls += 1
        try:
            asked = self._asked(method, context.time_remaining(), identity)
            async with aclosing(self.answers(method, request, asked)) as answers:
                async for answer in answers:
                    yield answer
        finally:
            self._calls -= 1

    def _asked(self, method: Method, remaining: float | None, caller: Identity) -> Asked:
        cap = UNARY_CAP if method.kind is Kind.UNARY else STREAM_CAP
        given = cap if remaining is None else min(remaining, cap)
        ends = self._clock.boot() + given - min(MARGIN, given / 10)
        return Asked(method.name, caller.principal, ends, self._clock, caller=caller)

    async def answers(self, method: Method, request: bytes | Bytes, asked: Asked) -> AsyncGenerator[bytes, None]:
        """The whole way of a call at the replica that is asked. Raises BatonError, and whatever a handler raises."""
        if not isinstance(request, bytes):
            messages = (self._piece(method, piece) async for piece in request)
            async for answer in method.handler(messages, asked):
                yield answer.SerializeToString()
            return
        if len(request) > MAX_REQUEST:
            raise LimitExceeded(f"the request holds {len(request)} bytes, more than {MAX_REQUEST}")
        message = decode(method.request, request)
        method.validate(message, self._clock.wall())
        if method.route is None:
            async for answer in method.handler(message, asked):
                yield answer.SerializeToString()
            return

        resuming = _resuming(method, message) if method.resume is not None else None
        stream = self._forwarder.stream(method.route(message), method.name, request, asked, resuming)
        async with aclosing(stream) as payloads:
            async for payload in payloads:
                yield payload

    @staticmethod
    def _piece(method: Method, payload: bytes) -> Message:
        if len(payload) > MAX_REQUEST:
            raise LimitExceeded(f"a piece holds {len(payload)} bytes, more than {MAX_REQUEST}")
        message: Message = decode(method.request, payload)
        return message


def _resuming(method: Method, message: Message) -> OnAnswer:
    """How the request of a stream changes with each answer that was passed on."""
    resume = method.resume or (lambda _request, _response: None)

    def on_answer(payload: bytes) -> bytes:
        resume(message, method.response.FromString(payload))
        return bytes(message.SerializeToString())

    return on_answer


def at_owner(method: Method, clock: Clock) -> CallHandler:
    """The handler of a method for calls that were routed here, from this replica or another."""

    async def handle(payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        message = decode(method.request, payload)
        asked = Asked(method.name, context.principal, clock.boot() + context.timeout, clock, context.shard)
        async with aclosing(method.handler(message, asked)) as answers:  # type: ignore[type-var]  # a generator
            async for answer in answers:
                yield answer.SerializeToString()

    return handle


async def abort(context: grpc.aio.ServicerContext[bytes, bytes], told: BatonError) -> None:
    """End the call with a failure; never returns normally."""
    status = to_status(told)
    await context.abort(
        _STATUS_CODES[status.code],
        status.message,
        trailing_metadata=((STATUS_KEY, status.SerializeToString()),),
    )


_STATUS_CODES = {code.value[0]: code for code in grpc.StatusCode}
