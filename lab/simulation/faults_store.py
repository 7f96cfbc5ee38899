"""Misfortunes of the store, and of the way to it; see `lab.simulation.faults`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane.store import keys
from lab.simulation.etcd import Weather

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis


def storm(nemesis: Nemesis) -> str:
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


def cut_store(nemesis: Nemesis) -> str:
    """A replica does not reach the store."""
    return nemesis.weather(Weather(cut=True), nemesis.long(), all_replicas=False)


def trouble_watches(nemesis: Nemesis) -> str:
    """Watches are late, broken, told twice, compacted."""
    rng = nemesis.rng
    weather = Weather(
        watch_slow=rng.choice((0.0, 0.2)),
        watch_broken=rng.choice((0.0, 0.1)),
        watch_twice=rng.choice((0.0, 0.2)),
        watch_compacted=rng.choice((0.0, 0.05)),
    )
    return nemesis.weather(weather, nemesis.long(), all_replicas=rng.random() < 0.5)


def lose_quorum(nemesis: Nemesis) -> str:
    """Nothing is answered; what waits may land in the end."""
    etcd, gap, applied = nemesis.world.ground.etcd, nemesis.long(), nemesis.rng.random() < 0.7
    etcd.lose_quorum()
    nemesis.later(gap, lambda: etcd.regain_quorum(apply_parked=applied))
    return f"for {gap:.1f} s, then what waited is {'applied' if applied else 'dropped'}"


def change_leader(nemesis: Nemesis) -> str:
    """Another etcd leader."""
    nemesis.world.ground.etcd.change_leader()
    return "every TTL starts again"


def expire_lease(nemesis: Nemesis) -> str:
    """A lease ends although its holder lives: etcd promises nothing else."""
    replica = nemesis.rng.choice(nemesis.world.replicas)
    kv = nemesis.world.ground.etcd.keyspace.live.get(keys.member(replica.name))
    if kv is not None:
        nemesis.world.ground.etcd.revoke(kv.lease)
    return replica.name


def compact(nemesis: Nemesis) -> str:
    """All history is forgotten."""
    etcd = nemesis.world.ground.etcd
    etcd.compact(etcd.keyspace.revision)
    return f"at revision {etcd.keyspace.revision}"
