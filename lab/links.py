"""The network of a local federation: a fault proxy on each way that a cable could be.

    client, other replicas ---> front(replica) -----> replica
    agent of a cluster -------> way(cluster, replica) -> replica
    replica ------------------> shelf(replica) -----> etcd

Theory: to cut a cluster is to drop what it sends to any replica; to cut a replica is to drop its ways from clients, agents
and other replicas *and* its way to etcd, for a replica that reaches the store but nobody else would keep its shards. What
a cut replica dials itself (its stream to a peer) is not cut: without the store it has nothing true to say there. A
replica's port changes when it is started again; the proxies' ports do not, so nobody has to be told.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence

from lab.proxy import Mode, Proxy


class Links:
    """All proxies. `replica_ports` and `store` are changed by whoever starts the processes behind them."""

    def __init__(self, replicas: Sequence[str], clusters: Sequence[str]) -> None:
        self.replica_ports: dict[str, int] = {}
        self.store: tuple[str, int] | None = None
        self._cut: set[str] = set()
        self._fronts = {replica: Proxy(self._to_replica(replica)) for replica in replicas}
        self._shelves = {replica: Proxy(lambda: self.store) for replica in replicas}
        self._ways = {
            (cluster, replica): Proxy(self._to_replica(replica)) for cluster in clusters for replica in replicas
        }

    async def start(self, ports: Mapping[str, int]) -> None:
        """Listen. `ports`: where the fronts listened the last time, kept if they are free. Raises OSError."""
        for replica, front in self._fronts.items():
            try:
                await front.start(ports.get(replica, 0))
            except OSError:
                await front.start()
        for proxy in (*self._shelves.values(), *self._ways.values()):
            await proxy.start()

    async def close(self) -> None:
        """Break everything."""
        proxies = (*self._fronts.values(), *self._shelves.values(), *self._ways.values())
        await asyncio.gather(*(proxy.close() for proxy in proxies))

    def front(self, replica: str) -> str:
        """host:port where clients and peers find a replica, whatever becomes of its process."""
        return self._fronts[replica].address

    def front_ports(self) -> dict[str, int]:
        """The fronts' ports, to be asked for again."""
        return {replica: front.port for replica, front in self._fronts.items()}

    def shelf(self, replica: str) -> str:
        """host:port where a replica finds etcd."""
        return self._shelves[replica].address

    def ways(self, cluster: str) -> list[str]:
        """host:port of every replica, as one cluster finds them."""
        return [proxy.address for (name, _), proxy in self._ways.items() if name == cluster]

    def is_cut(self, name: str) -> bool:
        """Whether this cluster or replica has no network."""
        return name in self._cut

    def cut(self, name: str) -> None:
        """Take the network of a cluster or replica away: sockets stay, nothing moves."""
        self._cut.add(name)
        self._apply()

    def heal(self, name: str) -> None:
        """Give it back."""
        self._cut.discard(name)
        self._apply()

    def _apply(self) -> None:
        for proxy, ends in self._with_ends():
            wanted = Mode.DROP if self._cut & ends else Mode.PASS
            if proxy.mode is not wanted:
                proxy.set(wanted)

    def _with_ends(self) -> Iterator[tuple[Proxy, set[str]]]:
        for replica, front in self._fronts.items():
            yield front, {replica}
        for replica, shelf in self._shelves.items():
            yield shelf, {replica}
        for (cluster, replica), way in self._ways.items():
            yield way, {cluster, replica}

    def _to_replica(self, replica: str) -> Callable[[], tuple[str, int] | None]:
        return lambda: ("127.0.0.1", self.replica_ports[replica]) if replica in self.replica_ports else None
