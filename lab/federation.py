"""A local federation: etcd, replicas and clusters as real processes on loopback, with the faults a person wants to see.

Theory: nothing here stands in for the product. The processes are those an operator would start, told their addresses by
flags; between them lies a network that can be cut (links.py). Everything belongs to the process that runs this class and
dies with it: replicas and etcd by the kernel's word to the child of a dead thread, machines by the end of their stdin.
What survives is on disk: stop and start again, and runs go on (clusters come back as rebooted hosts, PROTOCOL S6).

Call it from the main thread's asyncio loop only.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from baton.client import AsyncClient
from baton.clock import SystemClock, SystemEntropy
from baton.errors import BatonError
from baton.v1 import cluster_pb2
from control_plane.store.versions import Support
from lab.etcd_binary import find_etcd
from lab.layout import ETCD, Layout, Settings, settings_record
from lab.links import Links
from lab.machine import OFF_SECONDS
from lab.machine_part import Cluster
from lab.parts import Part, PartFailed, Replica, Store, part_status
from lab.processes import Identity, kill_remains

READY_SECONDS = 60.0
"""For all clusters to be READY after their processes run; five here, much more on a machine that is busy."""

LOOK_SECONDS = 0.1


class UnknownPart(Exception):
    """A name that nothing here has; the text lists the names."""


class Federation:
    """See the module. `start` once, `stop` once; the verbs in between raise UnknownPart and PartFailed."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        """Raises EtcdNotFound."""
        self.layout = layout
        self.settings = settings.checked()
        self.binary = find_etcd()
        self.stage = "starting"
        self.suspicion = ""
        """Why etcd looks restored, in words; nothing is written while it does (PROTOCOL J12). As last heard."""
        entropy = SystemEntropy()
        unsafe = self.binary.support is Support.UNSAFE
        self.links = Links(settings.replica_names, settings.clusters)
        self._store = Store(layout, self.links, self.binary)
        self._replicas = {
            name: Replica(name, layout, self.links, unsafe_etcd=unsafe, collector=settings.otlp_endpoint)
            for name in settings.replica_names
        }
        self._clusters = {name: Cluster(name, layout, self.links, settings, entropy) for name in settings.clusters}

    @property
    def warning(self) -> str:
        """One line about an etcd that is not supported; empty if there is nothing to say."""
        if self.binary.support is Support.SUPPORTED:
            return ""
        unsafe = self.binary.support is Support.UNSAFE
        what = "has bugs that can lose data; good for a look, for nothing else" if unsafe else "lacks known fixes"
        has_go = shutil.which("go") is not None
        fix = "run `scripts/tools etcd` for a supported one" if has_go else "with Go, `scripts/tools etcd` builds one"
        return f"warning: etcd {self.binary.version} {what}; {fix}"

    @property
    def endpoints(self) -> list[str]:
        """host:port for clients; the same for the life of the directory, if nobody else took the ports."""
        return [self.links.front(name) for name in self._replicas]

    @asynccontextmanager
    async def client(self) -> AsyncIterator[AsyncClient]:
        """A client of all replicas."""
        async with AsyncClient(self.endpoints) as client:
            yield client

    async def start(self) -> None:
        """Bring everything up, on what the directory holds. On failure everything is stopped; raises PartFailed."""
        self.layout.make()
        earlier = self.layout.read_state()
        await _bury([Identity(*each) for each in earlier.get("processes", [])])
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self.stop)
            await self.links.start(earlier.get("ports", {}))
            self.record()
            await self._store.start()
            self.record()
            await _together([replica.start for replica in self._replicas.values()])
            self.record()
            await _together([cluster.start for cluster in self._clusters.values()])
            self.record()
            await self._wait_ready()
            undo.pop_all()
        self.stage = "running"
        self.record()

    async def stop(self) -> None:
        """End everything and keep the state. Raises PartFailed if something could not be killed."""
        self.stage = "stopping"
        try:
            await _together([cluster.stop for cluster in self._clusters.values()])
            await _together([replica.stop for replica in self._replicas.values()])
        finally:
            await self._store.stop()
            await self.links.close()
        self.stage = "stopped"
        self.record()

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def part(self, name: str) -> Part:
        """The part of that name. Raises UnknownPart."""
        found: Part | None = self._clusters.get(name) or self._replicas.get(name)
        if name == ETCD:
            found = self._store
        if found is None:
            known = ", ".join([*self._clusters, *self._replicas, ETCD])
            raise UnknownPart(f"nothing here is called {name!r}; there are {known}")
        return found

    async def kill(self, name: str, *, agent_only: bool = False) -> None:
        """SIGKILL all of it at once, as a power cut would; or only a cluster's agent."""
        await self.part(name).kill(agent_only=agent_only)
        self.record()

    async def start_again(self, name: str) -> None:
        """Start what is dead of it."""
        await self.part(name).start()
        self.record()

    async def freeze(self, name: str, *, everything: bool = False) -> None:
        """SIGSTOP a cluster's agent (`everything`: guard and workloads too), a replica, or etcd."""
        await self.part(name).freeze(everything=everything)
        self.record()

    async def thaw(self, name: str) -> None:
        """Undo `freeze`."""
        await self.part(name).thaw()
        self.record()

    def cut(self, name: str) -> None:
        """Take the network of a cluster or replica away."""
        self._with_network(name)
        self.links.cut(name)
        self.record()

    def heal(self, name: str) -> None:
        """Give it back."""
        self._with_network(name)
        self.links.heal(name)
        self.record()

    def _with_network(self, name: str) -> None:
        self.part(name)
        if name == ETCD:
            raise UnknownPart("etcd has no network of its own here; cut the replicas, or freeze etcd")

    # -- what is written down ------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Everything a person may ask, as plain data."""
        return {
            "stage": self.stage,
            "directory": str(self.layout.directory),
            "logs": str(self.layout.logs),
            "endpoints": self.endpoints,
            "profile": self.settings.profile,
            "settings": settings_record(self.settings),
            "etcd_version": self.binary.version,
            "warning": self.warning,
            "restored": self.suspicion,
            "store": {**part_status(self._store, self.links, ETCD)},
            "replicas": [
                {
                    **part_status(each, self.links, name),
                    "address": self.links.front(name),
                    "web": self.layout.web_address(name),
                }
                for name, each in self._replicas.items()
            ],
            "clusters": [
                {**part_status(each, self.links, name), "web": self.layout.web_address(name)}
                for name, each in self._clusters.items()
            ],
        }

    def record(self) -> None:
        """Write down what a later supervisor, or a person, has to know."""
        everyone: list[Part] = [self._store, *self._replicas.values(), *self._clusters.values()]
        found = [identity for part in everyone for identity in part.identities()]
        self.layout.write_state(
            {
                **self.status(),
                "ports": self.links.front_ports(),
                "processes": [[identity.pid, identity.start_ticks] for identity in found],
            }
        )

    async def look(self, client: AsyncClient) -> None:
        """Hear whether etcd looks restored. What nobody answers stays as it was."""
        with contextlib.suppress(BatonError):
            answer = await client.list_shards()
            self.suspicion = answer.restore_detail if answer.restore_suspected else ""

    async def _wait_ready(self) -> None:
        """Until every cluster is READY in the eyes of the federation, or none can be before a person has said that etcd was
        restored on purpose (J12): that needs a federation that is up. Raises PartFailed."""
        clock = SystemClock()
        deadline = clock.boot() + READY_SECONDS
        missing, why = set(self._clusters), "no replica answered"
        async with self.client() as client:
            while clock.boot() < deadline:
                try:
                    ready = {
                        each.name.removeprefix("clusters/")
                        async for each in client.list_clusters()
                        if each.health == cluster_pb2.CLUSTER_HEALTH_READY
                    }
                    missing, why = set(self._clusters) - ready, "they did not become ready"
                except BatonError as error:
                    why = error.message
                await self.look(client)
                if not missing or self.suspicion:
                    return
                await clock.sleep(LOOK_SECONDS)
        raise PartFailed(f"after {READY_SECONDS:.0f} s {', '.join(sorted(missing))} cannot be used: {why}")


async def _together(acts: list[Callable[[], Any]]) -> None:
    """All at once; the first failure is raised after the last has ended."""
    results = await asyncio.gather(*(act() for act in acts), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result


async def _bury(remains: list[Identity]) -> None:
    """Processes of a supervisor that died without a word: they end by themselves; what does not is killed."""
    clock = SystemClock()
    deadline = clock.boot() + OFF_SECONDS
    while any(each.alive for each in remains) and clock.boot() < deadline:
        await clock.sleep(LOOK_SECONDS)
    for each in remains:
        kill_remains(each)
