"""A restored store is noticed by whoever remembers more, and stops everybody (PROTOCOL J12)."""

from __future__ import annotations

import asyncio
import json

import pytest

from baton.errors import WrongState
from control_plane.confirmation import Confirmation
from control_plane.core.model import Admission, ClusterFacts, FleetTable, Health
from control_plane.fleet_keys import encode_table
from control_plane.refusals import OutcomeUnknown
from control_plane.restore import Mark, Marks, in_words
from control_plane.snapshots import InPlaceSnapshotter, Job
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from control_plane.store.memory import MemoryEtcd
from control_plane.view import View
from tests.unit.journal_world import LOST_REPLY, LOST_REQUEST, Ledger, Member, Replica, names, story, until


def mark_of(replica: Replica, shard: str = "00") -> Mark:
    owned = replica.controller.owned()[shard]
    return Mark(shard, owned.incarnation, owned.seq, owned.nonce)


async def check(replica: Replica, *marks: Mark) -> bool:
    detector = replica.controller.restore
    return await detector.check_marks(marks, detector.federation_uid)


@story
async def test_j12_honest_marks_prove_nothing(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    marks = [mark_of(a)]
    for word in ("x", "y", "z"):
        await a.ask("00", word)
        marks.append(mark_of(a))
    assert not await check(a, *marks)
    owned = a.controller.owned()["00"]
    await InPlaceSnapshotter(a.store, a.clock, Ledger).snapshot(Job("00", owned.owner_value.decode(), 1))
    await a.ask("00", "v")
    assert not await check(a, *marks, mark_of(a)), "also of seqs that were trimmed"
    assert keys.RESTORED_SUSPECTED not in server.keyspace.live


@story
async def test_j12_a_head_below_a_mark_stops_everybody_until_it_is_confirmed(server: MemoryEtcd) -> None:
    a, b = await Replica(server, "a").start("00"), await Replica(server, "b").start("01")
    await a.ask("00", "x")
    backup = server.snapshot()
    await a.ask("00", "y")
    told = mark_of(a)
    server.restore(backup)
    assert await check(b, told)
    detail = json.loads(server.keyspace.live[keys.RESTORED_SUSPECTED].value)
    assert detail["replica"] == "b"
    assert "the head is at 1" in detail["detail"]
    stuck = asyncio.create_task(b.ask("01", "z"))
    await asyncio.sleep(10)
    assert not stuck.done()
    assert await b.controller.restore.confirm_restored() == 2
    with pytest.raises(OutcomeUnknown):
        await stuck
    assert keys.RESTORED_SUSPECTED not in server.keyspace.live
    assert server.keyspace.live[keys.INCARNATION].value == b"2"
    assert "01" not in b.controller.owned(), "its epoch is of the old incarnation"
    assert not await check(b, told), "a mark of an old incarnation says nothing"
    assert await b.controller.restore.confirm_restored() == 2, "nothing to confirm"


@story
async def test_j12_another_nonce_at_a_known_seq_is_a_restore(server: MemoryEtcd) -> None:
    """The log has grown past the mark again, so only the nonce tells."""
    a = await Replica(server, "a").start("00")
    await a.ask("00", "x")
    backup = server.snapshot()
    await a.ask("00", "y")
    told = mark_of(a)
    await a.crash()
    server.restore(backup)
    await a.lose_lease()
    b = await Replica(server, "b").start("00")
    await b.ask("00", "other")
    await b.ask("00", "more")
    assert await check(b, told)


@story
async def test_j12_also_after_the_seq_was_trimmed(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    backup = server.snapshot()
    await a.ask("00", "y")
    told = mark_of(a)
    await a.crash()
    server.restore(backup)
    await a.lose_lease()
    b = await Replica(server, "b").start("00")
    await b.ask("00", "other")
    await InPlaceSnapshotter(b.store, b.clock, Ledger).snapshot(
        Job("00", b.controller.owned()["00"].owner_value.decode(), 1)
    )
    assert await check(b, told)


@story
async def test_j12_marks_of_another_federation_or_incarnation_are_not_ours(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    high = Mark("00", 1, 99, "aa")
    assert not await a.controller.restore.check_marks([high], "another")
    assert not await check(a, Mark("00", 2, 99, "aa"), Mark("no-shard", 1, 9, "a"), Mark("00", 1, 0, ""))
    assert await check(a, high)


@story
async def test_j12_a_replicas_own_memory_finds_it_on_taking(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    backup = server.snapshot()
    await a.ask("00", "x")
    await a.controller.release("00")
    server.restore(backup)
    await a.lose_lease()
    a.lease = (await a.store.lease_grant(3600.0, timeout=5.0)).id
    a.controller.attach(a.lease, lambda: True)
    await a.controller.take("00")
    assert keys.RESTORED_SUSPECTED in server.keyspace.live


@story
async def test_j12_the_owner_itself_finds_it_when_it_commits(server: MemoryEtcd) -> None:
    """The backup holds its own owner key."""
    a = await Replica(server, "a").start("00")
    await a.ask("00", "x")
    backup = server.snapshot()
    await a.ask("00", "y")
    server.restore(backup)
    stuck = asyncio.create_task(a.ask("00", "z"))
    await asyncio.sleep(5)
    assert not stuck.done()
    assert keys.RESTORED_SUSPECTED in server.keyspace.live
    stuck.cancel()


@story
async def test_j12_after_the_confirmation_work_goes_on_in_the_next_incarnation(server: MemoryEtcd) -> None:
    a = await Member(server, "a").join()
    await until(lambda: "00" in a.mine())
    await a.ask("00", "x")
    backup = server.snapshot()
    await a.ask("00", "y")
    server.restore(backup)
    assert await check(a, *a.controller.restore.marks.of(["00"]))
    await a.controller.restore.confirm_restored()
    await until(lambda: "00" in a.mine() and a.controller.owned()["00"].incarnation == 2, 60)
    assert await a.controller.read("00", names, timeout=5.0) == ["x"]
    assert await a.ask("00", "z") == 2
    assert mark_of(a).incarnation == 2


@story
async def test_j12_a_suspicion_whose_answer_was_lost_is_still_said(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    a.faults.plan("txn", keys.RESTORED_SUSPECTED, LOST_REQUEST, LOST_REPLY)
    assert await check(a, Mark("00", 1, 99, "aa"))
    assert keys.RESTORED_SUSPECTED in server.keyspace.live


async def suspected(replica: Replica) -> tuple[Confirmation, asyncio.Task[None]]:
    """A replica whose view has just heard of a suspicion."""
    view = View(replica.store, replica.clock)
    confirmation = Confirmation(replica.controller.restore, view, replica.clock)
    following = asyncio.create_task(view.run())
    await view.ready()
    await replica.controller.restore.suspect(1, "the head is too low")
    await until(lambda: view.restore_suspected != "")
    return confirmation, following


async def seconds_left(confirmation: Confirmation) -> float:
    with pytest.raises(WrongState) as early:
        await confirmation.confirm(now=False)
    assert early.value.applied == "no"
    assert early.value.retry_after is not None
    return early.value.retry_after


async def join(replica: Replica, *profiles: str) -> None:
    """Fleet's table, with a cluster of each profile."""
    clusters = {
        profile: ClusterFacts(profile, profile, Health.READY, Admission.OPEN, (), profile=profile)
        for profile in profiles
    }
    put = Put(keys.FLEET_TABLE, encode_table(FleetTable(1, clusters)))
    await replica.store.txn(Txn([], [put]), timeout=5.0)


@story
async def test_j12_a_confirmation_waits_until_no_work_from_after_the_backup_lives(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await join(a, "fast")
    confirmation, following = await suspected(a)
    assert 19 < await seconds_left(confirmation) <= 20
    await asyncio.sleep(15)
    left = await seconds_left(confirmation)
    assert 4 < left <= 5, "counted from the first sight, not from the first call"
    await asyncio.sleep(left)
    assert await confirmation.confirm(now=False) == 2
    assert await confirmation.confirm(now=False) == 2, "nothing to confirm"
    following.cancel()


@story
async def test_j12_a_cluster_that_joined_after_the_backup_counts(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await join(a, "fast", "patient")
    confirmation, following = await suspected(a)
    await join(a, "fast")  # what the backup knew
    await asyncio.sleep(100)
    assert 499 < await seconds_left(confirmation) <= 500
    assert await confirmation.confirm(now=True) == 2, "an operator may know better"
    following.cancel()


@story
async def test_j12_a_replica_that_starts_again_counts_anew(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    _, following = await suspected(a)
    await asyncio.sleep(40)
    following.cancel()
    again = Confirmation(a.controller.restore, View(a.store, a.clock), a.clock)  # its view has heard nothing yet
    assert await seconds_left(again) == 42
    await asyncio.sleep(42)
    assert await again.confirm(now=False) == 2


def test_a_suspicion_is_told_in_words() -> None:
    raw = json.dumps({"replica": "replica-1", "detail": "shard 00, seq 2 was acknowledged", "wall": 1_700_000_000.5})
    assert in_words(raw) == (
        "replica-1 found at 2023-11-14T22:13:20Z that the store knows less than was acknowledged"
        " (shard 00, seq 2 was acknowledged)"
    )
    assert in_words("?") == "?"


def test_marks_keep_the_highest() -> None:
    marks = Marks()
    for mark in (Mark("00", 1, 5, "a"), Mark("00", 1, 4, "b"), Mark("01", 1, 1, "c"), Mark("00", 2, 1, "d")):
        marks.observe(mark)
    assert marks.of(["00", "01", "02"]) == [Mark("00", 2, 1, "d"), Mark("01", 1, 1, "c")]
