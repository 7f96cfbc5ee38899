"""The Executor port: what the agent may ask of the place where workloads live, and what it is told.

The executor is the side of the wall where processes are. For `process` it is a **guard** in a process of its own (PROTOCOL
G1): it outlives the agent, holds the lease timers, and kills on its own clock. The contract (tests/contract/test_executor.py):

1. **At most one spawn per attempt key** (F4), for the life of the executor's disk: a second `start` of a key that was
   ever started, refused or tombstoned spawns nothing and is answered `Refused` (or nothing, when it is still running).
2. **Leases by generation** (G1, G2, F5). `renew(generation, sent_boot)` says that a heartbeat *sent* at `sent_boot` (this
   host's boot clock) was acknowledged for that generation. At `sent_boot + fence_seconds` the lease of that generation
   has passed: nothing of it is started any more (a `start` is refused and tombstoned) and everything running under it
   that is not `keep_at_fence` gets TERM, and KILL so that all is dead `kill_seconds` later. A later `renew` of the same
   generation makes new starts possible again; what was killed stays dead.
3. `adopt(keys, generation)` moves running attempts to the lease of another generation (F5: AttemptsAdopted confirmed).
4. **Stop** tombstones the key durably, then kills; it is confirmed (`Stopped`) only when the key is on disk as a tombstone
   and no process of it is left and no spawn of it is pending (F8). Stopping an unknown key tombstones it: it can never start.
5. At the deadline KILL falls on `stop_at` (D1), and TERM comes `grace_seconds` earlier, but at most a quarter of the time
   between start and deadline. `timeout_seconds` counts from the start: TERM when it has passed, KILL `grace_seconds`
   later, though never after `stop_at`.
6. Exits are kept until `forget`: an agent that was away learns of them from `census` and from `events`.
7. A workload leaves nothing behind: double forks and setsid are found and killed with it (G4), also when the guard dies.
8. When a new connection is made, unread requests of the old one are void *before* the census is taken (G3).
9. **Prefetch** (G5). Of python calls of one environment (tenant, requirements, code, resources) at most `slots` run at once;
   others wait behind them and start when one ends, `Started` being told then. One that waits counts as started: it is in the census,
   its lease and deadline end it. A stop, the fence or the end of a worker recalls it; what was recalled had not begun, so it ends
   without having run, or runs elsewhere. `widen` raises `slots` for those that wait. An executor may also start all at once.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from cluster_agent.core.model import ArtifactRef, ArtifactSource


@dataclass(frozen=True, slots=True, order=True)
class AttemptKey:
    """Identity of an attempt (PROTOCOL F1): run uid, dense task index, attempt number, nonce of the batch that placed it."""

    run_uid: str
    task: int
    n: int
    nonce: str

    def text(self) -> str:
        """`run.task.n.nonce`: names directories and cgroups; safe as a file name."""
        return f"{self.run_uid}.{self.task}.{self.n}.{self.nonce}"

    @staticmethod
    def parse(text: str) -> AttemptKey:
        """Inverse of `text`. Raises ValueError."""
        run_uid, task, n, nonce = text.split(".")
        return AttemptKey(run_uid, int(task), int(n), nonce)


@dataclass(frozen=True, slots=True)
class Limits:
    """Resource bounds of one attempt; 0 means none."""

    cpu_millis: int = 0
    memory_bytes: int = 0
    processes: int = 0
    disk_bytes: int = 0
    output_bytes: int = 8 << 20
    """Cap of captured stdout + stderr; beyond it output is dropped and the log says so."""
    result_bytes: int = 16 << 10
    """Cap of the result file (DESIGN 14: inline result 16 KiB); a larger one fails the attempt, naming the limit."""


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A function to call in a warm worker of the same environment. Its JSON return value is the attempt's result."""

    function: str
    """module:qualname."""
    args_json: str
    """JSON array or object, as PythonTask.args_json of graph.proto."""
    requirements: tuple[str, ...] = ()
    code: str = ""
    """Sha-256 of `code_zip` in hex; empty when the module comes with a requirement or the agent's own Python."""
    code_zip: bytes = b""
    tenant: str = ""
    """A worker serves one of these only: what a task leaves in its process is seen by nobody else."""
    extended: tuple[tuple[str, int], ...] = ()
    """Resources it holds that no limit bounds: calls that hold other ones (a GPU, say) never get each other's places."""

    @property
    def stored(self) -> bool:
        """Its code is in the artifact store."""
        return bool(self.code) and not self.code_zip


