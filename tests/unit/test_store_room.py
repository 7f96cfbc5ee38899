"""New work stops before the store is full (PROTOCOL J9)."""

from __future__ import annotations

import asyncio

import pytest

from control_plane.core.commands import Archived, CancelRun, CreateRun, PutGraph, PutNamespace, Request
from control_plane.store.base import Put, StoreStatus, Txn
from control_plane.store.memory import MemoryEtcd, MemoryStore
from control_plane.store_room import DEFAULT_QUOTA, POLL_INTERVAL, StoreRoom, refusal
from lab.virtual_time import VirtualClock, run

REQUEST = Request("", "")
CREATIONS = (
    CreateRun(REQUEST, "ns", "r", "u", 1.0, 0, ()),
    PutGraph(REQUEST, "ns", "g", "u", ()),
    PutNamespace(REQUEST, "ns", 1.0, 0, 0.0),
)
ENDINGS = (CancelRun(REQUEST, "ns", "r", ""), Archived("u", 1))


def test_j9_creations_stop_at_70_percent_of_the_quota_and_endings_do_not() -> None:
    async def main() -> None:
        clock = VirtualClock()
        store = MemoryStore(MemoryEtcd(clock, quota_bytes=100_000))
        room = StoreRoom(store, clock)
        looking = asyncio.create_task(room.run())
        await store.txn(Txn([], [Put("a", bytes(60_000))]), timeout=1.0)
        await clock.sleep(POLL_INTERVAL + 0.1)
        assert [room.refuses(command) for command in CREATIONS] == ["", "", ""]
        await store.txn(Txn([], [Put("b", bytes(15_000))]), timeout=1.0)
        await clock.sleep(POLL_INTERVAL + 0.1)
        for command in CREATIONS:
            assert "of 100000 bytes: nothing is created above 70% of its quota" in room.refuses(command)
        assert [room.refuses(command) for command in ENDINGS] == ["", ""]
        await store.close()
        await clock.sleep(2 * POLL_INTERVAL)
        assert room.refuses(CREATIONS[0]), "a store that does not answer says nothing new"
        assert not looking.done()
        looking.cancel()

    run(main())


@pytest.mark.parametrize(
    ("in_use", "file", "told", "given", "refused"),
    [
        (69, 90, 100, 0, ""),
        (70, 90, 100, 0, "70% of its quota"),
        (10, 95, 100, 0, "defragment etcd"),
        (80, 80, 0, 100, "of 100 bytes"),
        (80, 80, 0, DEFAULT_QUOTA, ""),
        (80, 80, 1000, 100, ""),
        (80, 80, -1, 100, ""),
    ],
    ids=["room", "in use", "a large file", "it does not tell", "etcd's default", "what it tells wins", "no quota"],
)
def test_j9_what_is_judged(in_use: int, file: int, told: int, given: int, refused: str) -> None:
    said = refusal(StoreStatus("3.7.3", file, in_use, told, "c"), given)
    assert refused in said
    assert bool(refused) == bool(said)
