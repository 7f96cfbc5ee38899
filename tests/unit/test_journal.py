"""Committing under the fence, and what unclear answers mean (PROTOCOL J4, J5, J6, J12)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from control_plane.batches import seal
from control_plane.core.model import ALL_SHARDS
from control_plane.journal import (
    COMMIT_TIMEOUT,
    Entry,
    Head,
    Journal,
    Reading,
    Verdict,
    judge,
    owner_value,
    transaction,
)
from control_plane.store import keys
from control_plane.store.base import MAX_TXN_OPS, Compare, Delete, Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd, MemoryStore, Outcome
from lab.virtual_time import VirtualClock
from tests.unit.journal_world import LOST_REPLY, LOST_REQUEST, Faults, story

NONCE = "11" * 8
OTHER = "22" * 8


def entry(shard: str = "00", nonce: str = NONCE, before: Head | None = None) -> Entry:
    value = seal(b"a batch", nonce, 1000)[0]
    return Entry(shard, owner_value("a", nonce), before or Head(), nonce, value, 1)


class Bench:
    """A journal on a store where replica `a` owns shards."""

    def __init__(self, server: MemoryEtcd, *shards: str) -> None:
        self.server, self.faults = server, Faults()
        self.clock = VirtualClock()
        self.suspicions: list[str] = []
        self.verdicts: dict[str, Verdict] = {}
        self.journal = Journal(MemoryStore(server, faults=self.faults, clock=self.clock), self.clock, self.suspect)
        self.put(Put(keys.INCARNATION, b"1"), *(Put(keys.owner(shard), entry(shard).owner) for shard in shards))

    async def suspect(self, incarnation: int, problem: str) -> None:
        self.suspicions.append(problem)
        self.put(Put(keys.RESTORED_SUSPECTED, problem.encode()))

    def put(self, *ops: Put | Delete) -> None:
        assert self.server.txn(Txn((), ops)).succeeded

    def lose(self, shard: str, by: str = OTHER) -> None:
        self.put(Put(keys.owner(shard), owner_value("b", by)))

    def found(self, key: str) -> bytes | None:
        kv = self.server.keyspace.live.get(key)
        return kv.value if kv else None

    async def commit(self, *entries: Entry, condition: Compare | None = None) -> dict[str, Verdict]:
        def resolved(entry: Entry, verdict: Verdict) -> None:
            assert entry.shard not in self.verdicts, "told twice"
            self.verdicts[entry.shard] = verdict

        await self.journal.commit(entries, condition, resolved)
        return self.verdicts


def test_j4_the_transaction_of_all_shards_fits_etcd() -> None:
    txn = transaction([entry(shard) for shard in ALL_SHARDS])
    assert len(txn.compares) == 2 * 33 + 2
    assert len(txn.success) == 2 * 33
    assert max(len(txn.compares), len(txn.success), len(txn.failure)) <= MAX_TXN_OPS


@story
async def test_j4_a_commit_writes_log_head_and_side_puts(server: MemoryEtcd) -> None:
    bench = Bench(server, "00", "01")
    side = replace(entry("01"), side_puts=(Put(keys.FLEET_TABLE, b"t"),))
    assert await bench.commit(entry(), side) == {"00": Verdict.COMMITTED, "01": Verdict.COMMITTED}
    for shard in ("00", "01"):
        assert bench.found(keys.log(shard, 1)) == entry(shard).value
        assert bench.found(keys.head(shard)) == Head(1, NONCE).encode()
    assert bench.found(keys.FLEET_TABLE) == b"t"


@story
async def test_j4_a_stale_replicas_write_is_refused(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.lose("00")
    assert await bench.commit(entry()) == {"00": Verdict.NOT_APPLIED}
    assert bench.found(keys.log("00", 1)) is None


@story
async def test_j4_nothing_is_written_while_a_restore_is_suspected(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.put(Put(keys.RESTORED_SUSPECTED, b"{}"))
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(10)
    assert not task.done()
    assert bench.found(keys.log("00", 1)) is None
    bench.put(Delete(keys.RESTORED_SUSPECTED))
    assert await task == {"00": Verdict.COMMITTED}


@story
async def test_j4_another_incarnation_kills_the_batch(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.put(Put(keys.INCARNATION, b"2"))
    assert await bench.commit(entry()) == {"00": Verdict.LOST}


@story
async def test_j6_applied_but_the_answer_was_lost(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", LOST_REPLY)
    assert await bench.commit(entry()) == {"00": Verdict.COMMITTED}
    assert bench.found(keys.log("00", 2)) is None


@story
async def test_j6_not_applied_and_nobody_said_so(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", LOST_REQUEST, CallFault(Outcome.REFUSED), LOST_REQUEST)
    assert await bench.commit(entry()) == {"00": Verdict.COMMITTED}
    assert bench.found(keys.log("00", 1)) == entry().value


@story
async def test_j6_applied_late_after_the_repeat(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", CallFault(Outcome.LATE, late=30.0), LOST_REPLY)
    assert await bench.commit(entry()) == {"00": Verdict.COMMITTED}
    revision = server.keyspace.revision
    await asyncio.sleep(60)
    assert server.keyspace.revision == revision, "the late copy was refused by its own compare"


@story
async def test_j6_applied_late_before_the_repeat(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    slow = CallFault(latency=COMMIT_TIMEOUT + 0.5)
    bench.faults.plan("txn", "shards/00", slow, LOST_REQUEST, CallFault(latency=3.0))
    assert await bench.commit(entry()) == {"00": Verdict.COMMITTED}


@story
async def test_j6_the_owner_changed_while_it_was_unclear_and_it_had_been_applied(server: MemoryEtcd) -> None:
    """The log still has our nonce: committed, and lost."""
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", LOST_REPLY)
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(0.01)
    bench.lose("00")
    assert await task == {"00": Verdict.COMMITTED_THEN_LOST}


@story
async def test_j6_the_owner_changed_while_it_was_unclear_and_the_log_was_trimmed(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", LOST_REPLY)
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(0.01)
    bench.lose("00")
    bench.put(Delete(keys.log("00", 1)), Put(keys.head("00"), Head(7, OTHER).encode()))
    assert await task == {"00": Verdict.LOST}


@story
async def test_j6_not_applied_is_said_only_after_one_read_that_proves_it(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", CallFault(Outcome.LATE, late=30.0))
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(0.01)
    bench.lose("00")
    assert await task == {"00": Verdict.NOT_APPLIED}
    await asyncio.sleep(60)
    assert bench.found(keys.head("00")) is None, "the late copy found another owner"


@story
async def test_j6_committed_is_seen_at_the_head_when_the_log_is_trimmed(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.faults.plan("txn", "shards/00", LOST_REPLY)
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(0.01)
    bench.put(Delete(keys.log("00", 1)))
    assert await task == {"00": Verdict.COMMITTED}


@story
async def test_j6_a_dead_transactions_other_shards_go_again(server: MemoryEtcd) -> None:
    bench = Bench(server, "00", "01", "02")
    bench.faults.plan("txn", "shards/00", CallFault(Outcome.LATE, late=30.0))
    task = asyncio.create_task(bench.commit(entry("00"), entry("01"), entry("02")))
    await asyncio.sleep(0.01)
    bench.lose("01")
    assert await task == {"00": Verdict.COMMITTED, "01": Verdict.NOT_APPLIED, "02": Verdict.COMMITTED}
    assert bench.found(keys.log("02", 1)) == entry("02").value, "byte-identical"
    await asyncio.sleep(60)
    assert bench.found(keys.log("01", 1)) is None


@story
async def test_j6_stepping_down_is_per_shard_and_at_once(server: MemoryEtcd) -> None:
    bench = Bench(server, "00", "01")
    bench.lose("01")
    bench.faults.plan("txn", "shards/00", CallFault(), *[LOST_REQUEST] * 5)
    task = asyncio.create_task(bench.commit(entry("00"), entry("01")))
    await asyncio.sleep(0.05)
    assert bench.verdicts == {"01": Verdict.NOT_APPLIED}
    assert not task.done()
    await task
    assert bench.verdicts["00"] is Verdict.COMMITTED


@story
async def test_j6_no_quorum_then_the_parked_write_lands(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    server.lose_quorum()
    task = asyncio.create_task(bench.commit(entry()))
    await asyncio.sleep(20)
    assert not task.done()
    server.regain_quorum()
    assert await task == {"00": Verdict.COMMITTED}
    assert bench.found(keys.head("00")) == Head(1, NONCE).encode()


@story
async def test_j5_a_condition_that_fails_alone_discards_the_batch(server: MemoryEtcd) -> None:
    bench = Bench(server, "fleet")
    bench.put(Put("sessions/eu/beat", b"1"))
    seen = server.keyspace.live["sessions/eu/beat"].mod_revision
    bench.put(Put("sessions/eu/beat", b"2"))
    bench.faults.plan("txn", "shards/fleet", CallFault(Outcome.LATE, late=30.0))
    condition = Compare.unchanged("sessions/eu/beat", seen)
    assert await bench.commit(entry("fleet"), condition=condition) == {"fleet": Verdict.CONDITION_FAILED}
    await asyncio.sleep(60)
    assert bench.found(keys.log("fleet", 1)) is None


@story
async def test_j5_a_condition_does_not_hide_a_commit(server: MemoryEtcd) -> None:
    """It held, the batch was applied, the answer was lost, then the condition became false."""
    bench = Bench(server, "fleet")
    bench.put(Put("sessions/eu/beat", b"1"))
    condition = Compare.unchanged("sessions/eu/beat", server.keyspace.live["sessions/eu/beat"].mod_revision)
    bench.faults.plan("txn", "shards/fleet", LOST_REPLY)
    task = asyncio.create_task(bench.commit(entry("fleet"), condition=condition))
    await asyncio.sleep(0.01)
    bench.put(Put("sessions/eu/beat", b"2"))
    assert await task == {"fleet": Verdict.COMMITTED}


@story
async def test_j12_a_head_that_went_back_under_our_own_key_is_a_restore(server: MemoryEtcd) -> None:
    bench = Bench(server, "00")
    bench.put(Put(keys.head("00"), Head(3, NONCE).encode()))
    task = asyncio.create_task(bench.commit(entry(before=Head(5, NONCE))))
    await asyncio.sleep(5)
    assert len(bench.suspicions) == 1
    assert not task.done(), "nothing else is decided for the shard"
    task.cancel()


OURS = entry().owner
STATES = [
    (Reading(OURS, Head(), "", "1", False), None),
    (Reading(OURS, Head(1, NONCE), NONCE, "1", False), Verdict.COMMITTED),
    (Reading(OURS, Head(2, OTHER), "", "1", False), Verdict.COMMITTED),
    (Reading(OURS, Head(1, NONCE), NONCE, "2", True), Verdict.COMMITTED),
    (Reading(OURS, Head(), "", "2", False), Verdict.LOST),
    (Reading(OURS, Head(), "", "1", True), None),
    (Reading(None, Head(), "", "1", False), Verdict.NOT_APPLIED),
    (Reading(b"b", Head(), "", "1", False), Verdict.NOT_APPLIED),
    (Reading(b"b", Head(1, OTHER), OTHER, "1", False), Verdict.LOST),
    (Reading(b"b", Head(9, OTHER), "", "1", False), Verdict.LOST),
    (Reading(b"b", Head(9, OTHER), NONCE, "1", False), Verdict.COMMITTED_THEN_LOST),
]


@pytest.mark.parametrize(("reading", "verdict"), STATES)
def test_j6_the_table_of_readings(reading: Reading, verdict: Verdict | None) -> None:
    assert judge(entry(), reading) is verdict
