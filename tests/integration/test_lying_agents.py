"""Agents that lie, over gRPC: they are refused by the field, and what others see stays whole (PROTOCOL S1, S2, C4)."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import grpc.aio
import pytest

from baton.client import AsyncClient
from baton.time_limits import time_limit
from baton.v1 import agent_pb2, agent_pb2_grpc, cluster_pb2
from baton.v1.cluster_pb2 import NodeShape
from control_plane.services.agents import MAX_MESSAGE
from control_plane.services.methods import PAGE_BYTES
from tests.integration.replicas import rig, until


def hello(cluster: str) -> agent_pb2.Hello:
    return agent_pb2.Hello(cluster=cluster, instance="i", boot_id="b", journal_uid="j", profile="fast")


async def answer_of(stream: Any) -> agent_pb2.SessionResponse:
    answer = await stream.read()
    assert isinstance(answer, agent_pb2.SessionResponse)
    return answer


async def test_s1_s2_a_lying_agent_is_refused_by_field_and_lists_stay_whole() -> None:
    async with rig("r1") as federation:
        node = federation.nodes[0]
        stub = agent_pb2_grpc.AgentServiceStub(node.channel)
        async with time_limit(20):
            bad = stub.Session()
            await bad.write(agent_pb2.SessionRequest(hello=hello("x" * 1_600_000)))
            refusal = (await answer_of(bad)).refusal
            assert (refusal.reason, refusal.message.split(":")[0]) == ("INVALID_ARGUMENT", "hello.cluster")
            stream = stub.Session()
            await stream.write(agent_pb2.SessionRequest(hello=hello("eu")))
            assert (await answer_of(stream)).welcome.generation == 1
            beat = agent_pb2.Heartbeat(seq=1, generation=1, shapes=[NodeShape(count=-1)])
            await stream.write(agent_pb2.SessionRequest(heartbeat=beat))
            refusal = (await answer_of(stream)).refusal
            assert (refusal.reason, refusal.message.split(":")[0]) == ("INVALID_ARGUMENT", "heartbeat.shapes[0].count")
        async with AsyncClient([node.server.address]) as client:
            assert [cluster.name async for cluster in client.list_clusters()] == ["clusters/eu"]


async def test_an_agents_message_over_the_limit_ends_its_stream() -> None:
    async with rig("r1") as federation:
        stream = agent_pb2_grpc.AgentServiceStub(federation.nodes[0].channel).Session()
        large = agent_pb2.LogChunk(data=bytes(MAX_MESSAGE + 1))
        await stream.write(agent_pb2.SessionRequest(log=large))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(stream.read(), 20)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(MAX_MESSAGE) in (caught.value.details() or "")


async def test_lists_of_clusters_are_cut_by_bytes_too() -> None:
    """Ten clusters with 200 KiB of shapes each: pages of at most 1 MiB, all of them once."""
    shapes = [NodeShape(count=1, cpu_millis=n, memory_bytes=1 << 40, total_memory_bytes=1 << 40) for n in range(9_000)]
    beat = agent_pb2.Heartbeat(seq=1, generation=1, shapes=shapes)
    async with rig("r1") as federation, time_limit(30):
        node = federation.nodes[0]
        stub = agent_pb2_grpc.AgentServiceStub(node.channel)
        streams = [stub.Session() for _ in range(10)]
        for number, stream in enumerate(streams):
            await stream.write(agent_pb2.SessionRequest(hello=hello(f"c{number}")))
            assert (await answer_of(stream)).welcome.generation == 1
            await stream.write(agent_pb2.SessionRequest(heartbeat=beat))
            assert (await answer_of(stream)).heartbeat_ack.seq == 1
        await until(lambda: len(node.replica.view.beats) == len(streams))
        pages: list[list[str]] = []
        token = ""
        while token or not pages:
            page = await node.clusters.ListClusters(cluster_pb2.ListClustersRequest(page_token=token))
            assert page.ByteSize() <= PAGE_BYTES + 256
            assert len(page.next_page_token) < 200
            pages.append([cluster.name for cluster in page.clusters])
            token = page.next_page_token
        assert len(pages) > 1
        assert [name for page in pages for name in page] == [f"clusters/c{number}" for number in range(10)]
