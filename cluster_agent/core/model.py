"""What the agent knows: attempts by key, epochs and marks by shard, its last session. Plain values, no behaviour.

An attempt's life at the agent, by phase:

    (unknown) --dispatch--> QUEUED --fits--> STARTING --Started--> RUNNING --Exited--> FINISHED --ack--> (forgotten)
                              |  ^               |                    |
                    new stream|  |dispatch       +--- stop ---+-------+
                    or lapse  v  |                            v
                              VOID ------- stop -------> STOPPING --Stopped--> TOMBSTONED --ack--> (forgotten)

QUEUED and VOID exist in memory only: an attempt that was never started is as good as one that never arrived (S6). All
other phases are on disk before their effects leave; RUNNING is STARTING plus what the executor says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


@dataclass(frozen=True, slots=True, order=True)
class AttemptKey:
    """Identity of an attempt (F1): run uid, dense task index, attempt number, nonce of the batch that placed it.

    The executor port has one of its own: the core knows nothing of ports (`workload` translates).
    """

    run_uid: str
    task: int
    n: int
    nonce: str

    def text(self) -> str:
        """`run.task.n.nonce`."""
        return f"{self.run_uid}.{self.task}.{self.n}.{self.nonce}"

    @staticmethod
    def parse(text: str) -> AttemptKey:
        """Inverse of `text`. Raises ValueError."""
        run_uid, task, n, nonce = text.split(".")
        return AttemptKey(run_uid, int(task), int(n), nonce)


class Phase(Enum):
    """Where an attempt stands at this agent."""

    QUEUED = "queued"
    VOID = "void"  # queued on a stream that is gone: starts only if dispatched again (F3)
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"  # tombstoned, the executor has not confirmed yet (F8)
    FINISHED = "finished"
    TOMBSTONED = "tombstoned"  # no process, no spawn pending, never started again


class Outcome(Enum):
    """How an attempt ended."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed_out"
    DEADLINE = "deadline"
    FENCED = "fenced"
    STOPPED = "stopped"
    LOST = "lost"


@dataclass(frozen=True, slots=True, order=True)
class Epoch:
    """Fence of a shard's owner (J12): the higher one wins."""

    incarnation: int
    revision: int


@dataclass(frozen=True, slots=True)
class Mark:
    """How far a shard's log was, as an owner told us (J12)."""

    incarnation: int
    seq: int
    nonce: str


@dataclass(frozen=True, slots=True)
class Demand:
    """What an attempt reserves on one node; 0 reserves nothing."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    extended: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """A file that an attempt made: its name, bytes of content, and the sha-256 of its manifest."""

    name: str
    size: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class ArtifactSource:
    """An artifact and the attempt that made it, which says where it lies (F1)."""

    namespace: str
    maker: AttemptKey
    cluster_uid: str
    ref: ArtifactRef
    task_id: str


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A Python function to call: module:qualname, JSON arguments, packages it needs, and its packed code with its hash. With a
    hash but no archive, the code is in the artifact store."""

    function: str
    args_json: str
    requirements: tuple[str, ...] = ()
    code: str = ""
    code_zip: bytes = b""


@dataclass(frozen=True, slots=True)
class WorkSpec:
    """What to run, as dispatched."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    demand: Demand
    task_id: str
    run: str
    fence: str
    deadline_wall_ms: int
    """The run's absolute deadline by the control plane's wall clock (D1); 0 means none."""
    processes: int = 0
    timeout_seconds: float | None = None
    grace_seconds: float = 3.0
    keep_at_fence: bool = False
    inputs: bytes = b""
    traceparent: str = ""
    python: PythonCall | None = None
    """Instead of `argv`, which is empty then."""
    artifacts: tuple[ArtifactSource, ...] = ()
    """Of its parents; to be there before it starts."""
    checkpoint: ArtifactSource | None = None
    """The last one of an earlier attempt; to be there before it starts."""

    @property
    def carried(self) -> bool:
        """Something has to be fetched before it can start."""
        stored = self.python is not None and bool(self.python.code) and not self.python.code_zip
        return stored or bool(self.artifacts) or self.checkpoint is not None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an attempt, as it is reported. Wall times are milliseconds since the epoch; 0 means never."""

    outcome: Outcome
    exit_code: int | None = None
    result: bytes = b""
    message: str = ""
    start_wall_ms: int = 0
    end_wall_ms: int = 0
    late: bool = False
    artifacts: tuple[ArtifactRef, ...] = ()
    """What it made; stored already."""


@dataclass(slots=True)
class Attempt:
    """One attempt this agent holds."""

    key: AttemptKey
    shard: str
    generation: int
    phase: Phase
    demand: Demand = field(default_factory=Demand)
    grace_seconds: float = 0.0
    spec: WorkSpec | None = None
    """Only while it waits in the queue."""
    ended: Ended | None = None
    rejected: str = ""
    """Why it was refused; set in phase TOMBSTONED only."""
    keep_at_fence: bool = False
    """Not to be stopped at F (F7); known from its start on."""
    orphaned: bool = False
    """STOPPING because a started attempt has no process (F4): it ends as LOST, not as stopped."""


@dataclass(slots=True)
class AgentState:
    """The fold of the agent's journal, plus the queue."""

    journal_uid: str
    boot_id: str = ""
    federation_uid: str = ""
    cluster_uid: str = ""
    generation: int = 0
    """Of the last session; 0 if there was none."""
    fence_seconds: float = 0.0
    """F of that session: what ran under it keeps this bound across a restart (F5). 0 if there was none."""
    kill_seconds: float = 0.0
    attempts: dict[AttemptKey, Attempt] = field(default_factory=dict)
    epochs: dict[str, Epoch] = field(default_factory=dict)
    marks: dict[str, Mark] = field(default_factory=dict)
