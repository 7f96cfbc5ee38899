"""The Transport over gRPC; the only module of the agent plane that imports grpc.

Plain text only to loopback addresses; anything else needs mutual TLS, where the certificate names the cluster.
Certificates are read anew for every connection, so that a rotated one is used by the next stream. Keepalives notice a
dead peer within 15 s when nothing else does; faster pings would be refused by servers with default settings.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from baton.bundles import BUNDLE_BYTES, BUNDLE_MESSAGES, join
from baton.time_limits import time_limit
from baton.v1 import agent_pb2
from cluster_agent.transport import Stream, TransportClosed

DIAL_SECONDS = 3.0
"""To have a connection. Shorter than the session's patience, so that a dead endpoint costs one try, not the
session's."""

MESSAGE_BYTES = 48 << 20
"""Of one message. One dispatch may carry the inline results of a whole run (16 MiB, DESIGN 14) as texts inside JSON: gRPC's 4 MiB
would break the stream at a wide join, again and again. Larger than MAX_MESSAGE of the replicas' streams would gain nothing."""

_METHOD = "/baton.v1.AgentService/Session"
ENDPOINTS = 32
"""Most endpoints kept; replicas are few, and a list from the wire is bounded."""

OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    # Channels to one endpoint would share a connection: a stream that was given up on a silent one would be opened on it again, and
    # pings, which pause between streams, would not catch it before the next lease lapses.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # a stream that broke is opened anew, with an inventory
)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `server_name` overrides the name that the server's certificate must carry."""

    ca: Path
    certificate: Path
    key: Path
    server_name: str = ""


class BadEndpoint(ValueError):
    """Not host:port, or plain text beyond loopback."""


def check_endpoint(endpoint: str, *, tls: bool) -> None:
    """Raise BadEndpoint for what must not be dialled."""
    host, _, port = endpoint.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise BadEndpoint(f"{endpoint!r} is not host:port")
    if tls or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise BadEndpoint(f"{endpoint!r} is not a loopback address; plain text goes no further: give --tls-* files")


class GrpcTransport:
    """Dials its endpoints in turn."""

    def __init__(self, endpoints: Sequence[str], tls: TlsFiles | None = None, *, learns: bool = True) -> None:
        """`learns`: whether addresses that replicas tell are dialled too. Raises BadEndpoint."""
        if not endpoints:
            raise BadEndpoint("no endpoint is given")
        for endpoint in endpoints:
            check_endpoint(endpoint, tls=tls is not None)
        self._endpoints = list(dict.fromkeys(endpoints))
        self._tls = tls
        self._learns = learns
        self._next = 0

    def open(self, turn: int) -> tuple[str, grpc.aio.Channel]:
        """A channel of its own to one of the endpoints, by turns, for what must not hold up the session (carrier_grpc). Raises
        TransportClosed."""
        endpoint = self._endpoints[turn % len(self._endpoints)]
        return endpoint, self._channel(endpoint)

    async def connect(self) -> Stream:
        endpoint = self._endpoints[self._next % len(self._endpoints)]
        self._next += 1
        channel = self._channel(endpoint)
        try:
            async with time_limit(DIAL_SECONDS):
                await channel.channel_ready()
        except TimeoutError as error:
            await channel.close()
            raise TransportClosed(f"{endpoint} did not answer within {DIAL_SECONDS} s") from error
        except BaseException:
            await channel.close()
            raise
        return _GrpcStream(endpoint, channel)

    def learn(self, endpoints: Sequence[str]) -> None:
        for endpoint in endpoints:
            if not self._learns or endpoint in self._endpoints or len(self._endpoints) >= ENDPOINTS:
                continue
            try:
                check_endpoint(endpoint, tls=self._tls is not None)
            except BadEndpoint:
                continue
            self._endpoints.append(endpoint)

    async def close(self) -> None:
        """Streams own their channels; nothing else is held."""

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if self._tls is None:
            return grpc.aio.insecure_channel(endpoint, options=OPTIONS)
        try:
            credentials = grpc.ssl_channel_credentials(
                root_certificates=self._tls.ca.read_bytes(),
                private_key=self._tls.key.read_bytes(),
                certificate_chain=self._tls.certificate.read_bytes(),
            )
        except OSError as error:
            raise TransportClosed(f"TLS files cannot be read: {error}") from error
        name = self._tls.server_name
        override = (("grpc.ssl_target_name_override", name),) if name else ()
        return grpc.aio.secure_channel(endpoint, credentials, options=(*OPTIONS, *override))


class _GrpcStream:
    """One call on a channel of its own."""

    def __init__(self, endpoint: str, channel: grpc.aio.Channel) -> None:
        self._endpoint = endpoint
        self._channel = channel
        serialize: Any = bytes
        read: Any = agent_pb2.SessionResponse.FromString
        self._call: Any = channel.stream_stream(_METHOD, request_serializer=serialize, response_deserializer=read)()
        self._bundles = False
        """The replica reads `more`."""

    @property
    def endpoint(self) -> str:
        return self._endpoint

    async def send(self, messages: Sequence[agent_pb2.SessionRequest]) -> None:
        try:
            for payload in self._payloads(messages):
                await self._call.write(payload)
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise TransportClosed(self._cause(error)) from error

    def _payloads(self, messages: Sequence[agent_pb2.SessionRequest]) -> Iterator[bytes]:
        """What is written: as few messages as may be, none of them too large."""
        waiting: list[bytes] = []
        size = 0
        for message in messages:
            if message.HasField("hello"):
                message.hello.bundles = True
            payload = message.SerializeToString()
            full = size + len(payload) > BUNDLE_BYTES or len(waiting) >= BUNDLE_MESSAGES
            if waiting and (full or not self._bundles):
                yield join(agent_pb2.SessionRequest, waiting)
                waiting, size = [], 0
            waiting.append(payload)
            size += len(payload)
        if waiting:
            yield join(agent_pb2.SessionRequest, waiting)

    async def receive(self) -> Sequence[agent_pb2.SessionResponse]:
        try:
            message = await self._call.read()
        except (grpc.RpcError, asyncio.InvalidStateError) as error:
            raise TransportClosed(self._cause(error)) from error
        if message is grpc.aio.EOF:
            raise TransportClosed(f"{self._endpoint} ended the stream")
        self._bundles |= message.welcome.bundles
        return (message, *message.more)

    async def close(self) -> None:
        self._call.cancel()
        await self._channel.close()

    def _cause(self, error: Exception) -> str:
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{self._endpoint}: {error.code().name}: {error.details()}"
        return f"{self._endpoint}: {error}"
