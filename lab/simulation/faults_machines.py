"""Misfortunes of whole machines and of what was installed on them: sleep, and programs one version behind.

Theory. A suspended machine is not a stopped process: its timers are late by the time asleep, while the clocks by which leases are
judged have gone on (PROTOCOL F5, O2). A machine whose work lives sleeps no longer than P here: F5 says no more of a longer pause.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lab.simulation.sieges import blind
from lab.simulation.versions import found

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis
    from lab.simulation.processes import ReplicaProcess
    from lab.simulation.world import World

REPLICA_BEHIND = "a replica one version behind"
AGENT_BEHIND = "an agent one version behind"
SUSPENDED = "host suspended"

MIXED = 0.25
"""Share of seeds whose federation was made by the older program and is upgraded while they run."""

UPGRADE = (2.0, 9.0)
"""Seconds into such a seed until its replicas are upgraded, in turn: the level rises 60 s after the last one at the earliest."""


def suspend(nemesis: Nemesis) -> str:
    """A machine sleeps: one of a replica's for any time, a cluster's briefly while work is alive there."""
    world, rng = nemesis.world, nemesis.rng
    if rng.random() < 0.5:
        replica, gap = rng.choice(world.replicas), nemesis.long()
        if replica.node is not None:
            replica.node.suspend()
            nemesis.later(gap, replica.node.thaw)
        return f"{replica.name} for {gap:.1f} s"
    cluster = rng.choice(world.clusters)
    alive = cluster.host.living()
    gap = rng.uniform(0.2, nemesis.guard_pause) if alive else nemesis.outage()
    node = cluster.node
    cluster.host.suspend()
    if node is not None:
        node.suspend()

    def wake() -> None:
        cluster.host.resume()
        if node is not None:
            node.thaw()
        cluster.start()

    nemesis.later(gap, wake)
    return f"{cluster.name} for {gap:.1f} s, {len(alive)} processes there"


def put_back_replica(nemesis: Nemesis) -> str:
    """A replica is started again as its older self. If the federation has moved on, it is not let in (J11)."""
    replica, gap = nemesis.rng.choice(nemesis.world.replicas), nemesis.rng.uniform(5.0, 25.0)
    replica.kill()
    replica.older = True
    replica.start()
    nemesis.later(gap, lambda: _upgrade(replica))
    return f"{replica.name} for {gap:.1f} s"


def put_back_agent(nemesis: Nemesis) -> str:
    """An agent is started again as its older self, and upgraded later."""
    cluster, gap = nemesis.rng.choice(nemesis.world.clusters), nemesis.rng.uniform(5.0, 25.0)
    blind(cluster)
    cluster.kill()
    cluster.older = True
    cluster.start()

    def upgrade() -> None:
        cluster.older = False
        cluster.kill()
        cluster.start()

    nemesis.later(gap, upgrade)
    return f"{cluster.name} for {gap:.1f} s"


def age(world: World, nemesis: Nemesis) -> None:
    """Let a world begin as the older program left it, with a rolling upgrade to come. Before its replicas are started."""
    rng = nemesis.rng
    found(world.ground.etcd, world.client.entropy)
    for replica in world.replicas:
        replica.older = rng.random() < 0.7
        if replica.older:
            world.hits[REPLICA_BEHIND] += 1
            asyncio.get_running_loop().call_later(rng.uniform(*UPGRADE), _roll, nemesis, replica)


def _roll(nemesis: Nemesis, replica: ReplicaProcess) -> None:
    replica.older = False
    nemesis.note_only("upgrade", nemesis.leave(replica, 4.0))


def _upgrade(replica: ReplicaProcess) -> None:
    replica.older = False
    replica.kill()
    replica.start()
