"""What this replica still knows of its shards while the store is away or rewound (PROTOCOL J10, J12).

Theory. A restore takes back what was committed after the backup; a replica that lives through it holds that in memory until it takes
its shards anew. Two things of it stay true whatever the store says now. A run that was final at a commit is final: it was committed
and told, so history may have it at any time, needs no lease for it, and a repetition is absorbed (J10). And the names of runs that
went on are what a person needs who is told by an agent that it holds work of some uid.

So finality is noted at commits, never read from a machine alone, which may show a decision in flight (J2). A shard that was dropped is
kept for a while, for owner keys are gone from a restored store before anybody has noticed the restore.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from baton.clock import Clock
from control_plane.core.model import FLEET
from control_plane.core.shard import RunShard

if TYPE_CHECKING:
    from control_plane.controller import OwnedShard
    from control_plane.core.commands import Outbox

KEEP = 30.0
"""Seconds that the state of a dropped shard is kept: agents and replicas are back at a restored store within seconds, and one mark is
enough. Shorter: a slow restart of everything loses the ends of runs; longer: memory of shards that were handed over."""

MAX_NAMES = 1_000
"""Open runs whose names are remembered of one restore: a page that a person reads. More are not named."""


@dataclass(slots=True)
class Survivor:
    """A shard as it was known at its last commit here."""

    shard: OwnedShard
    final: set[str]
    """Uids of runs that were final at a commit; some are archived by now."""
    dropped: float | None = None
    """Boot clock when it was let go of; None while it is owned."""

    @property
    def machine(self) -> RunShard:
        """The state; a decision in flight may show in it."""
        return cast(RunShard, self.shard.machine)

    def unarchived(self) -> list[str]:
        """Runs that were final at a commit and have not been archived."""
        return [uid for uid in self.machine.archivable() if uid in self.final]


class Survivors:
    """A controller `Listener`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._owned: dict[str, Survivor] = {}
        self._dropped: list[Survivor] = []

    def taken(self, shard: OwnedShard) -> None:
        """See `controller.Listener`."""
        if shard.id != FLEET:
            self._owned[shard.id] = Survivor(shard, set(cast(RunShard, shard.machine).archivable()))

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """See `controller.Listener`."""
        survivor = self._owned.get(shard.id)
        if survivor is not None and outbox.finished:
            survivor.final.intersection_update(survivor.machine.archivable())
            survivor.final.update(outbox.finished)

    def dropped(self, shard: str) -> None:
        """See `controller.Listener`."""
        survivor = self._owned.pop(shard, None)
        if survivor is not None:
            survivor.dropped = self._clock.boot()
            self._dropped.append(survivor)

    def with_ends(self) -> list[Survivor]:
        """Shards that are owned now, and in which a run has ended that is not archived."""
        return [each for each in self._owned.values() if each.final and each.machine.archivable()]

    def all_of(self, incarnation: int) -> Iterator[Survivor]:
        """Every shard known here as of that incarnation or a later one, which the store may have lost; those that were dropped lately
        too."""
        yield from [each for each in (*self._dropped, *self._owned.values()) if each.shard.incarnation >= incarnation]

    def forget_old(self) -> None:
        """Let go of what was dropped long ago."""
        if not self._dropped:
            return
        self._dropped = [
            each for each in self._dropped if each.dropped is not None and self._clock.boot() - each.dropped < KEEP
        ]

    def open_runs(self, incarnation: int) -> dict[str, str]:
        """Uid -> name of runs that were not final, at most MAX_NAMES."""
        found: dict[str, str] = {}
        for survivor in self.all_of(incarnation):
            machine = survivor.machine
            for uid in set(machine.event_numbers()).difference(machine.archivable()):
                view = machine.run_by_uid(uid)
                if view is not None:
                    found[uid] = view.name
                if len(found) >= MAX_NAMES:
                    return found
        return found
