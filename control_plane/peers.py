"""Messages between replicas: the Peers port, and calls over it (PROTOCOL O5).

Theory. Replicas tell each other two kinds of things. *Levels* (demand, grants, dispatches, reports) may be lost, because whoever
cares sends them again (PROTOCOL J7, S5). *Calls* (a client's request forwarded to a shard's owner) want an answer: a call that
gets none in its time has an unknown outcome, never a negative one. Both share one ordered, batched stream per pair and
direction; a call is forwarded once and never again (the loop guard is that a received call is only handled locally).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from baton.clock import Entropy
from baton.internal import peer_pb2 as pb
from baton.time_limits import time_limit

MessageHandler = Callable[[str, pb.PeerMessage], None]

MAX_ANSWERS = 1024
"""Answers of one streaming call kept for a slow reader. Too small: bursts of a watch end it; too large: memory. When it is
full the call ends as lost, and the client resumes by event number."""


class Peers(Protocol):
    """Ordered, batched, lossy-on-break messages between replicas."""

    def send(self, replica: str, message: pb.PeerMessage) -> bool:
        """Queue a message; False if there is no such peer or its queue is full (the message is dropped)."""
        ...

    def on_message(self, handler: MessageHandler) -> None:
        """`handler(from_replica, message)` is called on the loop for each message, in order."""
        ...

    def on_break(self, handler: Callable[[str], None]) -> None:
        """`handler(replica)` is called when the stream to or from a peer broke: answers may be lost."""
        ...


class CallLost(Exception):
    """The call may have been handled; its answer did not come (outcome unknown)."""


class CallFailed(Exception):
    """The owner answered with a failure: gRPC code, message, serialized google.rpc.Status."""

    def __init__(self, code: int, message: str, details: bytes) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


@dataclass(frozen=True, slots=True)
class CallContext:
    """What a handler may know of a forwarded call. `timeout` in seconds."""

    method: str
    timeout: float
    principal: str
    shard: str


CallHandler = Callable[[bytes, CallContext], AsyncIterator[bytes]]
Failure = Callable[[BaseException], CallFailed]


class Calls:
    """Calls and their answers over `Peers`. One per replica."""

    def __init__(self, peers: Peers, entropy: Entropy, failure: Failure) -> None:
        """`failure` turns an exception of a handler into what travels."""
        self._peers = peers
        self._failure = failure
        self._waiting: dict[tuple[str, int], asyncio.Queue[pb.PeerReply | None]] = {}
        self._serving: dict[tuple[str, int], asyncio.Task[None]] = {}
        self._handlers: dict[str, CallHandler] = {}
        # Ids of an earlier life of this replica must not meet answers meant for it.
        self._next_id = int(entropy.token(5), 16)

    def register(self, method: str, handler: CallHandler) -> None:
        """Serve `method` (full name) with an async generator of serialized answers."""
        self._handlers[method] = handler

    def handler(self, method: str) -> CallHandler | None:
        """The local handler of a method."""
        return self._handlers.get(method)

    async def call(self, replica: str, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        """Answers of `replica`, in order. Raises CallFailed, CallLost."""
        self._next_id += 1
        key = (replica, self._next_id)
        answers: asyncio.Queue[pb.PeerReply | None] = asyncio.Queue(MAX_ANSWERS)
        self._waiting[key] = answers
        call = pb.PeerCall(
            id=key[1],
            method=context.method,
            payload=payload,
            timeout_ms=int(context.timeout * 1000),
            principal=context.principal,
            shard=context.shard,
        )
        finished = False
        try:
            if not self._peers.send(replica, pb.PeerMessage(call=call)):
                raise CallLost(f"replica {replica} cannot be reached")
            async with time_limit(context.timeout):
                while True:
                    reply = await answers.get()
                    if reply is None:
                        raise CallLost(f"the stream to replica {replica} broke")
                    finished = not reply.more
                    if reply.code:
                        finished = True
                        raise CallFailed(reply.code, reply.message, reply.details)
                    if reply.payload or reply.more:
                        yield reply.payload
                    if finished:
                        return
        except TimeoutError as error:
            raise CallLost(f"replica {replica} did not answer in {context.timeout:.1f} s") from error
        finally:
            self._waiting.pop(key, None)
            if not finished:
                self._peers.send(replica, pb.PeerMessage(cancel=pb.PeerCancel(id=key[1])))

    def receive(self, replica: str, message: pb.PeerMessage) -> bool:
        """Take a call, reply or cancel; False if the message is none of these."""
        kind = message.WhichOneof("message")
        if kind == "call":
            self._serve(replica, message.call)
        elif kind == "reply":
            answers = self._waiting.get((replica, message.reply.id))
            if answers is not None:
                self._offer(answers, message.reply)
        elif kind == "cancel":
            task = self._serving.pop((replica, message.cancel.id), None)
            if task is not None:
                task.cancel()
        else:
            return False
        return True

    def broken(self, replica: str) -> None:
        """All open calls to `replica` have an unknown outcome; all calls from it are pointless now."""
        for key, answers in list(self._waiting.items()):
            if key[0] == replica:
                self._offer(answers, None)
        for served, task in list(self._serving.items()):
            if served[0] == replica:
                task.cancel()

    @staticmethod
    def _offer(answers: asyncio.Queue[pb.PeerReply | None], reply: pb.PeerReply | None) -> None:
        if answers.full():
            # A reader this slow has lost its place: end the call instead of growing.
            while not answers.empty():
                answers.get_nowait()
            reply = None
        answers.put_nowait(reply)

    def _serve(self, replica: str, call: pb.PeerCall) -> None:
        task = asyncio.get_running_loop().create_task(self._answer(replica, call))
        self._serving[replica, call.id] = task
        task.add_done_callback(lambda _: self._serving.pop((replica, call.id), None))

    async def _answer(self, replica: str, call: pb.PeerCall) -> None:
        def reply(**fields: object) -> None:
            self._peers.send(replica, pb.PeerMessage(reply=pb.PeerReply(id=call.id, **fields)))  # type: ignore[arg-type]

        handler = self._handlers.get(call.method)
        context = CallContext(call.method, call.timeout_ms / 1000, call.principal, call.shard)
        try:
            if handler is None:
                raise LookupError(f"no such method: {call.method}")
            async with time_limit(context.timeout):
                async for payload in handler(call.payload, context):
                    reply(payload=payload, more=True)
            reply()
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises has to travel, not end the stream
            failed = self._failure(error)
            reply(code=failed.code, message=failed.message, details=failed.details)


async def single(answers: AsyncIterator[bytes]) -> bytes:
    """The one answer of a unary call. Raises CallLost if there is none."""
    async for payload in answers:
        return payload
    raise CallLost("no answer")


Caller = Callable[[str, bytes, CallContext], Awaitable[bytes]]
