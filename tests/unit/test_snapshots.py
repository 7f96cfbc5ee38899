"""Snapshots: exactly one seq, written under the fence, then the log goes (PROTOCOL J9)."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.codec import FEATURE_LEVEL
from control_plane.controller import CycleConfig
from control_plane.manifest import Manifest
from control_plane.recovery import recover
from control_plane.refusals import Corrupt, TooNew
from control_plane.snapshot_process import HelperProcess, answer, describe, parse_answer, parse_job
from control_plane.snapshots import (
    CHUNK_BYTES,
    InPlaceSnapshotter,
    Job,
    Report,
    Snapshots,
    SnapshotsConfig,
    Superseded,
    decimal_blocks,
)
from control_plane.store import keys
from control_plane.store.base import Compacted, Put, StoreError, Txn, Unavailable
from control_plane.store.memory import CallFault, MemoryEtcd, Outcome
from tests.unit.journal_world import LOST_REPLY, LOST_REQUEST, Ledger, Replica, names, story, until


def job_of(replica: Replica, shard: str = "00") -> Job:
    owned = replica.controller.owned()[shard]
    return Job(shard, owned.owner_value.decode(), owned.incarnation)


def snapshotter(replica: Replica) -> InPlaceSnapshotter:
    return InPlaceSnapshotter(replica.store, replica.clock, Ledger)


def seqs(server: MemoryEtcd, shard: str = "00") -> list[int]:
    parsed = [keys.parse_log(key) for key in server.keyspace.live]
    return sorted(found[1] for found in parsed if found is not None and found[0] == shard)


def chunks(server: MemoryEtcd, shard: str = "00") -> list[tuple[int, int]]:
    parsed = [keys.parse_snapshot_chunk(key) for key in server.keyspace.live]
    return sorted(found[1:] for found in parsed if found is not None and found[0] == shard)


async def asked(replica: Replica, *words: str, shard: str = "00") -> None:
    for word in words:
        await replica.ask(shard, word)


async def successor(server: MemoryEtcd, replica: Replica, name: str) -> Replica:
    await replica.crash()
    await replica.lose_lease()
    return await Replica(server, name).start("00")


@story
async def test_j9_snapshot_trim_and_recovery(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x", "y", "z")
    report = await snapshotter(a).snapshot(job_of(a))
    assert report.seq == 3
    assert seqs(server) == []
    assert chunks(server) == [(3, 0)]
    await asked(a, "v", "w")
    assert seqs(server) == [4, 5]
    b = await successor(server, a, "b")
    assert await b.controller.read("00", names, timeout=5.0) == ["x", "y", "z", "v", "w"]
    await snapshotter(b).snapshot(job_of(b))
    assert (seqs(server), chunks(server)) == ([], [(5, 0)])
    await asked(b, "u")
    c = await successor(server, b, "c")
    assert await c.controller.read("00", names, timeout=5.0) == ["x", "y", "z", "v", "w", "u"]


@story
async def test_j9_the_manifest_remembers_every_trimmed_nonce(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    marks = []
    for word in ("x", "y", "z", "v"):
        await asked(a, word)
        marks.append((a.controller.owned()["00"].seq, a.controller.owned()["00"].nonce))
        if word in "yv":
            await snapshotter(a).snapshot(job_of(a))
    manifest = Manifest.parse(server.keyspace.live[keys.snapshot_manifest("00")].value)
    assert [(seq, manifest.nonce_at(seq)) for seq, _ in marks] == marks
    assert (manifest.seq, manifest.nonce) == marks[-1]


@story
async def test_j11_a_snapshot_is_as_new_as_the_batches_in_it(server: MemoryEtcd) -> None:
    """While the federation is at an older level, a program of that level may take the shard over and must read it."""

    def level() -> int:
        return Manifest.parse(server.keyspace.live[keys.snapshot_manifest("00")].value).level

    a = await Replica(server, "a").start("00")
    a.controller.set_feature_level(FEATURE_LEVEL - 1)
    await asked(a, "x")
    await snapshotter(a).snapshot(job_of(a))
    assert level() == FEATURE_LEVEL - 1
    a.controller.set_feature_level(FEATURE_LEVEL)
    await asked(a, "y")
    await snapshotter(a).snapshot(job_of(a))
    assert level() == FEATURE_LEVEL
    a.controller.set_feature_level(FEATURE_LEVEL - 1)
    await asked(a, "z")
    await snapshotter(a).snapshot(job_of(a))
    assert level() == FEATURE_LEVEL, "what an earlier snapshot folded is still in it"


@story
async def test_j9_a_helper_that_outlives_its_owner_writes_nothing(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x")
    job = job_of(a)
    a.faults.plan("txn", keys.snapshot_chunk_prefix("00", 1), CallFault(latency=2.0))
    late = asyncio.create_task(snapshotter(a).snapshot(job))
    await asyncio.sleep(1)
    await a.controller.release("00")
    with pytest.raises(Superseded):
        await late
    assert chunks(server) == []
    b = await Replica(server, "b").start("00")
    with pytest.raises(Superseded):
        await snapshotter(b).snapshot(job)
    assert seqs(server) == [1]


@story
async def test_j9_an_owner_that_changes_before_the_trim_leaves_a_whole_snapshot(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x", "y")
    a.faults.plan("txn", keys.log("00", 1), CallFault(latency=2.0))
    late = asyncio.create_task(snapshotter(a).snapshot(job_of(a)))
    await asyncio.sleep(1)
    await a.controller.release("00")
    with pytest.raises(Superseded):
        await late
    assert (seqs(server), chunks(server)) == ([1, 2], [(2, 0)])
    b = await Replica(server, "b").start("00")
    assert await b.controller.read("00", names, timeout=5.0) == ["x", "y"]


@story
async def test_j9_unclear_writes_are_sent_again(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x")
    a.faults.plan("txn", keys.snapshot_prefix("00"), LOST_REPLY, LOST_REQUEST, LOST_REPLY)
    a.faults.plan("txn", keys.snapshot_manifest("00"), LOST_REPLY, CallFault(Outcome.LATE, late=30.0))
    a.faults.plan("txn", keys.log_prefix("00"), LOST_REPLY)
    assert (await snapshotter(a).snapshot(job_of(a))).seq == 1
    assert (seqs(server), chunks(server)) == ([], [(1, 0)])


@story
async def test_j9_what_a_failed_job_left_behind_goes_with_the_next(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x")
    server.txn(Txn((), (Put(keys.snapshot_chunk("00", 7, 0), b"left"), Put(keys.snapshot_chunk("00", 0, 3), b"left"))))
    await snapshotter(a).snapshot(job_of(a))
    assert chunks(server) == [(1, 0)]


@story
async def test_j9_a_snapshot_stands_at_a_whole_batch(server: MemoryEtcd) -> None:
    """Parts of a decision that is still in flight stay in the log."""
    a = await Replica(server, "a", CycleConfig(batch_bytes=4096)).start("00")
    await asked(a, "x")
    a.faults.plan("txn", "shards/00", CallFault(), CallFault(), CallFault(latency=3.0))
    big = asyncio.create_task(a.ask("00", "big:300"))
    await asyncio.sleep(1)
    assert (await snapshotter(a).snapshot(job_of(a))).seq == 1
    assert seqs(server) == [2, 3]
    assert await big == 301
    b = await successor(server, a, "b")
    assert len(await b.controller.read("00", names, timeout=5.0)) == 301


@story
async def test_j9_a_large_state_lies_in_many_chunks(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, *(f"big:{3000 + n}" for n in range(4)))
    report = await snapshotter(a).snapshot(job_of(a))
    assert len(chunks(server)) == -(-report.size // CHUNK_BYTES) > 2
    b = await successor(server, a, "b")
    assert len(await b.controller.read("00", names, timeout=5.0)) == 4 * 3000 + 6


@story
async def test_a_snapshot_that_is_not_whole_stops_the_shard(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x")
    await snapshotter(a).snapshot(job_of(a))
    server.txn(Txn((), (Put(keys.snapshot_chunk("00", 1, 0), b"rot"),)))
    with pytest.raises(Corrupt, match="not whole"):
        await recover(a.store, a.clock, "00", Ledger, timeout=5.0)


@story
async def test_recovery_begins_again_when_a_compaction_overtakes_it(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    await asked(a, "x", "y")
    a.faults.plan("range", keys.log_prefix("00"), CallFault(latency=1.0))
    reading = asyncio.create_task(recover(a.store, a.clock, "00", Ledger, timeout=20.0))
    await asyncio.sleep(0.5)
    await snapshotter(a).snapshot(job_of(a))
    await a.store.compact(server.keyspace.revision, timeout=5.0)
    found = await reading
    assert names(found.machine) == ["x", "y"]
    assert found.manifest is not None
    assert isinstance(Compacted(1), StoreError)


@story
async def test_j9_snapshots_are_due_by_bytes_and_by_time(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00", "01", "fleet")
    config = SnapshotsConfig(log_bytes=100_000, seconds=60.0, keep_history=20.0)
    snapshots = Snapshots(a.store, a.clock, a.controller, snapshotter(a), config)
    a.spawn(snapshots.run())
    await asyncio.sleep(5)
    await asked(a, "big:3000")
    await asked(a, "x", shard="01")
    await asyncio.sleep(5)
    assert (chunks(server, "00")[:1], chunks(server, "01")) == ([(a.controller.owned()["00"].seq, 0)], [])
    await asyncio.sleep(60)
    assert chunks(server, "01") == [(1, 0)]
    assert server.keyspace.compacted > 0, "where fleet is owned the store's history is cut"
    first = server.keyspace.live[keys.snapshot_manifest("01")].mod_revision
    await asyncio.sleep(200)
    assert server.keyspace.live[keys.snapshot_manifest("01")].mod_revision == first, "nothing was written since"


@story
async def test_j9_a_failed_job_is_done_again(server: MemoryEtcd) -> None:
    a = await Replica(server, "a").start("00")
    inner, failures = snapshotter(a), [Unavailable("down"), TooNew("x"), Superseded("y")]

    class Flaky:
        async def snapshot(self, job: Job) -> Report:
            if failures:
                raise failures.pop()
            return await inner.snapshot(job)

    a.spawn(Snapshots(a.store, a.clock, a.controller, Flaky(), SnapshotsConfig(seconds=10.0)).run())
    await asked(a, "x")
    await until(lambda: chunks(server) == [(1, 0)])


@given(st.integers(0, 5000), st.integers(0, 5000), st.sampled_from([1, 10, 1000]))
def test_decimal_blocks_cover_exactly(first: int, length: int, most: int) -> None:
    last = first + length - 1
    covered: list[int] = []
    for start, zeros in decimal_blocks(first, last, most):
        assert start % 10**zeros == 0
        assert 10**zeros <= most
        covered += range(start, start + 10**zeros)
    assert covered == list(range(first, last + 1))


@pytest.mark.parametrize("error", [Superseded("a"), Unavailable("b"), TooNew("c"), Corrupt("d")])
def test_failures_cross_the_pipe(error: Exception) -> None:
    with pytest.raises(type(error), match=str(error)):
        parse_answer(answer(error))


def test_jobs_and_reports_cross_the_pipe() -> None:
    job, report = Job("00", '{"replica":"a","nonce":"n"}', 3), Report(5, 6, 7)
    assert parse_job(describe(job)) == job
    assert parse_answer(answer(report)) == report
    with pytest.raises(Unavailable, match="cut short"):
        parse_answer(b"")


HELPER = """
import sys
for line in sys.stdin:
    if "die" in line:
        sys.exit(1)
    print('{"seq": 1, "size": 2, "revision": 3}', flush=True)
"""


async def test_the_helper_process_is_started_again_after_it_died() -> None:
    helper = HelperProcess(())
    helper._command = (sys.executable, "-c", HELPER)
    try:
        assert await helper.snapshot(Job("00", "o", 1)) == Report(1, 2, 3)
        with pytest.raises(Unavailable):
            await helper.snapshot(Job("00", "die", 1))
        assert await helper.snapshot(Job("00", "o", 1)) == Report(1, 2, 3)
        process: Any = helper._process
    finally:
        await helper.close()
    assert process.returncode == 0
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
