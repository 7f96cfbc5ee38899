"""The simulated etcd: the memory store as a node of its own, remembering everything, and the weather between it and its clients.

Theory. A request that has left its client lands whatever becomes of the client, and leases die although nobody looks: so the
server's tasks belong to the server. Its memory of every revision, with the true time, is the history that checkers read;
compaction takes nothing from it.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from control_plane.store.base import Delete, Get, NoSpace, Put, TxnResult, WatchEvent
from control_plane.store.memory import CallFault, KeepaliveFault, MemoryEtcd, Outcome, WatchFault
from control_plane.store.memory_keyspace import Keyspace
from control_plane.store.memory_server import Answer
from lab.simulation.kinds import AFTER_REVOKE, CUT_OFF, NO_SPACE, STALE_LEADER
from lab.simulation.nodes import NODE, Node
from lab.virtual_time import VirtualClock

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Revision:
    """What one revision changed, and when it truly did."""

    at: float
    number: int
    events: tuple[WatchEvent, ...]
    writer: str = ""
    """Node that sent the request; empty for etcd's own doing."""


class RecordedKeyspace(Keyspace):
    """A Keyspace that forgets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[Revision] = []
        self.writer = ""
        """Who is being served just now."""

    def run(self, ops: Iterable[Put | Delete | Get], succeeded: bool) -> TxnResult:
        """See `Keyspace.run`."""
        before = self.revision
        result = super().run(ops, succeeded)
        if self.revision != before:
            now = asyncio.get_running_loop().time()
            self.record.append(Revision(now, self.revision, tuple(self._history[-1]), self.writer))
        return result


class SimEtcd(MemoryEtcd):
    """A MemoryEtcd on its own node."""

    def __init__(self, node: Node) -> None:
        super().__init__(VirtualClock())
        self._node = node
        self.recorded = RecordedKeyspace()
        self.keyspace = self.recorded
        self.hits: Counter[str] = Counter()

    @property
    def quorum(self) -> bool:
        """Somebody answers."""
        return self._quorum

    def deliver(self, delay: float, work: Callable[[], T]) -> asyncio.Future[Answer[T] | None]:
        """See `MemoryEtcd.deliver`; what it writes is signed with the sender's name."""
        sender = NODE.get()

        def signed() -> T:
            self.recorded.writer = sender.name if sender is not None else ""
            try:
                return work()
            except NoSpace:
                self.hits[NO_SPACE] += 1
                raise
            finally:
                self.recorded.writer = ""

        return super().deliver(delay, signed)

    def known_ttl(self, lease_id: int) -> float:
        """See `MemoryEtcd.known_ttl`: it is asked for lies alone."""
        self.hits[STALE_LEADER if lease_id in self._leases else AFTER_REVOKE] += 1
        return super().known_ttl(lease_id)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._node.run(partial(super()._start, work))

    def _after(self, delay: float, act: Callable[[], None]) -> None:
        self._node.run(partial(self.clock.later, delay, act))


@dataclass(slots=True)
class Weather:
    """How likely each misfortune of a store call is just now. All 0: only latency."""

    refused: float = 0.0
    lost_request: float = 0.0
    lost_reply: float = 0.0
    late: float = 0.0
    slow: float = 0.0
    slow_txn: float = 0.0
    """As `slow` and `late`, of transactions alone: a disk that syncs slowly hurts nobody else."""
    late_txn: float = 0.0
    watch_slow: float = 0.0
    watch_broken: float = 0.0
    watch_twice: float = 0.0
    watch_compacted: float = 0.0
    stale_keepalive: float = 0.0
    revoked_keepalive: float = 0.0
    cut: bool = False
    """The client cannot reach the store at all."""


CALM = Weather()

LATENCY = 0.004
"""Seconds of a way to the store and back, at most, in fine weather: an fsync on a good disk."""


@dataclass(slots=True)
class SeededStoreFaults:
    """One client's luck: `control_plane.store.memory.StoreFaults`."""

    rng: random.Random
    hits: Counter[str]
    weather: Weather = field(default_factory=Weather)

    def call(self, op: str, key: str) -> CallFault:
        """See `StoreFaults.call`."""
        del key
        weather, rng = self.weather, self.rng
        there, back = rng.uniform(0.0, LATENCY), rng.uniform(0.0, LATENCY)
        if weather is CALM:
            return CallFault(latency=there, reply_latency=back)
        if weather.cut:
            self.hits[CUT_OFF] += 1
            return CallFault(Outcome.LOST_REQUEST, latency=there + 60.0)
        for outcome, chance in (
            (Outcome.REFUSED, weather.refused),
            (Outcome.LOST_REQUEST, weather.lost_request),
            (Outcome.LOST_REPLY, weather.lost_reply),
            (Outcome.LATE, weather.late + weather.late_txn * (op == "txn")),
        ):
            if rng.random() < chance:
                self.hits[f"store {outcome.value}{' (txn)' if op == 'txn' else ''}"] += 1
                wait = rng.choice((0.05, 1.0, 4.0))
                return CallFault(outcome, latency=there + wait, late=rng.uniform(0.1, 12.0))
        if rng.random() < weather.slow or (op == "txn" and rng.random() < weather.slow_txn):
            self.hits["store slow"] += 1
            there += rng.uniform(0.1, 3.0)
        return CallFault(latency=there, reply_latency=back)

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        """See `StoreFaults.keepalive`."""
        del lease_id
        if self.weather is not CALM and self.rng.random() < self.weather.stale_keepalive:
            return KeepaliveFault.STALE_LEADER
        if self.weather.revoked_keepalive and self.rng.random() < self.weather.revoked_keepalive:
            return KeepaliveFault.ACKED_AFTER_REVOKE
        return KeepaliveFault.HONEST

    def watch(self, prefix: str, revision: int) -> WatchFault:
        """See `StoreFaults.watch`."""
        del prefix, revision
        weather, rng = self.weather, self.rng
        delay = rng.uniform(0.0, LATENCY)
        if weather is CALM:
            return WatchFault(delay=delay)
        if rng.random() < weather.watch_slow:
            self.hits["watch lag"] += 1
            delay += rng.uniform(0.2, 5.0)
        fault = WatchFault(
            delay=delay,
            compacted=rng.random() < weather.watch_compacted,
            broken=rng.random() < weather.watch_broken,
            duplicate=rng.random() < weather.watch_twice,
        )
        for name in ("compacted", "broken", "duplicate"):
            if getattr(fault, name):
                self.hits[f"watch {name}"] += 1
                break
        return fault
