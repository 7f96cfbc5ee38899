"""Everything that can happen to a shard, in the past tense. A shard's state is the fold of these, and of nothing else (J1).

Hot events are columns: `tasks[i]` with `ns[i]` is one attempt. `apply` for a published event never changes meaning (J11):
a new meaning is a new event. The stored form is `baton.internal.events`, one message each with the same field names.
"""

from __future__ import annotations

from dataclasses import dataclass

from control_plane.core.model import Admission, AttemptState, Evidence, GraphTask, Health, RunState, TaskState

ARTIFACTS_LEVEL = 2
"""The feature level from which artifacts and checkpoints may be written (PROTOCOL J11)."""


@dataclass(frozen=True, slots=True)
class RequestRecorded:
    """A mutation was decided (PROTOCOL O8): the same id with the same digest gets the same resource."""

    request_id: str
    digest: str
    resource: str


@dataclass(frozen=True, slots=True)
class RequestsPruned:
    """Records at or below `floor` are forgotten; such ids are EXPIRED (PROTOCOL O8)."""

    floor: str


@dataclass(frozen=True, slots=True)
class NamespacePut:
    """A namespace was created or changed; retention in seconds."""

    name: str
    weight: float
    live_task_quota: int
    retention: float


@dataclass(frozen=True, slots=True)
class GraphPut:
    """A new version of a graph, in whole."""

    uid: str
    namespace: str
    graph_id: str
    version: int
    tasks: tuple[GraphTask, ...]
    labels: tuple[tuple[str, str], ...]
    annotations: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class RunCreated:
    """A run was admitted; it is invisible until sealed, so a big graph may come in several batches. `deadline` is wall."""

    run: str
    namespace: str
    run_id: str
    deadline: float
    priority: int
    task_total: int
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    graph: str = ""
    graph_version: int = 0
    resumed_from: str = ""
    trace_id: str = ""


@dataclass(frozen=True, slots=True)
class TasksAdded:
    """More tasks, appended in index order."""

    run: str
    tasks: tuple[GraphTask, ...]


@dataclass(frozen=True, slots=True)
class RunSealed:
    """All tasks are there; roots are ready."""

    run: str


@dataclass(frozen=True, slots=True)
class AttemptsPlaced:
    """Attempts join their tasks' live sets (PROTOCOL F2); their nonce is the batch's. `overlap` says before the start that a
    copy may still run (F6)."""

    run: str
    cluster: str
    generation: int
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    hedge: bool = False
    overlap: bool = False


@dataclass(frozen=True, slots=True)
class AttemptsStarted:
    """Reported running; starts are the agent's wall clock."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    starts: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class AttemptsFinished:
    """Members left their live sets by their own report (PROTOCOL F2). State SUCCEEDED accepts the result: at most once per
    task (I3). `infra[i]` is true when the failure costs the infrastructure budget, not the application's."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    states: tuple[AttemptState, ...]
    infra: tuple[bool, ...]
    exit_codes: tuple[int | None, ...]
    results: tuple[bytes, ...]
    messages: tuple[str, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ArtifactsPublished:
    """Artifacts of attempts whose success the same batch accepts, one row each; before the AttemptsFinished that does (F2)."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CheckpointsCommitted:
    """Checkpoints of live attempts: the task's next attempt starts from the last one."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    names: tuple[str, ...]
    sizes: tuple[int, ...]
    digests: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AttemptsRejected:
    """The agent had no room; members leave, no budget is charged (PROTOCOL C3)."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AttemptsLost:
    """Members left after ClusterLost of their generation and the guard time (PROTOCOL F2, S5)."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class AttemptsAdopted:
    """Members live in another generation now (PROTOCOL S6)."""

    run: str
    generation: int
    tasks: tuple[int, ...]
    ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopsOrdered:
    """Stops are outstanding until confirmed (PROTOCOL F8). Live members stay in their set (drain) until they report."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class StopsConfirmed:
    """Tombstoned, no process, no spawn pending: reservations end (PROTOCOL F8)."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ResultsRefused:
    """Late results, kept as evidence, counted, never accepted (PROTOCOL F8)."""

    run: str
    tasks: tuple[int, ...]
    ns: tuple[int, ...]
    messages: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RetriesSet:
    """Tasks are ready again, not before these wall times."""

    run: str
    tasks: tuple[int, ...]
    not_before: tuple[float, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TasksEnded:
    """Tasks reached a final state other than SUCCEEDED; members still live are stopped (they leave, stop outstanding)."""

    run: str
    tasks: tuple[int, ...]
    states: tuple[TaskState, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RunCancelRequested:
    """A cancel was accepted."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class RunFinished:
    """Every task is final. First terminal decision wins (PROTOCOL D2)."""

    run: str
    state: RunState
    reason: str


@dataclass(frozen=True, slots=True)
class RunArchived:
    """The run is in history; its live state goes (PROTOCOL J10). Outstanding stops are kept until confirmed."""

    run: str


@dataclass(frozen=True, slots=True)
class RunImage:
    """Snapshot form of a run's mutable state (never in a log): JSON bytes made and read by core.run only."""

    run: str
    image: bytes


@dataclass(frozen=True, slots=True)
class ClusterAdded:
    """A cluster was seen for the first time."""

    uid: str
    name: str


@dataclass(frozen=True, slots=True)
class SessionOpened:
    """A new generation (PROTOCOL S5). Its predecessor's ClusterLost is in this batch or before it."""

    cluster: str
    generation: int
    boot_id: str
    journal_uid: str
    instance: str
    replica: str
    profile: str
    lost_seconds: float
    guard_seconds: float
    labels: tuple[tuple[str, str], ...]
    taints: tuple[str, ...]
    isolation: bool
    orphan_killer: bool
    namespaces: tuple[str, ...]
    agent_version: str


@dataclass(frozen=True, slots=True)
class ClusterLost:
    """A generation ended, exactly once (PROTOCOL S4, S5)."""

    cluster: str
    generation: int
    evidence: Evidence
    reason: str


@dataclass(frozen=True, slots=True)
class HealthChanged:
    """READY <-> SUSPECT <-> QUARANTINED; LOST comes by ClusterLost only."""

    cluster: str
    health: Health


@dataclass(frozen=True, slots=True)
class AdmissionSet:
    """Cordon, uncordon or drain."""

    cluster: str
    admission: Admission


@dataclass(frozen=True, slots=True)
class StormHeld:
    """Many clusters were lost at once: tasks are held until this wall time at most (PROTOCOL S7)."""

    until: float


Event = (
    RequestRecorded
    | RequestsPruned
    | NamespacePut
    | GraphPut
    | RunCreated
    | TasksAdded
    | RunSealed
    | AttemptsPlaced
    | AttemptsStarted
    | AttemptsFinished
    | ArtifactsPublished
    | CheckpointsCommitted
    | AttemptsRejected
    | AttemptsLost
    | AttemptsAdopted
    | StopsOrdered
    | StopsConfirmed
    | ResultsRefused
    | RetriesSet
    | TasksEnded
    | RunCancelRequested
    | RunFinished
    | RunArchived
    | RunImage
    | ClusterAdded
    | SessionOpened
    | ClusterLost
    | HealthChanged
    | AdmissionSet
    | StormHeld
)
