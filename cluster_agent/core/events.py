"""What can happen to an agent. Past tense; every field is a value. `stream` numbers the agent's own streams."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster_agent.core.model import ArtifactRef, AttemptKey, Ended, Epoch, Mark, WorkSpec


@dataclass(frozen=True, slots=True)
class StreamOpened:
    """A connection stands; Hello comes next."""

    stream: int


@dataclass(frozen=True, slots=True)
class StreamClosed:
    """It is gone."""

    stream: int


@dataclass(frozen=True, slots=True)
class Welcomed:
    """The session stands (S1). Seconds for F and K."""

    stream: int
    generation: int
    resumed: bool
    cluster_uid: str
    federation_uid: str
    fence_seconds: float
    kill_seconds: float


@dataclass(frozen=True, slots=True)
class HeartbeatAcked:
    """A heartbeat sent at `sent_boot` was answered when the server's wall clock said `server_wall_ms` (S2, F5, D1)."""

    stream: int
    generation: int
    sent_boot: float
    server_wall_ms: int


@dataclass(frozen=True, slots=True)
class OwnerMessage:
    """What every message of a shard's owner carries (F3, J12)."""

    stream: int
    shard: str
    epoch: Epoch
    mark: Mark | None


@dataclass(frozen=True, slots=True)
class Assignment:
    """One attempt to run."""

    key: AttemptKey
    spec: WorkSpec


@dataclass(frozen=True, slots=True)
class Dispatched(OwnerMessage):
    """Attempts placed here; also confirms adopted and void ones (F3)."""

    generation: int
    dispatch_no: int
    assignments: tuple[Assignment, ...]


@dataclass(frozen=True, slots=True)
class StopOrdered(OwnerMessage):
    """Attempts to tombstone and kill, whatever their generation (F8)."""

    keys: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class Adopted(OwnerMessage):
    """Attempts that live in `generation` now (S6)."""

    generation: int
    keys: tuple[AttemptKey, ...]


@dataclass(frozen=True, slots=True)
class ReportsSettled(OwnerMessage):
    """Attempts whose report is committed, and checkpoints (by name) that are settled."""

    keys: tuple[AttemptKey, ...]
    checkpoints: tuple[tuple[AttemptKey, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WorkStarted:
    """A workload runs."""

    key: AttemptKey
    wall_ms: int


@dataclass(frozen=True, slots=True)
class WorkRefused:
    """The executor will never start it and has it tombstoned."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class WorkEnded:
    """All its processes are gone. `seconds`: its run time, as the executor measured it."""

    key: AttemptKey
    ended: Ended
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkSaved:
    """It runs, and has a newer checkpoint, which is stored."""

    key: AttemptKey
    checkpoint: ArtifactRef


@dataclass(frozen=True, slots=True)
class WorkStopped:
    """A stop is confirmed: tombstoned, no process, no spawn pending (F8)."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Census:
    """What the executor holds, at the moment of (re)joining it (G3): what runs, and what ended unnoticed."""

    running: Mapping[AttemptKey, int]
    """What has a process, or is about to, and the generation whose lease it is on."""
    ended: tuple[WorkEnded, ...]


@dataclass(frozen=True, slots=True)
class ExecutorLost:
    """The executor died; a census of its successor says what is left."""


@dataclass(frozen=True, slots=True)
class GuardSilence:
    """The guard stopped ticking, or ticks again (G2)."""

    silent: bool


@dataclass(frozen=True, slots=True)
class DiskState:
    """The journal cannot be written, or can again."""

    writable: bool


@dataclass(frozen=True, slots=True)
class DrainOrdered:
    """An operator wants this agent gone: no new work, and what runs is killed (S5)."""


Event = (
    StreamOpened
    | StreamClosed
    | Welcomed
    | HeartbeatAcked
    | Dispatched
    | StopOrdered
    | Adopted
    | ReportsSettled
    | WorkStarted
    | WorkRefused
    | WorkEnded
    | WorkSaved
    | WorkStopped
    | Census
    | ExecutorLost
    | GuardSilence
    | DiskState
    | DrainOrdered
)
