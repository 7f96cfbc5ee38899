"""Misfortunes of whole machines and of what was installed on them: sleep, a clock that is set, programs one version behind.

Theory. A suspended machine is not a stopped process: its timers are late by the time asleep, while the clocks by which leases are
judged have gone on (PROTOCOL F5, O2). A machine whose work lives sleeps no longer than P here: F5 says no more of a longer pause.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from control_plane.core.model import shard_of
from control_plane.store import keys
from lab.checking.history import Owned
from lab.simulation.kinds import REPLICA_BEHIND
from lab.simulation.sieges import blind
from lab.simulation.versions import found

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis
    from lab.simulation.processes import ReplicaProcess
    from lab.simulation.world import World

MIXED = 0.25
"""Share of seeds whose federation was made by the older program and is upgraded while they run."""

UPGRADE = (2.0, 9.0)
"""Seconds into such a seed until its replicas are upgraded, in turn: the level rises 60 s after the last one at the earliest."""


AHEAD = 10.0
"""Seconds from a strike to the deadline it aims at, at most: what is not due soon is left for a later strike."""

STEPPED = (1.0, 8.0)
"""Seconds until the wall clock of an owner is set right again."""


def suspend(nemesis: Nemesis) -> str | None:
    """A machine sleeps: one of a replica's for any time, a cluster's briefly while work is alive there."""
    world, rng = nemesis.world, nemesis.rng
    if rng.random() < 0.5:
        replica, gap = rng.choice(world.replicas), nemesis.long()
        if replica.node is None or not replica.node.runs:
            return None
        replica.node.suspend()
        nemesis.later(gap, replica.node.thaw)
        return f"{replica.name} for {gap:.1f} s"
    cluster = rng.choice(world.clusters)
    alive = cluster.host.living()
    gap = rng.uniform(0.2, nemesis.guard_pause) if alive else nemesis.outage()
    node = cluster.node
    if cluster.host.suspended or cluster.off:
        return None
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


def put_back_replica(nemesis: Nemesis) -> str | None:
    """A replica is started again as its older self. If the federation has moved on, it is not let in (J11)."""
    replica, gap = nemesis.rng.choice(nemesis.world.replicas), nemesis.rng.uniform(5.0, 25.0)
    if replica.older:
        return None
    replica.kill()
    replica.older = True
    replica.start()
    nemesis.later(gap, lambda: _upgrade(replica))
    return f"{replica.name} for {gap:.1f} s"


def put_back_agent(nemesis: Nemesis) -> str | None:
    """An agent is started again as its older self, and upgraded later."""
    cluster, gap = nemesis.rng.choice(nemesis.world.clusters), nemesis.rng.uniform(5.0, 25.0)
    if cluster.older:
        return None
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


def step_at_deadline(nemesis: Nemesis) -> str | None:
    """The wall clock of a run's owner is set while its deadline passes, and set right again: the end may be early or late by what
    the clock is wrong, and is still only one (D1, D2)."""
    world, rng, loop = nemesis.world, nemesis.rng, asyncio.get_running_loop()
    step, gap, now = rng.uniform(-2.0, 2.0), rng.uniform(*STEPPED), loop.time()
    last = min(now + AHEAD, world.shape.harm - 1.0)  # later, all might be healed before it comes
    due = sorted((at, run) for run, at in world.client.deadlines.items() if now < at < last)
    due = [(at, run) for at, run in due if run in world.client.names and run not in world.client.final]
    if not due:
        return None
    at, run = rng.choice(due)
    shard = shard_of("default", world.client.names[run])

    def jump() -> None:
        kv = world.ground.etcd.keyspace.live.get(keys.owner(shard))
        owner = Owned.of(0.0, 0, shard, kv.value if kv is not None else b"").replica or world.replicas[0].name
        clock = next(replica.clock for replica in world.replicas if replica.name == owner)
        clock.step_wall(step)
        nemesis.later(gap, lambda: clock.step_wall(-step))

    loop.call_later(at - now + rng.uniform(-0.3, 0.3) * min(1.0, at - now), jump)
    return f"the owner of {run} by {step:.1f} s, in {at - now:.1f} s and for {gap:.1f} s"


def age(world: World, nemesis: Nemesis) -> None:
    """Let a world begin as the older program left it, with a rolling upgrade to come. Before its replicas are started."""
    rng = nemesis.rng
    found(world.ground.etcd, world.client.entropy)
    for replica in world.replicas:
        replica.older = rng.random() < 0.7
        if replica.older:
            nemesis.note(REPLICA_BEHIND, f"{replica.name}, from the beginning")
            asyncio.get_running_loop().call_later(rng.uniform(*UPGRADE), _roll, nemesis, replica)


def _roll(nemesis: Nemesis, replica: ReplicaProcess) -> None:
    replica.older = False
    nemesis.note_only("upgrade", nemesis.leave(replica, 4.0))


def _upgrade(replica: ReplicaProcess) -> None:
    replica.older = False
    replica.kill()
    replica.start()
