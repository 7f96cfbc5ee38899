"""The words of a trace: what is known of a run, spans, and their identities (DESIGN 11; the theory is in `core.spans`).

Ids are hashes of identities, so that every replica says the same. All times are nanoseconds since the Unix epoch, 0 = not yet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import IntEnum

from control_plane.core.model import AttemptState, Evidence, RunState, TaskState

Attribute = str | int | bool

UID_HEX = 24
"""Hex digits of a run's uid (O8); the rest of a trace id's 32 is a check, so that a trace id leads back to its run."""


class SpanKind(IntEnum):
    """What a span stands for; numbers are those of `baton.v1.SpanKind`."""

    RUN = 1
    ATTEMPT = 2
    QUEUE = 3
    DISPATCH = 4
    EXECUTE = 5
    REPORT = 6


class Status(IntEnum):
    """OpenTelemetry's status of a span."""

    UNSET = 0
    OK = 1
    ERROR = 2


@dataclass(frozen=True, slots=True)
class AttemptFacts:
    """One placement, as recorded. `cluster` is a name."""

    n: int
    fence: str
    cluster: str
    generation: int
    state: AttemptState
    placed: int
    start: int = 0
    end: int = 0
    exit_code: int | None = None
    message: str = ""
    evidence: Evidence = Evidence.UNSPECIFIED
    overlap: bool = False
    hedge: bool = False
    refused: int = 0
    checkpoint: str = ""
    """Its last committed checkpoint."""
    resumed: str = ""
    """The checkpoint it was placed with: `{n}/{name}`."""


@dataclass(frozen=True, slots=True)
class TaskFacts:
    """One task; `parents` are indices, attempts oldest first."""

    index: int
    id: str
    state: TaskState
    reason: str
    parents: tuple[int, ...]
    attempts: tuple[AttemptFacts, ...]


@dataclass(frozen=True, slots=True)
class RunFacts:
    """The run itself. `left_out`: tasks that are not among those handed in. `now`: until when open spans of a run that goes on are
    drawn; a finished run's trace does not depend on it."""

    uid: str
    name: str
    state: RunState
    reason: str
    created: int
    finished: int
    deadline: int
    task_total: int
    graph: str = ""
    resumed_from: str = ""
    left_out: int = 0
    now: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """One row of a kept run event."""

    at: int
    kind: str
    task: int
    n: int
    state: TaskState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened within a span."""

    at: int
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class SpanLink:
    """Another span of the same trace; `relation` is replaces, retries, rejected or hedges."""

    span_id: str
    relation: str


@dataclass(frozen=True, slots=True)
class Span:
    """One span. `open`: it has not ended, and `end` is when that was last known."""

    trace_id: str
    span_id: str
    parent_id: str
    kind: SpanKind
    name: str
    start: int
    end: int
    open: bool = False
    task: str = ""
    n: int = 0
    cluster: str = ""
    status: Status = Status.UNSET
    message: str = ""
    attributes: tuple[tuple[str, Attribute], ...] = ()
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    critical: bool = False


# -- identities --------------------------------------------------------------------------------------------------------


def trace_id_of(run_uid: str) -> str:
    """The trace id of a run: 32 hex digits, of which the last 24 are the uid if it is one of ours."""
    if len(run_uid) == UID_HEX and all(digit in "0123456789abcdef" for digit in run_uid):
        return _hex(4, f"trace\n{run_uid}") + run_uid
    return _hex(16, f"trace\n{run_uid}")


def run_uid_of(trace_id: str) -> str | None:
    """The run of a trace id of ours; None for any other."""
    uid = trace_id[-UID_HEX:]
    return uid if trace_id_of(uid) == trace_id else None


def run_span_id(run_uid: str) -> str:
    """The root span of a run."""
    return _hex(8, f"{run_uid}/run")


def attempt_span_id(run_uid: str, task: int, n: int) -> str:
    """The span of an attempt: the one its workload finds in TRACEPARENT."""
    return _hex(8, f"{run_uid}/{task}/{n}")


def phase_span_id(run_uid: str, task: int, n: int, kind: SpanKind) -> str:
    """The span of a phase of an attempt."""
    return _hex(8, f"{run_uid}/{task}/{n}/{kind.name}")


def waiting_span_id(run_uid: str, task: int) -> str:
    """The span of a task's wait that led to no attempt."""
    return _hex(8, f"{run_uid}/{task}/waiting")


def _hex(size: int, text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()
