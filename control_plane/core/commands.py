"""What a shard may be asked or told, in the imperative. Handled by `core.shard` (runs, namespaces) or `core.fleet`.

Every command is handled in one go: it emits events (applied at once) and returns a reply, or raises `Refused`, in which
case it has emitted nothing. Facts about clusters come in as commands too: cores ask nobody.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from control_plane.core.model import (
    Admission,
    ArtifactRef,
    AttemptId,
    Evidence,
    FleetTable,
    GraphTask,
    Outcome,
    RunState,
)


class Refused(Exception):
    """The command cannot be done; nothing was emitted. `reason` is a name of baton.v1.ErrorReason without prefix."""

    def __init__(self, reason: str, message: str, field_path: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field_path = field_path


@dataclass(frozen=True, slots=True)
class Request:
    """Idempotency of a mutation (PROTOCOL O8). An empty id (creations inside the system) is exempt."""

    id: str
    digest: str


@dataclass(frozen=True, slots=True)
class CreateRun:
    """Admit a run. Reply: its uid. A repeat with the same request gets the same uid."""

    request: Request
    namespace: str
    run_id: str
    run_uid: str
    deadline: float
    priority: int
    tasks: tuple[GraphTask, ...]
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    graph: str = ""
    graph_version: int = 0
    resumed_from: str = ""
    trace_id: str = ""
    named: bool = False
    """The caller chose run_id: a live or archived run of that name refuses with NAME_TAKEN."""


@dataclass(frozen=True, slots=True)
class CancelRun:
    """Stop a run by its id. Reply: its uid."""

    request: Request
    namespace: str
    run_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class PutGraph:
    """Store a version of a graph. Reply: (uid, version)."""

    request: Request
    namespace: str
    graph_id: str
    uid: str
    tasks: tuple[GraphTask, ...]
    labels: tuple[tuple[str, str], ...] = ()
    annotations: tuple[tuple[str, str], ...] = ()
    etag: str = ""


@dataclass(frozen=True, slots=True)
class PutNamespace:
    """Create or change a namespace. Reply: None."""

    request: Request
    name: str
    weight: float
    live_task_quota: int
    retention: float


@dataclass(frozen=True, slots=True)
class Finish:
    """One attempt's end as its agent tells it."""

    attempt: AttemptId
    outcome: Outcome
    exit_code: int | None
    result: bytes
    message: str
    start: float
    end: float
    artifacts: tuple[ArtifactRef, ...] = ()
    """What it made, stored already; published if the success is accepted."""


@dataclass(frozen=True, slots=True)
class SavedCheckpoint:
    """The newest checkpoint of an attempt that runs, stored already."""

    attempt: AttemptId
    ref: ArtifactRef


