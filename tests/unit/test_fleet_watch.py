"""FleetWatch and GuardWait in virtual time: who is lost when, and when a copy may start (PROTOCOL S3-S5, S7, F2, F6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from baton.v1 import agent_pb2
from control_plane.controller import Controller
from control_plane.core.commands import (
    CreateRun,
    GenerationFenced,
    Grant,
    LoseCluster,
    ObserveHealth,
    OpenSession,
    Request,
    TakeGrants,
    TakeTable,
)
from control_plane.core.fleet import Fleet
from control_plane.core.model import FLEET, Evidence, FleetTable, GraphTask, Health, TaskSpec
from control_plane.core.shard import RunShard
from control_plane.fleet_keys import SessionInfo, encode_table, side_puts
from control_plane.fleet_watch import MAX_GAP, POLL_INTERVAL, FleetWatch
from control_plane.guard_wait import LEVEL, GuardWait
from control_plane.store import keys
from control_plane.store.base import Put, Txn
from control_plane.store.memory import CallFault, MemoryEtcd, MemoryStore, Outcome, StoreFaults, WatchFault
from control_plane.store.memory_faults import KeepaliveFault
from control_plane.view import View
from lab.virtual_time import SeededEntropy, VirtualClock, run
from tests.unit.one_replica import OneReplica

L, G, H = 15.0, 5.0, 2.0
"""Of profile fast."""


class Line(StoreFaults):
    """A connection that can be cut; `slow` seconds each way."""

    def __init__(self) -> None:
        self.cut = False
        self.slow = 0.0

    def call(self, op: str, key: str) -> CallFault:
        if self.cut:
            return CallFault(Outcome.LOST_REQUEST, latency=0.1)
        return CallFault(latency=self.slow, reply_latency=self.slow)

    def keepalive(self, lease_id: int) -> KeepaliveFault:
        return KeepaliveFault.HONEST

    def watch(self, prefix: str, revision: int) -> WatchFault:
        return WatchFault()


class World:
    """One replica that owns fleet, with a line of its own to the store; and agents that beat past it."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        server = MemoryEtcd(self.clock)
        self.line = Line()
        self.store = MemoryStore(server)
        self.controller = OneReplica(self.clock, self.store)
        self.watch = FleetWatch(MemoryStore(server, faults=self.line), self.clock, self.controller)  # type: ignore[arg-type]
        self.controller.listen(self.watch)
        self.fleet = Fleet()
        self.seq = 0

    async def open(self, name: str = "eu", **changes: Any) -> None:
        fields: dict[str, Any] = {
            "cluster_name": name,
            "cluster_uid": f"u-{name}",
            "instance": "i",
            "boot_id": "b1",
            "journal_uid": "j1",
            "replica": "r1",
            "profile": "fast",
            "lost_seconds": L,
            "guard_seconds": G,
            "orphan_killer": True,
        }
        await self.controller.submit(FLEET, OpenSession(**fields | changes), timeout=1.0)

    async def beat(self, name: str = "eu", generation: int = 1, *, silent: bool = False) -> None:
        self.seq += 1
        value = agent_pb2.Heartbeat(seq=self.seq, generation=generation, guard_silent=silent).SerializeToString()
        await self.store.txn(Txn([], [Put(keys.session_beat(f"u-{name}"), value)]), timeout=1.0)

    async def beats_until(self, end: float, name: str = "eu") -> None:
        while self.clock.boot() < end:
            await self.beat(name)
            await self.clock.sleep(H)

    def lost(self) -> list[LoseCluster]:
        return [command for _, command in self.controller.said if isinstance(command, LoseCluster)]

    def health(self, name: str = "eu") -> Health:
        return self.fleet.table().clusters[f"u-{name}"].health

    async def until_lost(self, within: float = 60.0) -> float:
        """Seconds until somebody is lost."""
        start = self.clock.boot()
        while not self.lost():
            assert self.clock.boot() - start < within, "nobody was lost"
            await self.clock.sleep(0.05)
        return self.clock.boot() - start


