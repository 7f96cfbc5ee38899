"""Whole agents in this process: a fake host below, real gRPC to the replicas above."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from baton.clock import SystemClock, SystemEntropy
from baton.leases import PROFILES
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.disk import MemoryDisk
from cluster_agent.executors.base import StartRequest
from cluster_agent.executors.fake import FakeExecutor, FakeHost
from cluster_agent.executors.fake_workload import Script
from cluster_agent.transport_grpc import GrpcTransport

CLOCK = SystemClock()


class FakeCluster:
    """One cluster; `seconds` is how long its workloads take."""

    def __init__(self, name: str, endpoints: Sequence[str], seconds: float) -> None:
        self.name = name
        programs: Mapping[str, Callable[[StartRequest], Script]] = {"work": lambda _: Script(seconds=seconds)}
        self.host = FakeHost(CLOCK, programs=programs)
        self.executor = FakeExecutor(self.host)
        self.config = AgentConfig(name, tuple(endpoints), Path("unused"), (NodeSpec(2000),), lease=PROFILES["fast"])
        transport, disk = GrpcTransport(endpoints), MemoryDisk()
        self.agent = Agent(
            self.config, CLOCK, SystemEntropy(), transport, self.executor, disk, boot_id=f"boot of {name}"
        )
        self._life = asyncio.create_task(self.agent.run())

    async def die(self) -> None:
        """The agent is gone without a word."""
        self._life.cancel()
        await asyncio.gather(self._life, return_exceptions=True)

    async def close(self) -> None:
        self.agent.stop()
        await self.die()
        await self.host.close()


@asynccontextmanager
async def fake_cluster(name: str, endpoints: Sequence[str], seconds: float = 0.2) -> AsyncIterator[FakeCluster]:
    made = FakeCluster(name, endpoints, seconds)
    try:
        yield made
    finally:
        await made.close()
