"""The Carrier over gRPC: ArtifactService of any replica, on a channel of its own, with the session's endpoints and TLS.

Of its own, for a large file must not hold up the session's heartbeats (PROTOCOL F5). The channel lives until a try fails on it; the
next one dials the next endpoint. Packing, hashing and files are work for threads; on the loop is only what waits. There is no
deadline for a whole transfer, whose size is unknown, but one for every step of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from baton.artifact_wire import Incoming, put_chunk, put_end, put_header
from baton.artifacts import Chunk, CorruptArtifact, read_chunks
from baton.errors import (
    BatonError,
    Denied,
    LimitExceeded,
    NameTaken,
    NotFound,
    StoreUnavailable,
    WrongState,
    from_status,
)
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, artifact_pb2
from cluster_agent.carrying.port import (
    CarrierCorrupt,
    CarrierDown,
    CarrierError,
    CarrierFull,
    CarrierLacks,
    CarrierRefused,
    Download,
    Maker,
    NameUsed,
    NotConfigured,
    Wanted,
)
from cluster_agent.core.model import ArtifactRef, ArtifactSource, AttemptKey
from cluster_agent.transport import TransportClosed
from cluster_agent.transport_grpc import GrpcTransport
from cluster_agent.workload import inner

DIAL_SECONDS = 5.0
STEP_SECONDS = 30.0
"""For one message to leave or to come: the gateway itself tries a slow object for up to 60 s before it says so, but chunks are in
flight while it does. Shorter takes a busy store for a dead one; longer hides a replica that is frozen."""

ANSWER_SECONDS = 75.0
"""For the answer to the last chunk: what is in flight has to be stored, three tries of 20 s each."""

_KINDS: dict[type[BatonError], type[CarrierError]] = {
    WrongState: NotConfigured,
    Denied: CarrierRefused,
    NotFound: CarrierLacks,
    NameTaken: NameUsed,
    StoreUnavailable: CarrierDown,
    LimitExceeded: CarrierDown,  # a replica's own bound of calls; sizes were judged here
}
_CODES: dict[grpc.StatusCode, type[CarrierError]] = {
    grpc.StatusCode.UNAVAILABLE: CarrierDown,
    grpc.StatusCode.DEADLINE_EXCEEDED: CarrierDown,
    grpc.StatusCode.CANCELLED: CarrierDown,
    grpc.StatusCode.UNIMPLEMENTED: CarrierRefused,
    grpc.StatusCode.UNAUTHENTICATED: CarrierRefused,
}
"""What a refusal means. Anything else speaks of what was sent or stored: it is tried a few times, then told."""

_TORN = "Internal error from Core"
"""In gRPC's words for a write that met the end of the call, whose status it then forgets; another try may hear it. If these words
change, it is taken for damage, and tried a few times only."""

_PUT, _GET = "/baton.v1.ArtifactService/PutArtifact", "/baton.v1.ArtifactService/GetArtifact"

T = TypeVar("T")


class GrpcCarrier:
    """See Carrier."""

    def __init__(self, transport: GrpcTransport) -> None:
        self._transport = transport
        self._turn = 0
        self._channel: grpc.aio.Channel | None = None
        self._endpoint = ""

    async def put(self, maker: Maker, name: str, file: BinaryIO) -> ArtifactRef:
        """See Carrier."""
        channel = self._open()
        serialize: Any = artifact_pb2.PutArtifactRequest.SerializeToString
        read: Any = artifact_pb2.PutArtifactResponse.FromString
        call: Any = channel.stream_unary(_PUT, request_serializer=serialize, response_deserializer=read)()
        header = artifact_pb2.PutArtifactHeader(
            namespace=maker.namespace, attempt=_attempt(inner(maker.key)), name=name, cluster_uid=maker.cluster_uid
        )
        try:
            await _step(call.write(put_header(header)), STEP_SECONDS)
            chunks, sent = read_chunks(file), 0
            while (chunk := await asyncio.to_thread(_next, chunks)) is not None:
                await _step(call.write(put_chunk(chunk)), STEP_SECONDS)
                sent += 1
            await _step(call.write(put_end(sent)), STEP_SECONDS)
            await _step(call.done_writing(), STEP_SECONDS)
            answer = await _step(call, ANSWER_SECONDS)
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError, TimeoutError) as error:
            # Never `moved`: what was written may lie in a buffer on the way, and a put begins anew in any case.
            failure = await self._failure(call, error)
            await self._leave(channel, failure)
            raise failure from error
        finally:
            call.cancel()
        ref = answer.artifact
        return ArtifactRef(ref.name, ref.size, ref.digest)

    def download(self, wanted: Wanted, into: BinaryIO) -> Download:
        """See Carrier."""
        return _Download(self, wanted, into)

    async def close(self) -> None:
        """See Carrier."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def receive(self, request: artifact_pb2.GetArtifactRequest, incoming: Incoming, into: BinaryIO) -> None:
        """One try of a download."""
        channel, before = self._open(), incoming.next_chunk
        serialize: Any = artifact_pb2.GetArtifactRequest.SerializeToString
        read: Any = artifact_pb2.GetArtifactResponse.FromString
        call: Any = channel.unary_stream(_GET, request_serializer=serialize, response_deserializer=read)(request)
        failure: CarrierError
        try:
            while (message := await _step(call.read(), STEP_SECONDS)) is not grpc.aio.EOF:
                content = await asyncio.to_thread(incoming.take, message)
                if content:
                    await asyncio.to_thread(into.write, content)
            if incoming.complete:
                await asyncio.to_thread(into.flush)
                return
            failure = CarrierDown(f"{self._endpoint} ended the download early")
        except CorruptArtifact as error:
            failure = CarrierCorrupt(str(error))
        except (grpc.RpcError, asyncio.InvalidStateError, asyncio.CancelledError, TimeoutError) as error:
            failure = await self._failure(call, error)
        finally:
            call.cancel()
        failure.moved = incoming.next_chunk > before
        await self._leave(channel, failure)
        raise failure

    def _open(self) -> grpc.aio.Channel:
        if self._channel is None:
            try:
                self._endpoint, self._channel = self._transport.open(self._turn)
            except TransportClosed as error:
                raise CarrierDown(str(error)) from error
        return self._channel

    async def _leave(self, channel: grpc.aio.Channel, failure: CarrierError) -> None:
        """The next try goes elsewhere, unless the answer would be the same there. Transfers that still run on the channel end too, and
        try again."""
        if isinstance(failure, CarrierDown | CarrierCorrupt) and channel is self._channel:
            self._turn += 1
            self._channel = None
            await channel.close()

    async def _failure(self, call: Any, error: BaseException) -> CarrierError:
        """What a failed call means. A write that fails says only that the call is over; its status says why. A channel that is closed
        under a call cancels it, which must not look as if we were to end. Raises CancelledError if we are."""
        if isinstance(error, TimeoutError):
            return CarrierDown(f"{self._endpoint} is silent")
        if not isinstance(error, grpc.aio.AioRpcError | asyncio.CancelledError):
            try:
                await _step(call.code(), DIAL_SECONDS)
                await _step(call, DIAL_SECONDS)
            except (grpc.aio.AioRpcError, asyncio.CancelledError) as told:
                error = told
            except (grpc.RpcError, asyncio.InvalidStateError, TimeoutError, TypeError):
                pass
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise error
        if not isinstance(error, grpc.aio.AioRpcError):
            return CarrierDown(f"{self._endpoint} ended the call, or the connection was given up")
        if error.details() == _TORN:
            return CarrierDown(f"{self._endpoint} ended the call, and why was lost")
        return meaning(_told(error), error.code())


