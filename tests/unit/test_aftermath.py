"""Owners ask history for their live runs in a later incarnation, and only there (PROTOCOL J12)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from baton.v1 import run_pb2
from control_plane.aftermath import AGAIN, Aftermath
from control_plane.core.commands import CreateRun, Request, TakeHistory
from control_plane.core.model import GraphTask, RunState, TaskSpec
from control_plane.core.shard import RunShard
from control_plane.history import Archive, MemoryHistory
from control_plane.store.memory import MemoryEtcd, MemoryStore
from lab.virtual_time import VirtualClock, run
from tests.unit.one_replica import OneReplica


class Owner(OneReplica):
    """Its store was restored so often."""

    incarnation = 2

    def take(self, shard: str, machine: Any) -> None:
        listeners, self._listeners = self._listeners, []
        super().take(shard, machine)
        self._listeners = listeners
        self._owned[shard].incarnation = self.incarnation
        for listener in listeners:
            listener.taken(self._owned[shard])

    async def read(self, shard: str, question: Callable[[RunShard], Any], *, timeout: float) -> Any:
        return question(self._owned[shard].machine)  # type: ignore[arg-type]


class World:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.controller = Owner(self.clock, MemoryStore(MemoryEtcd(self.clock)))
        self.history = MemoryHistory()
        self.aftermath = Aftermath(self.history, self.controller, self.clock)  # type: ignore[arg-type]
        self.machine = RunShard()

    async def before(self) -> None:
        """Two runs are live as the restored store says; history has seen the end of `done`."""
        self.controller.take("00", self.machine)
        for uid in ("done", "open"):
            tasks = (GraphTask("t", (), TaskSpec(("true",))),)
            create = CreateRun(Request("", ""), "ns", uid, uid, self.clock.wall() + 3600.0, 0, tasks)
            await self.controller.submit("00", create, timeout=1.0)
        past = run_pb2.Run(name="namespaces/ns/runs/done", uid="done", state=run_pb2.RUN_STATE_SUCCEEDED)
        await self.history.insert([Archive(1, past, (), ())])
        self.controller.drop("00")

    def taken(self) -> list[TakeHistory]:
        return [command for _, command in self.controller.said if isinstance(command, TakeHistory)]


def story(play: Callable[[World], Any], *, incarnation: int = 2) -> None:
    async def main() -> None:
        world = World()
        await world.before()
        world.controller.incarnation = incarnation
        world.controller.listen(world.aftermath)
        loop = asyncio.create_task(world.aftermath.run())
        await play(world)
        assert not loop.done()
        loop.cancel()

    run(main())


def test_j12_a_live_run_that_history_holds_as_finished_takes_its_outcome() -> None:
    async def play(world: World) -> None:
        world.controller.take("00", world.machine)
        await world.clock.sleep(0.1)
        assert world.taken() == [TakeHistory("done", RunState.SUCCEEDED)]
        assert world.machine.run_by_uid("done") is None
        assert world.machine.run_by_uid("open") is not None

    story(play)


def test_j12_in_the_first_incarnation_nobody_asks() -> None:
    async def play(world: World) -> None:
        world.controller.take("00", world.machine)
        await world.clock.sleep(3 * AGAIN)
        assert world.taken() == []

    story(play, incarnation=1)


def test_j12_a_history_that_is_down_is_asked_again_by_whoever_owns_the_shard() -> None:
    async def play(world: World) -> None:
        world.history.down = True
        world.controller.take("00", world.machine)
        await world.clock.sleep(3 * AGAIN)
        assert world.taken() == []
        world.controller.drop("00")
        world.history.down = False
        await world.clock.sleep(3 * AGAIN)
        assert world.taken() == []
        world.controller.take("00", world.machine)
        await world.clock.sleep(0.1)
        assert len(world.taken()) == 1

    story(play)
