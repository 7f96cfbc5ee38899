"""Losing a cluster for good: what a seed needs to see a copy start while the old work could still be alive (PROTOCOL F5, S4).

Theory. A copy overlaps with its original only if the work outlasts L + G (20 s of the leases in use) on a cluster that is out of
sight for as long; faults that strike at random do that once in many seeds. So most seeds besiege their busiest cluster early, while
the tasks of a marathon (`workload`) run there, and let it come back late, with whatever its guard has left alive.

One combination is left out, as G2 states it: a guard that is frozen for longer than P while its agent cannot see that.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis
    from lab.simulation.processes import ClusterProcess

SIEGES = ("partition of a cluster", "agent frozen", "agent killed")
"""Ways to lose a cluster whose guard and work live on."""

BEGIN = (4.5, 6.5)
"""Seconds into a seed. Earlier, marathons have not been placed; later, they end before the copy starts."""

SECONDS = (25.0, 29.0)
"""Length: beyond L + G on the slowest clock (21.7 s), and over before everything is healed."""


def besiege(nemesis: Nemesis, kind: str) -> None:
    """Take the busiest cluster out of sight, so that its work starts elsewhere before it is back."""
    loop = asyncio.get_running_loop()
    if loop.time() < nemesis.truce_until:
        loop.call_at(nemesis.truce_until, besiege, nemesis, kind)
        return
    world, gap = nemesis.world, nemesis.rng.uniform(*SECONDS)
    cluster = max(world.clusters, key=lambda each: (len(each.host.living()), each.name))
    node = cluster.node
    if node is None or not node.runs:
        return
    if kind == "agent killed":
        blind(cluster)
        cluster.kill()
        nemesis.later(gap, cluster.start)
    elif kind == "agent frozen":
        blind(cluster)
        node.freeze()
        nemesis.later(gap, node.thaw)
    elif not nemesis.cut(nemesis.around(cluster), gap):
        return
    nemesis.note(kind, f"{cluster.name}, the busiest, for {gap:.1f} s")


def blind(cluster: ClusterProcess) -> None:
    """Its agent cannot look after the guard from now on, so the guard must not be frozen: G2's stated limit of `timed`."""
    cluster.host.thaw_guard()
