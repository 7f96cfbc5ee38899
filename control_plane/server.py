"""The gRPC server around a replica: what listens, who may connect, and in which order it comes up and goes down.

Theory. A listener is made first, because a replica must register the address that it really has; it starts to serve when the replica
has been wired, says SERVING when the replica takes part, and says NOT_SERVING before the replica leaves, so that balancers and
clients have turned away by the time shards move. Limits are per connection (reliability.md 5.2): a caller that floods its own
connection waits, others do not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.clock import Clock
from baton.internal import peer_pb2_grpc
from control_plane.config import TlsPaths
from control_plane.peer_grpc import MAX_MESSAGE, GrpcPeers
from control_plane.replica import Identity, Parts, Replica
from control_plane.services import agents
from control_plane.services.agents import Agents
from control_plane.services.edge import Edge
from control_plane.services.identity import Identity as Caller
from control_plane.services.identity import identify
from control_plane.tls import Material, Reloader
from control_plane.view import View

__all__ = ["GrpcServer", "Identity", "Listener", "Parts", "Replica", "live"]

log = logging.getLogger(__name__)

MAX_STREAMS = 100
"""Streams of one connection at one time; more wait in the caller's library. gRPC's default is no limit at all."""

KEEPALIVE_MS = 20_000
KEEPALIVE_TIMEOUT_MS = 10_000
"""We ping a silent connection, and drop it after so long without an answer: half-open ones would hold sessions and watches."""

MIN_PING_MS = 5_000
"""Callers may ping every 5 s, half of the shortest keepalive of ours; the default of 5 minutes would turn agents away."""

CONNECTION_AGE_MS = 3_600_000
CONNECTION_GRACE_MS = 30_000
"""Under TLS a connection ends after an hour, streams included: a certificate that was replaced or withdrawn is gone by then."""

METADATA_BYTES = 16 * 1024

STOP_GRACE = 2.0
"""Seconds for answers under way when the server stops: shards have moved already, so what is left is writing them out."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to serve."""

    address: str
    """host:port; port 0 takes a free one."""
    tls: TlsPaths | None = None
    reflection: bool = False


class GrpcServer:
    """A listener, then a server."""

    def __init__(self, listener: Listener) -> None:
        """Binds. Raises BadConfig for certificates that cannot be used, OSError if the address cannot be had."""
        self._listener = listener
        self._reloader = Reloader(listener.tls) if listener.tls else None
        self._server = grpc.aio.server(options=_server_options(tls=listener.tls is not None))
        self._health = health.aio.HealthServicer()
        self._edge: Edge | None = None
        self._peers: GrpcPeers | None = None
        host = listener.address.rpartition(":")[0]
        try:
            port = self._bind()
        except RuntimeError as error:
            raise OSError(f"cannot listen on {listener.address}: the address is in use or not ours") from error
        self.address = f"{host}:{port}"

    def make_peers(self, replica: str, clock: Clock, view: View) -> GrpcPeers:
        """The peer streams of this listener's replica; for `Parts.make_peers`."""

        def address_of(peer: str) -> str | None:
            member = view.members.get(peer)
            return member.address if member else None

        self._peers = GrpcPeers(replica, clock, address_of, self._open_channel, self._may_be_peer)
        return self._peers

    @property
    def dropped_messages(self) -> int:
        """Messages to peers that found their queue full."""
        return self._peers.dropped if self._peers is not None else 0

    async def start(self, replica: Replica) -> None:
        """Serve a replica that has been started; not yet SERVING."""
        parts = replica.parts
        edge = Edge(replica.services.methods, replica.forwarder, parts.clock, parts.entropy, self.identify)
        edge.serve_peers(replica.calls)
        self._edge = edge
        of_agents = Agents(replica.sessions, parts.entropy, self.identify)
        self._server.add_generic_rpc_handlers((*edge.handlers(), of_agents.handler()))
        if self._peers is not None:
            peer_pb2_grpc.add_PeerServiceServicer_to_server(self._peers, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        services = {method.service for method in replica.services.methods} | {agents.SERVICE}
        if self._listener.reflection:
            reflection.enable_server_reflection(
                (*sorted(services), health.SERVICE_NAME, reflection.SERVICE_NAME), self._server
            )
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def serving(self) -> None:
        """The replica takes part."""
        await self._say(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Turn new calls away; those under way go on."""
        await self._say(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._edge is not None:
            self._edge.draining = True

    async def stop(self, grace: float = STOP_GRACE) -> None:
        """End, leaving calls under way `grace` seconds."""
        if self._peers is not None:
            await self._peers.close()
        await self._server.stop(grace)

    def identify(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> Caller:
        """Who calls."""
        return identify(context.auth_context(), tls=self._reloader is not None)

    # -- the pieces --------------------------------------------------------------------------------------------------------

    async def _say(self, status: int) -> None:
        await self._health.set("", status)

    def _bind(self) -> int:
        if self._reloader is None:
            return self._server.add_insecure_port(self._listener.address)
        reloader = self._reloader

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            material = reloader.changed()
            return _certificates(material) if material is not None else None

        credentials = grpc.dynamic_ssl_server_credentials(
            _certificates(reloader.current),
            fetch,  # type: ignore[arg-type]  # None means: as before
            require_client_authentication=True,
        )
        return self._server.add_secure_port(self._listener.address, credentials)

    def _open_channel(self, address: str) -> grpc.aio.Channel:
        options = _channel_options()
        if self._reloader is None:
            return grpc.aio.insecure_channel(address, options=options)
        self._reloader.changed()
        material = self._reloader.current
        credentials = grpc.ssl_channel_credentials(material.ca, material.key, material.cert)
        return grpc.aio.secure_channel(address, credentials, options=options)

    def _may_be_peer(self, context: object) -> bool:
        return self.identify(context).may_be_replica  # type: ignore[arg-type]  # the stream's own message types differ


def _certificates(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.ca)


def _server_options(*, tls: bool) -> Sequence[tuple[str, int]]:
    options = [
        # Peer streams carry forwarded graphs, so the listener's limit is theirs; users' calls are held to less by `edge`.
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.max_concurrent_streams", MAX_STREAMS),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_MS),
        ("grpc.so_reuseport", 0),
    ]
    if tls:
        options += [
            ("grpc.max_connection_age_ms", CONNECTION_AGE_MS),
            ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
        ]
    return options


def _channel_options() -> Sequence[tuple[str, int]]:
    return (
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.max_send_message_length", MAX_MESSAGE),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.enable_retries", 0),  # a broken stream has lost messages: their senders must know (J7)
        ("grpc.use_local_subchannel_pool", 1),
    )


async def live(replica: Replica, server: GrpcServer, started: Callable[[], None]) -> None:
    """A replica's life on its listener, until it is cancelled or fails: raises what failed. `started()` is called once it
    listens; health says when it serves."""
    await replica.start()
    await server.start(replica)
    started()
    await replica.ready()
    if replica.running:
        await server.serving()
        log.info("serving")
    await replica.run()
