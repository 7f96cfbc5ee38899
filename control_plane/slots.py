"""One owned shard as the cycle sees it: its handle for others, its inbox, and the decision that is in flight
(PROTOCOL J2).

Theory. A shard is *open* while its machine shows committed state and *closed* while a decision of it is in flight, or
while it is taken or rebuilt. Everything that arrives waits in the inbox; only the cycle looks at it. So no command,
read or timer ever sees, or builds on, what is not durable.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

from control_plane.core.commands import Command, Outbox
from control_plane.core.events import Event
from control_plane.core.machine import Machine
from control_plane.core.model import Stamp
from control_plane.journal import Entry, Head, Verdict
from control_plane.refusals import NotOwned, OutcomeUnknown
from control_plane.store.base import Compare, Put


@dataclass(slots=True)
class OwnedShard:
    """A shard this replica owns, as loops and services may see it. (`seq`, `nonce`) is the mark of its last committed
    batch (PROTOCOL J12); (`incarnation`, `epoch_revision`) the epoch agents compare. `lost` once it is dropped: let
    go of it."""

    id: str
    machine: Machine
    epoch_revision: int
    incarnation: int
    seq: int
    nonce: str
    lost: bool = False
    owner_value: bytes = b""
    """What the owner key holds: the fence of this taking (PROTOCOL J4)."""
    log_bytes: int = 0
    """Bytes of log written and found since the taking; rises only."""
    taken_boot: float = 0.0
    """Boot clock of the taking (PROTOCOL O4: minimum hold)."""


class Listener(Protocol):
    """Hears of owned shards, on the loop, in order. Must be quick and must not raise."""

    def taken(self, shard: OwnedShard) -> None:
        """Recovered and open: derive all effects from its state (PROTOCOL J7)."""
        ...

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """A batch of it is durable; `outbox` hints at the effects that are due (PROTOCOL J7)."""
        ...

    def dropped(self, shard: str) -> None:
        """It is lost or released."""
        ...


SidePuts = Callable[[OwnedShard, Sequence[Event]], Sequence[Put]]
"""Extra puts that go in the same transaction as a batch with these events."""


@dataclass(slots=True, eq=False)
class Item:
    """A command in an inbox. `reply` is None for a posted one; a cancelled `reply` means that nobody waits any more."""

    command: Command
    actor: str
    reply: asyncio.Future[Any] | None
    condition: Compare | None = None
    decided: bool = False

    @property
    def abandoned(self) -> bool:
        """Its caller went away before it was decided: it must not be."""
        return self.reply is not None and self.reply.done()

    def succeed(self, value: object) -> None:
        """Answer, if anybody still listens."""
        if self.reply is not None and not self.reply.done():
            self.reply.set_result(value)

    def fail(self, error: Exception) -> None:
        """Answer with a failure, if anybody still listens."""
        if self.reply is not None and not self.reply.done():
            self.reply.set_exception(error)


@dataclass(slots=True, eq=False)
class Read:
    """A question that waits for the shard to open (PROTOCOL J8)."""

    question: Callable[[Any], Any]
    answer: asyncio.Future[Any]


Answer = tuple[Item, object]
"""An item and its reply; an Exception is raised to its caller."""


@dataclass(slots=True)
class Decision:
    """A decided batch, and how far it is committed: `values[:written]` are."""

    stamp: Stamp
    values: list[bytes]
    side_puts: tuple[Put, ...]
    answers: list[Answer]
    condition: Compare | None = None
    written: int = 0

    @property
    def last(self) -> bool:
        """Only its last part is missing: writing that one makes it take effect."""
        return self.written == len(self.values) - 1


class Phase(Enum):
    """What the cycle may do with a shard."""

    TAKING = "taking"
    OPEN = "open"
    CLOSED = "closed"
    """A decision is in flight."""
    REBUILDING = "rebuilding"
    """A decision was discarded (J5) or failed in the middle; its state is read anew."""


@dataclass(slots=True, eq=False)
class Slot:
    """See the module."""

    shard: str
    phase: Phase = Phase.TAKING
    handle: OwnedShard | None = None
    inbox: deque[Item] = field(default_factory=deque)
    reads: deque[Read] = field(default_factory=deque)
    decision: Decision | None = None
    releasing: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """No decision is in flight."""
    due: float = math.inf
    """The machine's next timer (wall time), not before `quiet_until`, as long as `due_of` is the machine: it moves only by
    deciding."""
    due_of: Machine | None = None
    quiet_until: float = 0.0
    """Wall time before which a timer that brought nothing is not asked again."""

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def owned(self) -> OwnedShard:
        """The handle; only after TAKING."""
        if self.handle is None:
            raise RuntimeError(f"shard {self.shard} is still being taken")
        return self.handle

    def entry(self) -> Entry:
        """The next part of its decision, under its fence."""
        decision, owned = self.decision, self.owned
        if decision is None:
            raise RuntimeError(f"shard {self.shard} has nothing to commit")
        return Entry(
            shard=self.shard,
            owner=owned.owner_value,
            before=Head(owned.seq, owned.nonce),
            nonce=decision.stamp.nonce,
            value=decision.values[decision.written],
            incarnation=owned.incarnation,
            side_puts=decision.side_puts if decision.last else (),
        )

    def fail_all(self, verdict: Verdict | None) -> None:
        """The shard is gone. What was not decided is NOT applied; what was is as `verdict` says (PROTOCOL J6)."""
        decision, self.decision = self.decision, None
        if decision is not None:
            # Parts before the last have no effect, so a batch whose last part was never sent is surely not applied.
            unknown = decision.last and verdict is not Verdict.NOT_APPLIED
            for item, _ in decision.answers:
                item.fail(
                    OutcomeUnknown(f"shard {self.shard} was lost while a decision was in flight")
                    if unknown
                    else NotOwned(self.shard)
                )
        for item in self.inbox:
            item.fail(NotOwned(self.shard))
        for read in self.reads:
            if not read.answer.done():
                read.answer.set_exception(NotOwned(self.shard))
        self.inbox.clear()
        self.reads.clear()
        self.idle.set()
