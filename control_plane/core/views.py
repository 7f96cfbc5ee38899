"""What a shard shows to its readers (PROTOCOL J8): values made from committed state, never live objects.

All times are wall seconds; 0 means "not yet". `clusters` are uids: names are fleet's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.core.model import (
    ArtifactRef,
    AttemptId,
    AttemptState,
    Evidence,
    GraphTask,
    Group,
    RunState,
    TaskSpec,
    TaskState,
    fence_of,
)


@dataclass(frozen=True, slots=True)
class ArtifactView:
    """A file that an attempt of a task made, with all that is needed to find it (PROTOCOL F1). `cluster` is a uid."""

    namespace: str
    task_id: str
    attempt: AttemptId
    cluster: str
    ref: ArtifactRef


@dataclass(frozen=True, slots=True)
class AttemptView:
    """One placement of a task. `live`: in its task's live set (F2). `stopping`: its stop is outstanding (F8)."""

    id: AttemptId
    incarnation: int
    cluster: str
    generation: int
    state: AttemptState
    hedge: bool
    overlap: bool
    evidence: Evidence
    live: bool
    stopping: bool
    placed: float
    start: float
    end: float
    exit_code: int | None
    message: str
    refused_results: int
    checkpoint: str = ""
    """Its last committed checkpoint, by name."""
    resumed_from: str = ""
    """The checkpoint it was placed with: `{n}/{name}`."""

    @property
    def fence(self) -> str:
        """As it was given to its workload (F1)."""
        return fence_of(self.incarnation, self.id.n)


@dataclass(frozen=True, slots=True)
class TaskView:
    """One task. `attempts` oldest first. `ready_at` is the end of its backoff, 0 if none runs."""

    id: str
    index: int
    state: TaskState
    reason: str
    ready_at: float
    parents: tuple[str, ...]
    attempts: tuple[AttemptView, ...]
    result: bytes
    accepted_results: int
    spec: TaskSpec
    artifacts: tuple[ArtifactView, ...] = ()
    """Of the accepted attempt."""
    checkpoint: ArtifactView | None = None
    """The last committed one, if the task is not final."""


@dataclass(frozen=True, slots=True)
class RunView:
    """One run as it stands."""

    uid: str
    namespace: str
    run_id: str
    state: RunState
    reason: str
    deadline: float
    created: float
    finished: float
    priority: int
    task_total: int
    tasks_by_state: Mapping[TaskState, int]
    labels: tuple[tuple[str, str], ...]
    annotations: tuple[tuple[str, str], ...]
    graph: str
    graph_version: int
    resumed_from: str
    trace_id: str
    event_number: int
    accepted_results: int
    refused_results: int

    @property
    def name(self) -> str:
        """namespaces/{namespace}/runs/{run}"""
        return f"namespaces/{self.namespace}/runs/{self.run_id}"

    @property
    def etag(self) -> str:
        """Changes with every change."""
        return f"{self.uid}.{self.event_number}"


@dataclass(frozen=True, slots=True)
class RunEventView:
    """One numbered change of a run; numbers have no gaps (PROTOCOL J10). Columns of equal length: task `tasks[i]` has state
    `states[i]` after it; `ns[i]` is the attempt concerned (0 = none), `clusters[i]` its cluster ("" = none)."""

    number: int
    wall: float
    run_state: RunState
    kind: str
    tasks: tuple[int, ...]
    states: tuple[TaskState, ...]
    ns: tuple[int, ...]
    clusters: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything history needs of a final run (PROTOCOL J10). `events` are the kept ones; `events[0].number` may be above 1."""

    run: RunView
    tasks: tuple[TaskView, ...]
    events: tuple[RunEventView, ...]


@dataclass(frozen=True, slots=True)
class DispatchView:
    """What an agent is told of a live attempt. `inputs`: parent id -> its accepted result, only those with an inline result.
    `artifacts`: of the parents. `checkpoint`: the last committed one, of an earlier attempt."""

    run: str
    namespace: str
    run_id: str
    task_id: str
    spec: TaskSpec
    deadline: float
    inputs: Mapping[str, bytes]
    trace_id: str
    n: int
    fence: str
    keep_at_fence: bool
    artifacts: tuple[ArtifactView, ...] = ()
    checkpoint: ArtifactView | None = None


@dataclass(frozen=True, slots=True)
class DemandLine:
    """Ready tasks of a group (PROTOCOL C1). Slack in seconds, may be negative; `since_wall`: when the oldest became ready;
    `run_seconds`: learned run time of one, 0 if it is not known."""

    key: str
    group: Group
    count: int
    slack_seconds: float
    since_wall: float
    run_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class GraphView:
    """One version of a graph. `created`: wall time of the first version, `updated` of this one."""

    uid: str
    namespace: str
    graph_id: str
    version: int
    tasks: tuple[GraphTask, ...]
    labels: tuple[tuple[str, str], ...]
    annotations: tuple[tuple[str, str], ...]
    created: float
    updated: float

    @property
    def etag(self) -> str:
        """Changes with every change."""
        return f"{self.uid}.{self.version}"


@dataclass(frozen=True, slots=True)
class NamespaceView:
    """A namespace; retention in seconds. `live_attempts` counts this shard's only (PROTOCOL O7)."""

    name: str
    weight: float
    live_task_quota: int
    retention: float
    live_attempts: int