@dataclass(frozen=True, slots=True)
class StartRequest:
    """Everything needed to run one attempt of a `process` or `python` task. Times are on this host's boot clock, in
    seconds."""

    key: AttemptKey
    generation: int
    argv: tuple[str, ...]
    env: Mapping[str, str]
    """The complete environment of the workload, BATON_* included except the paths that only the executor knows
    (BATON_RESULT, BATON_CHECKPOINT_DIR, BATON_INPUTS), which it adds. Nothing is inherited."""
    limits: Limits = field(default_factory=Limits)
    stop_at: float | None = None
    timeout_seconds: float | None = None
    grace_seconds: float = 3.0
    keep_at_fence: bool = False
    inputs: bytes = b""
    """Written to the file BATON_INPUTS names (JSON object: parent id -> result), if not empty."""
    python: PythonCall | None = None
    """Instead of `argv`, which is empty then."""
    artifacts: tuple[ArtifactSource, ...] = ()
    """Of its parents, fetched into $BATON_INPUT_DIR before it starts, by an executor that carries (executors/carrying.py)."""
    checkpoint: ArtifactSource | None = None
    """Of an earlier attempt, fetched to $BATON_CHECKPOINT_DIR/latest before it starts, likewise."""
    slots: int = 0
    """Of a python call (contract 9): so many of its environment may run at once from now on. 0: it starts at once, whatever runs."""

    @property
    def carried(self) -> bool:
        """Something has to be fetched before it can start."""
        call = self.python
        if call is not None and call.code and not call.code_zip:
            return True
        return bool(self.artifacts) or self.checkpoint is not None


class Cause(Enum):
    """Why a workload ended."""

    EXIT = "exit"  # by itself: exit_code or signal say how
    STOP = "stop"  # a Stop was carried out
    FENCE = "fence"  # the lease of its generation passed
    DEADLINE = "deadline"  # stop_at
    TIMEOUT = "timeout"  # timeout_seconds
    LIMIT = "limit"  # a resource limit (memory, disk, processes); message names it
    SPAWN = "spawn"  # it could not be started at all (no such program, ...)
    LOST = "lost"  # the guard died with it: dead, its outcome unknown
    RESULT = "result"  # it exited 0 but its result is too large or unreadable
    CARRIAGE = "carriage"  # its files could not be fetched or stored, through no fault of its own; message says why


@dataclass(frozen=True, slots=True)
class Started:
    """The workload runs. `at_wall` seconds since the epoch, for people."""

    key: AttemptKey
    pid: int
    at_wall: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The start was refused and the key is tombstoned on disk; no process was or will be made."""

    key: AttemptKey
    reason: str


@dataclass(frozen=True, slots=True)
class Exited:
    """All processes of the attempt are gone. `exit_code` is None when a signal ended it. `late` is set when the kill came
    later than the lease allowed (the guard woke too late, PROTOCOL F6)."""

    key: AttemptKey
    cause: Cause
    exit_code: int | None
    signal: int | None
    start_wall: float
    end_wall: float
    result: bytes = b""
    message: str = ""
    late: bool = False
    files_of: str = ""
    """Name of the run, if it succeeded and left files in $BATON_ARTIFACTS_DIR."""
    artifacts: tuple[ArtifactRef, ...] = ()
    """Those files, once they are stored."""

    @property
    def succeeded(self) -> bool:
        """Exit code 0 of its own accord."""
        return self.cause is Cause.EXIT and self.exit_code == 0


@dataclass(frozen=True, slots=True)
class Saved:
    """The workload runs, and has a newer checkpoint, which is stored."""

    key: AttemptKey
    checkpoint: ArtifactRef


@dataclass(frozen=True, slots=True)
class Stopped:
    """The key is tombstoned durably, has no process and no pending spawn (PROTOCOL F8)."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class GuardLost:
    """The executor itself died. Everything it ran is dead (G4) if `killed` - else that is not known (evidence `none`)."""

    killed: bool


