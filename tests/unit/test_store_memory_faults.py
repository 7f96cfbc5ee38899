"""Each way in which the memory store can misbehave, one by one, under a clock that only moves when told.

The simulator's findings are worth what these faults are worth (reliability.md 3.2): each must do exactly what it says.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import pytest

from baton.clock import Alarm
from control_plane.store.base import (
    Ambiguous,
    Compacted,
    Compare,
    Get,
    NoSpace,
    NotApplied,
    Put,
    Txn,
    Unavailable,
    WatchBatch,
)
from control_plane.store.keeper import NEVER, TaskLeaseKeeper
from control_plane.store.memory import (
    CallFault,
    KeepaliveFault,
    MemoryEtcd,
    MemoryStore,
    Outcome,
    WatchFault,
)

R = TypeVar("R")


class Called:
    """A call that comes unless it is cancelled."""

    def __init__(self, future: asyncio.Future[None]) -> None:
        self._future = future

    def cancel(self) -> None:
        self._future.cancel()


class HandClock:
    """Time that moves by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    def boot(self) -> float:
        return self.now

    def wall(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), future))
        await future

    def later(self, seconds: float, action: Callable[[], object]) -> Alarm:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        future.add_done_callback(lambda done: None if done.cancelled() else action())
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), future))
        return Called(future)

    async def advance(self, seconds: float) -> None:
        """Move on, waking every sleeper at its own time."""
        end = self.now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.now, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            await self.settle()
        self.now = end

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)


class Plan:
    """Faults by hand: each is used up by the next call it fits."""

    def __init__(self) -> None:
        self.calls: list[CallFault] = []
        self.keepalives: list[KeepaliveFault] = []
        self.watches: list[WatchFault] = []
        self.seen: list[tuple[str, str]] = []

    def call(self, op: str, key: str) -> CallFault:
        self.seen.append((op, key))
        return self.calls.pop(0) if self.calls else CallFault()

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        return self.keepalives.pop(0) if self.keepalives else KeepaliveFault.HONEST

    def watch(self, prefix: str, revision: int) -> WatchFault:
        return self.watches.pop(0) if self.watches else WatchFault()


class Bench:
    def __init__(self) -> None:
        self.clock = HandClock()
        self.server = MemoryEtcd(self.clock)
        self.plan = Plan()
        self.faulty = MemoryStore(self.server, faults=self.plan)
        self.honest = MemoryStore(self.server)

    async def value(self, key: str = "a") -> bytes | None:
        kv, _ = await self.honest.get(key, timeout=1)
        return kv.value if kv else None

    async def outcome(self, call: Awaitable[R], after: float = 0.0) -> R:
        """The call's result once `after` seconds have passed; fails if it takes another time."""
        task = asyncio.ensure_future(call)
        if after:
            await self.clock.advance(after - 0.001)
            assert not task.done()
            await self.clock.advance(0.001)
        await self.clock.settle()
        assert task.done()
        return await task


WRITE = Txn((), (Put("a", b"new"),))


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.server.close()


async def test_the_hooks_are_told_what_is_called(bench: Bench) -> None:
    await bench.faulty.txn(Txn([Compare.absent("c")], (Put("k", b""),)), timeout=1)
    await bench.faulty.get("g", timeout=1)
    await bench.faulty.range("r/", timeout=1)
    lease = await bench.faulty.lease_grant(2, timeout=1)
    await bench.faulty.lease_keepalive(lease.id, timeout=1)
    await bench.faulty.lease_revoke(lease.id, timeout=1)
    await bench.faulty.compact(1, timeout=1)
    await bench.faulty.status(timeout=1)
    ops = [op for op, _ in bench.plan.seen]
    assert ops == ["txn", "get", "range", "grant", "keepalive", "revoke", "compact", "status"]
    assert [key for _, key in bench.plan.seen[:3]] == ["k", "g", "r/"]


