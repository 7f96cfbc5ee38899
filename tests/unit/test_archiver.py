"""Ended runs come into history with and without a store, once, and never before their end is committed (PROTOCOL J10, J12)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from baton.v1 import run_pb2
from control_plane.archiver import DELAY, Archiver, Translator
from control_plane.core.commands import Archived, CancelRun, CreateRun, Request
from control_plane.core.model import GraphTask, TaskSpec
from control_plane.core.shard import RunShard
from control_plane.history import MemoryHistory
from control_plane.refusals import StoreDown
from control_plane.store.memory import MemoryEtcd, MemoryStore
from control_plane.survivors import KEEP, Survivors
from lab.virtual_time import VirtualClock, run
from tests.unit.one_replica import OneReplica


class Owner(OneReplica):
    """One whose lease may be gone: then it answers no reads, and what is posted waits."""

    acting = True

    async def read(self, shard: str, question: Callable[[RunShard], Any], *, timeout: float) -> Any:
        if not self.acting:
            await asyncio.sleep(timeout)
            raise StoreDown(shard)
        return question(self._owned[shard].machine)  # type: ignore[arg-type]

    def post(self, shard: str, command: Any) -> None:
        if self.acting and shard in self._owned:
            super().post(shard, command)


class CountingHistory(MemoryHistory):
    inserts = 0

    async def insert(self, archives: Any) -> None:
        self.inserts += len(archives)
        await super().insert(archives)


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.controller = Owner(self.clock, MemoryStore(MemoryEtcd(self.clock)))
        self.history = CountingHistory()
        self.survivors = Survivors(self.clock)
        self.controller.listen(self.survivors)
        self.machine = RunShard()
        self.heard = (1, False)

    def archiver(self) -> asyncio.Task[None]:
        state = run_pb2.RUN_STATE_CANCELLED
        translator = Translator(
            run=lambda view, _shard: run_pb2.Run(name=view.name, uid=view.uid, state=state, etag=view.etag),
            task=lambda view: run_pb2.TaskStatus(index=view.index),
            event=lambda view, _ids: run_pb2.RunEvent(number=view.number),
        )
        made = Archiver(
            self.history,
            self.controller,  # type: ignore[arg-type]
            self.clock,
            translator,
            survivors=self.survivors,
            suspected=lambda: self.heard,
        )
        return asyncio.create_task(made.run())

    async def create(self, uid: str) -> None:
        tasks = (GraphTask("t", (), TaskSpec(("true",))),)
        create = CreateRun(Request("", ""), "ns", uid, uid, self.clock.wall() + 3600.0, 0, tasks)
        await self.controller.submit("00", create, timeout=1.0)

    async def end(self, uid: str) -> None:
        await self.controller.submit("00", CancelRun(Request("", ""), "ns", uid, "enough"), timeout=1.0)

    async def kept(self, uid: str) -> bool:
        return await self.history.by_uid(uid) is not None

    def archived(self) -> list[str]:
        return [command.run for _, command in self.controller.said if isinstance(command, Archived)]


def story(play: Callable[[World], Any]) -> None:
    async def main() -> None:
        world = World()
        world.controller.take("00", world.machine)
        for uid in ("ended", "open"):
            await world.create(uid)
        loop = world.archiver()
        await play(world)
        assert not loop.done()
        loop.cancel()

    run(main())


def test_j10_a_run_is_archived_some_seconds_after_its_end() -> None:
    async def play(world: World) -> None:
        await world.end("ended")
        await world.clock.sleep(DELAY - 1)
        assert not await world.kept("ended")
        await world.clock.sleep(2)
        assert await world.kept("ended")
        assert world.archived() == ["ended"]
        assert not await world.kept("open")

    story(play)


def test_the_delay_counts_from_the_end_and_not_from_each_owner() -> None:
    async def play(world: World) -> None:
        await world.end("ended")
        await world.clock.sleep(DELAY - 1)
        world.controller.drop("00")
        world.controller.take("00", world.machine)
        await world.clock.sleep(2)
        assert await world.kept("ended")

    story(play)


def test_j10_without_a_store_history_has_it_all_the_same_and_once() -> None:
    async def play(world: World) -> None:
        await world.end("ended")
        world.controller.acting = False
        await world.clock.sleep(DELAY + 2)
        assert await world.kept("ended")
        assert world.archived() == []
        assert world.history.inserts == 1
        world.controller.acting = True
        await world.clock.sleep(2 * DELAY)
        assert world.archived() == ["ended"]

    story(play)


def test_j12_a_suspected_restore_brings_every_ended_run_into_history_at_once() -> None:
    """Also of a shard whose owner key the restored store does not have."""

    async def play(world: World) -> None:
        await world.end("ended")
        world.controller.drop("00")
        world.controller.acting = False
        world.heard = (1, True)
        await world.clock.sleep(1.0)
        assert await world.kept("ended")
        assert not await world.kept("open")
        await world.clock.sleep(60.0)
        assert world.history.inserts == 1

    story(play)


def test_j10_an_end_that_is_decided_and_not_committed_is_no_end() -> None:
    async def play(world: World) -> None:
        heard, world.controller._listeners = world.controller._listeners, []  # its commit is told to nobody
        await world.end("ended")
        world.controller._listeners = heard
        world.controller.acting = False
        world.heard = (1, True)
        await world.clock.sleep(DELAY + 2)
        assert not await world.kept("ended")

    story(play)


def test_j12_an_end_of_an_earlier_incarnation_comes_too_late() -> None:
    """Its run may live again by now, and history would contradict what the store decides."""

    async def play(world: World) -> None:
        await world.end("ended")
        world.controller.drop("00")
        world.heard = (2, True)
        await world.clock.sleep(2.0)
        assert not await world.kept("ended")

    story(play)


def test_open_runs_are_remembered_by_name_for_a_while() -> None:
    async def play(world: World) -> None:
        await world.end("ended")
        world.controller.drop("00")
        assert world.survivors.open_runs(1) == {"open": "namespaces/ns/runs/open"}
        await world.clock.sleep(KEEP + 2)
        assert world.survivors.open_runs(1) == {}

    story(play)
