"""The nemesis: seeded misfortune, one class at a time or many at once, each counted and each mended in the end.

Theory. Bugs live where faults meet. So each seed draws a handful of fault classes (a swarm: not always all of them) and lets them
strike at random times; what it breaks it mends after a while, and `heal` mends everything at once.

A strike that finds nothing to break (a dead process, a link that is cut already) returns None: it is not counted and not told, for a
count of what did nothing would say that a fault was tried which was not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from lab.checking.history import Owned, Restored
from lab.simulation import faults_flaps as flaps
from lab.simulation import faults_machines as machines
from lab.simulation import faults_rare as rare
from lab.simulation import faults_store as at_store
from lab.simulation.chance import chance
from lab.simulation.etcd import CALM, Weather
from lab.simulation.kinds import (
    AGENT_BEHIND,
    LINK_FLAP,
    LYING,
    OUT_OF_SPACE,
    REPLICA_BEHIND,
    RING_FLAP,
    SECOND,
    STEP_AT_DEADLINE,
    STORM,
    SUSPENDED,
)
from lab.simulation.sieges import BEGIN, SIEGES, besiege, blind

if TYPE_CHECKING:
    from lab.simulation.processes import ClusterProcess, ReplicaProcess
    from lab.simulation.world import World

PACE = 6.0
"""Mean seconds between two faults of a seed."""

AGAIN = 0.5
"""Seconds after a strike that did nothing until another is drawn. More: seeds of few faults; none: a world with nothing left to
strike would never go on."""

OUTAGES = (2.0, 8.0, 24.0, 32.0, 40.0)
"""Seconds for which a cluster is out of sight: from a hiccup to twice L + G of the leases (20 s)."""

GUARD_PAUSE = 1.9
"""Longest freeze of a guard together with its agent: below P of the leases (2 s); a longer one is the stated limit of `timed`."""


class Nemesis:
    """Strikes a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.rng = chance("nemesis", world.seed)
        self._mending: list[Callable[[], None]] = []
        self.notes: list[tuple[float, str]] = []
        self.healed = False
        """Nothing new strikes from here on."""
        self.guard_pause = GUARD_PAUSE
        self.backups = 0
        self.truce_until = 0.0
        """Virtual time until when nothing is struck."""
        self.restored: list[Restored] = []
        self.owners: list[Owned] = []
        """Owner keys as restores left them."""
        self.started: list[asyncio.Task[None]] = []
        """What strikes have begun, held so that it is not collected."""
        self.operator: asyncio.Task[None] | None = None
        self.strikes: dict[str, Callable[[], str | None]] = {
            "replica killed": self._kill_replica,
            "replica frozen": self._freeze_replica,
            "replica left in order": self._leave_replica,
            "agent killed": self._kill_agent,
            "agent frozen": self._freeze_agent,
            "agent left in order": self._leave_agent,
            "agent drained": self._drain_agent,
            "agent's disk full": self._fill_disk,
            "wall clock stepped": self._step_wall,
            "guard killed": self._kill_guard,
            "guard frozen": self._freeze_guard,
            "host rebooted": self._reboot,
            "host frozen": self._freeze_host,
            "partition of a cluster": self._part_cluster,
            "one-way cut of a cluster": self._cut_cluster,
            "partition of replicas": self._part_replicas,
            "store storm": partial(at_store.storm, self),
            "store cut off": partial(at_store.cut_store, self),
            "store without quorum": partial(at_store.lose_quorum, self),
            "store leader changed": partial(at_store.change_leader, self),
            "lease expired": partial(at_store.expire_lease, self),
            "watch trouble": partial(at_store.trouble_watches, self),
            "store compacted": partial(at_store.compact, self),
            STORM: self._storm_of_clusters,
            "glimpse of a cluster": partial(rare.glimpse, self),
            "store sluggish": partial(rare.slow_store, self),
            "store restored": partial(rare.restore_store, self),
            SUSPENDED: partial(machines.suspend, self),
            REPLICA_BEHIND: partial(machines.put_back_replica, self),
            AGENT_BEHIND: partial(machines.put_back_agent, self),
            STEP_AT_DEADLINE: partial(machines.step_at_deadline, self),
            OUT_OF_SPACE: partial(at_store.fill_store, self),
            LYING: partial(at_store.lie, self),
            RING_FLAP: partial(flaps.flap_ring, self),
            LINK_FLAP: partial(flaps.flap_link, self),
            "message reordered": partial(rare.reorder_messages, self),
            "message repeated": partial(rare.repeat_messages, self),
            "request repeated": partial(rare.repeat_request, self),
            SECOND: partial(rare.second_agent, self),
        }

    async def run(self, seconds: float) -> None:
        """Strike for so long."""
        kinds = [kind for kind in self.world.shape.faults if kind in self.strikes]
        if not kinds:
            return
        count = self.rng.choice((1, 2, 4, 6, 8, 12)) if self.world.shape.swarm else len(kinds)
        chosen = self.rng.sample(kinds, min(len(kinds), count))
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        sieges = [kind for kind in SIEGES if kind in kinds]
        if sieges and self.rng.random() < self.world.shape.sieges:
            loop.call_later(self.rng.uniform(*BEGIN), besiege, self, self.rng.choice(sieges))
        await asyncio.sleep(self.rng.uniform(1.0, 6.0))
        while loop.time() < end:
            await asyncio.sleep(max(0.0, self.truce_until - loop.time()))
            kind = self.rng.choice(chosen)
            told = self.strikes[kind]()
            if told is None:
                await asyncio.sleep(AGAIN)
                continue
            self.note(kind, told)
            await asyncio.sleep(self.rng.expovariate(1.0 / self.world.shape.pace))

    def truce(self, seconds: float) -> None:
        """Mend what is under way, and strike nothing for so long."""
        mending, self._mending = self._mending, []
        for mend in mending:
            mend()
        self.truce_until = asyncio.get_running_loop().time() + seconds

    def note(self, kind: str, detail: str) -> None:
        """Count a strike, and write it down."""
        self.world.hits[kind] += 1
        self.note_only(kind, detail)

    def note_only(self, kind: str, detail: str) -> None:
        """Write down what is no strike."""
        self.notes.append((asyncio.get_running_loop().time(), f"{kind}: {detail}"))

    def heal(self) -> None:
        """Mend everything."""
        self.healed = True
        for mend in self._mending:
            mend()
        self._mending.clear()
        world = self.world
        world.ground.links.heal_all()
        for replica in world.replicas:
            replica.faults.weather = CALM
            replica.start()
        for cluster in world.clusters:
            cluster.start()
        self.notes.append((asyncio.get_running_loop().time(), "everything is healed"))

    def later(self, seconds: float, mend: Callable[[], None]) -> None:
        """Mend once: then, or when all is healed."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                mend()

        self._mending.append(once)
        asyncio.get_running_loop().call_later(seconds, once)

    def long(self) -> float:
        """A duration: mostly short, sometimes beyond every lease."""
        return self.rng.choice((0.3, 1.5, 4.0, 10.0, 18.0, 25.0, 35.0)) * self.rng.uniform(0.5, 1.5)

    def outage(self) -> float:
        """A duration for a cluster out of sight: often beyond L + G."""
        return self.rng.choice(self.world.shape.outages) * self.rng.uniform(0.7, 1.3)

    # -- processes -------------------------------------------------------------------------------------------------------

    def _kill_replica(self) -> str | None:
        replica, gap = self.rng.choice(self.world.replicas), self.long()
        if not replica.alive:
            return None
        replica.kill()
        self.later(gap, replica.start)
        return f"{replica.name}, back in {gap:.1f} s"

    def _freeze_replica(self) -> str | None:
        replica, gap = self.rng.choice(self.world.replicas), self.long()
        node = replica.node
        if node is None or not node.runs:
            return None
        node.freeze()
        self.later(gap, node.thaw)
        return f"{replica.name} for {gap:.1f} s"

    def _kill_agent(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        if not cluster.alive:
            return None
        blind(cluster)
        cluster.kill()
        self.later(gap, cluster.start)
        return f"{cluster.name}, back in {gap:.1f} s"

    def _freeze_agent(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        node = cluster.node
        if node is None or not node.runs:
            return None
        blind(cluster)
        node.freeze()
        self.later(gap, node.thaw)
        return f"{cluster.name} for {gap:.1f} s"

    def _leave_replica(self) -> str | None:
        replica, gap = self.rng.choice(self.world.replicas), 12.0 + self.long()
        return self.leave(replica, gap) if replica.serves else None

    def leave(self, replica: ReplicaProcess, gap: float) -> str:
        """SIGTERM, and a new process after `gap` seconds."""
        node = replica.node
        replica.leave()

        def start() -> None:
            if replica.node is node:
                replica.kill()  # frozen or slow: it is not waited for, or it would leave when all is healed
            replica.start()

        self.later(gap, start)
        return f"{replica.name}, back in {gap:.1f} s"

    def _leave_agent(self) -> str | None:
        return self._stop_agent(drain=False)

    def _drain_agent(self) -> str | None:
        return self._stop_agent(drain=True)

    def _stop_agent(self, *, drain: bool) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        node = cluster.node
        if not cluster.serves:
            return None
        blind(cluster)
        cluster.leave(drain=drain)

        def start() -> None:
            if cluster.node is node:
                cluster.kill()
            cluster.start()

        self.later(gap, start)
        return f"{cluster.name}, back in {gap:.1f} s"

    def _fill_disk(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.long()
        disk = cluster.disk
        if disk.capacity is not None:
            return None
        disk.capacity = disk.used + self.rng.choice((0, 200))

        def empty() -> None:
            disk.capacity = None

        self.later(gap, empty)
        return f"{cluster.name} for {gap:.1f} s"

    def _step_wall(self) -> str:
        """Replicas are kept by NTP, more or less; what an agent thinks of the date must not matter (D1)."""
        if self.rng.random() < 0.5:
            replica, step = self.rng.choice(self.world.replicas), self.rng.uniform(-2.0, 2.0)
            replica.clock.step_wall(step)
            return f"{replica.name} by {step:.1f} s"
        cluster, step = self.rng.choice(self.world.clusters), self.rng.uniform(-3000.0, 3000.0)
        cluster.clock.step_wall(step)
        return f"{cluster.name} by {step:.1f} s"

    def _kill_guard(self) -> str | None:
        cluster = self.rng.choice(self.world.clusters)
        if not cluster.host.guarded:
            return None
        cluster.host.kill_guard()
        return cluster.name

    def _freeze_guard(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        if cluster.node is None or not cluster.node.runs:
            gap = min(gap, GUARD_PAUSE)  # nobody is there to see it, see `blind`
        if not cluster.host.guarded or cluster.host.frozen:
            return None
        cluster.host.freeze_guard()
        self.later(gap, cluster.host.thaw_guard)
        return f"{cluster.name} for {gap:.1f} s"

    def _freeze_host(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.rng.uniform(0.2, GUARD_PAUSE)
        node, host = cluster.node, cluster.host
        if node is None or not node.runs or not host.guarded or host.frozen:
            return None
        host.freeze_guard()
        self.later(gap, host.thaw_guard)
        node.freeze()
        self.later(gap, node.thaw)
        return f"{cluster.name} for {gap:.1f} s"

    def _reboot(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        if cluster.off:
            return None
        cluster.reboot()
        self.later(gap, cluster.start)
        return f"{cluster.name}, up in {gap:.1f} s"

    # -- network ---------------------------------------------------------------------------------------------------------

    def cut(self, pairs: list[tuple[str, str]], gap: float) -> bool:
        """Cut links for `gap` seconds; False, and nothing is done, if all of them are cut."""
        links = self.world.ground.links
        if not any(links.heard(source, target) for source, target in pairs):
            return False
        for source, target in pairs:
            links.cut(source, target)

        def mend() -> None:
            for source, target in pairs:
                links.heal(source, target)

        self.later(gap, mend)
        return True

    def around(self, cluster: ClusterProcess, names: list[str] | None = None) -> list[tuple[str, str]]:
        """The links of a cluster with these replicas (all), both ways."""
        names = names or [replica.name for replica in self.world.replicas]
        return [pair for name in names for pair in ((cluster.name, name), (name, cluster.name))]

    def _part_cluster(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        some = self.some_replicas()
        struck = self.cut(self.around(cluster, some), gap)
        return f"{cluster.name} from {', '.join(some)} for {gap:.1f} s" if struck else None

    def _cut_cluster(self) -> str | None:
        cluster, gap = self.rng.choice(self.world.clusters), self.outage()
        some, up = self.some_replicas(), self.rng.random() < 0.5
        struck = self.cut([(cluster.name, name) if up else (name, cluster.name) for name in some], gap)
        return f"{cluster.name} {'to' if up else 'from'} {', '.join(some)} for {gap:.1f} s" if struck else None

    def _storm_of_clusters(self) -> str | None:
        """As many as make a storm: at least two, and more than a third (S7)."""
        clusters, gap = self.world.clusters, self.rng.uniform(5.0, 45.0)
        some = self.rng.sample(clusters, min(len(clusters), max(2, len(clusters) // 3 + 1)))
        struck = self.cut([pair for cluster in some for pair in self.around(cluster)], gap)
        return f"{', '.join(cluster.name for cluster in some)} for {gap:.1f} s" if struck else None

    def _part_replicas(self) -> str | None:
        if len(self.world.replicas) < 2:
            return None
        one, other = self.rng.sample(self.world.replicas, 2)
        gap = self.long()
        both = [(one.name, other.name), (other.name, one.name)]
        struck = self.cut(both[: self.rng.choice((1, 2))], gap)
        return f"{one.name} and {other.name} for {gap:.1f} s" if struck else None

    def some_replicas(self) -> list[str]:
        """Names: all of them, or some."""
        names = [replica.name for replica in self.world.replicas]
        return names if self.rng.random() < 0.6 else self.rng.sample(names, self.rng.randint(1, len(names)))

    # -- store -----------------------------------------------------------------------------------------------------------

    def weather(self, weather: Weather, gap: float, *, all_replicas: bool) -> str | None:
        """Let the way of one replica, or of all, to the store be like that for `gap` seconds; None if nobody is there to go it."""
        some = self.world.replicas if all_replicas else [self.rng.choice(self.world.replicas)]
        if weather == CALM or not any(replica.alive for replica in some):
            return None
        for replica in some:
            replica.faults.weather = weather

        def mend() -> None:
            for replica in some:
                if replica.faults.weather is weather:
                    replica.faults.weather = CALM

        self.later(gap, mend)
        return f"{', '.join(replica.name for replica in some)} for {gap:.1f} s"