def story(play: Callable[[World], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        world = World()
        polling = asyncio.create_task(world.watch.run())
        world.controller.take(FLEET, world.fleet)
        await play(world)
        world.fleet.validate()
        polling.cancel()

    run(main())


def test_s4_lost_after_l_of_silence_and_not_before() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beats_until(world.clock.boot() + 60.0)
        assert world.lost() == []
        await world.beat()
        taken = await world.until_lost()
        assert L <= taken <= L + 3 * POLL_INTERVAL
        assert world.lost()[0].evidence is Evidence.TIMED
        assert world.health() is Health.LOST
        await world.clock.sleep(60.0)
        assert len(world.lost()) == 1, "S5: once"

    story(play)


def test_s4_a_session_that_never_beat_is_lost_too() -> None:
    async def play(world: World) -> None:
        await world.open()
        assert L <= await world.until_lost() <= L + 3 * POLL_INTERVAL

    story(play)


def test_s4_s7_a_generation_that_never_beat_is_a_known_death_and_one_that_beat_is_not() -> None:
    async def play(world: World) -> None:
        await world.open("eu")
        await world.beat("eu")
        await world.open("fake")
        await world.until_lost()
        await world.clock.sleep(3 * POLL_INTERVAL)
        told = {command.cluster: command for command in world.lost()}
        assert (told["u-eu"].begun, told["u-fake"].begun) == (True, False)
        assert told["u-eu"].idle == {"u-fake"}
        table = world.fleet.table().clusters
        assert table["u-eu"].generations[-1].evidence is Evidence.TIMED
        assert table["u-fake"].generations[-1].evidence is Evidence.REPORTED

    story(play)


def test_s4_a_heartbeat_of_an_earlier_generation_is_none_of_this_one() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat(generation=1)
        await world.clock.sleep(1.0)
        await world.open(boot_id="b2")
        await world.until_lost()
        assert [command.begun for command in world.lost()] == [False]

    story(play)


def test_s4_one_failed_poll_starts_l_anew_so_nobody_is_lost_without_a_store() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        await world.clock.sleep(L - 2.0)
        world.line.cut = True
        await world.clock.sleep(POLL_INTERVAL)
        world.line.cut = False
        assert await world.until_lost() >= L - 1.0
        assert len(world.lost()) == 1

    story(play)


def test_s4_a_store_that_is_down_loses_nobody() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        world.line.cut = True
        await world.clock.sleep(10 * L)
        assert world.lost() == []

    story(play)


def test_s4_a_suspend_is_a_gap() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        await world.clock.sleep(L - 2.0)
        world.clock.step_boot(5.0)
        assert await world.until_lost() >= L - 1.0

    story(play)


def test_s4_a_stall_of_our_own_loop_is_no_gap_while_nothing_was_renewed() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        for _ in range(6):
            await world.clock.sleep(1.0)
            world.clock.step_boot(MAX_GAP - 2 * POLL_INTERVAL - 0.1)
        assert await world.until_lost() <= L - 6 * (MAX_GAP - 0.1 - 2 * POLL_INTERVAL) - 4.0, "L went on"

    story(play)


def test_s4_a_renewal_within_a_stall_starts_l_anew() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        await world.clock.sleep(L - 3.0)
        await world.beat()
        world.clock.step_boot(MAX_GAP - 2 * POLL_INTERVAL - 0.1)
        assert await world.until_lost() >= L - POLL_INTERVAL

    story(play)


@pytest.mark.parametrize("dropped", [True, False], ids=["another replica had it", "rebuilt here"])
def test_s4_a_takeover_starts_l_anew(dropped: bool) -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        await world.clock.sleep(L - 2.0)
        if dropped:
            world.controller.drop(FLEET)
        world.controller.take(FLEET, world.fleet)
        assert await world.until_lost() >= L - 1.0

    story(play)


def test_s4_who_does_not_own_fleet_says_nothing() -> None:
    async def play(world: World) -> None:
        await world.open()
        world.controller.drop(FLEET)
        await world.clock.sleep(3 * L)
        assert world.lost() == []

    story(play)


def test_s4_j5_a_heartbeat_that_lands_before_the_commit_saves_the_session() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        before = world.controller.submit

        async def late(shard: str, command: Any, **more: Any) -> Any:
            if isinstance(command, LoseCluster) and world.seq == 1:
                await world.beat()
            return await before(shard, command, **more)

        world.controller.submit = late  # type: ignore[method-assign]
        await world.clock.sleep(L + 3.0)
        assert world.lost() == []
        assert world.health() is not Health.LOST
        assert await world.until_lost() >= L - 4.0

    story(play)


def test_s4_a_slow_store_only_makes_losses_later() -> None:
    async def play(world: World) -> None:
        world.line.slow = 0.2
        await world.open()
        await world.beat()
        assert L <= await world.until_lost() <= L + 4 * POLL_INTERVAL

    story(play)


def test_s4_the_loss_of_one_is_no_gap_for_the_others() -> None:
    async def play(world: World) -> None:
        await world.open("eu")
        await world.open("us")
        await world.beat("eu")
        await world.clock.sleep(1.0)
        await world.beat("us")
        before = world.controller.submit

        async def slow(shard: str, command: Any, **more: Any) -> Any:
            if isinstance(command, LoseCluster) and command.cluster == "u-eu":
                await world.clock.sleep(5.0)
            return await before(shard, command, **more)

        world.controller.submit = slow  # type: ignore[method-assign]
        await world.clock.sleep(L + 2.0)
        assert [command.cluster for command in world.lost()] == ["u-us"]

    story(play)


def test_s3_suspect_after_three_missed_heartbeats_and_ready_with_the_next() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beats_until(world.clock.boot() + 10.0)
        await world.clock.sleep(2 * H - 0.1)
        assert world.health() is Health.READY
        await world.clock.sleep(H + 1.0)
        assert world.health() is Health.SUSPECT
        await world.beat()
        await world.clock.sleep(2 * POLL_INTERVAL)
        assert world.health() is Health.READY
        said = [command for _, command in world.controller.said if isinstance(command, ObserveHealth)]
        assert len(said) == 2, "said once each"

    story(play)


def test_s3_a_new_owner_of_fleet_does_not_clear_a_suspicion_it_knows_nothing_of() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat()
        await world.clock.sleep(3 * H + 1.0)
        world.controller.drop(FLEET)
        world.controller.take(FLEET, world.fleet)
        await world.clock.sleep(1.0)
        assert world.health() is Health.SUSPECT

    story(play)


@pytest.mark.parametrize(
    ("killer", "silent", "evidence"),
    [(True, False, Evidence.TIMED), (False, False, Evidence.NONE), (True, True, Evidence.NONE)],
)
def test_f6_timed_needs_a_killer_and_a_guard_that_ticked(killer: bool, silent: bool, evidence: Evidence) -> None:
    async def play(world: World) -> None:
        await world.open(orphan_killer=killer)
        await world.beat(silent=silent)
        await world.clock.sleep(1.0)
        await world.beat()
        await world.until_lost()
        await world.clock.sleep(1.0)
        assert world.fleet.table().clusters["u-eu"].generations[-1].evidence is evidence

    story(play)


def test_g2_a_guard_that_was_silent_in_an_earlier_generation_counts_no_more() -> None:
    async def play(world: World) -> None:
        await world.open()
        await world.beat(silent=True)
        await world.clock.sleep(1.0)
        await world.open(boot_id="b2")
        await world.clock.sleep(1.0)
        await world.beat(generation=2)
        await world.until_lost()
        await world.clock.sleep(1.0)
        assert [g.evidence for g in world.fleet.table().clusters["u-eu"].generations] == [
            Evidence.REPORTED,
            Evidence.TIMED,
        ]

    story(play)


def test_s7_a_partition_of_two_of_three_makes_one_storm() -> None:
    async def play(world: World) -> None:
        for name in ("eu", "us", "ap"):
            await world.open(name)
            await world.beat(name)
        beating = asyncio.create_task(world.beats_until(world.clock.boot() + 40.0, "ap"))
        first = world.clock.wall() + await world.until_lost()
        await world.clock.sleep(5.0)
        assert len(world.lost()) == 2
        assert world.fleet.table().storm_until == pytest.approx(first + 2 * (L + G), abs=1.0)
        await beating

    story(play)


def test_s5_opening_and_loss_reach_the_session_key_and_the_table_in_their_own_transaction() -> None:
    """With the real journal: what is published is what is committed, and what is recovered is what was published."""

    async def main() -> None:
        clock = VirtualClock()
        store = MemoryStore(MemoryEtcd(clock))
        await store.txn(Txn([], [Put(keys.INCARNATION, b"1")]), timeout=1.0)
        controller = Controller(
            store=store,
            clock=clock,
            entropy=SeededEntropy(1),
            replica="r1",
            make_machine=lambda shard: Fleet() if shard == FLEET else RunShard(),
            side_puts=side_puts,
        )
        lease = await store.lease_grant(1e6, timeout=1.0)
        controller.attach(lease.id, lambda: True)
        watch = FleetWatch(store, clock, controller)
        controller.listen(watch)
        view = View(store, clock)
        tasks = [asyncio.create_task(loop) for loop in (controller.run(), watch.run(), view.run())]
        assert await controller.take(FLEET)
        hello = OpenSession("eu", "u", "i", "b1", "j1", "r1", "fast", L, G, orphan_killer=True)
        await controller.submit(FLEET, hello, timeout=5.0)
        beat = agent_pb2.Heartbeat(seq=1, generation=1).SerializeToString()
        await store.txn(Txn([], [Put(keys.session_beat("u"), beat)]), timeout=1.0)
        await clock.sleep(1.0)
        assert view.sessions["u"] == SessionInfo(1, "r1", ended=False)
        await clock.sleep(L + 1.0)
        assert view.sessions["u"] == SessionInfo(1, "", ended=True)
        assert view.table.clusters["u"].generations[-1].evidence is Evidence.TIMED
        ended = await store.get(keys.session_owner("u"), timeout=1.0)
        table = await store.get(keys.FLEET_TABLE, timeout=1.0)
        head = await store.get(keys.head(FLEET), timeout=1.0)
        revisions = {kv.mod_revision for kv, _ in (ended, table, head) if kv is not None}
        assert (len(revisions), None in (ended[0], table[0], head[0])) == (1, False)
        await controller.submit(FLEET, hello, timeout=5.0)
        await clock.sleep(1.0)
        assert view.sessions["u"] == SessionInfo(2, "r1", ended=False)
        await controller.release(FLEET)
        assert await controller.take(FLEET)
        recovered = controller.owned()[FLEET].machine
        assert isinstance(recovered, Fleet)
        recovered.validate()
        assert recovered.table() == view.table
        for task in tasks:
            task.cancel()

    run(main())


# -- GuardWait --------------------------------------------------------------------------------------------------------


class Waiting:
    """A run shard with one running task on eu, and a table that the test publishes."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.store = MemoryStore(MemoryEtcd(self.clock))
        self.view = View(self.store, self.clock)
        self.controller = OneReplica(self.clock, self.store)
        self.guard = GuardWait(self.clock, self.controller, self.view)  # type: ignore[arg-type]
        self.controller.listen(self.guard)
        self.shard = RunShard()
        self.fleet = World()

    async def publish(self, table: FleetTable) -> None:
        await self.store.txn(Txn([], [Put(keys.FLEET_TABLE, encode_table(table))]), timeout=1.0)
        await asyncio.sleep(0.01)

    async def place(self) -> None:
        """One task of one run, placed on generation 1."""
        run_ = CreateRun(
            request=Request("", ""),
            namespace="ns",
            run_id="r",
            run_uid="run",
            deadline=self.clock.wall() + 3600.0,
            priority=0,
            tasks=(GraphTask("t", (), TaskSpec(("true",))),),
        )
        await self.controller.submit("00", run_, timeout=1.0)
        (line,) = self.shard.demand()
        grant = Grant("u-eu", 1, line.key, 1)
        await self.controller.submit("00", TakeGrants(1, (grant,)), timeout=1.0)
        assert [a.n for a in self.shard.live_on("u-eu")] == [1]

    def fences(self) -> list[GenerationFenced]:
        return [command for _, command in self.controller.said if isinstance(command, GenerationFenced)]

    def tables(self) -> list[int]:
        return [command.table.seq for _, command in self.controller.said if isinstance(command, TakeTable)]


def waiting(play: Callable[[Waiting, Fleet], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        w = Waiting()
        following = asyncio.create_task(w.view.run())
        looping = asyncio.create_task(w.guard.run())
        await w.view.ready()
        fleet = w.fleet.fleet
        w.fleet.controller.take(FLEET, fleet)
        await w.fleet.open()
        w.controller.take("00", w.shard)
        await w.publish(fleet.table())
        await w.place()
        await play(w, fleet)
        following.cancel()
        looping.cancel()

    run(main())


async def lose(w: Waiting, evidence: Evidence = Evidence.TIMED) -> None:
    await w.fleet.controller.submit(FLEET, LoseCluster("u-eu", 1, evidence, "x"), timeout=1.0)
    await w.publish(w.fleet.fleet.table())


def test_s5_an_owner_waits_g_from_seeing_the_end() -> None:
    async def play(w: Waiting, fleet: Fleet) -> None:
        await lose(w)
        assert w.tables()[-1] == fleet.table().seq, "the level goes to the shard at once"
        await w.clock.sleep(G - 0.1)
        assert w.fences() == []
        await w.clock.sleep(0.2)
        assert w.fences() == [GenerationFenced("u-eu", 1, Evidence.TIMED)]

    waiting(play)


def test_s5_a_new_owner_waits_g_from_its_taking() -> None:
    async def play(w: Waiting, fleet: Fleet) -> None:
        await lose(w)
        await w.clock.sleep(G - 1.0)
        w.controller.drop("00")
        w.controller.take("00", w.shard)
        await asyncio.sleep(0.01)
        assert w.tables()[-1] == fleet.table().seq, "compared before anything else"
        await w.clock.sleep(G - 0.1)
        assert w.fences() == []
        await w.clock.sleep(0.2)
        assert len(w.fences()) == 1

    waiting(play)


def test_s5_fences_and_tables_are_told_again_while_work_is_live_there() -> None:
    async def play(w: Waiting, fleet: Fleet) -> None:
        w.controller.post = lambda shard, command: None  # type: ignore[method-assign]
        await lose(w)
        await w.clock.sleep(G + 0.5)
        del w.controller.post  # the full inbox is over
        await w.clock.sleep(LEVEL + 0.5)
        assert len(w.fences()) == 1
        assert w.tables()[-1] == fleet.table().seq

    waiting(play)


def test_s5_the_current_generation_is_never_fenced() -> None:
    async def play(w: Waiting, fleet: Fleet) -> None:
        await w.clock.sleep(10 * G)
        assert w.fences() == []
        assert fleet.table().clusters["u-eu"].generation == 1

    waiting(play)


def test_s5_a_generation_that_the_table_has_forgotten_ended_without_evidence() -> None:
    async def play(w: Waiting, fleet: Fleet) -> None:
        for boot in range(40):
            await w.fleet.open(boot_id=f"later{boot}")
        await w.publish(fleet.table())
        assert fleet.table().clusters["u-eu"].find(1) is None
        await w.clock.sleep(G + 0.2)
        assert w.fences()[0] == GenerationFenced("u-eu", 1, Evidence.NONE)

    waiting(play)
