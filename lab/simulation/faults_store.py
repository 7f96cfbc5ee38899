"""Misfortunes of the store, and of the way to it; see `lab.simulation.faults`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane.store import keys
from control_plane.store.memory_server import ELECTION
from lab.simulation.etcd import CALM, Weather

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis
    from lab.simulation.processes import ReplicaProcess

FULL = (3.0, 20.0)
"""Seconds without space: from a missed heartbeat to beyond L (15 s), so that clusters are lost although they live."""

LIE = 2.0
"""Seconds for which a dead lease is acknowledged: one keepalive at least (they come every 1.7 s)."""


def storm(nemesis: Nemesis) -> str | None:
    """Requests are refused, lost, late, slow; replies too."""
    chance = nemesis.rng.choice((0.03, 0.1, 0.3))
    weather = Weather(
        refused=chance * nemesis.rng.random(),
        lost_request=chance * nemesis.rng.random(),
        lost_reply=chance * nemesis.rng.random(),
        late=chance * nemesis.rng.random(),
        slow=chance * nemesis.rng.random(),
        stale_keepalive=chance * nemesis.rng.random(),
    )
    return nemesis.weather(weather, nemesis.long(), all_replicas=nemesis.rng.random() < 0.5)


def cut_store(nemesis: Nemesis) -> str | None:
    """A replica does not reach the store."""
    return nemesis.weather(Weather(cut=True), nemesis.long(), all_replicas=False)


def trouble_watches(nemesis: Nemesis) -> str | None:
    """Watches are late, broken, told twice, compacted."""
    rng = nemesis.rng
    weather = Weather(
        watch_slow=rng.choice((0.0, 0.2)),
        watch_broken=rng.choice((0.0, 0.1)),
        watch_twice=rng.choice((0.0, 0.2)),
        watch_compacted=rng.choice((0.0, 0.05)),
    )
    return nemesis.weather(weather, nemesis.long(), all_replicas=rng.random() < 0.5)


def lose_quorum(nemesis: Nemesis) -> str | None:
    """Nothing is answered; what waits may land in the end."""
    etcd, gap, applied = nemesis.world.ground.etcd, nemesis.long(), nemesis.rng.random() < 0.7
    if not etcd.quorum:
        return None
    etcd.lose_quorum()
    nemesis.later(gap, lambda: etcd.regain_quorum(apply_parked=applied))
    return f"for {gap:.1f} s, then what waited is {'applied' if applied else 'dropped'}"


def change_leader(nemesis: Nemesis) -> str | None:
    """Another etcd leader."""
    if not nemesis.world.ground.etcd.quorum:
        return None
    nemesis.world.ground.etcd.change_leader()
    return "every TTL starts again"


def expire_lease(nemesis: Nemesis) -> str | None:
    """A lease ends although its holder lives: etcd promises nothing else."""
    replica = nemesis.rng.choice(nemesis.world.replicas)
    return replica.name if revoke_lease(nemesis, replica) else None


def revoke_lease(nemesis: Nemesis, replica: ReplicaProcess) -> bool:
    """End a replica's lease; False if it has none, or no leader is there to end it."""
    etcd = nemesis.world.ground.etcd
    kv = etcd.keyspace.live.get(keys.member(replica.name))
    if kv is None or not etcd.quorum:
        return False
    etcd.revoke(kv.lease)
    return True


def compact(nemesis: Nemesis) -> str | None:
    """All history is forgotten."""
    etcd = nemesis.world.ground.etcd
    if not etcd.quorum:
        return None
    etcd.compact(etcd.keyspace.revision)
    return f"at revision {etcd.keyspace.revision}"


def fill_store(nemesis: Nemesis) -> str | None:
    """The quota is reached: puts and grants are refused, keepalives and deletes are not, until somebody makes room."""
    etcd, gap = nemesis.world.ground.etcd, nemesis.rng.uniform(*FULL)
    if etcd.nospace:
        return None
    etcd.nospace = True

    def make_room() -> None:
        etcd.nospace = False

    nemesis.later(gap, make_room)
    return f"for {gap:.1f} s"


def lie(nemesis: Nemesis) -> str | None:
    """A leader that is none any more acknowledges keepalives until another is elected, who starts every TTL again (O2); or a lease
    is revoked, and its holder's keepalives are acknowledged for as long all the same (etcd issue 14758)."""
    etcd = nemesis.world.ground.etcd
    if not etcd.quorum:
        return None
    if nemesis.rng.random() < 0.5:
        if nemesis.weather(Weather(stale_keepalive=1.0), ELECTION, all_replicas=True) is None:
            return None
        nemesis.later(ELECTION, etcd.change_leader)
        return f"a deposed leader acknowledges what it does not renew, for {ELECTION:.1f} s"
    replica = nemesis.rng.choice(nemesis.world.replicas)
    if not revoke_lease(nemesis, replica):
        return None
    weather = Weather(revoked_keepalive=1.0)
    replica.faults.weather = weather

    def mend() -> None:
        if replica.faults.weather is weather:
            replica.faults.weather = CALM

    nemesis.later(LIE, mend)
    return f"the lease of {replica.name} is revoked, and acknowledged for {LIE:.1f} s"
