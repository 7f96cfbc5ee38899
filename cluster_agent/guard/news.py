"""What the guard has to tell, gathered over one turn of its loop: exits on disk first, then told, in one record and one message.

An exit is told when the last process of the attempt is gone, and kept until `forget`; one that a full disk would not take is told all
the same and written when there is room. A start is told when it is a moment old; that of a call which ended before rides in
its end (DESIGN 13).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from cluster_agent.executors.base import Exited
from cluster_agent.guard import host
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.protocol import Message, exit_to_wire

START_SECONDS = 0.02
"""How old a start is when it is told. Smaller: one more message through all of the system for a short task; larger: people see later
that a long one runs."""

Emit = Callable[[Message], None]


class News:
    """The starts and ends of one turn."""

    def __init__(self, ledger: Ledger, emit: Emit) -> None:
        self._ledger, self._emit = ledger, emit
        self._started: dict[str, tuple[int, float]] = {}
        self._starts_due: float | None = None
        """When they are told, boot clock; None: there are none."""
        self._exits: dict[str, Message] = {}
        self._recorded: list[Message] = []
        self.unrecorded: dict[str, Message] = {}
        """Exits a full disk would not take; told already, written when there is room."""

    def started(self, key: str, pid: int, wall: float) -> None:
        """It runs."""
        self._started[key] = (pid, wall)
        if self._starts_due is None:
            self._starts_due = host.boot() + START_SECONDS

    def unstarted(self, key: str) -> None:
        """It was taken back before it began."""
        self._started.pop(key, None)

    @property
    def next_wakeup(self) -> float | None:
        """When `tell` has starts to tell."""
        return self._starts_due

    def exited(self, key: str, exited: Exited, *, bare: bool = False) -> None:
        """All of it is gone. `bare`: it left no log and no directory."""
        wire = self._exits[key] = exit_to_wire(exited)
        started = self._started.pop(key, None)
        if started is not None:
            wire["pid"] = started[0]
        if bare:
            wire["bare"] = True

    def tell(self) -> None:
        """What happened since the last time."""
        self.record()
        if self._recorded:
            self._emit({"ev": "exits", "exits": self._recorded})
            self._recorded = []
        if self._starts_due is not None and host.boot() >= self._starts_due:
            if self._started:
                self._emit({"ev": "started", "starts": [(key, *fact) for key, fact in self._started.items()]})
            self._started, self._starts_due = {}, None

    def record(self) -> None:
        """Have the exits on disk; they are still to be told."""
        if not self._exits:
            return
        exits, self._exits = self._exits, {}
        try:
            self._ledger.exited_together(exits)
        except OSError:
            self.unrecorded.update(exits)
        self._recorded.extend(exits.values())

    def supersede(self) -> None:
        """Somebody is about to be told all of it by a census."""
        self.record()
        self._recorded, self._started, self._starts_due = [], {}, None

    def catch_up(self) -> None:
        """Write what a full disk held up."""
        for key in list(self.unrecorded):
            with suppress(OSError):
                self._ledger.exited(key, self.unrecorded[key])
                del self.unrecorded[key]
