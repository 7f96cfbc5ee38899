"""The federation that chaos strikes: `lab.federation`, with etcd members, a network that fails in more ways, and odd clocks."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from baton.clock import Entropy, SystemEntropy
from cluster_agent.guard import proctree
from control_plane.store.versions import Support
from lab.chaos.network import Network
from lab.chaos.offsets import shifted
from lab.chaos.store import StoreCluster
from lab.federation import Federation
from lab.layout import Layout, Settings
from lab.machine_part import Cluster
from lab.parts import Part, PartFailed, Replica
from lab.processes import Identity, identify


class ManyShelves(Replica):
    """A replica that knows all etcd members."""

    def __init__(self, name: str, layout: Layout, network: Network, *, unsafe_etcd: bool) -> None:
        super().__init__(name, layout, network, unsafe_etcd=unsafe_etcd)
        self._network = network

    def _command(self) -> list[str]:
        command = super()._command()
        at = command.index("--etcd")
        command[at : at + 2] = [word for shelf in self._network.shelves(self.name) for word in ("--etcd", shelf)]
        return command


class ShiftedCluster(Cluster):
    """A machine with a boot clock of its own."""

    def __init__(
        self, name: str, layout: Layout, links: Network, settings: Settings, entropy: Entropy, offset: int
    ) -> None:
        super().__init__(name, layout, links, settings, entropy)
        self.offset = offset

    def _command(self) -> list[str]:
        return [*shifted(self.offset), *super()._command()]

    def guard(self) -> Identity:
        """The guard: below the machine, and no child of another guard (those are the keepers it forked). Raises PartFailed."""
        machine = self.identities()
        below = proctree.descendants(machine[0].pid, proctree.everything()) if machine else []
        guards = {each.pid: each for each in below if _is_guard(each.pid)}
        found = [each for each in guards.values() if each.ppid not in guards]
        if len(found) != 1:
            raise PartFailed(f"{self.name} has {len(found)} guards just now")
        return identify(found[0].pid)


def _is_guard(pid: int) -> bool:
    try:
        return b"\0cluster_agent.guard\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # gone


class Ground(Federation):
    """See the module."""

    def __init__(self, directory: Path, settings: Settings, members: int, offsets: Mapping[str, int]) -> None:
        """`offsets`: cluster -> seconds that its boot clock is ahead. Raises EtcdNotFound."""
        super().__init__(Layout(directory), settings)
        self.offsets = dict(offsets)
        names = [f"etcd-{number}" for number in range(1, members + 1)]
        network = self.network = self.links = Network(settings.replica_names, settings.clusters, names)
        self.store = StoreCluster(self.layout.etcd.parent, names, self.binary, network)
        self._store = self.store  # type: ignore[assignment]  # a Part, as Federation needs it
        unsafe, entropy = self.binary.support is Support.UNSAFE, SystemEntropy()
        self.replicas = {
            name: ManyShelves(name, self.layout, network, unsafe_etcd=unsafe) for name in settings.replica_names
        }
        self.clusters = {
            name: ShiftedCluster(name, self.layout, network, settings, entropy, self.offsets.get(name, 0))
            for name in settings.clusters
        }
        self._replicas, self._clusters = {**self.replicas}, {**self.clusters}

    async def kill_everything(self) -> None:
        """SIGKILL all parts at once, however they are; `stop` then has nothing to wait for. What could not be killed, `stop` tells."""
        parts: list[Part] = [*self.clusters.values(), *self.replicas.values(), *self.store.members.values()]
        await asyncio.gather(*(part.kill() for part in parts), return_exceptions=True)

    def failed(self) -> list[str]:
        """Parts that are not as they should be while nothing is broken: they died by themselves."""
        parts: dict[str, Part] = {**self.replicas, **self.clusters, **self.store.members}
        return [f"{name} is {part.word}" for name, part in parts.items() if part.word != "running"]
