"""The network of a federation under chaos: as `lab.links`, and a way from every replica to every etcd member.

Each strike takes the ways of one part and sets them to a mode of the proxy; a part is struck once at a time, so healing is PASS for
just those ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from lab.links import Links
from lab.proxy import Mode, Proxy


class Network(Links):
    """All proxies, by the parts at their ends."""

    def __init__(self, replicas: Sequence[str], clusters: Sequence[str], members: Sequence[str]) -> None:
        super().__init__(replicas, clusters)
        self.member_ports: dict[str, int] = {}
        self._to_members = {
            (replica, member): Proxy(lambda member=member: self._member(member))  # type: ignore[misc]  # a default
            for replica in replicas
            for member in members
        }

    def _member(self, name: str) -> tuple[str, int] | None:
        port = self.member_ports.get(name)
        return ("127.0.0.1", port) if port else None

    async def start(self, ports: Mapping[str, int]) -> None:
        """See Links."""
        await super().start(ports)
        for proxy in self._to_members.values():
            await proxy.start()

    async def close(self) -> None:
        """See Links."""
        await asyncio.gather(*(proxy.close() for proxy in self._to_members.values()))
        await super().close()

    def shelves(self, replica: str) -> list[str]:
        """host:port of every etcd member, as one replica finds them."""
        return [proxy.address for (name, _), proxy in self._to_members.items() if name == replica]

    def of_cluster(self, cluster: str) -> list[Proxy]:
        """Its ways to all replicas."""
        return [proxy for (name, _), proxy in self._ways.items() if name == cluster]

    def to_store(self, replica: str) -> list[Proxy]:
        """A replica's ways to all etcd members."""
        return [proxy for (name, _), proxy in self._to_members.items() if name == replica]

    def of_replica(self, replica: str) -> list[Proxy]:
        """Everything that leads to a replica, and from it to the store."""
        agents = [proxy for (_, name), proxy in self._ways.items() if name == replica]
        return [self._fronts[replica], *agents, *self.to_store(replica)]


def set_all(ways: Sequence[Proxy], mode: Mode, delay_seconds: float = 0.0) -> None:
    """One mode for all."""
    for proxy in ways:
        proxy.set(mode, delay_seconds=delay_seconds)