async def test_refused_is_sure_and_without_effect(bench: Bench) -> None:
    bench.plan.calls = [CallFault(Outcome.REFUSED), CallFault(Outcome.REFUSED)]
    with pytest.raises(NotApplied):
        await bench.faulty.txn(WRITE, timeout=1)
    with pytest.raises(Unavailable):
        await bench.faulty.get("a", timeout=1)
    assert await bench.value() is None


async def test_lost_request_is_unsure_and_never_applied(bench: Bench) -> None:
    bench.plan.calls = [CallFault(Outcome.LOST_REQUEST, latency=0.5)]
    with pytest.raises(Ambiguous):
        await bench.outcome(bench.faulty.txn(WRITE, timeout=1), after=0.5)
    await bench.clock.advance(100)
    assert await bench.value() is None


async def test_lost_reply_is_unsure_and_applied(bench: Bench) -> None:
    bench.plan.calls = [CallFault(Outcome.LOST_REPLY)]
    with pytest.raises(Ambiguous):
        await bench.faulty.txn(WRITE, timeout=1)
    assert await bench.value() == b"new"


async def test_late_is_applied_after_the_client_gave_up(bench: Bench) -> None:
    bench.plan.calls = [CallFault(Outcome.LATE, latency=0.2, late=5.0)]
    with pytest.raises(Ambiguous):
        await bench.outcome(bench.faulty.txn(WRITE, timeout=1), after=0.2)
    await bench.clock.advance(4.9)
    assert await bench.value() is None
    await bench.clock.advance(0.2)
    assert await bench.value() == b"new"


async def test_latency_both_ways(bench: Bench) -> None:
    bench.plan.calls = [CallFault(latency=0.2, reply_latency=0.3)]
    call = asyncio.ensure_future(bench.faulty.txn(WRITE, timeout=1))
    await bench.clock.advance(0.1)
    assert await bench.value() is None
    await bench.clock.advance(0.2)
    assert await bench.value() == b"new"
    assert not call.done()
    await bench.clock.advance(0.2)
    assert (await call).succeeded


@pytest.mark.parametrize("fault", [CallFault(latency=3.0), CallFault(reply_latency=3.0)])
async def test_a_way_longer_than_the_time_out_is_unsure_and_lands(bench: Bench, fault: CallFault) -> None:
    bench.plan.calls = [fault]
    with pytest.raises(Ambiguous):
        await bench.outcome(bench.faulty.txn(WRITE, timeout=1), after=1.0)
    await bench.clock.advance(2.5)
    assert await bench.value() == b"new"


async def test_a_cancelled_call_still_lands(bench: Bench) -> None:
    bench.plan.calls = [CallFault(latency=0.5)]
    call = asyncio.ensure_future(bench.faulty.txn(WRITE, timeout=1))
    await bench.clock.advance(0.1)
    call.cancel()
    await bench.clock.advance(1.0)
    assert call.cancelled()
    assert await bench.value() == b"new"


@pytest.mark.parametrize("apply_parked", [True, False])
async def test_without_quorum_nothing_answers_and_writes_wait(bench: Bench, apply_parked: bool) -> None:
    bench.server.lose_quorum()
    with pytest.raises(Ambiguous):
        await bench.outcome(bench.faulty.txn(WRITE, timeout=1), after=1.0)
    with pytest.raises(Unavailable):
        await bench.outcome(bench.faulty.get("a", timeout=1), after=1.0)
    bench.server.regain_quorum(apply_parked=apply_parked)
    assert await bench.value() == (b"new" if apply_parked else None)


async def test_a_quorum_that_comes_back_in_time_answers(bench: Bench) -> None:
    bench.server.lose_quorum()
    call = asyncio.ensure_future(bench.honest.txn(WRITE, timeout=5))
    await bench.clock.advance(2)
    bench.server.regain_quorum()
    await bench.clock.settle()
    assert (await call).succeeded