@dataclass(frozen=True, slots=True)
class TakeReports:
    """Reports of one agent for this shard. Reply: the AttemptIds whose reports are settled (to be acknowledged): finished,
    rejected and stopped ones, whether accepted, refused or known already. Checkpoints are all settled. `generation` is the
    session's."""

    cluster: str
    generation: int
    started: tuple[tuple[AttemptId, float], ...] = ()
    finished: tuple[Finish, ...] = ()
    rejected: tuple[tuple[AttemptId, str], ...] = ()
    stopped: tuple[AttemptId, ...] = ()
    checkpoints: tuple[SavedCheckpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class Held:
    """An attempt an agent's inventory lists. `phase` is a number of baton.v1.AttemptPhase."""

    attempt: AttemptId
    generation: int
    phase: int


@dataclass(frozen=True, slots=True)
class TakeInventory:
    """What a cluster holds of this shard, as of its Hello in `generation` (PROTOCOL S6, F8). Reply: an `InventoryVerdict`."""

    cluster: str
    generation: int
    boot_id: str
    journal_uid: str
    held: tuple[Held, ...]
    table: FleetTable
    stops_sent: frozenset[AttemptId] = frozenset()
    """Stops that this agent had received (receipt known) before it made the inventory: only for these does absence confirm."""
    incarnation: int = 0
    """Of the store when the Hello came (PROTOCOL J12); 0 if it is not known."""


@dataclass(frozen=True, slots=True)
class InventoryVerdict:
    """What to tell the agent after the commit."""

    adopted: tuple[AttemptId, ...] = ()
    confirm: tuple[AttemptId, ...] = ()
    """Queued or void attempts of this generation to dispatch again (PROTOCOL F3)."""
    resend: tuple[AttemptId, ...] = ()
    """Missing attempts to send again under the same identity (PROTOCOL S6)."""
    orphans: tuple[AttemptId, ...] = ()
    """Queued, void or running attempts of runs that are not known (any more): to be stopped by a bare stop (PROTOCOL F8)."""


@dataclass(frozen=True, slots=True)
class TakeTable:
    """Fleet's table changed, or the shard was just taken (PROTOCOL S5). Owners learn drains, boots, ends of
    generations. Reply: None."""

    table: FleetTable


@dataclass(frozen=True, slots=True)
class GenerationFenced:
    """The guard time of an ended generation is over on this owner's clock (PROTOCOL S5, F2). Attempts there may be replaced,
    except `wait` and `never_rerun` ones without evidence REPORTED (F7). Reply: None."""

    cluster: str
    generation: int
    evidence: Evidence


@dataclass(frozen=True, slots=True)
class Grant:
    """Permission to place up to `count` attempts of a group on a cluster's generation (PROTOCOL C1). `expires` is on the
    caller's boot clock, compared with `TakeGrants.boot_now`."""

    cluster: str
    generation: int
    group: str
    count: int


@dataclass(frozen=True, slots=True)
class TakeGrants:
    """New permissions replace older ones of the leader; lower terms are refused silently (PROTOCOL C3). Not journaled. Reply:
    None."""

    term: int
    grants: tuple[Grant, ...]
    reasons: tuple[tuple[str, str], ...] = ()
    """(group key, sentence) for groups that wait."""
    returning: frozenset[str] = frozenset()
    """Groups whose freed slots go back to the leader instead of to their next task, because a higher class or an owed share
    waits (PROTOCOL C2)."""


@dataclass(frozen=True, slots=True)
class DropGrants:
    """Grants' time to live is over. Reply: None."""

    term: int


@dataclass(frozen=True, slots=True)
class Tick:
    """A timer is due: backoffs, deadlines, storm holds, pruning. Reply: None."""


@dataclass(frozen=True, slots=True)
class Archived:
    """History holds the run durably, as it was at its event of that number (PROTOCOL J10). Reply: None."""

    run: str
    number: int


@dataclass(frozen=True, slots=True)
class TakeHistory:
    """History holds a run that is live here as finished in `state`: the store was restored to a time before its end (PROTOCOL
    J12). Reply: None."""

    run: str
    state: RunState


RunCommand = (
    CreateRun
    | CancelRun
    | PutGraph
    | PutNamespace
    | TakeReports
    | TakeInventory
    | TakeTable
    | GenerationFenced
    | TakeGrants
    | DropGrants
    | Tick
    | Archived
    | TakeHistory
)


@dataclass(frozen=True, slots=True)
class OpenSession:
    """An agent said Hello (PROTOCOL S1, S6). Reply: a `SessionGrant`. Refused with reason GENERATION_ENDING (journal uid changed:
    wait for the loss), SECOND_INSTANCE, or DENIED."""

    cluster_name: str
    cluster_uid: str
    """A fresh uid, used if the cluster is new."""
    instance: str
    boot_id: str
    journal_uid: str
    replica: str
    profile: str
    lost_seconds: float
    guard_seconds: float
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[str, ...] = ()
    isolation: bool = False
    orphan_killer: bool = False
    namespaces: tuple[str, ...] = ()
    agent_version: str = ""
    last_generation: int = 0
    first_session_alive: bool = False
    """The serving replica of the current generation still has another instance's stream (known to the session loop)."""


@dataclass(frozen=True, slots=True)
class SessionGrant:
    """The session's generation; `resumed` if it goes on. `profile` is the generation's, not what the agent asked for, and fleet
    and owners wait `recovery_seconds` (L + G) for it: the agent must live by these (F5, S8)."""

    cluster: str
    generation: int
    resumed: bool
    profile: str
    recovery_seconds: float


@dataclass(frozen=True, slots=True)
class LoseCluster:
    """L of unchanged polls is over, or a goodbye came. Its batch carries the S4 condition. Reply: None. Refused with WRONG_STATE if
    that generation has ended."""

    cluster: str
    generation: int
    evidence: Evidence
    reason: str
    begun: bool = True
    """Whether a heartbeat was ever committed in that generation. If not, the condition proves that there was none (S4)."""
    idle: frozenset[str] = frozenset()
    """Clusters that live, but in a generation without any committed heartbeat so far: they serve nothing yet (S7)."""


@dataclass(frozen=True, slots=True)
class ObserveHealth:
    """Missed heartbeats, or heartbeats again (PROTOCOL S3). Reply: None."""

    cluster: str
    generation: int
    suspect: bool


@dataclass(frozen=True, slots=True)
class SetAdmission:
    """Cordon, uncordon, drain by name. Reply: the cluster's uid."""

    request: Request
    cluster_name: str
    admission: Admission


@dataclass(frozen=True, slots=True)
class FleetTick:
    """A timer of fleet is due. Reply: None."""


FleetCommand = OpenSession | LoseCluster | ObserveHealth | SetAdmission | FleetTick

Command = RunCommand | FleetCommand


@dataclass(slots=True)
class Outbox:
    """What a batch's events oblige us to do after the commit (PROTOCOL J7): hints only. After a takeover it is empty, and the
    same effects are derived from state. Filled by `apply`, drained by the controller."""

    placed: list[AttemptId] = field(default_factory=list)
    stops: list[tuple[str, AttemptId]] = field(default_factory=list)
    """(cluster uid, attempt) whose stop became outstanding."""
    runs: set[str] = field(default_factory=set)
    """Uids of runs with new run events."""
    finished: list[str] = field(default_factory=list)
    """Uids of runs that became final."""
    table: bool = False
    """Fleet's table changed."""
    demand: bool = False
    """Ready counts changed."""
