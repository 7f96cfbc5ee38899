"""The nemesis: seeded misfortune, one class at a time or many at once, each counted and each mended in the end.

Theory. Bugs live where faults meet. So each seed draws a handful of fault classes (a swarm: not always all of them) and lets them
strike at random times; what it breaks it mends after a while, and `heal` mends everything at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from control_plane.store import keys
from lab.simulation.chance import chance
from lab.simulation.etcd import CALM, Weather

if TYPE_CHECKING:
    from lab.simulation.world import World

PACE = 4.0
"""Mean seconds between two faults of a seed."""

GUARD_PAUSE = 1.9
"""Longest freeze of a guard together with its agent: below P of the leases (2 s); a longer one is the stated limit of `timed`."""


class Nemesis:
    """Strikes a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rng = chance("nemesis", world.seed)
        self._mending: list[Callable[[], None]] = []
        self.notes: list[tuple[float, str]] = []
        self.strikes = {
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
            "store storm": self._storm,
            "store cut off": self._cut_store,
            "store without quorum": self._lose_quorum,
            "store leader changed": self._change_leader,
            "lease expired": self._expire,
            "watch trouble": self._trouble_watches,
            "store compacted": self._compact,
            "a third of the clusters gone": self._storm_of_clusters,
        }

    async def run(self, seconds: float) -> None:
        """Strike for so long."""
        kinds = [kind for kind in self._world.shape.faults if kind in self.strikes]
        if not kinds:
            return
        chosen = self._rng.sample(kinds, min(len(kinds), self._rng.choice((1, 2, 4, 6, 8, 12))))
        end = asyncio.get_running_loop().time() + seconds
        await asyncio.sleep(self._rng.uniform(1.0, 6.0))
        while asyncio.get_running_loop().time() < end:
            kind = self._rng.choice(chosen)
            self._note(kind, self.strikes[kind]())
            await asyncio.sleep(self._rng.expovariate(1.0 / PACE))

    def _note(self, kind: str, detail: str) -> None:
        self._world.hits[kind] += 1
        self.notes.append((asyncio.get_running_loop().time(), f"{kind}: {detail}"))

    def heal(self) -> None:
        """Mend everything."""
        for mend in self._mending:
            mend()
        self._mending.clear()
        world = self._world
        world.ground.links.heal_all()
        for replica in world.replicas:
            replica.faults.weather = CALM
            replica.start()
        for cluster in world.clusters:
            cluster.start()
        self.notes.append((asyncio.get_running_loop().time(), "everything is healed"))

    def _later(self, seconds: float, mend: Callable[[], None]) -> None:
        """Mend once: then, or when all is healed."""
        done = False

        def once() -> None:
            nonlocal done
            if not done:
                done = True
                mend()

        self._mending.append(once)
        asyncio.get_running_loop().call_later(seconds, once)

    def _long(self) -> float:
        """A duration: mostly short, sometimes beyond every lease."""
        return self._rng.choice((0.3, 1.5, 4.0, 10.0, 18.0, 25.0, 35.0)) * self._rng.uniform(0.5, 1.5)

    def _outage(self) -> float:
        """A duration for a cluster out of sight: often beyond L + G."""
        return self._rng.choice((2.0, 8.0, 24.0, 32.0, 40.0)) * self._rng.uniform(0.7, 1.3)

    # -- processes -------------------------------------------------------------------------------------------------------

    def _kill_replica(self) -> str:
        replica, gap = self._rng.choice(self._world.replicas), self._long()
        replica.kill()
        self._later(gap, replica.start)
        return f"{replica.name}, back in {gap:.1f} s"

    def _freeze_replica(self) -> str:
        replica, gap = self._rng.choice(self._world.replicas), self._long()
        node = replica.node
        if node is not None:
            node.freeze()
            self._later(gap, node.thaw)
        return f"{replica.name} for {gap:.1f} s"

    def _kill_agent(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        cluster.kill()
        self._later(gap, cluster.start)
        return f"{cluster.name}, back in {gap:.1f} s"

    def _freeze_agent(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        node = cluster.node
        if node is not None:
            node.freeze()
            self._later(gap, node.thaw)
        return f"{cluster.name} for {gap:.1f} s"

    def _leave_replica(self) -> str:
        replica, gap = self._rng.choice(self._world.replicas), 12.0 + self._long()
        replica.leave()
        self._later(gap, replica.start)
        return f"{replica.name}, back in {gap:.1f} s"

    def _leave_agent(self) -> str:
        return self._stop_agent(drain=False)

    def _drain_agent(self) -> str:
        return self._stop_agent(drain=True)

    def _stop_agent(self, *, drain: bool) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        node = cluster.node
        cluster.leave(drain=drain)

        def start() -> None:
            if cluster.node is node:
                cluster.kill()
            cluster.start()

        self._later(gap, start)
        return f"{cluster.name}, back in {gap:.1f} s"

    def _fill_disk(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._long()
        disk = cluster.disk
        disk.capacity = disk.used + self._rng.choice((0, 200))

        def empty() -> None:
            disk.capacity = None

        self._later(gap, empty)
        return f"{cluster.name} for {gap:.1f} s"

    def _step_wall(self) -> str:
        """Replicas are kept by NTP, more or less; what an agent thinks of the date must not matter (D1)."""
        if self._rng.random() < 0.5:
            replica, step = self._rng.choice(self._world.replicas), self._rng.uniform(-2.0, 2.0)
            replica.clock.step_wall(step)
            return f"{replica.name} by {step:.1f} s"
        cluster, step = self._rng.choice(self._world.clusters), self._rng.uniform(-3000.0, 3000.0)
        cluster.clock.step_wall(step)
        return f"{cluster.name} by {step:.1f} s"

    def _kill_guard(self) -> str:
        cluster = self._rng.choice(self._world.clusters)
        cluster.host.kill_guard()
        return cluster.name

    def _freeze_guard(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        cluster.host.freeze_guard()
        self._later(gap, cluster.host.thaw_guard)
        return f"{cluster.name} for {gap:.1f} s"

    def _freeze_host(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._rng.uniform(0.2, GUARD_PAUSE)
        node, host = cluster.node, cluster.host
        host.freeze_guard()
        self._later(gap, host.thaw_guard)
        if node is not None:
            node.freeze()
            self._later(gap, node.thaw)
        return f"{cluster.name} for {gap:.1f} s"

    def _reboot(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        cluster.reboot()
        self._later(gap, cluster.start)
        return f"{cluster.name}, up in {gap:.1f} s"

    # -- network ---------------------------------------------------------------------------------------------------------

    def _cut(self, pairs: list[tuple[str, str]], gap: float) -> None:
        links = self._world.ground.links
        for source, target in pairs:
            links.cut(source, target)

        def mend() -> None:
            for source, target in pairs:
                links.heal(source, target)

        self._later(gap, mend)

    def _part_cluster(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        some = self._some_replicas()
        self._cut([pair for name in some for pair in ((cluster.name, name), (name, cluster.name))], gap)
        return f"{cluster.name} from {', '.join(some)} for {gap:.1f} s"

    def _cut_cluster(self) -> str:
        cluster, gap = self._rng.choice(self._world.clusters), self._outage()
        some, up = self._some_replicas(), self._rng.random() < 0.5
        self._cut([(cluster.name, name) if up else (name, cluster.name) for name in some], gap)
        return f"{cluster.name} {'to' if up else 'from'} {', '.join(some)} for {gap:.1f} s"

    def _storm_of_clusters(self) -> str:
        clusters, gap = self._world.clusters, self._rng.uniform(5.0, 45.0)
        some = self._rng.sample(clusters, min(len(clusters), max(2, len(clusters) // 2)))
        names = [replica.name for replica in self._world.replicas]
        self._cut([p for c in some for n in names for p in ((c.name, n), (n, c.name))], gap)
        return f"{', '.join(cluster.name for cluster in some)} for {gap:.1f} s"

    def _part_replicas(self) -> str:
        if len(self._world.replicas) < 2:
            return "nobody"
        one, other = self._rng.sample(self._world.replicas, 2)
        gap = self._long()
        both = [(one.name, other.name), (other.name, one.name)]
        self._cut(both[: self._rng.choice((1, 2))], gap)
        return f"{one.name} and {other.name} for {gap:.1f} s"

    def _some_replicas(self) -> list[str]:
        names = [replica.name for replica in self._world.replicas]
        return names if self._rng.random() < 0.6 else self._rng.sample(names, self._rng.randint(1, len(names)))

    # -- store -----------------------------------------------------------------------------------------------------------

    def _weather(self, weather: Weather, gap: float, *, all_replicas: bool) -> str:
        some = self._world.replicas if all_replicas else [self._rng.choice(self._world.replicas)]
        for replica in some:
            replica.faults.weather = weather

        def mend() -> None:
            for replica in some:
                if replica.faults.weather is weather:
                    replica.faults.weather = CALM

        self._later(gap, mend)
        return f"{', '.join(replica.name for replica in some)} for {gap:.1f} s"

    def _storm(self) -> str:
        chance = self._rng.choice((0.03, 0.1, 0.3))
        weather = Weather(
            refused=chance * self._rng.random(),
            lost_request=chance * self._rng.random(),
            lost_reply=chance * self._rng.random(),
            late=chance * self._rng.random(),
            slow=chance * self._rng.random(),
            stale_keepalive=chance * self._rng.random(),
        )
        return self._weather(weather, self._long(), all_replicas=self._rng.random() < 0.5)

    def _cut_store(self) -> str:
        return self._weather(Weather(cut=True), self._long(), all_replicas=False)

    def _trouble_watches(self) -> str:
        rng = self._rng
        weather = Weather(
            watch_slow=rng.choice((0.0, 0.2)),
            watch_broken=rng.choice((0.0, 0.1)),
            watch_twice=rng.choice((0.0, 0.2)),
            watch_compacted=rng.choice((0.0, 0.05)),
        )
        return self._weather(weather, self._long(), all_replicas=rng.random() < 0.5)

    def _lose_quorum(self) -> str:
        etcd, gap, applied = self._world.ground.etcd, self._long(), self._rng.random() < 0.7
        etcd.lose_quorum()
        self._later(gap, lambda: etcd.regain_quorum(apply_parked=applied))
        return f"for {gap:.1f} s, then what waited is {'applied' if applied else 'dropped'}"

    def _change_leader(self) -> str:
        self._world.ground.etcd.change_leader()
        return "every TTL starts again"

    def _expire(self) -> str:
        """A lease ends although its holder lives: etcd promises nothing else."""
        replica = self._rng.choice(self._world.replicas)
        kv = self._world.ground.etcd.keyspace.live.get(keys.member(replica.name))
        if kv is not None:
            self._world.ground.etcd.revoke(kv.lease)
        return replica.name

    def _compact(self) -> str:
        etcd = self._world.ground.etcd
        etcd.compact(etcd.keyspace.revision)
        return f"at revision {etcd.keyspace.revision}"


KINDS = (
    "replica killed",
    "replica frozen",
    "replica left in order",
    "agent killed",
    "agent frozen",
    "agent left in order",
    "agent drained",
    "agent's disk full",
    "wall clock stepped",
    "guard killed",
    "guard frozen",
    "host rebooted",
    "host frozen",
    "partition of a cluster",
    "one-way cut of a cluster",
    "partition of replicas",
    "store storm",
    "store cut off",
    "store without quorum",
    "store leader changed",
    "lease expired",
    "watch trouble",
    "store compacted",
    "a third of the clusters gone",
)
