"""Replicas and clusters as the simulator runs them: production composition roots on nodes, with ports in memory.

A replica's process loses everything when it dies. An agent's process leaves its disk; its host leaves guard and workloads; a
reboot leaves the disk without what was not synced, and starts the boot clock anew.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.leases import LeaseValues
from baton.time_limits import time_limit
from cluster_agent.agent import Agent
from cluster_agent.config import AgentConfig
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.disk import DiskFailure, MemoryDisk
from cluster_agent.executors.base import StartRequest
from cluster_agent.executors.fake import FakeExecutor
from cluster_agent.executors.fake_workload import Script
from cluster_agent.transport import TransportClosed
from control_plane.history import MemoryHistory
from control_plane.replica import Identity, Parts, Replica, make_machine
from control_plane.services.edge import Edge
from control_plane.services.identity import Identity as Caller
from control_plane.services.methods import Asked
from control_plane.snapshots import InPlaceSnapshotter, SnapshotsConfig
from control_plane.store.keeper import TaskLeaseKeeper
from control_plane.store.memory import MemoryStore
from lab.sim_network import NOBODY, Links, MemoryPeers, Pipe, ReplicaEnd
from lab.simulation import versions
from lab.simulation.chance import chance
from lab.simulation.etcd import SeededStoreFaults, SimEtcd
from lab.simulation.hosts import SimHost
from lab.simulation.kinds import REFUSED_OLDER, TAIL_LOST
from lab.simulation.nodes import Node, SimLoop
from lab.simulation.transport import SimTransport
from lab.virtual_time import SeededEntropy, VirtualClock

if TYPE_CHECKING:
    from control_plane.view import View


RESTART = 1.0
"""Seconds until an agent that could not start is started again."""


REFUSED_PAUSE = 4.0
"""Seconds until a replica that may not take part is tried again."""


@dataclass(slots=True)
class Ground:
    """What all processes of one simulation stand on."""

    loop: SimLoop
    links: Links
    etcd: SimEtcd
    history: MemoryHistory
    hits: Counter[str]
    seed: str
    snapshots: float = 60.0
    """Seconds after which a shard that was written to gets a snapshot (J9)."""
    died: list[str] = field(default_factory=list)
    """Processes that ended by themselves, and why: always a violation."""


@dataclass(frozen=True, slots=True)
class Drift:
    """How a machine's clocks are wrong."""

    boot_offset: float
    wall_offset: float
    rate: float

    def clock(self) -> VirtualClock:
        """A clock of that machine, from now."""
        return VirtualClock(boot_offset=self.boot_offset, wall_offset=self.wall_offset, rate=self.rate)


