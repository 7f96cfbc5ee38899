"""What the agent writes down: a record for each fact that must outlive the process. State is a fold of them.

`DURABLE` names the kinds that must be on the platter before anything else happens (F4: tombstones and epochs). The
others may lose their tail in a power cut: another boot id then says that every process is dead anyway (S6).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cluster_agent.core.model import AgentState, Attempt, AttemptKey, Demand, Ended, Epoch, Mark, Phase


@dataclass(frozen=True, slots=True)
class Booted:
    """The host came up with this boot id."""

    boot_id: str


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A Welcome: the generation, whose federation and cluster this is, and the bounds F and K in seconds."""

    generation: int
    cluster_uid: str
    federation_uid: str
    fence_seconds: float
    kill_seconds: float


@dataclass(frozen=True, slots=True)
class EpochRaised:
    """A shard has a newer owner (F3)."""

    shard: str
    epoch: Epoch


@dataclass(frozen=True, slots=True)
class MarkRaised:
    """A shard's log was seen further on (J12)."""

    shard: str
    mark: Mark


@dataclass(frozen=True, slots=True)
class Starting:
    """The executor is about to be asked to spawn it. Nothing that has this record is ever started again (F4)."""

    key: AttemptKey
    shard: str
    generation: int
    demand: Demand
    grace_seconds: float
    keep_at_fence: bool = False


@dataclass(frozen=True, slots=True)
class Moved:
    """A running attempt was adopted into another generation (S6)."""

    key: AttemptKey
    generation: int


@dataclass(frozen=True, slots=True)
class Finished:
    """It ended; kept until its report is acknowledged."""

    key: AttemptKey
    shard: str
    generation: int
    ended: Ended


@dataclass(frozen=True, slots=True)
class Tombstoned:
    """It must never start: a stop (`rejected` is empty; confirmed later by `StopConfirmed`) or a rejection (F3, F8)."""

    key: AttemptKey
    shard: str
    generation: int
    rejected: str = ""


@dataclass(frozen=True, slots=True)
class StopConfirmed:
    """The executor has no process of it and no spawn pending (F8)."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Forgotten:
    """Its report was acknowledged."""

    key: AttemptKey


Record = (
    Booted
    | SessionOpened
    | EpochRaised
    | MarkRaised
    | Starting
    | Moved
    | Finished
    | Tombstoned
    | StopConfirmed
    | Forgotten
)

DURABLE: tuple[type, ...] = (Booted, SessionOpened, EpochRaised, Tombstoned)


def apply(state: AgentState, record: Record) -> None:
    """Fold one record into `state`. Total: a record about an unknown attempt makes it or changes nothing."""
    match record:
        case Booted(boot_id):
            state.boot_id = boot_id
        case SessionOpened():
            state.generation = record.generation
            state.cluster_uid = record.cluster_uid
            state.federation_uid = record.federation_uid
            state.fence_seconds = record.fence_seconds
            state.kill_seconds = record.kill_seconds
        case EpochRaised(shard, epoch):
            state.epochs[shard] = epoch
        case MarkRaised(shard, mark):
            state.marks[shard] = mark
        case Starting():
            attempt = _held(state, record.key, record.shard, record.generation)
            attempt.phase, attempt.spec = Phase.STARTING, None
            attempt.demand, attempt.grace_seconds = record.demand, record.grace_seconds
            attempt.keep_at_fence = record.keep_at_fence
        case Moved(key, generation):
            if key in state.attempts:
                state.attempts[key].generation = generation
        case Finished():
            attempt = _held(state, record.key, record.shard, record.generation)
            attempt.phase, attempt.ended, attempt.spec, attempt.orphaned = Phase.FINISHED, record.ended, None, False
            attempt.demand, attempt.grace_seconds, attempt.keep_at_fence = (
                Demand(),
                0.0,
                False,
            )  # it holds nothing any more
        case Tombstoned():
            attempt = _held(state, record.key, record.shard, record.generation)
            attempt.phase = Phase.TOMBSTONED if record.rejected else Phase.STOPPING
            attempt.rejected, attempt.spec, attempt.orphaned = record.rejected, None, False
        case StopConfirmed(key):
            if key in state.attempts:
                state.attempts[key].phase = Phase.TOMBSTONED
        case Forgotten(key):
            state.attempts.pop(key, None)


def _held(state: AgentState, key: AttemptKey, shard: str, generation: int) -> Attempt:
    attempt = state.attempts.get(key)
    if attempt is None:
        attempt = state.attempts[key] = Attempt(key, shard, generation, Phase.VOID)
    attempt.shard, attempt.generation = shard, generation
    return attempt


def snapshot(state: AgentState) -> Iterator[Record]:
    """Records whose fold is `state` less its queue (compaction)."""
    yield Booted(state.boot_id)
    if state.generation:
        yield SessionOpened(
            state.generation, state.cluster_uid, state.federation_uid, state.fence_seconds, state.kill_seconds
        )
    for shard, epoch in state.epochs.items():
        yield EpochRaised(shard, epoch)
    for shard, mark in state.marks.items():
        yield MarkRaised(shard, mark)
    for attempt in state.attempts.values():
        yield from _attempt_records(attempt)


def _attempt_records(attempt: Attempt) -> Iterator[Record]:
    key, shard, generation = attempt.key, attempt.shard, attempt.generation
    starting = Starting(key, shard, generation, attempt.demand, attempt.grace_seconds, attempt.keep_at_fence)
    match attempt.phase:
        case Phase.QUEUED | Phase.VOID:
            return
        case Phase.STARTING | Phase.RUNNING:
            yield starting
        case Phase.FINISHED:
            if attempt.ended is not None:
                yield Finished(key, shard, generation, attempt.ended)
        case Phase.STOPPING | Phase.TOMBSTONED:
            if attempt.phase is Phase.STOPPING and (attempt.demand != Demand() or attempt.grace_seconds):
                yield starting
            if attempt.ended is not None and not attempt.orphaned:  # an orphan's end is the executor's to tell again
                yield Finished(key, shard, generation, attempt.ended)
            if not attempt.orphaned:
                yield Tombstoned(key, shard, generation, attempt.rejected)
            if attempt.phase is Phase.TOMBSTONED and not attempt.rejected:
                yield StopConfirmed(key)
