"""View follows the small keys by list and watch, and fleet's encodings (PROTOCOL S2, S5)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import agent_pb2
from control_plane.core import events as ev
from control_plane.core.fleet import Fleet
from control_plane.core.machine import Batch
from control_plane.core.model import Admission, ClusterFacts, Evidence, FleetTable, Generation, Health, Stamp
from control_plane.fleet_keys import (
    SessionInfo,
    decode_session,
    decode_table,
    encode_session,
    encode_table,
    side_puts,
)
from control_plane.slots import OwnedShard
from control_plane.store import keys
from control_plane.store.base import Delete, Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd, MemoryStore, Outcome, StoreFaults, WatchFault
from control_plane.store.memory_faults import KeepaliveFault
from control_plane.view import View
from lab.virtual_time import VirtualClock, run

FACTS = ClusterFacts(
    uid="u-eu",
    name="eu",
    health=Health.SUSPECT,
    admission=Admission.DRAINING,
    generations=(Generation(1, "b1", "j1", Evidence.TIMED, 6.0), Generation(2, "b2", "j1", guard_seconds=5.0)),
    labels=(("gpu", "a100"),),
    taints=("spot",),
    isolation=True,
    orphan_killer=True,
    namespaces=("ns",),
    profile="fast",
    agent_version="1.0",
    create_wall=12.5,
)
TABLE = FleetTable(7, {"u-eu": FACTS}, 99.5)

TEXT = st.text(max_size=8)
FACTS_ANY = st.builds(
    ClusterFacts,
    uid=TEXT,
    name=TEXT,
    health=st.sampled_from(Health),
    admission=st.sampled_from(Admission),
    generations=st.lists(
        st.builds(Generation, st.integers(1, 99), TEXT, TEXT, st.sampled_from(Evidence), st.floats(0, 60)), max_size=4
    ).map(tuple),
    labels=st.lists(st.tuples(TEXT, TEXT), max_size=2).map(tuple),
    taints=st.lists(TEXT, max_size=2).map(tuple),
    isolation=st.booleans(),
    orphan_killer=st.booleans(),
    namespaces=st.lists(TEXT, max_size=2).map(tuple),
    profile=TEXT,
    agent_version=TEXT,
    create_wall=st.floats(0, 2e9),
)


@given(st.lists(FACTS_ANY, max_size=3, unique_by=lambda f: f.uid), st.integers(0, 1 << 50), st.floats(0, 2e9))
def test_tables_survive_their_encoding(rows: list[ClusterFacts], seq: int, until: float) -> None:
    table = FleetTable(seq, {facts.uid: facts for facts in rows}, until)
    assert decode_table(encode_table(table)) == table


def test_a_full_table_of_a_hundred_clusters_stays_far_below_a_shards_share_of_a_transaction() -> None:
    rows = {}
    for i in range(100):
        generations = tuple(Generation(g, f"{i * 1000 + g:032x}", f"{i:032x}", Evidence.TIMED) for g in range(32))
        rows[f"u{i}"] = ClusterFacts(f"u{i}", f"cluster-{i}", Health.READY, Admission.OPEN, generations)
    assert len(encode_table(FleetTable(1, rows))) < 100_000


@pytest.mark.parametrize("value", [b"", b"nonsense", b"{}", encode_session(SessionInfo(1, "r", ended=False))])
def test_what_is_no_table_is_a_value_error(value: bytes) -> None:
    with pytest.raises(ValueError, match="fleet/table"):
        decode_table(value)


def test_sessions_survive_their_encoding_and_garbage_is_a_value_error() -> None:
    older = b'{"ended": true, "generation": 3, "nonce": "n", "replica": "r1"}'
    assert decode_session(older) == SessionInfo(3, "r1", ended=True, nonce="n"), "a replica that knows no levels"
    info = SessionInfo(3, "r1", ended=True, nonce="n", level=2)
    assert decode_session(encode_session(info)) == info
    for value in (b"{}", b"[]", b"x"):
        with pytest.raises(ValueError):  # noqa: PT011 - three kinds of garbage, one kind of error
            decode_session(value)


def test_s5_side_puts_carry_the_table_and_the_last_word_on_each_session() -> None:
    fleet = Fleet()
    batch = Batch(Stamp(1.0, "n", 1, 1), fleet.apply)
    opened = ev.SessionOpened("u", 2, "b", "j", "i", "r1", "fast", 15.0, 5.0, (), (), False, True, (), "")
    batch.emit(ev.ClusterAdded("u", "eu"))
    batch.emit(ev.SessionOpened("u", 1, "a", "j", "i", "r1", "fast", 15.0, 5.0, (), (), False, True, (), ""))
    batch.emit(ev.ClusterLost("u", 1, Evidence.REPORTED, "boot"))
    lost = list(batch.events)
    shard = OwnedShard("fleet", fleet, 1, 1, 1, "n")
    puts = {put.key: put.value for put in side_puts(shard, lost)}
    assert decode_session(puts[keys.session_owner("u")]) == SessionInfo(1, "", ended=True)
    batch.emit(opened)
    puts = {put.key: put.value for put in side_puts(shard, batch.events)}
    assert decode_session(puts[keys.session_owner("u")]) == SessionInfo(2, "r1", ended=False)
    assert decode_table(puts[keys.FLEET_TABLE]) == fleet.table()
    fleet.outbox.table = False
    assert side_puts(shard, [ev.RequestRecorded("id", "d", "u")]) == []


class Faults(StoreFaults):
    """Refuse the first calls; break, repeat or compact the first watches."""

    def __init__(self, refused: int = 0, watches: list[WatchFault] | None = None) -> None:
        self.refused = refused
        self.watches = watches or []

    def call(self, op: str, key: str) -> CallFault:
        if self.refused > 0:
            self.refused -= 1
            return CallFault(Outcome.REFUSED)
        return CallFault()

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        return KeepaliveFault.HONEST

    def watch(self, prefix: str, revision: int) -> WatchFault:
        return self.watches.pop(0) if self.watches else WatchFault()


async def put(store: MemoryStore, *pairs: tuple[str, bytes]) -> None:
    await store.txn(Txn([], [Put(key, value) for key, value in pairs]), timeout=1.0)


async def settle() -> None:
    await asyncio.sleep(0.5)


def story(main: Coroutine[Any, Any, None]) -> None:
    run(asyncio.wait_for(main, 1000))


def test_a_view_lists_what_was_there_and_follows_what_comes() -> None:
    async def main() -> None:
        clock = VirtualClock(boot_offset=100.0)
        store = MemoryStore(MemoryEtcd(clock))
        member = {"replica": "r1", "address": "a:1", "version": "1", "feature_level": 1, "start_wall": 5.0}
        await put(
            store,
            (keys.member("r1"), json.dumps(member).encode()),
            (keys.owner("03"), b'{"replica": "r1", "nonce": "x"}'),
            (keys.log("03", 1), b"not ours to read"),
            (keys.INCARNATION, b"2"),
        )
        view = View(store, clock)
        topics: list[str] = []
        view.subscribe(topics.append)
        following = asyncio.create_task(view.run())
        await view.ready()
        assert view.members["r1"].address == "a:1"
        assert (view.owners["03"].replica, view.owners["03"].nonce) == ("r1", "x")
        assert view.owners["03"].revision > 0
        assert view.incarnation == 2
        await settle()
        topics.clear()
        beat = agent_pb2.Heartbeat(seq=4, generation=2)
        await put(
            store,
            (keys.FLEET_TABLE, encode_table(TABLE)),
            (keys.session_owner("u-eu"), encode_session(SessionInfo(2, "r1", ended=False))),
            (keys.session_beat("u-eu"), beat.SerializeToString()),
            (keys.RESTORED_SUSPECTED, b"why"),
        )
        await settle()
        assert view.table == TABLE
        assert view.sessions["u-eu"].generation == 2
        assert view.beats["u-eu"].heartbeat == beat
        assert view.beats["u-eu"].seen_boot == pytest.approx(100.5, abs=0.1)
        assert view.restore_suspected == "why"
        assert set(topics) == {"table", "sessions", "beats", "restore"}
        gone = [keys.member("r1"), keys.owner("03"), keys.RESTORED_SUSPECTED]
        gone += [keys.session_owner("u-eu"), keys.session_beat("u-eu")]
        await store.txn(Txn([], [Delete(key) for key in gone]), timeout=1.0)
        await settle()
        assert (view.members, view.owners, view.sessions, view.beats, view.restore_suspected) == ({}, {}, {}, {}, "")
        following.cancel()

    story(main())


@pytest.mark.parametrize(
    "watches",
    [
        [WatchFault(compacted=True)],
        [WatchFault(broken=True)],
        [WatchFault(duplicate=True)],
        [WatchFault(delay=2.0), WatchFault(compacted=True)],
    ],
)
def test_a_view_gets_over_refused_listings_and_bad_watches(watches: list[WatchFault]) -> None:
    async def main() -> None:
        clock = VirtualClock()
        server = MemoryEtcd(clock)
        writer = MemoryStore(server)
        view = View(MemoryStore(server, faults=Faults(refused=50, watches=watches)), clock)
        await put(writer, (keys.member("gone"), b'{"address": "a:0"}'))
        following = asyncio.create_task(view.run())
        await view.ready()
        await put(writer, (keys.member("r1"), b'{"address": "a:1"}'))
        await writer.txn(Txn([], [Delete(keys.member("gone"))]), timeout=1.0)
        await asyncio.sleep(10.0)
        assert set(view.members) == {"r1"}
        following.cancel()

    story(main())


def test_what_is_told_twice_is_heard_once() -> None:
    async def main() -> None:
        clock = VirtualClock()
        server = MemoryEtcd(clock)
        store = MemoryStore(server)
        view = View(MemoryStore(server, faults=Faults(watches=[WatchFault(duplicate=True)])), clock)
        following = asyncio.create_task(view.run())
        await view.ready()
        topics: list[str] = []
        view.subscribe(topics.append)
        await put(store, (keys.member("r1"), b'{"address": "a:1"}'))
        await settle()
        assert topics == ["members"]
        following.cancel()

    story(main())


def test_an_unreadable_value_leaves_the_last_readable_one() -> None:
    async def main() -> None:
        clock = VirtualClock()
        store = MemoryStore(MemoryEtcd(clock))
        view = View(store, clock)
        following = asyncio.create_task(view.run())
        await view.ready()
        await put(store, (keys.FLEET_TABLE, encode_table(TABLE)), (keys.session_beat("u"), b"\xff\xff"))
        await put(store, (keys.FLEET_TABLE, b"from the future"))
        await put(store, (keys.member("r1"), b'{"address": "a:1"}'))
        await settle()
        assert view.table == TABLE
        assert view.beats == {}
        assert set(view.members) == {"r1"}
        following.cancel()

    story(main())
