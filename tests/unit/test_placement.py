"""Permissions and slots between leader and owners, in virtual time, with real run shards (PROTOCOL C1-C4, O7, S3)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from baton.internal import peer_pb2 as pb
from control_plane import placement_owner
from control_plane.core.commands import CancelRun, DropGrants, Request, TakeGrants
from control_plane.core.model import FLEET, Admission, Generation, Group, Health, Resources, TaskSpec
from control_plane.demand_wire import decode_group, encode_group
from control_plane.placement_leader import GRANT_TTL
from control_plane.placement_owner import LEVEL, QUIET_LEVEL, QUIET_MOST
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from tests.unit.placement_world import HOP, World, story


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
        dropped = Counter[type]()

        def first_of_each(said: pb.Demand | pb.Grants) -> bool:
            dropped[type(said)] += 1
            return dropped[type(said)] == 1

        world.wire.lose = first_of_each
        await world.submit_run(5)
        await world.clock.sleep(2 * LEVEL + 0.1)
        assert dropped[pb.Grants] > 1
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


def test_idle_shards_speak_together() -> None:
    async def play(world: World) -> None:
        for shard in ("00", "01", "02"):
            await world.take(shard)
            await world.clock.sleep(0.15)
        await world.clock.sleep(30.0)
        begun, said = world.wire.messages, len(world.wire.demands)
        await world.clock.sleep(30.0)
        assert len(world.wire.demands) - said >= 3 * 5
        assert world.wire.messages - begun == (len(world.wire.demands) - said) / 3

    story(play)


def test_words_that_are_too_long_together_go_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(world: World) -> None:
        await world.take("00", "01", "02")
        for shard in ("00", "01", "02"):
            await world.submit_run(2, shard=shard, name=shard)
        await world.clock.sleep(5.0)
        assert len(world.wire.demands) >= 3 * 8
        asked = [demand for demand in world.wire.demands if demand.groups]
        assert world.wire.messages >= len(asked), "two of them are never in one message"

    monkeypatch.setattr(placement_owner, "MOST_GROUPS", 1)
    story(play, lead=False)


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