ExecutorEvent = Started | Refused | Exited | Saved | Stopped | GuardLost


class Phase(Enum):
    """Where an attempt stands at the executor."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    EXITED = "exited"
    TOMBSTONED = "tombstoned"


@dataclass(frozen=True, slots=True)
class CensusEntry:
    """One attempt the executor knows. `exited` is set in phase EXITED."""

    key: AttemptKey
    generation: int
    phase: Phase
    exited: Exited | None = None
    run: str = ""
    """Name of its run, in phases STARTING and RUNNING, where it is known."""


@dataclass(frozen=True, slots=True)
class Features:
    """What this executor can enforce here (told in Hello; `require_isolation` tasks go only where `isolation` is true)."""

    isolation: bool
    """Memory, CPU, process-count limits are enforced by cgroups (v1 or v2), not by rlimits and polling."""
    orphan_killer: bool
    """Workloads die with the guard even after setsid and double fork (G4); false makes a loss's evidence `none`."""
    detail: str
    """One line for people, e.g. `cgroup v1 (memory, cpu, pids)`."""


class Executor(Protocol):
    """See the module's contract. Calls are batches; none blocks on a workload."""

    async def connect(self) -> Sequence[CensusEntry]:
        """Start or re-join the executor; void the previous connection's unread requests; what it knows (G3)."""
        ...

    def features(self) -> Features:
        """Valid after `connect`."""
        ...

    def ticked_at(self) -> float:
        """Boot time of the guard's last sign of life (PROTOCOL G2: heartbeats leave only if it has ticked since)."""
        ...

    async def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """F and K of F5, once after `connect` and whenever lease values change (S8)."""
        ...

    async def renew(self, generation: int, sent_boot: float) -> None:
        """A heartbeat sent at `sent_boot` was acknowledged for `generation`."""
        ...

    async def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """These attempts now live under `generation`."""
        ...

    async def start(self, requests: Sequence[StartRequest]) -> None:
        """Spawn each, in order; answers come as events."""
        ...

    async def widen(self, key: AttemptKey, slots: int) -> None:
        """So many calls of this one's environment may run at once from now on; nothing if it is over."""
        ...

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:
        """Tombstone and kill each; confirmed by `Stopped` (and `Exited`, when a process was there)."""
        ...

    async def forget(self, keys: Sequence[AttemptKey]) -> None:
        """Drop exit records and private directories of attempts whose outcome was accepted; logs stay by retention. The key
        remains unstartable."""
        ...

    def events(self) -> AsyncIterator[Sequence[ExecutorEvent]]:
        """Batches of what happened, in order, since `connect`."""
        ...

    async def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:
        """Captured output from `offset` (at most `limit` bytes), and whether it is complete (no more will come)."""
        ...

    async def kill_all(self) -> None:
        """Kill every workload now and confirm by events (an agent's goodbye, S5)."""
        ...

    async def kill_if_silent(self) -> None:
        """Wait a moment (2 s at most) for a sign of life of the guard; without one kill it, and its work with it (G2: at
        F the guard stops what must end, and a guard that does not live stops nothing). A living guard is left alone."""
        ...

    async def close(self) -> None:
        """Leave; workloads of a guard go on (adopted by the next agent)."""
        ...