class ReplicaProcess:
    """One replica, in all its lives."""

    def __init__(self, name: str, ground: Ground, drift: Drift) -> None:
        self.name, self._ground = name, ground
        self.clock = drift.clock()
        self.faults = SeededStoreFaults(chance(ground.seed, name, "store"), ground.hits)
        self.lives = 0
        self.older = False
        """The next life is one version behind (J11)."""
        self.node: Node | None = None
        self.replica: Replica | None = None
        self._leaving: Node | None = None
        self._edge: Edge | None = None

    @property
    def alive(self) -> bool:
        """A process is there, frozen or not."""
        return self.node is not None

    @property
    def serves(self) -> bool:
        """It has come up, and has not been told to leave."""
        return self.replica is not None and self._leaving is not self.node

    def start(self) -> None:
        """A new process."""
        if self.node is not None:
            return
        self.lives += 1
        self.node = self._ground.links.nodes[self.name] = Node(self.name, self._ground.loop)
        self.node.spawn(self._live(self.node))

    def kill(self) -> None:
        """SIGKILL."""
        node, self.node, self.replica, self._edge = self.node, None, None, None
        if node is not None:
            node.kill()
            self._ground.links.node_died(self.name)
            self._ground.links.nodes.pop(self.name, None)

    def leave(self) -> None:
        """SIGTERM: hand over, then end."""
        if self.node is not None and self.replica is not None:
            self.node.spawn(self._leave(self.node, self.replica))

    async def _leave(self, node: Node, replica: Replica) -> None:
        self._leaving = node
        await replica.stop()
        if self.node is node:
            self.kill()

    async def _live(self, node: Node) -> None:
        ground, clock = self._ground, self.clock
        entropy = SeededEntropy(f"{ground.seed}/{self.name}/{self.lives}")
        store = MemoryStore(ground.etcd, faults=self.faults, clock=clock)

        def make_peers(view: View) -> MemoryPeers:
            del view
            return MemoryPeers(self.name, ground.links)

        parts = Parts(
            store=store,
            make_keeper=lambda: TaskLeaseKeeper(store, clock),
            make_peers=make_peers,
            clock=clock,
            entropy=entropy,
            history=ground.history,
            snapshotter=InPlaceSnapshotter(store, clock, make_machine),
            snapshots=SnapshotsConfig(seconds=ground.snapshots),
        )
        replica = Replica(Identity(self.name, self.name), parts)
        try:
            await replica.start()
            if self.older:
                versions.make_older(replica)
            edge = Edge(replica.services.methods, replica.forwarder, clock, entropy, _nobody_asks)
            edge.serve_peers(replica.calls)
            self.replica, self._edge = replica, edge
            await replica.run()
            if self._leaving is not node:
                raise RuntimeError("the replica ended")
        except Exception as error:
            if self.older and self.node is node and versions.is_refusal(error):
                self._refused()
            elif self.node is node and not ground.loop.buried:
                ground.died.append(f"{self.name}: {error!r}")
                raise

    def _refused(self) -> None:
        """An older program may not take part any more (J11); whoever supervises it tries again, or upgrades it."""
        self.kill()
        self._ground.hits[REFUSED_OLDER] += 1
        self._ground.loop.call_later(REFUSED_PAUSE, self.start, context=NOBODY)

    def accept(self, pipe: Pipe) -> None:
        """An agent dials. Raises TransportClosed."""
        if self.replica is None or self.node is None:
            raise TransportClosed(f"{self.name} refuses the connection")
        self.node.spawn(self._serve(self.replica, ReplicaEnd(pipe)))

    async def _serve(self, replica: Replica, end: ReplicaEnd) -> None:
        """As `services.agents` does it: the stream ends when the handler is done."""
        try:
            await replica.sessions.serve(end)
        except Exception as error:  # noqa: BLE001 - `serve` promises to raise nothing
            if not self._ground.loop.buried:
                self._ground.died.append(f"{self.name}, serving an agent: {error!r}")
        end.end()

    async def stream(self, method: str, request: Any, timeout: float) -> AsyncIterator[bytes]:
        """A client's streaming call: its payloads as they arrive, until the server ends it. Raises as `call`."""
        edge, node, links = self._edge, self.node, self._ground.links
        if edge is None or node is None or not links.heard("client", self.name):
            raise ConnectionError(f"{self.name} refuses the connection")
        arrived: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()

        async def serve() -> None:
            handler = next(m for name, m in edge._methods.items() if name.endswith("/" + method))  # noqa: SLF001
            asked = Asked(handler.name, "client", self.clock.boot() + timeout, self.clock)
            end: Exception | None = None
            try:
                async for payload in edge.answers(handler, request.SerializeToString(), asked):
                    links.deliver(self.name, "client", partial(arrived.put_nowait, payload))
            except Exception as error:  # noqa: BLE001 - travels to the caller
                end = error
            links.deliver(self.name, "client", partial(arrived.put_nowait, end))

        links.deliver_alone("client", self.name, lambda: node.spawn(serve()))
        async with time_limit(timeout):
            while (payload := await arrived.get()) is not None:
                if isinstance(payload, Exception):
                    raise payload
                yield payload

    async def call(self, method: str, request: Any, timeout: float) -> bytes:
        """A client's call, answered by the production edge. Raises ConnectionError, TimeoutError, BatonError."""
        edge, node, links = self._edge, self.node, self._ground.links
        if edge is None or node is None or not links.heard("client", self.name):
            raise ConnectionError(f"{self.name} refuses the connection")
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            handler = next(m for name, m in edge._methods.items() if name.endswith("/" + method))  # noqa: SLF001
            asked = Asked(handler.name, "client", self.clock.boot() + timeout, self.clock)
            try:
                async for payload in edge.answers(handler, request.SerializeToString(), asked):
                    links.deliver_alone(self.name, "client", partial(_answer, answer, payload))
                    return
            except Exception as error:  # noqa: BLE001 - travels to the caller
                links.deliver_alone(self.name, "client", partial(_answer, answer, error))

        links.deliver_alone("client", self.name, lambda: node.spawn(serve()))
        async with time_limit(timeout):
            return await answer


def _answer(future: asyncio.Future[bytes], answer: bytes | Exception) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _nobody_asks(context: object) -> Caller:  # noqa: ARG001 - as the edge calls it
    raise AssertionError("there is no gRPC in here")


