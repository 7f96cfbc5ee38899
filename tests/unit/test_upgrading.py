"""The feature level rises by itself once everybody has read the higher one for a while, and never falls (PROTOCOL J11)."""

from __future__ import annotations

import asyncio

from control_plane.codec import FEATURE_LEVEL
from control_plane.core.model import FLEET
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd
from control_plane.upgrading import HOLD, LOOK, Upgrading
from control_plane.view import View
from tests.unit.journal_world import Member, story, until

HIGHER = FEATURE_LEVEL + 1


def stored(server: MemoryEtcd) -> int:
    return int(server.keyspace.live[keys.FEATURE_LEVEL].value)


async def member(server: MemoryEtcd, name: str, level: int = HIGHER) -> Member:
    """A replica with the loop under test."""
    made = await Member(server, name, feature_level=level).join()
    view = View(made.store, made.clock)
    upgrading = Upgrading(
        made.store,
        made.clock,
        view,
        leads=lambda: FLEET in made.controller.owned(),
        level=lambda: made.controller.feature_level,
    )
    made.spawn(view.run())
    made.spawn(upgrading.run())
    await until(lambda: bool(made.mine()))
    return made


@story
async def test_j11_the_level_rises_when_all_have_read_more_for_the_hold(server: MemoryEtcd) -> None:
    a, b = await member(server, "a"), await member(server, "b")
    await asyncio.sleep(HOLD / 2)
    assert stored(server) == FEATURE_LEVEL
    await until(lambda: stored(server) == HIGHER, HOLD)
    await until(lambda: a.controller.feature_level == b.controller.feature_level == HIGHER)
    await asyncio.gather(a.crash(), b.crash())


@story
async def test_j11_one_old_replica_holds_it_and_its_upgrade_lets_it_go(server: MemoryEtcd) -> None:
    new, old = await member(server, "new"), await member(server, "old", FEATURE_LEVEL)
    await asyncio.sleep(3 * HOLD)
    assert stored(server) == FEATURE_LEVEL
    await old.crash()
    again = await member(server, "old")
    await until(lambda: stored(server) == HIGHER, 2 * HOLD)
    await asyncio.gather(new.crash(), again.crash())


@story
async def test_j11_an_old_replica_that_restarts_in_time_is_not_shut_out(server: MemoryEtcd) -> None:
    new, old = await member(server, "new"), await member(server, "old", FEATURE_LEVEL)
    for _ in range(3):
        await old.crash()
        await asyncio.sleep(HOLD / 2)
        old = await member(server, "old", FEATURE_LEVEL)
        await asyncio.sleep(2 * LOOK)
    assert stored(server) == FEATURE_LEVEL
    await asyncio.gather(new.crash(), old.crash())


@story
async def test_j11_the_owner_of_fleet_dies_or_the_store_is_silent_and_it_rises_all_the_same(server: MemoryEtcd) -> None:
    a, b = await member(server, "a"), await member(server, "b")
    leader, other = (a, b) if FLEET in a.mine() else (b, a)
    await asyncio.sleep(HOLD / 2)
    await leader.crash()
    other.faults.plan("txn", keys.FEATURE_LEVEL, *[CallFault(latency=30.0)] * 2)
    await until(lambda: stored(server) == HIGHER, 4 * HOLD)
    await other.crash()


@story
async def test_j11_a_federation_of_an_older_program_is_taken_along(server: MemoryEtcd) -> None:
    """What an operator sees: level 1 as it was made, and the newest a minute after the last replica was upgraded."""
    a = await member(server, "a", FEATURE_LEVEL)
    await a.crash()
    server.txn(Txn((), (Put(keys.FEATURE_LEVEL, b"1"),)))
    b = await member(server, "b", FEATURE_LEVEL)
    await until(lambda: b.controller.feature_level == FEATURE_LEVEL, 2 * HOLD)
    await b.crash()
