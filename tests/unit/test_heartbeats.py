"""Heartbeats on their way into the store (PROTOCOL S2): the large ones of some never stop those of others."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.v1 import agent_pb2 as pb
from baton.v1.cluster_pb2 import NodeShape
from control_plane.agent_rules import MAX_BEAT, heartbeat_problem
from control_plane.heartbeats import Beating, Heartbeats
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from control_plane.store.memory import MemoryEtcd, MemoryStore
from lab.virtual_time import VirtualClock, run


@dataclass
class Stream:
    """What one agent was told, by the seqs that were acknowledged."""

    acks: list[int] = field(default_factory=list)

    def send(self, message: pb.SessionResponse) -> bool:
        self.acks.append(message.heartbeat_ack.seq)
        return True


@dataclass
class Beater:
    """One session."""

    cluster: str
    owner_value: bytes = b"mine"
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    stream: Stream = field(default_factory=Stream)


def nobody_moves(_: Beating) -> None:
    raise AssertionError("every fence holds")


def largest() -> pb.Heartbeat:
    beat = pb.Heartbeat(seq=1, generation=1)
    full: Iterable[NodeShape] = (NodeShape(count=1, cpu_millis=1 << 40, memory_bytes=1 << 40) for _ in range(12_000))
    beat.shapes.extend(full)
    assert 0.8 * MAX_BEAT < beat.ByteSize() < MAX_BEAT
    assert heartbeat_problem(beat) is None
    return beat


def test_s2_more_bytes_than_one_transaction_takes_are_acknowledged_in_several() -> None:
    async def main() -> None:
        clock = VirtualClock()
        store = MemoryStore(MemoryEtcd(clock))
        heartbeats = Heartbeats(store, clock, nobody_moves)
        sessions = [Beater(f"u{number}") for number in range(12)]
        for session in sessions:
            await store.txn(Txn([], [Put(keys.session_owner(session.cluster), b"mine")]), timeout=1.0)
            heartbeats.add(session, largest() if session.cluster != "u11" else pb.Heartbeat(seq=1, generation=1))
        committing = asyncio.create_task(heartbeats.run())
        await clock.sleep(1.0)
        assert [session.stream.acks for session in sessions] == [[1]] * len(sessions)
        committing.cancel()

    run(main())
