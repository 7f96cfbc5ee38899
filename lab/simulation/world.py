"""One simulated federation, from its seed to its record.

A run has three parts: harm (faults and work), healing (everything is mended, nobody does anything new), and the wait for
convergence, whose length is bounded. Everything random comes from the seed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from baton.leases import PROFILES
from control_plane.history import MemoryHistory
from lab.checking.history import Ran, Record
from lab.sim_network import Links
from lab.simulation import faults_machines as machines
from lab.simulation.chance import chance
from lab.simulation.etcd import Revision, SimEtcd
from lab.simulation.faults import OUTAGES, PACE, Nemesis
from lab.simulation.kinds import CLOCK_RATE, KINDS, REPLICA_BEHIND, SECOND, STALE_WORK
from lab.simulation.nodes import Node, SimLoop
from lab.simulation.processes import ClusterProcess, Drift, Ground, ReplicaProcess
from lab.simulation.record import digest, read_journal, read_owners, stale_returns
from lab.simulation.versions import read_levels
from lab.simulation.workload import Client, Load, wishes

log = logging.getLogger(__name__)

RHO = 0.08
"""Largest clock-rate error of a simulated node; just below the 0.083 that leases allow for."""

QUARTZ = 2e-4
"""Clock-rate error that is none: what cheap quartz does by itself. A machine beyond it is counted."""

SKEW = 0.5
"""Largest wall-clock error of a replica, seconds: what NTP keeps."""

QUIET = 30.0
"""Seconds after healing (or the last deadline) until everything must be clean: leases, stops, sessions."""

REST = 10.0
"""Seconds after the last run's end until everything must be clean: stops (KILL after 5 s), archives (5 s)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What kind of world a seed makes."""

    replicas: int = 3
    clusters: int = 0
    """0: three to five, by seed."""
    cpus: int = 6
    runs: int = 5
    """Beside the marathons and crowds of `load`."""
    harm: float = 30.0
    """Seconds of faults."""
    sieges: float = 0.95
    """Share of seeds in which the busiest cluster is taken out of sight, early and for longer than L + G (20 s)."""
    faults: tuple[str, ...] = KINDS
    shuffle: bool = True
    drift: bool = True
    rates: tuple[float, ...] = (0.0, 0.0, 0.001, RHO)
    """Largest clock-rate errors, of which each machine draws one."""
    # A targeted world: its seeds attack one rule instead of all of them (`lab.simulation.sabotage`).
    swarm: bool = True
    """Each seed draws some of the fault classes; False: it strikes with all of them."""
    pace: float = PACE
    """Mean seconds between two faults."""
    outages: tuple[float, ...] = OUTAGES
    """Seconds for which a cluster is out of sight, times 0.7 to 1.3."""
    load: Load = Load()  # noqa: RUF009 - a frozen value
    patience: float | None = None
    """Liveness mode: see `Record.patience`. Give runs a lifetime far beyond it, and nothing that waits for a lost cluster."""
    snapshots: float = 60.0
    """Seconds after which a shard that was written to gets a snapshot (J9)."""


LIVELY = Shape(
    load=Load(lifetime=(600.0, 700.0), hurried=0.0, longest=6.0, kept=0.0, marathons=0),
    patience=200.0,
)
"""Liveness mode: no deadline helps, no work may wait for a lost cluster. Patience is a chain of twelve such tasks, each tried thrice
with its backoff (some 120 s), and a storm's hold with the recovery after it (60 s)."""


