"""Misfortunes that need more than a process or a link: repeated messages and requests, a restored store, a second agent of one name.

Each strike takes the nemesis, does its harm, and says what it did; see `lab.simulation.faults`.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from baton.errors import BatonError
from baton.v1 import admin_pb2
from control_plane.core.model import ALL_SHARDS, FLEET
from control_plane.store import keys
from lab.checking.history import Owned, Restored
from lab.simulation.etcd import CALM, Weather

if TYPE_CHECKING:
    from lab.simulation.faults import Nemesis

BACKUP_AGE = (2.0, 12.0)
"""Seconds between a backup and its restore: a few commits of every busy shard."""

AWAY = (7.0, 12.0)
"""Seconds that a store is away while a backup is put in its place: longer than the lease of replicas (5 s and what O2 takes off), as
docs/restore.md asks. So whoever acts on it afterwards has looked at its own marks first (O3)."""

NOTICED = 8.0
"""Seconds after a store is back within which somebody who remembers more has told. From the backup until then nothing else is struck:
a restore that nobody lives to tell stays unseen, which J12 states as its limit."""

OPERATOR_PAUSE = 3.0
"""Seconds between two tries of the operator who confirms a restore."""

OPERATOR_PATIENCE = 100.0
"""Seconds after which the operator gives up: twice what every agent needs to end its work (J12), and some."""


def repeat_messages(nemesis: Nemesis) -> str | None:
    """What replicas relay between owners and agents arrives twice, the second time late and out of order (J7: all of it is
    idempotent)."""
    links, gap = nemesis.world.ground.links, nemesis.rng.uniform(5.0, 20.0)
    if links.repeats:
        return None
    links.repeats = nemesis.rng.choice((0.1, 0.3, 0.6))

    def mend() -> None:
        links.repeats = 0.0

    nemesis.later(gap, mend)
    return f"{links.repeats:.0%} of relayed messages for {gap:.1f} s"


def reorder_messages(nemesis: Nemesis) -> str | None:
    """Calls of clients, each on a stream of its own, overtake each other by seconds, and so do their answers (O8)."""
    links, gap = nemesis.world.ground.links, nemesis.rng.uniform(5.0, 20.0)
    if links.disorder:
        return None
    links.disorder = nemesis.rng.choice((0.2, 0.5))

    def mend() -> None:
        links.disorder = 0.0

    nemesis.later(gap, mend)
    return f"{links.disorder:.0%} of calls and answers late for {gap:.1f} s"


def repeat_request(nemesis: Nemesis) -> str | None:
    """A client's creation that was answered comes again, as from a program that started anew (O8)."""
    client = nemesis.world.client
    if not client.asked:
        return None
    run = nemesis.rng.choice(sorted(client.asked))
    nemesis.started.append(asyncio.get_running_loop().create_task(client.repeat(run)))
    return run


def slow_store(nemesis: Nemesis) -> str | None:
    """Transactions take up to seconds, and some land long after their clients gave up."""
    weather = Weather(slow_txn=nemesis.rng.choice((0.3, 0.7)), late=nemesis.rng.choice((0.0, 0.2)))
    return nemesis.weather(weather, nemesis.rng.uniform(5.0, 25.0), all_replicas=nemesis.rng.random() < 0.7)


def restore_store(nemesis: Nemesis) -> str | None:
    """The store is stopped and comes back as it was at a backup, once in a run; then an operator says so as soon as he may (J12)."""
    world, age, away = nemesis.world, nemesis.rng.uniform(*BACKUP_AGE), nemesis.rng.uniform(*AWAY)
    etcd, loop = world.ground.etcd, asyncio.get_running_loop()
    if nemesis.backups or not all(replica.alive for replica in world.replicas):
        return None
    nemesis.backups = 1
    nemesis.truce(age + away + NOTICED)
    backup = etcd.snapshot()
    revision = etcd.keyspace.revision

    def restore() -> None:
        etcd.restore(backup)
        etcd.regain_quorum(apply_parked=False)
        nemesis.restored.append(Restored(loop.time(), revision))
        for shard in ALL_SHARDS:
            kv = etcd.keyspace.live.get(keys.owner(shard))
            nemesis.owners.append(Owned.of(loop.time(), revision, shard, kv.value if kv is not None else b""))
        nemesis.operator = loop.create_task(_confirm(nemesis))

    nemesis.later(age, etcd.lose_quorum)
    nemesis.later(age + away, restore)
    return f"stopped in {age:.1f} s, back {away:.1f} s later at revision {revision}"


async def _confirm(nemesis: Nemesis) -> None:
    """The operator: asks replica after replica until the suspicion is lifted."""
    world, loop = nemesis.world, asyncio.get_running_loop()
    until, suspected = loop.time() + OPERATOR_PATIENCE, False
    while loop.time() < until:
        there = keys.RESTORED_SUSPECTED in world.ground.etcd.keyspace.live
        if suspected and not there:
            break
        suspected |= there
        if there:
            request = admin_pb2.ConfirmRestoredRequest(request_id=world.client.request_id())
            try:
                await nemesis.rng.choice(world.replicas).call("ConfirmRestored", request, 5.0)
            except (BatonError, ConnectionError, TimeoutError):
                pass  # too early, or nobody answers: he comes again
        await asyncio.sleep(OPERATOR_PAUSE)
    world.client.restored = world.client.watchers.restored = True
    nemesis.restored[-1] = replace(nemesis.restored[-1], settled=loop.time())


LAST_MOMENT = (12.0, 15.0)
"""Seconds out of sight after which a cluster comes back just when its loss (L = 15 s after its last heartbeat) is being decided."""

GLIMPSE = (4.0, 7.0)
"""Seconds for which it is seen then: enough for a session, a heartbeat and the start of what waits."""


def glimpse(nemesis: Nemesis) -> str | None:
    """A cluster is heard of at the very moment in which it is lost, while that decision lands late, and is gone again (S4)."""
    world, loop = nemesis.world, asyncio.get_running_loop()
    cluster = nemesis.rng.choice(world.clusters)
    gap, seen = nemesis.rng.uniform(*LAST_MOMENT), nemesis.rng.uniform(*GLIMPSE)
    pairs = nemesis.around(cluster)
    kv = world.ground.etcd.keyspace.live.get(keys.owner(FLEET))
    judge = Owned.of(0.0, 0, FLEET, kv.value if kv is not None else b"").replica
    weather = Weather(late_txn=0.8)

    def begin() -> None:
        for replica in world.replicas:
            if replica.name == judge and not nemesis.healed:
                replica.faults.weather = weather

    def end() -> None:
        for replica in world.replicas:
            if replica.faults.weather is weather:
                replica.faults.weather = CALM

    def cut_again() -> None:
        if not nemesis.healed:
            nemesis.cut(pairs, 12.0)

    if not nemesis.cut(pairs, gap):
        return None
    loop.call_later(gap - 0.5, begin)
    nemesis.later(gap + seen, end)
    loop.call_later(gap + seen, cut_again)
    return f"{cluster.name} after {gap:.1f} s for {seen:.1f} s"


def second_agent(nemesis: Nemesis) -> str | None:
    """Somebody starts another agent under a cluster's name, on another host: S1 keeps it out while the first one lives."""
    world, gap = nemesis.world, nemesis.rng.uniform(10.0, 40.0)
    free = [double for double in world.doubles if not double.alive]
    if not free:
        return None
    double = nemesis.rng.choice(free)
    double.start()
    nemesis.later(gap, double.reboot)
    return f"{double.name} for {gap:.1f} s"