class ClusterProcess:
    """One cluster: a host with guard and workloads, and its agent in all its lives."""

    def __init__(
        self,
        name: str,
        ground: Ground,
        drift: Drift,
        replicas: Sequence[ReplicaProcess],
        lease: LeaseValues,
        cpus: int,
        *,
        program: Callable[[StartRequest], Script] | None = None,
        labels: Mapping[str, str] | None = None,
        serves: str = "",
    ) -> None:
        """`program`: what its workloads do, by default what `script_of` reads from their argv. `serves`: the cluster's name, if it
        is not the host's."""
        self._serves = serves or name
        self.name, self._ground, self._replicas, self._lease, self._cpus = name, ground, replicas, lease, cpus
        self._labels = dict(labels or {})
        self._drift = drift
        self.clock = drift.clock()
        self.rng = chance(ground.seed, name)
        self.host = SimHost(Node(f"{name}-host", ground.loop), self.clock, program or script_of)
        self.disk = MemoryDisk()
        self.lives = self.boots = 0
        self.older = False
        """The next agent is one version behind (J11)."""
        self.node: Node | None = None
        self.agent: Agent | None = None
        self.off = False
        """The machine was rebooted and is not up yet."""
        self._leaving: Node | None = None
        self._executor: FakeExecutor | None = None

    @property
    def alive(self) -> bool:
        """An agent is there, frozen or not."""
        return self.node is not None

    @property
    def serves(self) -> bool:
        """An agent has begun, and has not been told to leave."""
        return self.agent is not None and self._leaving is not self.node

    def start(self) -> None:
        """A new agent."""
        if self.node is not None or self.host.suspended:
            return
        self.off = False
        self.lives += 1
        self.node = self._ground.links.nodes[self.name] = Node(self.name, self._ground.loop)
        self.node.spawn(self._live(self.node))

    def kill(self) -> None:
        """SIGKILL of the agent: disk, guard and work stay."""
        node, executor, self.node, self.agent, self._executor = self.node, self._executor, None, None, None
        if node is None:
            return
        node.kill()
        self._ground.links.node_died(self.name)
        self._ground.links.nodes.pop(self.name, None)
        if executor is not None:
            executor.leave()

    def leave(self, *, drain: bool) -> None:
        """SIGTERM: end in order, leaving work to the next agent, or with `drain` after all work is dead."""
        if self.agent is not None and self.node is not None:
            self._leaving = self.node
            self.node.run(partial(self.agent.stop, drain=drain))

    def reboot(self) -> None:
        """Power off: agent, guard and work are dead, the tail of the disk that was not synced is lost. `start` is the boot."""
        self.kill()
        self.host.resume()
        self.host.thaw_guard()
        self.host.reboot()
        before = self.disk.used
        self.disk.crash(self.rng.choice((0.0, 0.5, 1.0)))
        self._ground.hits[TAIL_LOST] += self.disk.used < before
        self.off = True
        self.boots += 1
        self._drift = Drift(self.rng.uniform(5.0, 50.0), self._drift.wall_offset, self._drift.rate)
        self.clock = self.host.clock = self._drift.clock()

    async def _live(self, node: Node) -> None:
        executor = self._executor = FakeExecutor(self.host)
        config = AgentConfig(
            cluster=self._serves,
            endpoints=tuple(replica.name for replica in self._replicas),
            directory=Path("unused"),
            nodes=(NodeSpec(cpu_millis=1000 * self._cpus),),
            lease=self._lease,
            labels=self._labels,
        )
        agent = self.agent = (versions.OlderAgent if self.older else Agent)(
            config,
            self.clock,
            SeededEntropy(f"{self._ground.seed}/{self.name}/{self.lives}"),
            SimTransport(self.name, self._ground.links, self._replicas),
            executor,
            self.disk,
            boot_id=f"{self.name}-boot-{self.boots}",
        )
        try:
            await agent.run()
            if self.node is node:
                self.kill()
        except DiskFailure:
            if self.node is node:  # no agent starts on a full disk; whoever supervises it tries again
                self.kill()
                self._ground.loop.call_later(RESTART, self.start, context=NOBODY)
        except Exception as error:
            if self.node is node and not self._ground.loop.buried:
                self._ground.died.append(f"{self.name}: {error!r}")
                raise


def script_of(request: StartRequest) -> Script:
    """`sim SECONDS FAILURES STUBBORN RESULT`: runs so long, fails in its first attempts, perhaps ignores TERM."""
    _, seconds, failures, stubborn, result = request.argv
    fails = request.key.n <= int(failures)
    return Script(
        float(seconds),
        exit_code=1 if fails else 0,
        result=b"" if fails or not result else f'"{result} of {request.key.n}"'.encode(),
        ignore_term=stubborn == "1",
    )
