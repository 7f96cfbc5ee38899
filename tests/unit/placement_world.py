"""Both sides of placement over the view, in virtual time, with real run shards: what its tests share, and `story` to play them.

Theory: one replica owns everything, so that what is between leader and owner is only the wire, which can lose, delay and double.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from baton.internal import peer_pb2 as pb
from baton.v1 import agent_pb2, cluster_pb2
from control_plane.core.commands import CreateRun, Finish, Request, TakeGrants, TakeReports, TakeTable
from control_plane.core.fleet import Fleet
from control_plane.core.model import (
    FLEET,
    RUN_SHARDS,
    Admission,
    AttemptId,
    ClusterFacts,
    FleetTable,
    Generation,
    GraphTask,
    Health,
    Outcome,
    TaskSpec,
)
from control_plane.core.shard import RunShard
from control_plane.fleet_keys import encode_table
from control_plane.placement import Placement
from control_plane.placement_leader import GRANT_TTL
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from control_plane.store.memory import MemoryEtcd, MemoryStore
from control_plane.view import View
from lab.virtual_time import VirtualClock, run
from tests.unit.one_replica import OneReplica

HOP = 0.001
"""Seconds a message takes."""


class Wire:
    """Routes of one replica that owns everything. Keeps what was said; `lose` drops messages."""

    def __init__(self) -> None:
        self.demands: list[pb.Demand] = []
        self.grants: list[pb.Grants] = []
        self.messages = 0
        self.lose: Callable[[pb.Demand | pb.Grants], bool] = lambda said: False
        self.delays: list[tuple[float, ...]] = []
        """Of the next grants: when each copy arrives."""

    def to_owner(self, shard: str, message: pb.PeerMessage) -> bool:
        self.messages += 1
        loop = asyncio.get_running_loop()
        for demand in message.demands.shards:
            self.demands.append(demand)
            if not self.lose(demand):
                loop.call_later(HOP, self.take_demand, demand)
        if message.HasField("grants"):
            self.grants.append(message.grants)
            delays = self.delays.pop(0) if message.grants.grants and self.delays else (HOP,)
            for delay in delays if not self.lose(message.grants) else ():
                loop.call_later(delay, self.take_grants, message.grants)
        return True

    def on_demand(self, handler: Callable[[pb.Demand], None]) -> None:
        self.take_demand = handler

    def on_grants(self, handler: Callable[[pb.Grants], None]) -> None:
        self.take_grants = handler


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(MemoryEtcd(self.clock))
        self.view = View(self.store, self.clock)
        self.controller = OneReplica(self.clock, self.store)
        self.wire = Wire()
        self.unreported: dict[str, list[tuple[str, int, list[AttemptId]]]] = {}
        self.placement = Placement(
            self.clock,
            self.controller,  # type: ignore[arg-type]
            self.view,
            self.wire,
            pending=lambda shard: self.unreported.get(shard, []),
        )
        self.controller.listen(self.placement)
        self.shards: dict[str, RunShard] = {}
        self.beat_seq = 0
        self.facts: dict[str, ClusterFacts] = {}

    async def cluster(self, name: str, cpus: int, **changes: Any) -> None:
        """A cluster joins (or changes) and reports."""
        fields: dict[str, Any] = {
            "uid": name,
            "name": name,
            "health": Health.READY,
            "admission": Admission.OPEN,
            "generations": (Generation(1, "b", "j"),),
        }
        self.facts[name] = ClusterFacts(**fields | changes)
        await self.tell_table()
        await self.report(name, cpus)

    def lead(self) -> None:
        """This replica owns fleet. Shards that are of no concern to the test have told that they hold nothing (O7)."""
        self.controller.take(FLEET, Fleet())
        for shard in RUN_SHARDS:
            if shard not in self.shards:
                self.wire.take_demand(pb.Demand(shard=shard))

    async def tell_table(self) -> None:
        self.beat_seq += 1
        table = FleetTable(self.beat_seq, dict(self.facts))
        await self.store.txn(Txn([], [Put(keys.FLEET_TABLE, encode_table(table))]), timeout=1.0)
        for shard in self.shards:
            await self.controller.submit(shard, TakeTable(table), timeout=1.0)

    async def report(self, name: str, cpus: int, generation: int = 1, queue: int = 0) -> None:
        """A committed heartbeat says that so many CPUs are free, and how much may wait."""
        self.beat_seq += 1
        shape = cluster_pb2.NodeShape(count=1, cpu_millis=cpus * 1000, memory_bytes=1 << 40, total_cpu_millis=16_000)
        beat = agent_pb2.Heartbeat(seq=self.beat_seq, generation=generation, shapes=[shape], queue_limit=queue)
        put = Put(keys.session_beat(name), beat.SerializeToString())
        await self.store.txn(Txn([], [put]), timeout=1.0)

    async def take(self, *shards: str) -> None:
        for shard in shards:
            self.shards[shard] = RunShard()
            self.controller.take(shard, self.shards[shard])
        await self.tell_table()

    async def submit_run(
        self, tasks: int, *, shard: str = "00", name: str = "r", namespace: str = "ns", spec: TaskSpec | None = None
    ) -> None:
        spec = spec or TaskSpec(("true",))
        command = CreateRun(
            request=Request("", ""),
            namespace=namespace,
            run_id=name,
            run_uid=f"run-{name}",
            deadline=self.clock.wall() + 36000.0,
            priority=0,
            tasks=tuple(GraphTask(f"t{i}", (), spec) for i in range(tasks)),
        )
        await self.controller.submit(shard, command, timeout=1.0)

    def live(self, shard: str = "00") -> dict[str, int]:
        counts = {name: len(list(self.shards[shard].live_on(name))) for name in self.facts}
        return {name: count for name, count in counts.items() if count}

    async def finish(self, cluster: str, count: int, shard: str = "00") -> None:
        """The oldest attempts there end well."""
        ended = [
            Finish(attempt, Outcome.SUCCEEDED, 0, b"", "", self.clock.wall(), self.clock.wall())
            for attempt in list(self.shards[shard].live_on(cluster))[:count]
        ]
        await self.controller.submit(shard, TakeReports(cluster, 1, finished=tuple(ended)), timeout=1.0)

    def granted(self) -> int:
        return sum(
            grant.count
            for _, command in self.controller.said
            if isinstance(command, TakeGrants)
            for grant in command.grants
        )


def story(play: Callable[[World], Coroutine[Any, Any, None]], *, lead: bool = True) -> None:
    async def main() -> None:
        world = World()
        tasks = [asyncio.create_task(world.view.run()), asyncio.create_task(world.placement.run())]
        await world.view.ready()
        if lead:
            world.lead()
            await world.clock.sleep(GRANT_TTL + 0.1)
        await play(world)
        for shard in world.shards.values():
            shard.validate()
        for task in tasks:
            task.cancel()

    run(main())
