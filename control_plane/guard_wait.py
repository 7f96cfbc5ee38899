"""From the end of a generation to the permission for a copy, on every replica (PROTOCOL S5, F2, F5).

Theory. Fleet says that a generation has ended; that alone permits nothing. Every owner waits the generation's guard time G on
*its own* boot clock, from its own seeing of the end (or from taking the shard, if that was later: what the last owner waited
is not ours to count). Only then is the shard told that attempts there may be replaced; what that permits is the graph core's
business (F2, F7).

All of it is level, not edge: the table is handed to every owned shard on every change and again every few seconds, and a
fence is told again while attempts of that generation are live. So a message lost in a full inbox, or an attempt that was
placed a moment before its shard heard of the end, costs seconds and never correctness.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from baton.clock import Clock
from control_plane.bell import Bell
from control_plane.core.commands import GenerationFenced, TakeTable
from control_plane.core.model import FLEET, ClusterFacts, Evidence
from control_plane.core.shard import RunShard
from control_plane.view import View

if TYPE_CHECKING:
    from control_plane.controller import Controller, OwnedShard
    from control_plane.core.commands import Outbox

LEVEL = 5.0
"""Seconds after which tables and fences are told again. Smaller costs a scan of live attempts; larger heals losses later."""


class GuardWait:
    """Hands tables and fences to owned run shards. A controller `Listener`; one per replica."""

    def __init__(self, clock: Clock, controller: Controller, view: View) -> None:
        self._clock = clock
        self._controller = controller
        self._view = view
        self._bell = Bell(clock)
        self._seen: dict[tuple[str, int], float] = {}
        self._taken: dict[str, float] = {}
        self._told: dict[tuple[str, str, int], float] = {}
        self._levelled = float("-inf")
        view.subscribe(self._heard)

    # -- Listener -----------------------------------------------------------------------------------------------------

    def taken(self, shard: OwnedShard) -> None:
        """A new owner compares at once, and waits G from here (S5)."""
        if shard.id == FLEET:
            return
        self._taken[shard.id] = self._clock.boot()
        if self._view.table.seq:
            self._controller.post(shard.id, TakeTable(self._view.table))
        self._bell.ring()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """Nothing follows from a commit."""

    def dropped(self, shard: str) -> None:
        """Its waiting is over; a new taking starts anew."""
        self._taken.pop(shard, None)
        self._told = {key: told for key, told in self._told.items() if key[0] != shard}

    def _heard(self, topic: str) -> None:
        if topic == "table":
            self._see()
            self._tell_tables()
            self._bell.ring()

    # -- waiting ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Tell fences when they are due, until cancelled."""
        while True:
            now = self._clock.boot()
            if now - self._levelled >= LEVEL:
                self._tell_tables()
                self._levelled = now
            wait = LEVEL
            for shard in list(self._controller.owned().values()):
                if shard.id in self._taken and not cast(RunShard, shard.machine).levelled(0):
                    wait = min(wait, self._fence(shard))
                    await self._clock.sleep(0)  # scans of 32 shards must not hold up the loop in one piece
            await self._bell.wait(wait)

    def _tell_tables(self) -> None:
        table, owned = self._view.table, self._controller.owned()
        for shard in self._taken if table.seq else ():
            handle = owned.get(shard)
            if handle is None or not cast(RunShard, handle.machine).levelled(table.seq):
                self._controller.post(shard, TakeTable(table))

    def _see(self) -> None:
        """Note when each ended generation was first seen to have ended; forget those the table has forgotten."""
        now = self._clock.boot()
        seen = self._seen
        self._seen = {
            (uid, generation.number): seen.get((uid, generation.number), now)
            for uid, facts in self._view.table.clusters.items()
            for generation in facts.generations
            if generation.ended
        }

    def _fence(self, shard: OwnedShard) -> float:
        """Tell one shard the fences that are due; seconds until the next one may be."""
        wait = LEVEL
        now = self._clock.boot()
        machine = cast(RunShard, shard.machine)
        for uid, facts in self._view.table.clusters.items():
            if not facts.generations or (len(facts.generations) == 1 and not facts.generations[0].ended):
                continue
            for number in _generations_on(machine, uid):
                evidence, guard = _end_of(facts, number)
                if evidence is Evidence.UNSPECIFIED:
                    continue
                start = max(self._seen.setdefault((uid, number), now), self._taken[shard.id])
                due = max(start + guard, self._told.get((shard.id, uid, number), float("-inf")) + LEVEL)
                if due > now:
                    wait = min(wait, due - now)
                    continue
                self._told[shard.id, uid, number] = now
                self._controller.post(shard.id, GenerationFenced(uid, number, evidence))
        return wait


def _generations_on(machine: RunShard, cluster: str) -> set[int]:
    """Generations in which the shard has live attempts on a cluster."""
    views = (machine.attempt(attempt) for attempt in machine.live_on(cluster))
    return {view.generation for view in views if view is not None}


def _end_of(facts: ClusterFacts, number: int) -> tuple[Evidence, float]:
    """How a generation ended and its G; UNSPECIFIED while it lives. One that the table has forgotten ended without evidence,
    and waits as long as the longest known."""
    generation = facts.find(number)
    if generation is not None:
        return generation.evidence, generation.guard_seconds
    if number > facts.generation:
        return Evidence.UNSPECIFIED, 0.0  # newer than the table we have: it will come
    return Evidence.NONE, max(g.guard_seconds for g in facts.generations)
