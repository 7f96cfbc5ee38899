"""The agent's stream over gRPC through a network that fails: a new stream is a new connection (PROTOCOL F5, S1)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from baton.time_limits import time_limit
from baton.v1 import agent_pb2
from cluster_agent.transport_grpc import GrpcTransport
from lab.proxy import Proxy

SOON = 30.0
METHOD = "/baton.v1.AgentService/Session"


class Welcoming(grpc.GenericRpcHandler):
    """Answers every message of a session with a welcome."""

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        """See grpc."""
        assert details.method == METHOD

        async def answer(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
            async for _ in requests:
                yield agent_pb2.SessionResponse(welcome=agent_pb2.Welcome()).SerializeToString()

        return grpc.stream_stream_rpc_method_handler(answer)


@pytest.fixture
async def way() -> AsyncIterator[Proxy]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((Welcoming(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    proxy = Proxy(lambda: ("127.0.0.1", port))
    await proxy.start()
    yield proxy
    await proxy.close()
    await server.stop(None)


async def greet(stream: Any) -> None:
    await stream.send([agent_pb2.SessionRequest(hello=agent_pb2.Hello())])
    async with time_limit(SOON):
        assert (await stream.receive())[0].HasField("welcome")


async def test_a_stream_after_a_half_open_one_uses_another_connection(way: Proxy) -> None:
    """Found by chaos: channels to one endpoint shared a connection, so a new stream went the way on which the last one had starved,
    and a keepalive that needs 15 s never caught it, for a lease lapses after 9."""
    transport = GrpcTransport([way.address])
    endpoint, beside = transport.open(0)  # as the carrier of artifacts does it
    assert endpoint == way.address
    async with time_limit(SOON):
        await beside.channel_ready()
    stream = await transport.connect()
    await greet(stream)
    way.strand()
    await stream.send([agent_pb2.SessionRequest(hello=agent_pb2.Hello())])
    with pytest.raises(TimeoutError):
        async with time_limit(0.3):
            await stream.receive()
    await stream.close()
    fresh = await transport.connect()
    await greet(fresh)
    await fresh.close()
    await beside.close()
