"""What the tests of journal, controller, ownership, snapshots and restore share: a tiny machine, and replicas in
virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

from control_plane.codec import FEATURE_LEVEL
from control_plane.controller import Controller, CycleConfig, OwnedShard
from control_plane.core.commands import Command, Outbox, PutNamespace, Refused, Request, Tick
from control_plane.core.events import Event, NamespacePut
from control_plane.core.machine import Batch
from control_plane.core.model import Stamp
from control_plane.ownership import Ownership, OwnershipConfig
from control_plane.registration import join_federation
from control_plane.store.keeper import TaskLeaseKeeper
from control_plane.store.memory import CallFault, KeepaliveFault, MemoryEtcd, MemoryStore, Outcome
from control_plane.store.memory_faults import NO_WATCH_FAULT, WatchFault
from control_plane.view import MemberInfo
from lab.virtual_time import SeededEntropy, VirtualClock, run

LOST_REPLY = CallFault(Outcome.LOST_REPLY)
LOST_REQUEST = CallFault(Outcome.LOST_REQUEST)


class Faults:
    """Bad luck in turn: `plan` a fault for the next call that matches."""

    def __init__(self) -> None:
        self._plans: list[tuple[str, str, CallFault]] = []
        self.keepalives = KeepaliveFault.HONEST
        self.down = False
        self.calls: list[tuple[str, str]] = []

    def plan(self, op: str, key: str, *faults: CallFault) -> None:
        """The next calls of `op` whose first key starts with `key` meet `faults`, in turn."""
        self._plans += [(op, key, fault) for fault in faults]

    def call(self, op: str, key: str) -> CallFault:
        self.calls.append((op, key))
        if self.down:
            return CallFault(Outcome.LOST_REQUEST, latency=0.5)
        for place, (wanted, prefix, fault) in enumerate(self._plans):
            if wanted == op and key.startswith(prefix):
                del self._plans[place]
                return fault
        return CallFault()

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        return self.keepalives

    def watch(self, prefix: str, revision: int) -> WatchFault:
        return NO_WATCH_FAULT


class Ledger:
    """A machine that remembers the names it was told, with the stamps they came under."""

    def __init__(self, shard: str = "") -> None:
        self.outbox = Outbox()
        self.names: list[str] = []
        self.stamps: list[Stamp] = []
        self.timer: float | None = None

    def handle(self, command: Command, batch: Batch) -> object:
        if isinstance(command, Tick):
            batch.emit(put("tick"))
            return None
        assert isinstance(command, PutNamespace)
        if command.name.startswith("no"):
            raise Refused("WRONG_STATE", f"{len(self.names)} names are there")
        if command.name == "again":
            return len(self.names)
        many = int(command.name.split(":")[1]) if command.name.startswith("big:") else 1
        entropy = SeededEntropy(command.name)
        for _ in range(many):
            name = command.name if many == 1 else entropy.token(100)
            batch.emit(NamespacePut(name, 1.0, 0, command.retention))
        if command.name == "bug":
            raise RuntimeError("a bug")
        return len(self.names)

    def settle(self, batch: Batch) -> None:
        if self.names and self.names[-1] == "settle":
            batch.emit(put("settled"))

    def apply(self, event: Event, stamp: Stamp) -> None:
        assert isinstance(event, NamespacePut)
        self.names.append(event.name)
        self.stamps.append(stamp)
        self.timer = stamp.wall + event.retention if event.retention else None
        self.outbox.runs.add(event.name)

    def due(self) -> float | None:
        return self.timer

    def dump(self) -> Iterable[Event]:
        return [put(name) for name in self.names]

    def validate(self) -> None:
        assert len(self.names) == len(self.stamps)


def put(name: str) -> NamespacePut:
    return NamespacePut(name, 1.0, 0, 0.0)


def add(name: str, *, after: float = 0.0) -> PutNamespace:
    """A command that adds `name`; `after` seconds sets a timer."""
    return PutNamespace(Request(f"id-{name}", "d"), name, 1.0, 0, after)


def names(machine: Any) -> list[str]:
    """A question for `Controller.read`."""
    return list(machine.names)


@dataclass
class Ear:
    """A Listener that remembers."""

    heard: list[tuple[str, str]] = field(default_factory=list)
    outboxes: list[Outbox] = field(default_factory=list)

    def taken(self, shard: OwnedShard) -> None:
        self.heard.append(("taken", shard.id))

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        self.heard.append(("committed", shard.id))
        self.outboxes.append(outbox)

    def dropped(self, shard: str) -> None:
        self.heard.append(("dropped", shard))


class Replica:
    """A controller with its own clock, faults and lease, without the ring: shards are taken by hand."""

    def __init__(self, server: MemoryEtcd, name: str, config: CycleConfig | None = None, **options: Any) -> None:
        self.name, self.server = name, server
        self.faults, self.clock, self.ear = Faults(), VirtualClock(), Ear()
        self.entropy = SeededEntropy(f"{name}-{server.keyspace.revision}")
        self.store = MemoryStore(server, faults=self.faults, clock=self.clock)
        self.good = True
        self.controller = Controller(
            store=self.store,
            clock=self.clock,
            entropy=self.entropy,
            replica=name,
            config=config,
            make_machine=options.pop("make_machine", Ledger),
            **options,
        )
        self.controller.listen(self.ear)
        self.lease = 0
        self.tasks: list[asyncio.Task[Any]] = []

    async def start(self, *shards: str) -> Replica:
        """Join, get a lease that lives for an hour, run the cycle, take `shards`."""
        federation = await join_federation(self.store, self.clock, self.entropy)
        self.controller.restore.federation_uid = federation.uid
        self.controller.set_feature_level(FEATURE_LEVEL)
        self.lease = (await self.store.lease_grant(3600.0, timeout=5.0)).id
        self.controller.attach(self.lease, lambda: self.good)
        self.spawn(self.controller.run())
        for shard in shards:
            assert await self.controller.take(shard)
        return self

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        self.tasks.append(asyncio.get_running_loop().create_task(work))

    async def ask(self, shard: str, name: str, timeout: float = 60.0, **more: Any) -> Any:
        return await self.controller.submit(shard, add(name), timeout=timeout, **more)

    async def lose_lease(self) -> None:
        """What an expired lease does to the store, seen from nowhere yet."""
        self.server.revoke(self.lease)

    async def crash(self) -> None:
        """Tasks are gone; what was sent still lands."""
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)


class Member(Replica):
    """A replica with ownership: ring, lease, hand-over."""

    def __init__(self, server: MemoryEtcd, name: str, config: OwnershipConfig | None = None, **options: Any) -> None:
        level = options.pop("feature_level", FEATURE_LEVEL)
        super().__init__(server, name, **options)
        self.ownership = Ownership(
            store=self.store,
            make_keeper=lambda: TaskLeaseKeeper(self.store, self.clock),
            clock=self.clock,
            entropy=self.entropy,
            controller=self.controller,
            member=MemberInfo(name, f"{name}:1", "0", level, 0.0),
            config=config,
        )

    async def join(self) -> Member:
        self.spawn(self.controller.run())
        self.serving = asyncio.get_running_loop().create_task(self.ownership.run())
        self.tasks.append(self.serving)
        return self

    def mine(self) -> set[str]:
        return set(self.controller.owned())


async def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait in virtual time."""
    for _ in range(int(seconds / 0.05)):
        if true():
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"not true after {seconds} virtual seconds")


def story(main: Callable[[MemoryEtcd], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test told in virtual time, with a fresh store; in the usual order of tasks, and in three others."""

    def test() -> None:
        async def tell() -> None:
            server = MemoryEtcd(VirtualClock())
            try:
                await main(server)
            finally:
                await server.close()

        run(tell())
        for seed in range(3):
            run(tell(), seed, shuffle=True)

    test.__name__ = main.__name__
    test.__doc__ = main.__doc__
    return test
