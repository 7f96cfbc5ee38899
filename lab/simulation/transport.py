"""How a simulated agent reaches replicas: one after the other, over links that may be cut."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cluster_agent.transport import TransportClosed
from lab.sim_network import AgentEnd, Links, Pipe

if TYPE_CHECKING:
    from lab.simulation.processes import ReplicaProcess


class SimTransport:
    """`cluster_agent.transport.Transport` over the links."""

    def __init__(self, cluster: str, links: Links, replicas: Sequence[ReplicaProcess]) -> None:
        self._cluster, self._links, self._replicas = cluster, links, replicas
        self._next = links.rng.randrange(len(replicas))

    async def connect(self) -> AgentEnd:
        """See `Transport.connect`."""
        target = self._replicas[self._next % len(self._replicas)]
        self._next += 1
        await asyncio.sleep(self._links.rng.uniform(0.0, 2 * self._links.max_delay))
        if not (self._links.heard(self._cluster, target.name) and self._links.heard(target.name, self._cluster)):
            await asyncio.sleep(1.0)
            raise TransportClosed(f"{target.name} does not answer")
        pipe = Pipe(self._cluster, target.name, self._links)
        try:
            target.accept(pipe)
        except TransportClosed:
            pipe.close()
            raise
        return AgentEnd(pipe)

    def learn(self, endpoints: Sequence[str]) -> None:
        """All replicas are known."""

    async def close(self) -> None:
        """Nothing is held."""
