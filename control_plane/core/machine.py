"""The shape both state machines share: `core.shard.RunShard` and `core.fleet.Fleet`.

A machine owns one shard's state. `handle` decides and emits; `apply` folds. The controller guarantees: one batch at a time
per machine; every emitted event is committed as part of that batch or the whole machine is thrown away (PROTOCOL J2, J6).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from control_plane.core.commands import Command, Outbox
from control_plane.core.events import ARTIFACTS_LEVEL, Event
from control_plane.core.model import Stamp


class Batch:
    """One batch in the making: a stamp, and the events so far. `emit` applies at once. `level` is the federation's feature level:
    no event above it may be emitted (PROTOCOL J11)."""

    __slots__ = ("_apply", "events", "level", "stamp")

    def __init__(self, stamp: Stamp, apply: Callable[[Event, Stamp], None], level: int = ARTIFACTS_LEVEL) -> None:
        self.stamp = stamp
        self.level = level
        self.events: list[Event] = []
        self._apply = apply

    @property
    def now(self) -> float:
        """Wall seconds of this batch."""
        return self.stamp.wall

    def emit(self, event: Event) -> None:
        """Decide `event`: it is applied now and journaled with the batch."""
        self._apply(event, self.stamp)
        self.events.append(event)


class Machine(Protocol):
    """A shard's state and its rules."""

    outbox: Outbox

    def handle(self, command: Command, batch: Batch) -> object:
        """Decide. Returns the command's reply; raises `Refused` having emitted nothing."""
        ...

    def settle(self, batch: Batch) -> None:
        """Called once after the last command of a batch: follow-ups that any of them made possible (skips, binding ready
        tasks to grants, finishing runs). Idempotent."""
        ...

    def apply(self, event: Event, stamp: Stamp) -> None:
        """Fold one event; total and deterministic on every log that `handle` can produce."""
        ...

    def due(self) -> float | None:
        """Wall time of the next timer, None if there is none."""
        ...

    def dump(self) -> Iterable[Event]:
        """Events that rebuild this state on an empty machine (snapshots, PROTOCOL J9)."""
        ...

    def validate(self) -> None:
        """Re-check all invariants across collections; raises AssertionError with the story. For tests and simulation."""
        ...
