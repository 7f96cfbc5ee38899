"""One simulated federation, from its seed to its record.

A run has three parts: harm (faults and work), healing (everything is mended, nobody does anything new), and the wait for
convergence, whose length is bounded. Everything random comes from the seed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from baton.leases import PROFILES
from control_plane.history import MemoryHistory
from lab.sim_network import Links
from lab.simulation.chance import chance
from lab.simulation.etcd import Revision, SimEtcd
from lab.simulation.faults import KINDS, Nemesis
from lab.simulation.nodes import Node, SimLoop
from lab.simulation.processes import ClusterProcess, Drift, Ground, ReplicaProcess
from lab.simulation.record import Ran, Record, digest, read_journal
from lab.simulation.workload import Client, wishes

log = logging.getLogger(__name__)

RHO = 0.08
"""Largest clock-rate error of a simulated node; just below the 0.083 that leases allow for."""

SKEW = 0.5
"""Largest wall-clock error of a replica, seconds: what NTP keeps."""

QUIET = 35.0
"""Seconds after the last run's end (or healing) until everything must be clean: leases, stops, archives."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of world a seed makes."""

    replicas: int = 3
    clusters: int = 4
    cpus: int = 4
    runs: int = 20
    harm: float = 60.0
    """Seconds of faults."""
    faults: tuple[str, ...] = KINDS
    shuffle: bool = True
    drift: bool = True


class World:
    """See the module."""

    def __init__(self, seed: int, shape: Shape, loop: SimLoop) -> None:
        self.seed, self.shape, self.loop = seed, shape, loop
        self.rng = chance("world", seed)
        self.hits: Counter[str] = Counter()
        links = Links(chance("links", seed), self.hits)
        self.ground = Ground(loop, links, SimEtcd(Node("etcd", loop)), MemoryHistory(), self.hits, str(seed))
        links.nodes["client"] = Node("client", loop)
        self.replicas = [ReplicaProcess(f"r{n}", self.ground, self._drift(SKEW)) for n in range(shape.replicas)]
        lease = PROFILES["fast"]
        self.clusters = [
            ClusterProcess(f"c{n}", self.ground, self._drift(20.0), self.replicas, lease, shape.cpus)
            for n in range(shape.clusters)
        ]
        self.client = Client(chance("client", seed), str(seed), self.replicas)
        self.nemesis = Nemesis(self)
        loop.set_exception_handler(self._unhandled)

    def _drift(self, skew: float) -> Drift:
        if not self.shape.drift:
            return Drift(1000.0, 0.0, 1.0)
        rate = 1.0 + self.rng.choice((0.0, 0.0, 0.001, RHO)) * self.rng.uniform(-1.0, 1.0)
        return Drift(self.rng.uniform(100.0, 100_000.0), self.rng.uniform(-skew, skew), rate)

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A task that failed and nobody asked: a bug of ours or of the product."""
        if not self.loop.buried:
            error = context.get("exception")
            self.ground.died.append(f"unhandled: {context.get('message')}: {error!r}")
            if isinstance(error, BaseException):
                log.error("unhandled", exc_info=error)

    async def run(self) -> Record:
        """Live."""
        shape, loop = self.shape, self.loop
        for start in [process.start for process in self.replicas] + [process.start for process in self.clusters]:
            loop.call_later(self.rng.uniform(0.0, 2.0), start)
        work = [
            loop.create_task(self.client.fulfil(wish))
            for wish in wishes(chance("wishes", self.seed), shape.runs, shape.harm * 0.8)
        ]
        nemesis = loop.create_task(self.nemesis.run(shape.harm))
        await asyncio.sleep(shape.harm)
        nemesis.cancel()
        self.nemesis.heal()
        healed = loop.time()
        left: list[str] = []
        bound = max([healed, *self.client.deadlines.values(), 0.0]) + QUIET
        await asyncio.wait(work, timeout=bound - loop.time())
        left += [f"run {run} is not final for its client" for run in sorted(self.client.created - self.client.final)]
        for task in work:
            task.cancel()
        await asyncio.sleep(QUIET)
        left += self._unclean()
        living = [f"{cluster.name}: {key.text()}" for cluster in self.clusters for key in cluster.host.living()]
        return self._record(healed, living, left)

    def _unclean(self) -> list[str]:
        """What should be back to normal, long after healing."""
        found = []
        members = {name for replica in self.replicas if replica.replica for name in replica.replica.view.members}
        if members != {replica.name for replica in self.replicas}:
            found.append(f"members are {sorted(members)}")
        for replica in self.replicas:
            if replica.replica is not None:
                found += [
                    f"{replica.name} sees cluster {facts.name} as {facts.health.name}"
                    for facts in replica.replica.view.table.clusters.values()
                    if facts.health.name != "READY"
                ]
        return found

    def _record(self, healed: float, living: list[str], left: list[str]) -> Record:
        ran = [Ran(cluster.name, interval) for cluster in self.clusters for interval in cluster.host.intervals]
        revisions = self.ground.etcd.recorded.record
        return Record(
            journal=read_journal(revisions),
            ran=ran,
            said=self.client.said,
            deadlines=self.client.deadlines,
            healed=healed,
            ended=self.loop.time(),
            died=self.ground.died,
            living=living,
            left=left,
            notes=self.nemesis.notes,
            digest=digest(revisions, ran, self.client.said),
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished simulation."""

    seed: int
    record: Record
    hits: Counter[str]
    turns: int
    revisions: Sequence[Revision]


def simulate(seed: int, shape: Shape | None = None) -> Outcome:
    """Run one seed from beginning to end. Raises Deadlock, Spinning."""
    shape = shape or Shape()
    loop = SimLoop(chance("order", seed) if shape.shuffle else None)
    asyncio.set_event_loop(loop)
    try:
        world: World = loop.run_until_complete(_make(seed, shape, loop))
        record = loop.run_until_complete(world.run())
        return Outcome(seed, record, world.hits, loop.turns, world.ground.etcd.recorded.record)
    finally:
        loop.bury()
        asyncio.set_event_loop(None)
        loop.close()


async def _make(seed: int, shape: Shape, loop: SimLoop) -> World:
    return World(seed, shape, loop)
