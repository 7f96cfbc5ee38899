"""The cycle and its edges: batches, closed shards, answers, takeovers (PROTOCOL J2, J5-J8, J11)."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from control_plane.batches import BatchReader
from control_plane.controller import CycleConfig
from control_plane.core.commands import Outbox, Refused, Tick
from control_plane.cycle import CROWD, GATHER_SECONDS
from control_plane.journal import Head
from control_plane.refusals import ConditionFailed, NotOwned, OutcomeUnknown, StoreDown
from control_plane.store import keys
from control_plane.store.base import Compare, Delete, Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd, Outcome
from tests.unit.journal_world import LOST_REPLY, LOST_REQUEST, Ledger, Replica, add, names, put, story, until


async def ask_all(replica: Replica, *asked: str, shard: str = "00") -> list[Any]:
    return await asyncio.gather(*(replica.ask(shard, name) for name in asked), return_exceptions=True)


def log_of(server: MemoryEtcd, shard: str) -> list[list[str]]:
    """Names by batch, as a reader of the log sees them."""
    reader, found = BatchReader(), []
    for key in sorted(key for key in server.keyspace.live if key.startswith(keys.log_prefix(shard))):
        batch = reader.take(server.keyspace.live[key].value)
        if batch is not None:
            found.append([getattr(event, "name", "?") for event in batch.events])
    return found


@story
async def test_j2_what_arrives_together_is_one_batch_and_one_transaction(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00", "01")
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    first = asyncio.create_task(a.ask("00", "w"))
    await asyncio.sleep(0.5)
    revision = server.keyspace.revision
    x, y, z = await asyncio.gather(a.ask("00", "x"), a.ask("00", "y"), a.ask("01", "z"))
    assert ({x, y}, z) == ({2, 3}, 1)
    assert await first == 1
    assert server.keyspace.revision == revision + 2
    assert len(log_of(server, "00")) == 2


@story
async def test_j1_an_answer_comes_only_after_the_commit(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0, reply_latency=1.0))
    task = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(1.5)
    assert log_of(server, "00") == [["x"]]
    assert not task.done()
    assert a.ear.heard == [("taken", "00")]
    assert await task == 1
    assert a.ear.heard == [("taken", "00"), ("committed", "00")]
    assert a.ear.outboxes[0].runs == {"x"}


@story
async def test_j2_a_closed_shard_is_neither_read_nor_decided(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00", "01")
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    first = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.1)
    read = asyncio.create_task(a.controller.read("00", names, timeout=30.0))
    second = asyncio.create_task(a.ask("00", "y"))
    assert await a.controller.read("01", names, timeout=30.0) == [], "another shard is open"
    await asyncio.sleep(0.5)
    assert not read.done()
    assert await read == ["x"]
    assert (await first, await second) == (1, 2)
    assert log_of(server, "00") == [["x"], ["y"]]


@story
async def test_a_refusal_that_rests_on_the_batch_waits_for_its_commit(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    a.faults.plan("txn", "shards/00", LOST_REQUEST)
    a.controller.post("00", add("x"))
    with pytest.raises(Refused, match="1 names are there"):
        await a.ask("00", "no")
    assert log_of(server, "00") == [["x"]]


@story
async def test_an_answer_without_events_needs_no_transaction(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    revision = server.keyspace.revision
    assert await a.ask("00", "again") == 0
    with pytest.raises(Refused):
        await a.ask("00", "no")
    assert server.keyspace.revision == revision


@story
async def test_settle_belongs_to_the_batch(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await a.ask("00", "settle")
    assert log_of(server, "00") == [["settle", "settled"]]


@story
async def test_a_timer_is_handled_when_it_is_due(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await a.controller.submit("00", add("x", after=10.0), timeout=5.0)
    await asyncio.sleep(9.9)
    assert log_of(server, "00") == [["x"]]
    await asyncio.sleep(0.2)
    assert log_of(server, "00") == [["x"], ["tick"]]


@story
async def test_j2_a_large_decision_is_several_transactions_and_one_effect(server: MemoryEtcd) -> None:
    a = await Replica(server, "a", CycleConfig(batch_bytes=4096)).start("00", "01")
    a.controller.post("00", add("big:300"))
    await asyncio.sleep(0)
    assert await a.ask("01", "small") == 1, "the others go on beside it"
    assert len(await a.controller.read("00", names, timeout=30.0)) == 300
    owned = a.controller.owned()["00"]
    assert owned.seq > 5
    assert server.keyspace.live[keys.head("00")].value == Head(owned.seq, owned.nonce).encode()
    stamps = {stamp.seq for stamp in owned.machine.stamps}  # type: ignore[attr-defined]  # it is a Ledger
    assert stamps == {1}
    await a.crash()
    await a.lose_lease()
    b = await Replica(server, "b").start("00")
    machine = b.controller.owned()["00"].machine
    assert machine.stamps == owned.machine.stamps  # type: ignore[attr-defined]  # the same fold
    assert machine.names == owned.machine.names  # type: ignore[attr-defined]


@story
async def test_j6_half_a_large_decision_never_happened(server: MemoryEtcd) -> None:
    a = await Replica(server, "a", CycleConfig(batch_bytes=4096)).start("00")
    a.faults.plan("txn", "shards/00", CallFault(), CallFault(), CallFault(latency=1.0))
    task = asyncio.create_task(a.ask("00", "big:300"))
    await asyncio.sleep(0.5)
    await a.lose_lease()
    with pytest.raises(NotOwned):
        await task
    b = await Replica(server, "b").start("00")
    assert await b.controller.read("00", names, timeout=5.0) == []
    assert await b.ask("00", "next") == 1
    await b.crash()
    await b.lose_lease()
    c = await Replica(server, "c").start("00")
    assert await c.controller.read("00", names, timeout=5.0) == ["next"]


@story
async def test_j2_transactions_are_bounded_and_shards_take_turns(server: MemoryEtcd) -> None:
    shards = ("00", "01", "02", "03", "04", "05")
    a = await Replica(server, "a", CycleConfig(batch_bytes=8192, txn_bytes=20_000)).start(*shards)
    for shard in shards:
        a.controller.post(shard, add("big:200"))
    await until(lambda: all(len(a.controller.owned()[shard].machine.names) == 200 for shard in shards))  # type: ignore[attr-defined]
    await asyncio.sleep(5)
    assert all(a.controller.owned()[shard].seq >= 3 for shard in shards)


@story
async def test_two_replicas_race_for_a_shard_and_one_wins(server: MemoryEtcd) -> None:
    a, b = await Replica(server, "a").start(), await Replica(server, "b").start()
    won = await asyncio.gather(a.controller.take("00"), b.controller.take("00"))
    assert sorted(won) == [False, True]
    winner, loser = (a, b) if won[0] else (b, a)
    assert await winner.ask("00", "x") == 1
    with pytest.raises(NotOwned):
        await loser.ask("00", "y")
    assert winner.controller.owned()["00"].epoch_revision == server.keyspace.live[keys.owner("00")].create_revision


@story
async def test_o1_a_taking_whose_answer_was_lost_is_ours(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start()
    a.faults.plan("txn", keys.owner("00"), LOST_REPLY)
    assert await a.controller.take("00")
    assert await a.ask("00", "x") == 1


@story
async def test_o4_calls_that_come_while_a_shard_is_taken_are_parked(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start()
    a.faults.plan("txn", keys.owner("00"), CallFault(latency=2.0))
    taking = asyncio.create_task(a.controller.take("00"))
    await asyncio.sleep(0.1)
    call = asyncio.create_task(a.ask("00", "x"))
    read = asyncio.create_task(a.controller.read("00", len_of_names, timeout=30.0))
    assert await taking
    assert await call == 1
    assert await read in (0, 1)


def len_of_names(machine: Ledger) -> int:
    return len(machine.names)


@story
async def test_o4_release_flushes_and_the_next_owner_has_everything(server: MemoryEtcd) -> None:
    a, b = await Replica(server, "a").start("00"), await Replica(server, "b").start()
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    call = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.1)
    await a.controller.release("00")
    assert await call == 1
    assert a.ear.heard[-1] == ("dropped", "00")
    with pytest.raises(NotOwned):
        await a.ask("00", "y")
    assert await b.controller.take("00")
    assert await b.ask("00", "y") == 2


@story
async def test_j4_a_replica_that_lost_its_lease_cannot_write(server: MemoryEtcd) -> None:
    """It does not know it yet; the fence does."""
    a, b = await Replica(server, "a").start("00"), await Replica(server, "b").start()
    await a.ask("00", "x")
    await a.lose_lease()
    assert await b.controller.take("00")
    await b.ask("00", "y")
    with pytest.raises(OutcomeUnknown):
        # b's batch has the seq that a's would have had, so a's read proves nothing about a's own.
        await a.ask("00", "z")
    assert "00" not in a.controller.owned()
    assert await b.controller.read("00", names, timeout=5.0) == ["x", "y"]


@story
async def test_j6_unknown_and_not_owned_after_a_loss(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    a.faults.plan("txn", "shards/00", *[LOST_REPLY] * 3)
    decided = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.01)
    waiting = asyncio.create_task(a.ask("00", "y"))
    read = asyncio.create_task(a.controller.read("00", names, timeout=30.0))
    await a.lose_lease()
    b = await Replica(server, "b").start("00")
    await b.ask("00", "z")
    assert await decided == 1, "log/seq still has our nonce"
    for task in (waiting, read):
        with pytest.raises(NotOwned):
            await task
    assert await b.controller.read("00", names, timeout=5.0) == ["x", "z"]


@story
async def test_j6_a_time_out_tells_decided_from_undecided(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    server.lose_quorum()
    decided = asyncio.create_task(a.ask("00", "x", timeout=8.0))
    await asyncio.sleep(0.1)
    with pytest.raises(StoreDown):
        await a.ask("00", "y", timeout=8.0)
    with pytest.raises(OutcomeUnknown):
        await decided
    with pytest.raises(StoreDown):
        await a.controller.read("00", names, timeout=1.0)
    server.regain_quorum()
    assert await a.controller.read("00", names, timeout=30.0) == ["x"], "the decided one happened, the other never will"


@story
async def test_j8_no_read_is_answered_under_a_lease_that_ran_out(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")

    def slow(machine: Ledger) -> int:
        a.good = False
        return len(machine.names)

    read = asyncio.create_task(a.controller.read("00", slow, timeout=30.0))
    await asyncio.sleep(1)
    assert not read.done()
    call = asyncio.create_task(a.ask("00", "again"))
    await asyncio.sleep(1)
    assert not call.done(), "O3: a lapsed replica decides nothing"
    read.cancel()
    await asyncio.sleep(0)
    a.good = True
    assert await call == 0


@story
async def test_j8_a_read_that_waited_is_not_answered_under_such_a_lease_either(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    asked: list[float] = []

    def slow(machine: Ledger) -> int:
        asked.append(a.clock.boot())
        a.good = len(asked) > 1
        return len(machine.names)

    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    call = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.1)
    read = asyncio.create_task(a.controller.read("00", slow, timeout=30.0))
    assert await call == 1
    await asyncio.sleep(1)
    assert (len(asked), read.done()) == (1, False)
    a.good = True
    a.controller.wake()
    assert await read == 1


@story
async def test_j5_a_condition_that_failed_leaves_the_state_as_it_was(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await a.ask("00", "x")
    stale = Compare.unchanged(keys.FEDERATION, 1)
    with pytest.raises(ConditionFailed):
        await a.ask("00", "y", condition=stale)
    assert await a.controller.read("00", names, timeout=5.0) == ["x"]
    assert a.ear.heard == [("taken", "00"), ("committed", "00")], "nobody needs to know"
    true = Compare.unchanged(keys.FEDERATION, server.keyspace.live[keys.FEDERATION].mod_revision)
    first, second, third = await asyncio.gather(a.ask("00", "z"), a.ask("00", "w", condition=true), a.ask("00", "v"))
    assert {first, second, third} == {2, 3, 4}
    assert sorted(map(tuple, log_of(server, "00"))) in (
        [("v",), ("w",), ("x",), ("z",)],
        [("v", "z"), ("w",), ("x",)],
        [("w",), ("x",), ("z", "v")],
    ), "alone in its batch"


@story
async def test_a_machine_with_a_bug_is_rebuilt_and_only_the_culprit_fails(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await a.ask("00", "x")
    before, bug, after = await ask_all(a, "y", "bug", "z")
    assert isinstance(bug, RuntimeError)
    assert {before, after} == {2, 3}
    assert "bug" not in await a.controller.read("00", names, timeout=5.0)


@story
async def test_side_puts_go_in_the_same_transaction(server: MemoryEtcd) -> None:
    def side_puts(shard: Any, events: Any) -> list[Put]:
        return [Put(f"sessions/{event.name}/owner", shard.id.encode()) for event in events]

    a = await Replica(server, "a", CycleConfig(batch_side_puts=5), side_puts=side_puts).start("00")
    await ask_all(a, *(f"n{n}" for n in range(12)))
    for n in range(12):
        kv = server.keyspace.live[f"sessions/n{n}/owner"]
        assert kv.mod_revision in {server.keyspace.live[keys.log("00", seq)].mod_revision for seq in (1, 2, 3)}
    assert len(log_of(server, "00")) == 3


@story
async def test_bounds_of_the_inbox(server: MemoryEtcd) -> None:
    a = await Replica(server, "a", CycleConfig(inbox=3)).start("00")
    a.faults.plan("txn", "shards/00", CallFault(latency=1.0))
    calls = [asyncio.create_task(a.ask("00", "x"))]
    await asyncio.sleep(0.1)
    calls += [asyncio.create_task(a.ask("00", f"y{n}")) for n in range(3)]
    await asyncio.sleep(0.1)
    with pytest.raises(Refused, match="try again later"):
        await a.ask("00", "z")
    a.controller.post("00", add("dropped"))
    a.controller.post("09", add("not ours"))
    await asyncio.gather(*calls)
    assert len(await a.controller.read("00", names, timeout=5.0)) == 4


@story
async def test_j11_an_event_that_is_too_new_stops_its_shard(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00", "01")
    await a.ask("00", "x")
    await a.crash()
    await a.lose_lease()
    future = b"\x08\x63"  # an envelope of format 99
    server.txn(Txn((), (Put(keys.log("00", 2), future), Put(keys.head("00"), Head(2, "aa").encode()))))
    b = await Replica(server, "b").start("01")
    assert not await b.controller.take("00")
    assert "format 99" in b.controller.stopped["00"]
    assert keys.owner("00") not in server.keyspace.live, "it is given back to whoever can"
    assert await b.ask("01", "others go on") == 1


@story
async def test_a_log_with_a_hole_stops_its_shard(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    for name in ("x", "y", "z"):
        await a.ask("00", name)
    await a.crash()
    await a.lose_lease()
    server.txn(Txn((), (Delete(keys.log("00", 2)),)))
    b = await Replica(server, "b").start()
    assert not await b.controller.take("00")
    assert "follows seq 1" in b.controller.stopped["00"]


@story
async def test_j7_effects_after_a_takeover_come_from_state(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await a.ask("00", "x")
    await a.crash()
    await a.lose_lease()
    b = await Replica(server, "b").start("00")
    assert b.ear.heard == [("taken", "00")]
    assert b.controller.owned()["00"].machine.outbox == Outbox()


@story
async def test_everybody_is_told_when_the_replica_stops(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    a.faults.plan("txn", "shards/00", CallFault(Outcome.LATE, latency=9.0))
    decided = asyncio.create_task(a.ask("00", "x"))
    await asyncio.sleep(0.1)
    waiting = asyncio.create_task(a.ask("00", "y"))
    await asyncio.sleep(0.1)
    await a.crash()
    with pytest.raises(OutcomeUnknown):
        await decided
    with pytest.raises(NotOwned):
        await waiting


class Parts(Ledger):
    """A larger decision: ten parts, each made by `settle` after a tick that itself emits nothing."""

    def handle(self, command: Any, batch: Any) -> object:
        return None if isinstance(command, Tick) else super().handle(command, batch)

    def settle(self, batch: Any) -> None:
        if 0 < len(self.names) < 10:
            batch.emit(put("part"))

    def due(self) -> float | None:
        return 0.0 if 0 < len(self.names) < 10 else None


@story
async def test_j2_the_parts_of_a_larger_decision_follow_each_other_at_once(server: MemoryEtcd) -> None:
    a = await Replica(server, "a", make_machine=Parts).start("00")
    begun = a.clock.boot()
    await a.ask("00", "x")
    await until(lambda: len(log_of(server, "00")) >= 9)
    assert a.clock.boot() - begun < 0.2, "no pause between two parts"


@story
async def test_after_a_crowd_the_next_transaction_waits_a_moment_for_company_and_a_lone_caller_never(
    server: MemoryEtcd,
) -> None:
    a = await Replica(server, "a").start("00")
    loop = asyncio.get_running_loop()
    began = loop.time()
    for name in ("x", "y", "z"):
        await a.ask("00", name)
    assert loop.time() - began < GATHER_SECONDS, "each commits at once"
    await asyncio.gather(*(a.ask("00", f"c{n}") for n in range(CROWD)))
    after = loop.time()
    first = asyncio.create_task(a.ask("00", "first"))
    await asyncio.sleep(GATHER_SECONDS / 2)
    await asyncio.gather(first, a.ask("00", "second"))
    assert loop.time() - after >= GATHER_SECONDS
    assert log_of(server, "00")[-1] == ["first", "second"]