class _Download:
    """See Download."""

    def __init__(self, carrier: GrpcCarrier, wanted: Wanted, into: BinaryIO) -> None:
        self._carrier, self._into = carrier, into
        self._request = artifact_pb2.GetArtifactRequest()
        if wanted.source is not None:
            self._incoming = Incoming(wanted.source.ref.digest)
            self._request.source.CopyFrom(source_message(wanted.source))
        else:
            self._incoming = Incoming(code_sha256=wanted.code_sha256)
            self._request.code.namespace, self._request.code.sha256 = wanted.namespace, wanted.code_sha256

    async def run(self) -> None:
        """See Download."""
        self._request.first_chunk = self._incoming.next_chunk
        await self._carrier.receive(self._request, self._incoming, self._into)


def meaning(error: BatonError, code: grpc.StatusCode) -> CarrierError:
    """Whose fault a refusal is."""
    words = error.message
    if isinstance(error, StoreUnavailable) and "store is full" in words:
        return CarrierFull(words)
    kind = _KINDS.get(type(error)) or _CODES.get(code, CarrierCorrupt)
    return kind(words)


def _told(failure: grpc.aio.AioRpcError) -> BatonError:
    """What a failed call says."""
    try:
        status = rpc_status.from_call(cast("grpc.Call", failure))
    except ValueError:
        status = None
    if status is None:
        code: Any = failure.code()
        status = status_pb2.Status(code=code.value[0], message=failure.details() or code.name)
    return from_status(status)


def source_message(source: ArtifactSource) -> agent_pb2.ArtifactSource:
    """A source as it is asked for."""
    ref = source.ref
    return agent_pb2.ArtifactSource(
        namespace=source.namespace,
        attempt=_attempt(source.maker),
        cluster_uid=source.cluster_uid,
        artifact=agent_pb2.ArtifactRef(name=ref.name, size=ref.size, digest=ref.digest),
        task_id=source.task_id,
    )


def _attempt(key: AttemptKey) -> agent_pb2.AttemptRef:
    return agent_pb2.AttemptRef(run_uid=key.run_uid, task=key.task, n=key.n, nonce=key.nonce)


def _next(chunks: Iterator[Chunk]) -> Chunk | None:
    return next(chunks, None)


async def _step(waiting: Awaitable[T], seconds: float) -> T:
    async with time_limit(seconds):
        return await waiting
