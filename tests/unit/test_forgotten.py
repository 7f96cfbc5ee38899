"""Runs that a restore has made nobody's are told from what replicas and agents remember (PROTOCOL J12, F8)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from baton.v1 import run_pb2
from control_plane.core.commands import CreateRun, Request
from control_plane.core.model import GraphTask, TaskSpec
from control_plane.core.shard import RunShard
from control_plane.forgotten import Forgotten
from control_plane.history import Archive, MemoryHistory
from control_plane.peers import CallContext, CallLost
from control_plane.store.memory import MemoryEtcd, MemoryStore
from control_plane.survivors import Survivors
from lab.virtual_time import VirtualClock, run
from tests.unit.one_replica import OneReplica


class Town:
    """Replicas r1 and r2, of which each may be gone; one view and one history."""

    def __init__(self) -> None:
        self.members = {"r1": None, "r2": None}
        self.incarnation, self.restore_suspected = 1, ""
        self.handlers: dict[tuple[str, str], Any] = {}
        self.hear: list[Callable[[str], None]] = []
        self.living: set[str] = set()
        self.history = MemoryHistory()
        self.clock = VirtualClock()

    def subscribe(self, callback: Callable[[str], None]) -> None:
        self.hear.append(callback)

    def member(self, replica: str, survivors: Survivors) -> Forgotten:
        seat = Seat(self, replica)
        made = Forgotten(seat, self, self.history, survivors, self.living.__contains__)  # type: ignore[arg-type]
        made.serve_peers(seat)  # type: ignore[arg-type]
        return made

    def suspect(self, text: str) -> None:
        self.restore_suspected = text
        for callback in self.hear:
            callback("restore")


class Seat:
    """A replica's router and calls."""

    def __init__(self, town: Town, replica: str) -> None:
        self.town, self.replica = town, replica

    def register(self, method: str, handler: Any) -> None:
        self.town.handlers[self.replica, method] = handler

    async def ask(self, replica: str, method: str, payload: bytes, *, timeout: float) -> AsyncIterator[bytes]:
        handler = self.town.handlers.get((replica, method))
        if handler is None:
            raise CallLost("gone")
        async for answer in handler(payload, CallContext(method, timeout, "", "")):
            json.loads(answer)
            yield answer


async def remembering(town: Town, *uids: str) -> Survivors:
    """What a replica remembers whose shard has these open runs."""
    survivors = Survivors(town.clock)
    controller = OneReplica(town.clock, MemoryStore(MemoryEtcd(town.clock)))
    controller.listen(survivors)
    controller.take("00", RunShard())
    for uid in uids:
        tasks = (GraphTask("t", (), TaskSpec(("true",))),)
        create = CreateRun(Request("", ""), "ns", uid, uid, town.clock.wall() + 3600.0, 0, tasks)
        await controller.submit("00", create, timeout=1.0)
    return survivors


def test_j12_what_is_remembered_and_known_to_nobody_is_told_by_any_replica() -> None:
    async def main() -> None:
        town = Town()
        first = town.member("r1", await remembering(town, "lost", "goes-on", "ended"))
        second = town.member("r2", Survivors(town.clock))
        second.held(["early"], "eu")
        town.suspect("?")
        assert await second.lines() == [], "nobody can know yet"
        town.suspect("")
        town.incarnation = 2
        town.living.add("goes-on")
        past = run_pb2.Run(name="namespaces/ns/runs/ended", uid="ended", state=run_pb2.RUN_STATE_SUCCEEDED)
        await town.history.insert([Archive(1, past, (), ())])
        second.held(["lost", "unnamed", "ended"], "eu")
        second.held(["lost"], "ap")
        told = ["namespaces/ns/runs/lost (work of it on ap, eu)", "run of uid unnamed (work of it on eu)"]
        assert await first.lines() == await second.lines() == told
        town.handlers.clear()
        assert await second.lines() == [
            "run of uid lost (work of it on ap, eu)",
            "run of uid unnamed (work of it on eu)",
        ]

    run(main())


def test_without_a_restore_work_of_unknown_runs_is_what_has_ended() -> None:
    async def main() -> None:
        town = Town()
        only = town.member("r1", Survivors(town.clock))
        only.held(["ended-and-pruned"], "eu")
        town.incarnation = 2
        assert await only.lines() == []
        await asyncio.sleep(0)

    run(main())
