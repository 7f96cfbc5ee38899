"""An agent whose work takes no time: the real agent over an executor that ends what it starts at once.

What is left is the control plane and the agent's own loop: `scripts/bench --instant` shows what these cost without guard and
workers. Never a figure of the product, for nothing runs.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from baton import collector
from baton.clock import SystemClock, SystemEntropy
from baton.leases import PROFILES
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.disk import RealDisk
from cluster_agent.executors.base import (
    AttemptKey,
    Cause,
    CensusEntry,
    ExecutorEvent,
    Exited,
    Features,
    StartRequest,
    Stopped,
)
from cluster_agent.transport_grpc import GrpcTransport

SLOTS = 64
"""Far more than the benchmark's two, so that one turn of the agent ends many tasks, as prefetching workers do."""


class InstantExecutor:
    """See the module. Keeps nothing: it lives as long as its agent."""

    def __init__(self) -> None:
        self._news: asyncio.Queue[list[ExecutorEvent]] = asyncio.Queue()
        self._clock = SystemClock()

    async def connect(self) -> Sequence[CensusEntry]:
        """Nothing runs."""
        return ()

    def features(self) -> Features:
        """None."""
        return Features(isolation=False, orphan_killer=True, detail="no work is done")

    def ticked_at(self) -> float:
        """Always well."""
        return self._clock.boot()

    async def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """Nothing to kill."""

    async def renew(self, generation: int, sent_boot: float) -> None:
        """Nothing to kill."""

    async def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """Nothing runs."""

    async def widen(self, key: AttemptKey, slots: int) -> None:
        """Nothing waits."""

    async def start(self, requests: Sequence[StartRequest]) -> None:
        """Started and over."""
        now = self._clock.wall()
        self._news.put_nowait(
            [Exited(each.key, Cause.EXIT, 0, None, now, now, b"%.6f" % self._clock.boot()) for each in requests]
        )

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:  # noqa: ARG002 - the port's
        """Confirmed at once."""
        self._news.put_nowait([Stopped(key) for key in keys])

    async def forget(self, keys: Sequence[AttemptKey]) -> None:
        """Nothing is kept."""

    async def events(self) -> AsyncIterator[Sequence[ExecutorEvent]]:
        """What was started, ended."""
        while True:
            batch = await self._news.get()
            while not self._news.empty():
                batch.extend(self._news.get_nowait())
            yield batch

    async def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:  # noqa: ARG002 - the port's
        """Empty."""
        return b"", True

    async def kill_all(self) -> None:
        """Nothing runs."""

    async def kill_if_silent(self) -> None:
        """Never silent."""

    async def close(self) -> None:
        """Nothing is held."""


async def _serve(endpoint: str, directory: Path) -> None:
    clock = SystemClock()
    config = AgentConfig("bench", (endpoint,), directory, (NodeSpec(1000 * SLOTS),), lease=PROFILES["balanced"])
    transport = GrpcTransport((endpoint,), None, learns=False)
    agent = Agent(config, clock, SystemEntropy(), transport, InstantExecutor(), RealDisk(directory), boot_id="instant")
    await agent.run()


if __name__ == "__main__":
    collector.tune()
    asyncio.run(_serve(sys.argv[1], Path(sys.argv[2])))