async def test_no_space_stops_puts_and_grants(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(5, timeout=1)
    bench.server.nospace = True
    with pytest.raises(NoSpace):
        await bench.honest.txn(WRITE, timeout=1)
    with pytest.raises(NoSpace):  # the quota is checked before the condition
        await bench.honest.txn(Txn([Compare.equals("a", b"x")], (Put("a", b""),), (Get("a"),)), timeout=1)
    with pytest.raises(Unavailable):
        await bench.honest.lease_grant(5, timeout=1)
    assert await bench.honest.lease_keepalive(lease.id, timeout=1) == 5


async def test_a_lease_dies_at_the_next_sweep_and_not_before(bench: Bench) -> None:
    await bench.clock.advance(0.3)
    lease = await bench.honest.lease_grant(2, timeout=1)
    await bench.honest.txn(Txn((), (Put("a", b"new", lease.id),)), timeout=1)
    await bench.clock.advance(2.1)
    assert await bench.value() == b"new"  # past its TTL, and alive: up to half a second
    await bench.clock.advance(0.15)
    assert await bench.value() is None


async def test_no_lease_dies_without_quorum_and_a_new_leader_restarts_all(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(5, timeout=1)
    await bench.honest.txn(Txn((), (Put("a", b"new", lease.id),)), timeout=1)
    bench.server.lose_quorum()
    await bench.clock.advance(20)
    bench.server.regain_quorum()
    await bench.clock.advance(5)
    assert await bench.value() == b"new"
    bench.server.change_leader()
    await bench.clock.advance(5)
    assert await bench.value() == b"new"
    await bench.clock.advance(2)
    assert await bench.value() is None


async def test_a_stale_leader_acknowledges_and_renews_nothing(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(4, timeout=1)
    await bench.honest.txn(Txn((), (Put("a", b"new", lease.id),)), timeout=1)
    await bench.clock.advance(3)
    bench.plan.keepalives = [KeepaliveFault.STALE_LEADER]
    assert await bench.faulty.lease_keepalive(lease.id, timeout=1) == 4
    await bench.clock.advance(1.6)
    assert await bench.value() is None


async def test_a_keepalive_may_be_acknowledged_after_the_revocation(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(4, timeout=1)
    await bench.honest.lease_revoke(lease.id, timeout=1)
    bench.plan.keepalives = [KeepaliveFault.ACKED_AFTER_REVOKE]
    assert await bench.faulty.lease_keepalive(lease.id, timeout=1) == 4
    assert await bench.faulty.lease_keepalive(lease.id, timeout=1) == 0


async def next_batch(bench: Bench, watch: AsyncIterator[WatchBatch]) -> WatchBatch:
    return await bench.outcome(anext(watch))


async def test_a_watch_batch_may_be_late(bench: Bench) -> None:
    bench.plan.watches = [WatchFault(delay=3.0)]
    done = await bench.honest.txn(WRITE, timeout=1)
    watch = bench.faulty.watch("a", from_revision=done.revision)
    assert (await bench.outcome(anext(watch), after=3.0)).revision == done.revision


async def test_a_watch_batch_may_come_twice(bench: Bench) -> None:
    bench.plan.watches = [WatchFault(duplicate=True)]
    done = await bench.honest.txn(WRITE, timeout=1)
    watch = bench.faulty.watch("a", from_revision=done.revision)
    assert await next_batch(bench, watch) == await next_batch(bench, watch)


async def test_a_broken_stream_resumes_without_a_gap(bench: Bench) -> None:
    bench.plan.watches = [WatchFault(delay=1.0, broken=True)]
    done = await bench.honest.txn(WRITE, timeout=1)
    watch = bench.faulty.watch("a", from_revision=done.revision)
    batch = await bench.outcome(anext(watch), after=1.0)
    assert [event.kv.value for event in batch.events] == [b"new"]


async def test_a_stream_that_breaks_across_a_compaction_is_told(bench: Bench) -> None:
    bench.plan.watches = [WatchFault(delay=1.0, broken=True)]
    done = await bench.honest.txn(WRITE, timeout=1)
    later = await bench.honest.txn(WRITE, timeout=1)
    waiting = asyncio.ensure_future(anext(bench.faulty.watch("a", from_revision=done.revision)))
    await bench.clock.advance(0.5)
    await bench.honest.compact(later.revision, timeout=1)
    await bench.clock.advance(1.0)
    with pytest.raises(Compacted):
        await waiting


async def test_a_watch_may_be_compacted_at_will(bench: Bench) -> None:
    bench.plan.watches = [WatchFault(compacted=True)]
    done = await bench.honest.txn(WRITE, timeout=1)
    with pytest.raises(Compacted) as told:
        await next_batch(bench, bench.faulty.watch("a", from_revision=done.revision))
    assert told.value.revision == done.revision


async def test_a_restore_rewinds_and_loses_what_was_on_its_way(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(5, timeout=1)
    kept = await bench.honest.txn(Txn((), (Put("a", b"kept"), Put("l", b"", lease.id))), timeout=1)
    backup = bench.server.snapshot()
    lost = await bench.honest.txn(WRITE, timeout=1)
    bench.plan.calls = [CallFault(Outcome.LATE, late=2.0)]
    with pytest.raises(Ambiguous):
        await bench.faulty.txn(WRITE, timeout=1)
    await bench.clock.advance(1)
    bench.server.restore(backup)
    await bench.clock.advance(2)
    kv, revision = await bench.honest.get("a", timeout=1)
    assert kv is not None
    assert (kv.value, kv.mod_revision, revision) == (b"kept", kept.revision, kept.revision)
    assert (await bench.honest.txn(WRITE, timeout=1)).revision == lost.revision  # the same revision, another write
    assert (await bench.honest.lease_grant(5, timeout=1)).id == lease.id + 1
    await bench.clock.advance(10)
    assert await bench.value("l") is None  # restored leases die too
    bench.server.restore(backup, bump_revision=1_000)
    kv, revision = await bench.honest.get("a", timeout=1)
    assert kv is not None
    assert (kv.value, revision) == (b"kept", kept.revision + 1_000)


async def test_task_keeper_renews_only_while_the_loop_ticks(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(6, timeout=1)
    keeper = TaskLeaseKeeper(bench.honest, bench.clock, max_tick_age=2.0)
    assert keeper.last_ack_sent == NEVER
    keeper.start(lease)
    for _ in range(20):
        await bench.clock.advance(1)
        keeper.tick()
    assert bench.clock.now - keeper.last_ack_sent <= 2.0
    silent_since = bench.clock.now
    await bench.clock.advance(6)
    assert keeper.last_ack_sent <= silent_since + 2.0
    assert not keeper.lost
    await bench.clock.advance(6)
    keeper.tick()
    await bench.clock.advance(1)
    assert keeper.lost
    await keeper.stop()


async def test_task_keeper_counts_from_the_sending_and_only_what_was_acknowledged(bench: Bench) -> None:
    lease = await bench.honest.lease_grant(6, timeout=1)
    keeper = TaskLeaseKeeper(bench.faulty, bench.clock, max_tick_age=100.0)
    bench.plan.calls = [
        CallFault(latency=1.0),
        CallFault(Outcome.LOST_REPLY, latency=0.1),
        CallFault(Outcome.REFUSED),
    ]
    sent = bench.clock.now
    keeper.start(lease)
    await bench.clock.advance(0.9)
    assert keeper.last_ack_sent == NEVER
    await bench.clock.advance(0.1)
    assert keeper.last_ack_sent == sent
    await bench.clock.advance(1.4)  # the second renewal, two seconds after the first, was renewed and not acknowledged
    assert keeper.last_ack_sent == sent
    await bench.clock.advance(1.0)
    assert keeper.last_ack_sent > sent + 2.0
    await keeper.stop()
    with pytest.raises(RuntimeError):
        keeper.start(lease)
