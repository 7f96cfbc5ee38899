"""The Store contract (control_plane/store/base.py), sentence by sentence, on both adapters.

What is true of only one adapter (several endpoints, TLS, fault hooks) is tested elsewhere; whatever is tested here, the
simulator may rely on because etcd does it too (reliability.md L1b).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest

from baton.clock import SystemClock
from baton.time_limits import time_limit
from control_plane.store.base import (
    MAX_REQUEST_BYTES,
    MAX_TXN_OPS,
    Ambiguous,
    Compacted,
    Compare,
    Delete,
    EventKind,
    Get,
    KeyValue,
    NoSpace,
    NotApplied,
    Put,
    Store,
    Txn,
    TxnResult,
    Unavailable,
    WatchBatch,
    WatchEvent,
)
from tests.contract.conftest import StoreWorld

T = 10.0


async def run(
    store: Store, *ops: Put | Delete | Get, when: Sequence[Compare] = (), other: Sequence[Get] = ()
) -> TxnResult:
    return await store.txn(Txn(when, ops, other), timeout=T)


async def value(store: Store, key: str) -> bytes | None:
    kv, _ = await store.get(key, timeout=T)
    return kv.value if kv else None


async def events(watch: AsyncIterator[WatchBatch], count: int) -> list[WatchEvent]:
    """The next `count` events; fails if they do not come."""
    found: list[WatchEvent] = []
    async with time_limit(20):
        while len(found) < count:
            found.extend((await anext(watch)).events)
    return found


async def close(watch: AsyncIterator[WatchBatch]) -> None:
    await watch.aclose()  # type: ignore[attr-defined]  # the contract asks for it; AsyncIterator cannot say so


# -- 1. transactions are atomic; compares see the state before; one branch runs ----------------------------------------


async def test_txn_without_compares_succeeds_and_reads_in_order(store: Store) -> None:
    result = await run(store, Get("a"), Put("a", b"1"), Get("a"), Get("b"))
    assert result.succeeded
    assert [kv and kv.value for kv in result.reads] == [None, b"1", None]


async def test_every_kind_of_compare_holds_and_fails(store: Store) -> None:
    first = await run(store, Put("a", b"1"))
    second = await run(store, Put("a", b"2"))
    holds = [Compare.equals("a", b"2"), Compare.unchanged("a", second.revision), Compare.absent("b")]
    fails = [
        Compare.equals("a", b"1"),
        Compare.equals("b", b""),
        Compare.unchanged("a", first.revision),
        Compare.unchanged("a", 0),
        Compare.absent("a"),
    ]
    assert (await run(store, Put("c", b"x"), when=holds)).succeeded
    for compare in fails:
        assert not (await run(store, Put("c", b"y"), when=[compare])).succeeded, compare
    assert (await run(store, when=[Compare.unchanged("b", 0)])).succeeded
    assert await value(store, "c") == b"x"


async def test_one_failing_compare_runs_only_the_other_branch(store: Store) -> None:
    await run(store, Put("a", b"1"), Put("z", b"kept"))
    refused = await run(
        store,
        Put("a", b"2"),
        Delete("z"),
        when=[Compare.equals("a", b"1"), Compare.equals("a", b"nope")],
        other=[Get("z"), Get("missing"), Get("a")],
    )
    assert not refused.succeeded
    assert [kv and kv.value for kv in refused.reads] == [b"kept", None, b"1"]
    assert await value(store, "a") == b"1"


async def test_the_else_branch_may_only_read(store: Store) -> None:
    with pytest.raises(NotApplied):
        await store.txn(Txn((), (), (Put("a", b"1"),)), timeout=T)  # type: ignore[arg-type]  # the point of the test


async def test_two_clients_racing_for_one_key_have_one_winner(world: StoreWorld) -> None:
    clients = [world.client() for _ in range(2)]
    tries = [run(client, Put("lock", b"%d" % n), when=[Compare.absent("lock")]) for n, client in enumerate(clients * 5)]
    assert sum(result.succeeded for result in await asyncio.gather(*tries)) == 1


async def test_what_one_client_wrote_another_reads(world: StoreWorld) -> None:
    await run(world.client(), Put("a", b"1"))
    assert await value(world.client(), "a") == b"1"


async def test_delete_of_a_key_and_of_a_prefix(store: Store) -> None:
    await run(store, Put("g/1", b""), Put("g/10", b""), Put("g/1/a", b""), Put("g/1/b", b""), Put("h", b""))
    await run(store, Delete("g/1"), Delete("g/1/", prefix=True))
    assert [kv.key for kv in (await store.range("", timeout=T)).kvs] == ["g/10", "h"]


async def test_limits_of_a_transaction(store: Store) -> None:
    full = [Put(f"k{n}", b"") for n in range(MAX_TXN_OPS)]
    compares = [Compare.absent(f"k{n}") for n in range(MAX_TXN_OPS)]
    reads = [Get(f"k{n}") for n in range(MAX_TXN_OPS)]
    assert (await store.txn(Txn(compares, full, reads), timeout=T)).succeeded
    one_more = Put("k_more", b"")
    for refused in (
        Txn((), (*full, one_more)),
        Txn((*compares, Compare.absent("k_more")), ()),
        Txn((), (), (*reads, Get("k_more"))),
        Txn((), (Put("twice", b"1"), Put("twice", b"2"))),
        Txn((), (Put("twice", b"1"), Delete("twice"))),
        Txn((), (Put("a/twice", b"1"), Delete("a/", prefix=True))),
        Txn((), (Put("big", bytes(MAX_REQUEST_BYTES + 1)),)),
        Txn((), (Put("", b"no key"),)),
        Txn((), (Put("k\u00fc", b"not ASCII"),)),
    ):
        with pytest.raises(NotApplied):
            await store.txn(refused, timeout=T)
    assert await value(store, "twice") is None


async def test_the_largest_request_is_taken(store: Store) -> None:
    size = MAX_REQUEST_BYTES - 1_000
    await run(store, Put("big", bytes(size)))
    assert len(await value(store, "big") or b"") == size


# -- 2. revisions ------------------------------------------------------------------------------------------------------


async def test_all_writes_of_a_transaction_share_one_new_revision(store: Store) -> None:
    first = await run(store, Put("a", b"1"), Put("b", b"1"))
    second = await run(store, Put("a", b"2"))
    assert second.revision > first.revision
    a, _ = await store.get("a", timeout=T)
    b, _ = await store.get("b", timeout=T)
    assert a == KeyValue("a", b"2", first.revision, second.revision, version=2)
    assert b == KeyValue("b", b"1", first.revision, first.revision, version=1)


async def test_reads_and_deletes_of_nothing_take_no_revision(store: Store) -> None:
    before = (await run(store, Put("a", b"1"))).revision
    assert (await run(store, Get("a"), Delete("missing"), Delete("none/", prefix=True))).revision == before
    assert (await run(store, Put("a", b"2"), when=[Compare.absent("a")])).revision == before


async def test_a_recreated_key_starts_anew(store: Store) -> None:
    first = await run(store, Put("a", b"1"))
    await run(store, Delete("a"))
    again = await run(store, Put("a", b"1"))
    kv, _ = await store.get("a", timeout=T)
    assert kv == KeyValue("a", b"1", again.revision, again.revision, version=1)
    assert not (await run(store, when=[Compare.unchanged("a", first.revision)])).succeeded


# -- 3. failure is one of two kinds --------------------------------------------------------------------------------------


async def test_a_write_that_times_out_is_ambiguous_and_a_read_unavailable(world: StoreWorld, store: Store) -> None:
    await run(store, Put("a", b"before"))
    world.freeze()
    with pytest.raises(Ambiguous):
        await store.txn(Txn((), (Put("a", b"after"),)), timeout=0.3)
    with pytest.raises(Unavailable):
        await store.get("a", timeout=0.3)
    with pytest.raises(Unavailable):
        await store.lease_grant(5, timeout=0.3)
    with pytest.raises(Ambiguous):
        await store.lease_revoke(1, timeout=0.3)
    with pytest.raises(Unavailable):
        await store.status(timeout=0.3)
    world.thaw()
    # Either may be true now, and "before" may still become "after": that is what Ambiguous says.
    assert await value(store, "a") in {b"before", b"after"}


async def test_cancelling_a_call_leaves_the_store_usable(world: StoreWorld, store: Store) -> None:
    await run(store, Put("a", b"1"))
    world.freeze()
    call = asyncio.create_task(store.txn(Txn((), (Put("b", b"1"),)), timeout=T))
    await asyncio.sleep(0.05)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    world.thaw()
    assert await value(store, "a") == b"1"


async def test_no_space_refuses_puts_and_nothing_else(world: StoreWorld, store: Store) -> None:
    lease = await store.lease_grant(30, timeout=T)
    await run(store, Put("a", b"1", lease.id), Put("b", b"1"))
    world.set_nospace(True)
    try:
        for refused in (Put("a", b"2"), Put("new", b"1")):
            with pytest.raises(NoSpace):
                await run(store, refused)
        with pytest.raises(Unavailable):
            await store.lease_grant(5, timeout=T)
        assert await value(store, "a") == b"1"
        assert (await run(store, Delete("b"))).succeeded
        assert await store.lease_keepalive(lease.id, timeout=T) == 30
    finally:
        world.set_nospace(False)
    assert (await run(store, Put("a", b"2"))).succeeded
    assert await value(store, "new") is None


async def test_a_closed_store_refuses(store: Store) -> None:
    await run(store, Put("a", b"1"))
    await store.close()
    with pytest.raises(NotApplied):
        await run(store, Put("a", b"2"))
    with pytest.raises(Unavailable):
        await store.get("a", timeout=T)


# -- 4. reads ----------------------------------------------------------------------------------------------------------


async def test_get_tells_the_revision_of_the_read(store: Store) -> None:
    missing, before = await store.get("a", timeout=T)
    assert missing is None
    written = await run(store, Put("a", b""))
    kv, revision = await store.get("a", timeout=T)
    assert kv is not None
    assert kv.value == b""
    assert revision == written.revision > before


async def test_a_range_is_in_order_and_ends_at_its_prefix(store: Store) -> None:
    names = ["g/1/a", "g/1/b", "g/10/a", "g/2", "g", "ga", "f"]
    await run(store, *(Put(name, b"v") for name in names))
    assert [kv.key for kv in (await store.range("g/1/", timeout=T)).kvs] == ["g/1/a", "g/1/b"]
    assert [kv.key for kv in (await store.range("g/", timeout=T)).kvs] == ["g/1/a", "g/1/b", "g/10/a", "g/2"]
    assert [kv.key for kv in (await store.range("g/", timeout=T, start="g/10/")).kvs] == ["g/10/a", "g/2"]
    assert [kv.key for kv in (await store.range("g/1/", timeout=T, start="a")).kvs] == ["g/1/a", "g/1/b"]
    assert (await store.range("g/1/", timeout=T, start="g/3")).kvs == ()
    assert (await store.range("none/", timeout=T)).kvs == ()


async def test_a_range_in_pages_at_one_revision(store: Store) -> None:
    for part in range(6):
        await run(store, *(Put(f"p/{part * 100 + n:04}", b"old") for n in range(100)))
    found: list[str] = []
    page = await store.range("p/", timeout=T, limit=7)
    assert len(page.kvs) == 7
    await run(store, Put("p/0000a", b"new"), Delete("p/0599"), Put("p/0300", b"new"))
    revision = page.revision
    while page.more:
        found += [kv.key for kv in page.kvs]
        page = await store.range("p/", timeout=T, start=found[-1] + "\0", limit=90, revision=revision)
        assert page.revision == revision
        assert {kv.value for kv in page.kvs} == {b"old"}
    found += [kv.key for kv in page.kvs]
    assert found == [f"p/{n:04}" for n in range(600)]
    everything = await store.range("p/", timeout=T)
    assert len(everything.kvs) == 600
    assert not everything.more
    assert not (await store.range("p/", timeout=T, limit=600)).more
    assert (await store.range("p/", timeout=T, limit=599)).more


async def test_keys_only_leaves_the_values_out(store: Store) -> None:
    written = await run(store, Put("a", b"value"))
    (kv,) = (await store.range("a", timeout=T, keys_only=True)).kvs
    assert kv == KeyValue("a", b"", written.revision, written.revision)


async def test_a_read_of_an_old_revision_sees_it(store: Store) -> None:
    old = await run(store, Put("a", b"1"), Put("b", b"1"))
    await run(store, Put("a", b"2"), Delete("b"))
    then = await store.range("", timeout=T, revision=old.revision)
    assert [(kv.key, kv.value) for kv in then.kvs] == [("a", b"1"), ("b", b"1")]
    with pytest.raises(Unavailable):
        await store.range("", timeout=T, revision=old.revision + 1_000_000)


async def test_a_read_of_a_compacted_revision_names_the_oldest(store: Store) -> None:
    old = await run(store, Put("a", b"1"))
    kept = await run(store, Put("a", b"2"))
    now = await run(store, Put("a", b"3"))
    await store.compact(kept.revision, timeout=T)
    await store.compact(old.revision, timeout=T)
    with pytest.raises(Compacted) as told:
        await store.range("", timeout=T, revision=old.revision)
    assert told.value.revision == kept.revision
    assert (await store.range("", timeout=T, revision=kept.revision)).kvs[0].value == b"2"
    assert (await store.range("", timeout=T, revision=now.revision)).kvs[0].value == b"3"
    with pytest.raises(NotApplied):
        await store.compact(now.revision + 1_000_000, timeout=T)


# -- 5. watches --------------------------------------------------------------------------------------------------------


async def test_a_watch_delivers_what_was_and_what_comes(store: Store) -> None:
    first = await run(store, Put("w/a", b"1"), Put("w/b", b"1"), Put("other", b""))
    second = await run(store, Put("w/a", b"2"), Delete("w/b"))
    watch = store.watch("w/", from_revision=first.revision)
    found = await events(watch, 4)
    third = await run(store, Put("w/c", b"3"))
    await run(store, Put("other", b"again"))
    found += await events(watch, 1)
    await close(watch)
    assert [(e.kind, e.kv.key, e.kv.value, e.kv.mod_revision) for e in found] == [
        (EventKind.PUT, "w/a", b"1", first.revision),
        (EventKind.PUT, "w/b", b"1", first.revision),
        (EventKind.PUT, "w/a", b"2", second.revision),
        (EventKind.DELETE, "w/b", b"", second.revision),
        (EventKind.PUT, "w/c", b"3", third.revision),
    ]
    assert found[2].kv.create_revision == first.revision


async def test_a_batch_holds_whole_revisions(store: Store) -> None:
    revision = (await run(store, Put("start", b""))).revision + 1
    written = [(await run(store, *(Put(f"w/{n}", bytes(5)) for n in range(20)))).revision for _ in range(10)]
    watch = store.watch("w/", from_revision=revision)
    seen: list[int] = []
    async with time_limit(20):
        while len(seen) < 200:
            batch = await anext(watch)
            revisions = [event.kv.mod_revision for event in batch.events]
            assert all(revisions.count(one) == 20 for one in set(revisions))
            assert not revisions or batch.revision == revisions[-1]
            seen += revisions
    await close(watch)
    assert seen == [one for one in written for _ in range(20)]


async def test_a_watch_starts_at_its_revision(store: Store) -> None:
    await run(store, Put("w", b"1"))
    second = await run(store, Put("w", b"2"))
    watch = store.watch("w", from_revision=second.revision)
    assert [e.kv.value for e in await events(watch, 1)] == [b"2"]
    await close(watch)


async def test_a_watch_of_the_future_waits(store: Store) -> None:
    now = await run(store, Put("w", b"1"))
    watch = store.watch("w", from_revision=now.revision + 1)
    waiting = asyncio.create_task(events(watch, 1))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    await run(store, Put("w", b"2"))
    assert [e.kv.value for e in await waiting] == [b"2"]
    await close(watch)


async def test_a_watch_goes_on_over_a_restart_without_gap_or_repetition(world: StoreWorld, store: Store) -> None:
    first = await run(store, Put("w", b"0"))
    watch = store.watch("w", from_revision=first.revision)
    found = await events(watch, 1)
    waiting = asyncio.create_task(events(watch, 2))
    await asyncio.sleep(0.05)
    world.bounce()
    for n in (1, 2):
        await _until_written(store, "w", b"%d" % n)
    found += await waiting
    await close(watch)
    assert [e.kv.value for e in found] == [b"0", b"1", b"2"]


async def test_a_compacted_watch_ends_with_the_oldest_revision(store: Store) -> None:
    old = await run(store, Put("w", b"1"))
    kept = await run(store, Put("w", b"2"))
    await store.compact(kept.revision, timeout=T)
    watch = store.watch("w", from_revision=old.revision)
    with pytest.raises(Compacted) as told:
        await events(watch, 1)
    assert told.value.revision == kept.revision
    watch = store.watch("w", from_revision=kept.revision)
    assert [e.kv.value for e in await events(watch, 1)] == [b"2"]
    await close(watch)


async def test_closing_the_store_ends_its_watches(store: Store) -> None:
    now = await run(store, Put("w", b"1"))
    watch = store.watch("w", from_revision=now.revision + 1)
    waiting = asyncio.create_task(anext(watch, None))
    await asyncio.sleep(0.05)
    await store.close()
    assert await asyncio.wait_for(waiting, 5) is None


# -- 6. leases ---------------------------------------------------------------------------------------------------------


async def test_a_lease_is_granted_in_whole_seconds_of_at_least_two(store: Store) -> None:
    for asked, granted in ((0.5, 2.0), (2, 2.0), (4.2, 5.0)):
        lease = await store.lease_grant(asked, timeout=T)
        assert lease.ttl == granted
        assert await store.lease_keepalive(lease.id, timeout=T) == granted


async def test_keys_vanish_with_their_lease_and_watchers_hear_of_it(store: Store) -> None:
    clock = SystemClock()
    lease = await store.lease_grant(2, timeout=T)
    await asyncio.sleep(1.0)
    renewed = clock.boot()
    assert await store.lease_keepalive(lease.id, timeout=T) == 2.0
    put = await run(store, Put("l/a", b"1", lease.id), Put("l/b", b"1", lease.id), Put("l/free", b"1"))
    watch = store.watch("l/", from_revision=put.revision + 1)
    gone = await events(watch, 2)
    await close(watch)
    assert clock.boot() - renewed >= 2.0
    assert {(e.kind, e.kv.key) for e in gone} == {(EventKind.DELETE, "l/a"), (EventKind.DELETE, "l/b")}
    assert len({e.kv.mod_revision for e in gone}) == 1
    assert [kv.key for kv in (await store.range("l/", timeout=T)).kvs] == ["l/free"]
    assert await store.lease_keepalive(lease.id, timeout=T) == 0.0


async def test_a_put_without_lease_detaches_the_key(store: Store) -> None:
    lease = await store.lease_grant(30, timeout=T)
    await run(store, Put("a", b"1", lease.id), Put("b", b"1", lease.id))
    kv, _ = await store.get("a", timeout=T)
    assert kv is not None
    assert kv.lease == lease.id
    await run(store, Put("a", b"2"))
    await store.lease_revoke(lease.id, timeout=T)
    assert await value(store, "a") == b"2"
    assert await value(store, "b") is None


async def test_revoking_twice_is_no_error_and_a_dead_lease_takes_no_keys(store: Store) -> None:
    lease = await store.lease_grant(30, timeout=T)
    await store.lease_revoke(lease.id, timeout=T)
    await store.lease_revoke(lease.id, timeout=T)
    with pytest.raises(NotApplied):
        await run(store, Put("a", b"1", lease.id))
    assert await value(store, "a") is None
    assert not (await run(store, Put("a", b"1", lease.id), when=[Compare.equals("a", b"")])).succeeded


# -- the rest ----------------------------------------------------------------------------------------------------------


async def test_status_tells_version_and_size(store: Store) -> None:
    await run(store, Put("a", bytes(1000)))
    status = await store.status(timeout=T)
    assert status.version.count(".") == 2
    assert status.db_bytes >= 1000
    assert status.quota_bytes > status.db_bytes >= status.in_use_bytes > 0
    assert status.cluster_id


async def test_a_restore_rewinds_and_a_bump_does_not(world: StoreWorld, store: Store) -> None:
    kept = await run(store, Put("a", b"kept"))
    world.back_up()
    await run(store, Put("a", b"lost"))
    lost = await run(store, Put("a", b"lost too"))
    world.restore()
    kv, revision = await _get_again(store, "a")
    assert (kv.value, kv.mod_revision) == (b"kept", kept.revision)
    assert revision < lost.revision
    world.restore(bump_revision=1_000)
    kv, revision = await _get_again(store, "a")
    assert kv.value == b"kept"
    assert revision > lost.revision
    with pytest.raises(Compacted):
        await store.range("", timeout=T, revision=kept.revision)


async def test_a_watch_that_is_ahead_of_a_restored_store_ends(world: StoreWorld, store: Store) -> None:
    await run(store, Put("a", b"kept"))
    world.back_up()
    for n in range(10):
        await run(store, Put("a", b"lost %d" % n))
    lost = await run(store, Put("a", b"lost too"))
    watch = store.watch("a", from_revision=lost.revision + 1)
    waiting = asyncio.create_task(events(watch, 1))
    await asyncio.sleep(0.1)
    world.restore()
    with pytest.raises(Compacted):
        await asyncio.wait_for(waiting, T)
    await close(watch)


async def _get_again(store: Store, key: str) -> tuple[KeyValue, int]:
    kv, revision = await store.get(key, timeout=T)
    assert kv is not None
    return kv, revision


async def _until_written(store: Store, key: str, new: bytes) -> None:
    """Write once, whatever it takes: a condition makes the copies harmless (PROTOCOL J5)."""
    before, _ = await store.get(key, timeout=T)
    assert before is not None
    async with time_limit(T):
        while True:
            try:
                await run(store, Put(key, new), when=[Compare.unchanged(key, before.mod_revision)])
            except (Ambiguous, NotApplied):
                await asyncio.sleep(0.05)
            else:
                return
