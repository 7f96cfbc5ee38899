"""Quotas and weights of namespaces, over shards that do not keep them (PROTOCOL O7, C1)."""

from __future__ import annotations

from collections import Counter

from baton.internal import peer_pb2 as pb
from control_plane.core.commands import PutNamespace, Request
from control_plane.core.model import RUN_SHARDS, shard_of
from control_plane.placement_leader import DEMAND_TTL, GRANT_TTL, HEARING
from control_plane.placement_owner import QUIET_MOST
from tests.unit.placement_world import World, story

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
        world.wire.lose = lambda said: isinstance(said, pb.Demand) and said.shard == FIRST
        world.lead()
        await quota(world, 6)
        await world.submit_run(20, shard=SECOND, name=SECOND)
        await world.clock.sleep(GRANT_TTL + 3.0)
        assert world.live(SECOND) == {}
        assert reason(world, SECOND) == "waits until 1 more shards have said what they hold of its quota"
        world.wire.lose = lambda said: False
        await world.clock.sleep(QUIET_MOST + 0.2)
        assert world.live(SECOND) == {"eu": 6}

    story(play, lead=False)


def test_o7_a_namespace_whose_keeper_has_not_spoken_waits_but_not_for_ever() -> None:
    async def play(world: World) -> None:
        await world.cluster("eu", 40)
        await world.take(KEEPER, SECOND)
        world.wire.lose = lambda said: isinstance(said, pb.Demand) and said.shard == KEEPER
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
