"""What the machine wants done. Imperative. A `Step` is carried out in order: records to disk, then the actions.

While the journal cannot be written, only actions with `needs_journal == False` may leave (DESIGN 12, full disk): they
take nothing on and forget nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from cluster_agent.core.capacity import FreeShape
from cluster_agent.core.model import ArtifactRef, AttemptKey, Ended, Epoch, Mark, Phase, WorkSpec
from cluster_agent.core.records import DURABLE, Record


@dataclass(frozen=True, slots=True)
class StartOrder:
    """One spawn. `stop_boot` is the deadline on this host's boot clock (D1), if there is one."""

    key: AttemptKey
    generation: int
    spec: WorkSpec
    stop_boot: float | None
    slots: int = 0
    """How many calls of its environment may run at once now (G5); 0: it starts at once."""


@dataclass(frozen=True, slots=True)
class StartWork:
    """Spawn each, in order."""

    orders: tuple[StartOrder, ...]
    needs_journal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class WidenWork:
    """So many calls of this one's environment may run at once now: it waited behind others and has a place (G5)."""

    key: AttemptKey
    slots: int
    needs_journal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class StopWork:
    """Tombstone and kill each. Safe without a journal: the executor's own tombstone is durable."""

    keys: tuple[AttemptKey, ...]
    grace_seconds: float
    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class AdoptWork:
    """These now live on the lease of `generation`."""

    keys: tuple[AttemptKey, ...]
    generation: int
    needs_journal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ForgetWork:
    """Their outcome is settled."""

    keys: tuple[AttemptKey, ...]
    needs_journal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class RenewLease:
    """A heartbeat sent at `sent_boot` was acknowledged for `generation` (G2)."""

    generation: int
    sent_boot: float
    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class SetBounds:
    """F and K of the session, seconds."""

    fence_seconds: float
    kill_seconds: float
    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class RejoinExecutor:
    """Connect again and take a census."""

    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class KillAll:
    """Kill every workload now (S5)."""

    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class KillIfSilent:
    """F has passed: if the guard, which should stop the work now, gives no sign of life, kill it and its work (G2)."""

    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class InventoryEntry:
    """One line of the inventory."""

    key: AttemptKey
    shard: str
    generation: int
    phase: Phase


@dataclass(frozen=True, slots=True)
class SendHello:
    """First message of a stream."""

    stream: int
    inventory: tuple[InventoryEntry, ...]
    marks: tuple[tuple[str, Mark], ...]
    last_generation: int
    federation_uid: str
    needs_journal: ClassVar[bool] = False


@dataclass(frozen=True, slots=True)
class SendReports:
    """Reports about one shard's attempts."""

    stream: int
    shard: str
    generation: int
    started: tuple[tuple[AttemptKey, int], ...] = ()
    finished: tuple[tuple[AttemptKey, Ended], ...] = ()
    rejected: tuple[tuple[AttemptKey, str], ...] = ()
    stopped: tuple[AttemptKey, ...] = ()
    checkpoints: tuple[tuple[AttemptKey, ArtifactRef], ...] = ()

    @property
    def needs_journal(self) -> bool:
        """A rejection is tombstoned before it is reported (F3); the rest is durable at the executor."""
        return bool(self.rejected)


@dataclass(frozen=True, slots=True)
class SendReceipt:
    """Dispatches up to this number arrived without a gap on this stream."""

    stream: int
    shard: str
    epoch: Epoch
    dispatch_no: int
    needs_journal: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class DropStream:
    """Close the stream and open another."""

    stream: int
    reason: str
    needs_journal: ClassVar[bool] = False


Action = (
    StartWork
    | WidenWork
    | StopWork
    | AdoptWork
    | ForgetWork
    | RenewLease
    | SetBounds
    | RejoinExecutor
    | KillAll
    | KillIfSilent
    | SendHello
    | SendReports
    | SendReceipt
    | DropStream
)


@dataclass(slots=True)
class Step:
    """What one step of the machine wants: records first, on the platter if `durable`, then the actions in order."""

    records: list[Record] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)

    @property
    def durable(self) -> bool:
        """Whether a record of this step must survive a power cut before the actions leave (F3, F4)."""
        return any(isinstance(record, DURABLE) for record in self.records)


@dataclass(frozen=True, slots=True)
class Vitals:
    """What a heartbeat says (S2, C4)."""

    generation: int
    shapes: tuple[FreeShape, ...]
    included: tuple[tuple[str, Epoch, int], ...]
    attempts: int
    queue_limit: int
    """Attempts that may wait beyond the room."""