class World:
    """See the module."""

    def __init__(self, seed: int, shape: Shape, loop: SimLoop) -> None:
        self.seed, self.shape, self.loop = seed, shape, loop
        self.rng = chance("world", seed)
        self.hits: Counter[str] = Counter()
        self._rates: list[float] = []
        """Of all machines' clocks."""
        links = Links(chance("links", seed), self.hits)
        etcd = SimEtcd(Node("etcd", loop))
        etcd.hits = self.hits
        self.ground = Ground(loop, links, etcd, MemoryHistory(), self.hits, str(seed), shape.snapshots)
        links.nodes["client"] = Node("client", loop)
        self.replicas = [ReplicaProcess(f"r{n}", self.ground, self._drift(SKEW)) for n in range(shape.replicas)]
        lease = PROFILES["fast"]
        self.clusters = [
            ClusterProcess(f"c{n}", self.ground, self._drift(20.0), self.replicas, lease, shape.cpus)
            for n in range(shape.clusters or self.rng.choice((3, 3, 3, 4, 5)))
        ]
        self.hits[CLOCK_RATE] = sum(abs(rate - 1.0) > QUARTZ for rate in self._rates)
        self.doubles = [
            ClusterProcess(
                f"{at.name}-double", self.ground, self._drift(20.0), self.replicas, lease, shape.cpus, serves=at.name
            )
            for at in (self.clusters if SECOND in shape.faults else ())
        ]
        """Agents that nobody should have started (S1)."""
        self.client = Client(chance("client", seed), str(seed), self.replicas)
        self.nemesis = Nemesis(self)
        loop.set_exception_handler(self._unhandled)

    def _drift(self, skew: float) -> Drift:
        if not self.shape.drift:
            return Drift(1000.0, 0.0, 1.0)
        rate = 1.0 + self.rng.choice(self.shape.rates) * self.rng.uniform(-1.0, 1.0)
        self._rates.append(rate)
        return Drift(self.rng.uniform(100.0, 100_000.0), self.rng.uniform(-skew, skew), rate)

    def _unhandled(self, _loop: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        """A task that failed and nobody asked: a bug of ours or of the product."""
        if not self.loop.buried:
            error = context.get("exception")
            self.ground.died.append(f"unhandled: {context.get('message')}: {error!r}")
            if isinstance(error, BaseException):
                log.error("unhandled", exc_info=error)

    @property
    def _hosts(self) -> list[ClusterProcess]:
        return [*self.clusters, *self.doubles]

    async def run(self) -> Record:
        """Live."""
        shape, loop = self.shape, self.loop
        if REPLICA_BEHIND in shape.faults and self.nemesis.rng.random() < machines.MIXED:
            machines.age(self, self.nemesis)
        together = self.rng.choice((0.2, 0.2, 2.0))  # apart, each new replica moves a share of the shards
        for start in [process.start for process in self.replicas]:
            loop.call_later(self.rng.uniform(0.0, together), start)
        for start in [process.start for process in self.clusters]:
            loop.call_later(self.rng.uniform(0.0, 2.0), start)
        work = [
            loop.create_task(self.client.fulfil(wish))
            for wish in wishes(chance("wishes", self.seed), shape.runs, shape.harm * 0.55, shape.load)
        ]
        nemesis = loop.create_task(self.nemesis.run(shape.harm))
        await asyncio.sleep(shape.harm)
        if nemesis.done():
            nemesis.result()  # a nemesis that failed strikes no more: such a seed is no seed
        nemesis.cancel()
        self.nemesis.heal()
        if self.nemesis.operator is not None:
            await self.nemesis.operator
        healed = loop.time()
        left: list[str] = []
        bound = max([healed, *self.client.deadlines.values(), 0.0]) + QUIET
        await asyncio.wait(work, timeout=bound - loop.time())
        failed = [task.exception() for task in work if task.done() and not task.cancelled()]
        self.ground.died += [f"the client: {error!r}" for error in failed if error is not None]
        left += [f"run {run} is not final for its client" for run in sorted(self.client.created - self.client.final)]
        for task in work:
            task.cancel()
        await asyncio.sleep(max(healed + QUIET - loop.time(), REST))
        left += self._unclean()
        self.loop.living()  # tasks that failed lately, and that nobody asked, tell it when they are let go of
        living = [f"{cluster.name}: {key.text()}" for cluster in self._hosts for key in cluster.host.living()]
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
        ran = [Ran(cluster.name, interval) for cluster in self._hosts for interval in cluster.host.intervals]
        revisions = self.ground.etcd.recorded.record
        journal = read_journal(revisions)
        self.hits[STALE_WORK] = stale_returns(journal)
        return Record(
            journal=journal,
            ran=ran,
            said=self.client.said,
            deadlines=self.client.deadlines,
            healed=healed,
            ended=self.loop.time(),
            died=self.ground.died,
            living=living,
            left=left,
            notes=self.nemesis.notes,
            digest=digest(revisions, ran, self.client.said, self.client.watchers.watched),
            owners=sorted([*read_owners(revisions), *self.nemesis.owners], key=lambda owned: owned.at),
            restored=self.nemesis.restored,
            levels=read_levels(revisions),
            capacity={cluster.name: self.shape.cpus for cluster in self._hosts},
            watched=self.client.watchers.watched,
            patience=self.shape.patience,
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
    with _no_collector():
        return _simulate(seed, shape)


def _simulate(seed: int, shape: Shape) -> Outcome:
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


@contextmanager
def _no_collector() -> Iterator[None]:
    """Without garbage collections: a world makes little garbage and lives for a second, and every collection would walk all of
    it (a quarter of a seed's time). What the last world left is collected once, and what was imported is never walked again."""
    if not gc.isenabled():
        yield
        return
    gc.collect()
    if not gc.get_freeze_count():
        gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _make(seed: int, shape: Shape, loop: SimLoop) -> World:
    return World(seed, shape, loop)
