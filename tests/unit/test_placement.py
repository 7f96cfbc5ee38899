"""Both sides of placement over the view, in virtual time, with real run shards (PROTOCOL C1-C4)."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from baton.internal import peer_pb2 as pb
from baton.v1 import agent_pb2, cluster_pb2
from control_plane.core.commands import (
    CancelRun,
    CreateRun,
    DropGrants,
    Finish,
    PutNamespace,
    Request,
    TakeGrants,
    TakeReports,
    TakeTable,
)
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
    Group,
    Health,
    Outcome,
    Resources,
    TaskSpec,
    shard_of,
)
from control_plane.core.shard import RunShard
from control_plane.demand_wire import decode_group, encode_group
from control_plane.fleet_keys import encode_table
from control_plane.placement import Placement
from control_plane.placement_leader import DEMAND_TTL, GRANT_TTL, HEARING
from control_plane.placement_owner import LEVEL, QUIET_LEVEL, QUIET_MOST
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
        self.lose: Callable[[pb.PeerMessage], bool] = lambda message: False
        self.delays: list[tuple[float, ...]] = []
        """Of the next grants: when each copy arrives."""

    def to_owner(self, shard: str, message: pb.PeerMessage) -> bool:
        kind = message.WhichOneof("message")
        if kind == "demand":
            self.demands.append(message.demand)
        else:
            self.grants.append(message.grants)
        if self.lose(message):
            return False
        handler: Any = self.take_demand if kind == "demand" else self.take_grants
        delays = self.delays.pop(0) if kind == "grants" and message.grants.grants and self.delays else (HOP,)
        for delay in delays:
            asyncio.get_running_loop().call_later(delay, handler, getattr(message, str(kind)))
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


def test_c1_ready_tasks_are_placed_within_milliseconds_of_their_commit() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        await world.submit_run(5)
        await world.clock.sleep(0.02)
        assert world.live() == {"eu": 5}

    story(play)


def test_c1_nothing_is_permitted_twice_although_messages_cross() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00", "01", "02")
        for shard in world.shards:
            await world.submit_run(20, shard=shard, name=f"r{shard}")
        await world.clock.sleep(5.0)
        assert sum(world.live(shard).get("eu", 0) for shard in world.shards) == 8
        assert world.granted() == 8

    story(play)


def test_c1_permissions_that_arrive_twice_or_late_are_used_once() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00")
        world.wire.delays = [(HOP, HOP)]
        await world.submit_run(20)
        await world.clock.sleep(3.0)
        assert world.live() == {"eu": 4}

    story(play)

    async def late(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00")
        world.wire.delays = [(1.0,), (0.4,), (0.55,)]  # after the next Demand, and the one after that
        await world.submit_run(20)
        await world.clock.sleep(5.0)
        assert world.live() == {"eu": 4}

    story(late)


def test_c1_nothing_is_wanted_anew_while_permissions_are_being_bound() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00")
        before = world.controller.submit

        async def slow(shard: str, command: Any, **more: Any) -> Any:
            if isinstance(command, TakeGrants) and command.grants:
                await world.clock.sleep(1.2)
            return await before(shard, command, **more)

        world.controller.submit = slow  # type: ignore[method-assign]
        await world.submit_run(20)
        await world.clock.sleep(0.1)
        await world.submit_run(20, name="more")
        await world.clock.sleep(5.0)
        assert world.live() == {"eu": 4}

    story(play)


def test_c2_permissions_that_found_no_task_are_not_used_after_they_were_returned() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00", "01")
        world.wire.delays = [(0.1,)]
        await world.submit_run(4)
        await world.clock.sleep(0.05)
        cancel = CancelRun(Request("", ""), "ns", "r", "not needed")
        await world.controller.submit("00", cancel, timeout=1.0)
        await world.clock.sleep(0.3)
        assert world.granted() == 4, "they came, and nobody waited any more"
        await world.submit_run(4, shard="01", name="other")
        await world.clock.sleep(0.3)
        assert world.live("01") == {"eu": 4}, "given to others"
        await world.submit_run(4, name="again")
        await world.clock.sleep(0.3)
        assert world.live() == {}

    story(play)


def test_c2_a_slot_serves_the_next_of_its_group_without_the_leader() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00")
        await world.submit_run(10)
        await world.clock.sleep(0.02)
        said = world.granted()
        await world.finish("eu", 4)
        assert world.live() == {"eu": 4}
        assert world.granted() == said == 4

    story(play)


def test_c4_a_slot_that_ended_between_two_reports_is_planned_again_at_once() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00", "01")
        await world.submit_run(4)
        await world.clock.sleep(0.05)
        await world.report("eu", 0)
        await world.submit_run(3, shard="01", name="other")
        await world.clock.sleep(1.0)
        assert world.live("01") == {}
        await world.finish("eu", 4)
        await world.clock.sleep(0.2)
        assert world.live("01") == {"eu": 3}, "without a new report"

    story(play)


def test_c4_what_a_report_does_not_include_yet_stays_subtracted() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00")
        await world.submit_run(4)
        await world.clock.sleep(0.05)
        world.unreported["00"] = [("eu", 1, list(world.shards["00"].live_on("eu")))]
        await world.report("eu", 4)  # made before the dispatches arrived
        await world.submit_run(4, name="more", spec=TaskSpec(("false",), resources=Resources(2000)))
        await world.clock.sleep(1.0)
        assert world.live() == {"eu": 4}
        world.unreported.clear()
        await world.report("eu", 4)  # made after: 4 CPUs are free beside them
        await world.clock.sleep(1.0)
        assert world.live() == {"eu": 6}

    story(play)


def test_new_capacity_is_used_as_soon_as_it_is_heard_of() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.submit_run(3)
        await world.clock.sleep(1.0)
        assert world.shards["00"].demand()[0].count == 3
        await world.cluster("eu", 2)
        await world.clock.sleep(0.05)
        assert world.live() == {"eu": 2}
        await world.cluster("us", 8)
        await world.clock.sleep(LEVEL + 0.1)
        assert world.live() == {"eu": 2, "us": 1}

    story(play)


def test_who_waits_is_told_why_and_told_anew_when_it_changes() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.submit_run(1, spec=TaskSpec(("true",), resources=Resources(20_000)))
        await world.clock.sleep(0.1)
        await world.cluster("eu", 10)
        await world.clock.sleep(0.1)
        said = [c.reasons for _, c in world.controller.said if isinstance(c, TakeGrants)]
        assert [reasons[0][1] for reasons in said] == [
            "no cluster has joined the federation",
            "needs 20 CPUs on one node; the largest node has 16 CPUs, on eu",
        ]

    story(play)


def test_lost_messages_cost_half_a_second() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        dropped = Counter[str]()

        def first_of_each(message: pb.PeerMessage) -> bool:
            kind = str(message.WhichOneof("message"))
            dropped[kind] += 1
            return dropped[kind] == 1

        world.wire.lose = first_of_each
        await world.submit_run(5)
        await world.clock.sleep(2 * LEVEL + 0.1)
        assert dropped["grants"] > 1
        # The lost permissions are void for their owner, and are not waited for by the leader.
        assert world.live() == {"eu": 5}

    story(play)


def test_c3_a_new_leader_is_silent_for_one_ttl_and_terms_only_rise() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        await world.submit_run(5)
        world.lead()
        await world.clock.sleep(GRANT_TTL - 0.01)
        assert world.wire.grants == []
        assert world.wire.demands[-1].seq > 2, "it is asked again and again"
        await world.clock.sleep(0.1)
        assert world.live() == {"eu": 5}
        assert {grants.term for grants in world.wire.grants} == {world.controller.epoch}
        late = pb.Grants(shard="00", term=0, demand_seq=world.wire.demands[-1].seq, ttl_ms=2000)
        late.grants.add(cluster_uid="eu", generation=1, key="x", count=3)
        said = len(world.controller.said)
        world.wire.take_grants(late)
        await world.clock.sleep(0.1)
        assert len(world.controller.said) == said

    story(play, lead=False)


def test_c3_unused_permissions_expire() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        await world.submit_run(5)
        await world.clock.sleep(GRANT_TTL + 0.2)
        assert any(isinstance(command, DropGrants) for _, command in world.controller.said)

    story(play)


def test_s3_no_work_for_a_cluster_that_is_suspect_or_cordoned_or_of_another_generation() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8, health=Health.SUSPECT)
        await world.cluster("us", 8, admission=Admission.CORDONED)
        await world.cluster("ap", 8, generations=(Generation(1, "b", "j"), Generation(2, "b", "j")))
        await world.take("00")
        await world.submit_run(5)
        await world.clock.sleep(2.0)
        assert world.live() == {}
        await world.report("ap", 8, generation=2)
        await world.clock.sleep(0.1)
        assert world.live() == {"ap": 5}

    story(play)


def test_c2_an_owed_share_gets_slots_as_they_become_free() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00", "01")
        await world.submit_run(200, namespace="rich")
        await world.clock.sleep(0.1)
        await world.report("eu", 0)
        await world.submit_run(200, namespace="poor", shard="01", name="late")
        for _ in range(12):
            await world.clock.sleep(0.2)
            await world.finish("eu", 2)
            await world.finish("eu", 1, "01")
        await world.clock.sleep(0.5)
        rich, poor = world.live("00").get("eu", 0), world.live("01").get("eu", 0)
        assert rich + poor == 8, "nothing idles"
        assert abs(rich - poor) <= 2

    story(play)


def test_o7_an_idle_shard_says_so_but_slowly() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        await world.submit_run(2)
        await world.clock.sleep(0.1)
        await world.finish("eu", 2)
        await world.clock.sleep(1.0)
        said = len(world.wire.demands)
        await world.report("eu", 8)
        await world.clock.sleep(30.0)
        assert len(world.wire.demands) <= said + 2 + 31 / QUIET_LEVEL
        assert not world.wire.demands[-1].groups

    story(play)


def test_o7_a_new_leader_hears_an_idle_shard_at_once() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.clock.sleep(30.0)
        said = len(world.wire.demands)
        assert said <= 4 + 30 / QUIET_MOST
        owner = Put(keys.owner(FLEET), b'{"replica": "b", "nonce": "n"}')
        await world.store.txn(Txn([], [owner]), timeout=1.0)
        await world.clock.sleep(0.2)
        assert len(world.wire.demands) == said + 1

    story(play)


def test_waiting_work_is_not_chatty() -> None:
    async def play(world: World) -> None:
        await world.take("00")
        await world.submit_run(2)
        await world.clock.sleep(10.0)
        assert len(world.wire.demands) <= 10.0 / LEVEL + 3

    story(play)


def test_a_dropped_shard_says_nothing_and_takes_nothing() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        await world.take("00")
        await world.clock.sleep(0.1)
        await world.submit_run(2)
        world.controller.drop("00")
        said = len(world.wire.demands)
        await world.clock.sleep(2.0)
        assert len(world.wire.demands) == said
        world.shards.clear()

    story(play)


def test_groups_survive_the_wire() -> None:
    need = Resources(1500, 1 << 30, 7, 3, (("gpu", 2),))
    group = Group("ns", -5, need, True, (("gpu", "a100"),), ("eu", "us"), ("spot",))
    assert decode_group(encode_group(group)) == group
    assert decode_group(encode_group(group)).key() == group.key()


KEEPER = shard_of("ns", "")
FIRST, SECOND = [shard for shard in RUN_SHARDS if shard != KEEPER][:2]


async def quota(world: World, count: int) -> None:
    await world.controller.submit(KEEPER, PutNamespace(Request("", ""), "ns", 1.0, count, 0.0), timeout=1.0)
    await world.clock.sleep(0.1)


def reason(world: World, shard: str) -> str:
    task = world.shards[shard].task_at(f"run-{shard}", 19)
    assert task is not None
    return task.reason


def test_o7_a_quota_holds_over_shards_that_do_not_keep_the_namespace() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 40)
        await world.take(KEEPER, FIRST, SECOND)
        await quota(world, 6)
        for shard in (FIRST, SECOND):
            await world.submit_run(20, shard=shard, name=shard)
        await world.clock.sleep(3.0)
        assert sum(world.live(shard).get("eu", 0) for shard in (FIRST, SECOND)) == 6
        assert "namespace ns is at its quota of 6 live tasks" in {reason(world, FIRST), reason(world, SECOND)}
        busy = max((FIRST, SECOND), key=lambda shard: world.live(shard).get("eu", 0))
        await world.finish("eu", 2, busy)
        await world.clock.sleep(3.0)
        assert sum(world.live(shard).get("eu", 0) for shard in (FIRST, SECOND)) == 6, "C2: slots serve their next"
        await quota(world, 9)
        await world.clock.sleep(1.0)
        assert sum(world.live(shard).get("eu", 0) for shard in (FIRST, SECOND)) == 9

    story(play)


def test_o7_what_a_silent_shard_held_counts_until_it_speaks_again() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 40)
        await world.take(KEEPER, FIRST, SECOND)
        await quota(world, 6)
        await world.submit_run(20, shard=FIRST, name=FIRST)
        await world.clock.sleep(1.0)
        assert world.live(FIRST) == {"eu": 6}
        world.controller.drop(FIRST)
        await world.submit_run(20, shard=SECOND, name=SECOND)
        await world.clock.sleep(3 * DEMAND_TTL)
        assert world.live(SECOND) == {}

    story(play)


def test_o7_a_new_leader_gives_nothing_of_a_quota_before_it_has_heard_every_shard() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 40)
        await world.take(KEEPER, FIRST, SECOND)
        world.wire.lose = lambda message: message.demand.shard == FIRST
        world.lead()
        await quota(world, 6)
        await world.submit_run(20, shard=SECOND, name=SECOND)
        await world.clock.sleep(GRANT_TTL + 3.0)
        assert world.live(SECOND) == {}
        assert reason(world, SECOND) == "waits until 1 more shards have said what they hold of its quota"
        world.wire.lose = lambda message: False
        await world.clock.sleep(QUIET_MOST + 0.2)
        assert world.live(SECOND) == {"eu": 6}

    story(play, lead=False)


def test_o7_a_namespace_whose_keeper_has_not_spoken_waits_but_not_for_ever() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 40)
        await world.take(KEEPER, SECOND)
        world.wire.lose = lambda message: message.demand.shard == KEEPER
        world.lead()
        await world.submit_run(20, shard=SECOND, name=SECOND)
        await world.clock.sleep(GRANT_TTL + 1.0)
        assert world.live(SECOND) == {}
        assert reason(world, SECOND) == "waits until the quota of namespace ns is known"
        await world.clock.sleep(HEARING)
        assert world.live(SECOND) == {"eu": 20}

    story(play, lead=False)


def test_c1_weights_come_with_the_demand_of_the_shard_that_keeps_the_namespace() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 8)
        keeper = shard_of("heavy", "")
        await world.take(*{keeper, "00"})
        await world.controller.submit(keeper, PutNamespace(Request("", ""), "heavy", 3.0, 0, 0.0), timeout=1.0)
        await world.clock.sleep(1.0)
        await world.cluster("eu", 0)
        await world.submit_run(20, shard="00", name="a", namespace="heavy")
        await world.submit_run(20, shard="00", name="b", namespace="light")
        await world.clock.sleep(0.1)
        await world.report("eu", 8)
        await world.clock.sleep(1.0)
        machine = world.shards["00"]
        owners = Counter(attempt.run for attempt in machine.live_on("eu"))
        assert owners == {"run-a": 6, "run-b": 2}

    story(play)


def test_c2_short_work_is_queued_once_its_run_time_is_known_and_stays_queued_without_the_leader() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 4)
        await world.take("00", "01")
        await world.report("eu", 4, queue=100)
        await world.submit_run(300)
        await world.clock.sleep(0.05)
        assert world.live() == {"eu": 4}, "nobody knows how long they take"
        await world.finish("eu", 2)
        await world.clock.sleep(0.2)
        assert world.live() == {"eu": 100}
        said = world.granted()
        await world.finish("eu", 60)
        assert world.live() == {"eu": 100}
        assert world.granted() == said
        spec = TaskSpec(("true",), resources=Resources(2000))
        await world.submit_run(1, shard="01", name="other", namespace="other", spec=spec)
        for _ in range(7):
            await world.finish("eu", 20)
            await world.clock.sleep(0.05)
        assert world.live("01") == {"eu": 1}, "who waits with nothing is served as the queue drains"

    story(play)
