"""Heartbeats become true: one fenced transaction for all that arrived while the last was in flight (PROTOCOL S2).

A heartbeat is acknowledged only by a committed put under a compare of the session's owner key, which fleet's ClusterLost changes. A
heartbeat whose transaction had no clear answer is simply not acknowledged: the agent sends another. Its put may still land later,
which can only delay a loss.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from baton.clock import Clock
from baton.v1 import agent_pb2 as pb
from control_plane.store import keys
from control_plane.store.base import Compare, Get, Put, Store, StoreError, Txn

BEAT_TIMEOUT = 2.0
"""Seconds a heartbeat transaction may take: T_rpc of the quick profiles (F5). Longer would only delay the next try."""

BEATS_PER_TXN = 60
"""A compare and a put each must stay under etcd's 128 per list (PROTOCOL S2). More agents take more transactions."""

BYTES_PER_TXN = 768 * 1024
"""Of heartbeats in one transaction: half of what etcd takes, so that the large beats of some agents never stop those of others."""


class Outlet(Protocol):
    """Where acknowledgements go."""

    def send(self, message: pb.SessionResponse) -> bool:
        """Queue a message."""
        ...


class Beating(Protocol):
    """What a heartbeat needs of its session."""

    cluster: str
    owner_value: bytes
    closed: asyncio.Event

    @property
    def stream(self) -> Outlet:
        """Where its acknowledgement goes."""
        ...


class Heartbeats:
    """The newest heartbeat of each session, on its way into the store."""

    def __init__(self, store: Store, clock: Clock, moved: Callable[[Beating], None]) -> None:
        """`moved(session)` is called when the fence of a session no longer holds."""
        self._store, self._clock, self._moved = store, clock, moved
        self._waiting: dict[str, tuple[Beating, pb.Heartbeat]] = {}
        self._arrived = asyncio.Event()

    def add(self, session: Beating, heartbeat: pb.Heartbeat) -> None:
        """A newer heartbeat replaces one that waits: acknowledging the newer renews more (F5 counts from its send time)."""
        self._waiting[session.cluster] = (session, heartbeat)
        self._arrived.set()

    async def run(self) -> None:
        """Commit until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._waiting:
                taken = self._next()
                await self._commit([(session, beat) for session, beat in taken if not session.closed.is_set()])

    def _next(self) -> list[tuple[Beating, pb.Heartbeat]]:
        """The longest waiting that fit into one transaction, at least one."""
        taken: list[tuple[Beating, pb.Heartbeat]] = []
        size = 0
        for uid, (session, beat) in list(self._waiting.items())[:BEATS_PER_TXN]:
            size += beat.ByteSize()
            if taken and size > BYTES_PER_TXN:
                break
            taken.append((session, beat))
            del self._waiting[uid]
        return taken

    async def _commit(self, beats: Sequence[tuple[Beating, pb.Heartbeat]]) -> None:
        while beats:
            txn = Txn(
                [Compare.absent(keys.RESTORED_SUSPECTED)]
                + [Compare.equals(keys.session_owner(session.cluster), session.owner_value) for session, _ in beats],
                [Put(keys.session_beat(session.cluster), beat.SerializeToString()) for session, beat in beats],
                [Get(keys.session_owner(session.cluster)) for session, _ in beats],
            )
            try:
                result = await self._store.txn(txn, timeout=BEAT_TIMEOUT)
            except StoreError:
                return
            if result.succeeded:
                wall = int(self._clock.wall() * 1000)
                for session, beat in beats:
                    ack = pb.HeartbeatAck(seq=beat.seq, server_wall_ms=wall)
                    session.stream.send(pb.SessionResponse(heartbeat_ack=ack))
                return
            good = []
            for (session, beat), read in zip(beats, result.reads, strict=True):
                if read is not None and read.value == session.owner_value:
                    good.append((session, beat))
                else:
                    self._moved(session)
            if len(good) == len(beats):
                return  # every fence holds, so a restore is suspected (J12): nothing may be acknowledged
            beats = good
