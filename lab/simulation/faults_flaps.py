"""What goes and comes again faster than anybody settles: a member of the ring, a cluster's link.

Theory. A change that lasts is followed by all; one that is undone while it is being followed meets half of them on the old side. So
shards are handed over to who is leaving already (O1, O4), and sessions are opened over streams that break before they serve (S1, S5).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from lab.simulation.faults_store import revoke_lease

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis

TIMES = (3, 5)
"""How often it goes. Less is no flapping; more takes longer than a seed's harm leaves."""

GONE = (0.2, 1.5)
"""Seconds for which it is gone each time: shorter than any lease."""

THERE = (0.3, 3.0)
"""Seconds for which it is there between: enough to begin a hand-over or a session, rarely enough to end it."""


def flap_ring(nemesis: Nemesis) -> str | None:
    """A replica leaves the ring and joins it again and again: its process dies, or its registration is lost and made anew."""
    rng, loop = nemesis.rng, asyncio.get_running_loop()
    replica, dies, times = rng.choice(nemesis.world.replicas), rng.random() < 0.5, rng.randint(*TIMES)
    if not replica.alive or (not dies and not revoke_lease(nemesis, replica)):
        return None

    def go(gap: float) -> None:
        if nemesis.healed:
            return
        if dies:
            replica.kill()
            nemesis.later(gap, replica.start)
        else:
            revoke_lease(nemesis, replica)

    at = 0.0
    for number in range(times):
        gap = rng.uniform(*GONE)
        if dies or number:
            loop.call_later(at, go, gap)
        at += gap + rng.uniform(*THERE)
    return f"{replica.name} {'dies' if dies else 'loses its registration'} {times} times in {at:.1f} s"


def flap_link(nemesis: Nemesis) -> str | None:
    """A cluster's links to replicas break and heal again and again."""
    rng, loop = nemesis.rng, asyncio.get_running_loop()
    cluster, times = rng.choice(nemesis.world.clusters), rng.randint(*TIMES)
    pairs = nemesis.around(cluster, nemesis.some_replicas())
    at = rng.uniform(*GONE)
    if not nemesis.cut(pairs, at):
        return None

    def cut(gap: float) -> None:
        if not nemesis.healed:
            nemesis.cut(pairs, gap)

    for _ in range(times - 1):
        at += rng.uniform(*THERE)
        gap = rng.uniform(*GONE)
        loop.call_later(at, cut, gap)
        at += gap
    return f"{cluster.name} {times} times in {at:.1f} s"
