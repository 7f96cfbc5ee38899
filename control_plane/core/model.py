"""The words of the control plane as values: tasks, resources, groups, attempts, and what is known of clusters.

Numbers of the enums equal those of `baton.v1`, so that the edge translates by casting. All times are seconds (float);
`wall` ones since the Unix epoch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

FLEET = "fleet"
"""Id of the shard that is the only writer of clusters, generations and verdicts (PROTOCOL O6)."""

RUN_SHARDS = tuple(f"{i:02}" for i in range(32))
"""Ids of the shards that hold runs. 32: enough to spread over a dozen replicas, few enough that one transaction can carry
all of them under etcd's 128 operations (PROTOCOL J4). Fixed at creation of a federation."""

ALL_SHARDS = (*RUN_SHARDS, FLEET)


def shard_of(namespace: str, name: str) -> str:
    """The shard of a run (by its id) or of a namespace (`name` empty). Stable for ever: it is in stored data."""
    digest = hashlib.blake2b(f"{namespace}/{name}".encode(), digest_size=4).digest()
    return RUN_SHARDS[int.from_bytes(digest, "big") % len(RUN_SHARDS)]


class TriggerRule(IntEnum):
    """When a task may start once its parents are final."""

    ALL_SUCCEEDED = 1
    ALL_DONE = 2
    ANY_FAILED = 3
    NONE_FAILED = 4


class OnClusterLost(IntEnum):
    """PROTOCOL F7."""

    RERUN_AFTER_FENCE = 1
    WAIT = 2
    NEVER_RERUN = 3


class RunState(IntEnum):
    """State of a run."""

    RUNNING = 1
    CANCELLING = 2
    SUCCEEDED = 3
    FAILED = 4
    CANCELLED = 5
    DEADLINE_EXCEEDED = 6

    @property
    def final(self) -> bool:
        """No event changes it any more."""
        return self >= RunState.SUCCEEDED


class TaskState(IntEnum):
    """State of a task."""

    PENDING = 1
    READY = 2
    PLACED = 3
    RUNNING = 4
    SUCCEEDED = 5
    FAILED = 6
    SKIPPED = 7
    CANCELLED = 8
    DEADLINE_EXCEEDED = 9

    @property
    def final(self) -> bool:
        """Terminal states absorb (I3, I6)."""
        return self >= TaskState.SUCCEEDED


class AttemptState(IntEnum):
    """How an attempt stands or ended."""

    PLACED = 1
    RUNNING = 2
    SUCCEEDED = 3
    FAILED = 4
    LOST = 5
    STOPPED = 6
    REJECTED = 7


class Evidence(IntEnum):
    """How sure a death is (PROTOCOL F6)."""

    UNSPECIFIED = 0
    REPORTED = 1
    TIMED = 2
    NONE = 3


class Outcome(IntEnum):
    """How an attempt ended, by its executor."""

    SUCCEEDED = 1
    FAILED = 2
    TIMED_OUT = 3
    DEADLINE = 4
    FENCED = 5
    STOPPED = 6
    LOST = 7


class Health(IntEnum):
    """Health of a cluster."""

    READY = 1
    SUSPECT = 2
    LOST = 3
    QUARANTINED = 4


class Admission(IntEnum):
    """Whether a cluster takes new work."""

    OPEN = 1
    CORDONED = 2
    DRAINING = 3


@dataclass(frozen=True, slots=True)
class Resources:
    """What a task reserves; `extended` is sorted by name."""

    cpu_millis: int = 1000
    memory_bytes: int = 0
    disk_bytes: int = 0
    processes: int = 0
    extended: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Budget and backoff (seconds) of application failures, and the budget of infrastructure losses."""

    max_attempts: int = 1
    initial_backoff: float = 1.0
    max_backoff: float = 60.0
    multiplier: float = 2.0
    max_infrastructure_losses: int = 20


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A function to call in a warm worker. `code_zip` is one object per distinct code: hashing it again costs nothing."""

    function: str
    args_json: str
    requirements: tuple[str, ...] = ()
    code: str = ""
    """Sha-256 of its packed code, empty when the module is not packed."""
    code_zip: bytes = b""
    """The code itself; empty when it is stored, and fetched by its hash."""

    @property
    def stored(self) -> bool:
        """Its code was stored before, and is not carried in the journal."""
        return bool(self.code) and not self.code_zip


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What equal tasks share; one object per distinct value in a run (DESIGN 13). Times in seconds, 0 = none."""

    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    resources: Resources = field(default_factory=Resources)
    trigger: TriggerRule = TriggerRule.ALL_SUCCEEDED
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: float = 0.0
    grace: float = 3.0
    expected: float = 0.0
    on_cluster_lost: OnClusterLost = OnClusterLost.RERUN_AFTER_FENCE
    hedge: bool = False
    require_isolation: bool = False
    selector: tuple[tuple[str, str], ...] = ()
    clusters: tuple[str, ...] = ()
    tolerations: tuple[str, ...] = ()
    python: PythonCall | None = None
    """Instead of `argv`, which is empty then."""

    @property
    def program(self) -> tuple[str, ...]:
        """What runs, whatever it is given: tasks of one program are expected to take alike (`core.run_times`)."""
        return self.argv if self.python is None else (self.python.function, self.python.code)


@dataclass(frozen=True, slots=True)
class GraphTask:
    """A node: its id, the dense indices of its parents, its spec."""

    id: str
    parents: tuple[int, ...]
    spec: TaskSpec


class AttemptId(NamedTuple):
    """Identity of an attempt (PROTOCOL F1)."""

    run: str
    task: int
    n: int
    nonce: str


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """A file that an attempt made, as it reports it. `digest` is the sha-256 of its manifest; where it lies follows from the
    attempt (PROTOCOL F1)."""

    name: str
    size: int
    digest: bytes


def fence_of(incarnation: int, n: int) -> str:
    """The fence of an attempt as it is shown: (incarnation of the batch that placed it, n), strictly increasing per task (F1)."""
    return f"{incarnation}.{n}"


@dataclass(frozen=True, slots=True)
class Group:
    """Ready tasks that are alike to the scheduler (PROTOCOL C1)."""

    namespace: str
    priority: int
    resources: Resources
    require_isolation: bool
    selector: tuple[tuple[str, str], ...]
    clusters: tuple[str, ...]
    tolerations: tuple[str, ...]
    level: int = 0
    """Feature level that its agent must read (J11); 0: any. An older one would not see what the dispatch asks of it."""

    def key(self) -> str:
        """Name of the group, equal on all replicas."""
        return hashlib.blake2b(repr(self).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True, slots=True)
class Generation:
    """One session generation of a cluster (PROTOCOL S5). `evidence` is UNSPECIFIED while it has not ended."""

    number: int
    boot_id: str
    journal_uid: str
    evidence: Evidence = Evidence.UNSPECIFIED
    guard_seconds: float = 5.0
    """G of F5, as the session had it: how long an owner waits from seeing the end before a copy may be placed."""

    @property
    def ended(self) -> bool:
        """Its ClusterLost is committed."""
        return self.evidence is not Evidence.UNSPECIFIED


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """What every owner knows of a cluster: a row of fleet's table. `generations` is oldest first, the last is current."""

    uid: str
    name: str
    health: Health
    admission: Admission
    generations: tuple[Generation, ...]
    labels: tuple[tuple[str, str], ...] = ()
    taints: tuple[str, ...] = ()
    isolation: bool = False
    orphan_killer: bool = False
    namespaces: tuple[str, ...] = ()
    profile: str = ""
    agent_version: str = ""
    create_wall: float = 0.0

    @property
    def generation(self) -> int:
        """Number of the current generation."""
        return self.generations[-1].number if self.generations else 0

    def find(self, number: int) -> Generation | None:
        """The generation of that number; None if it is unknown or so old that it was dropped (then it has ended)."""
        return next((g for g in self.generations if g.number == number), None)


@dataclass(frozen=True, slots=True)
class FleetTable:
    """Fleet's table as committed: a level, never an edge (PROTOCOL S5). `storm_until` is a wall time (S7), 0 if none."""

    seq: int = 0
    clusters: Mapping[str, ClusterFacts] = field(default_factory=dict)
    storm_until: float = 0.0


@dataclass(frozen=True, slots=True)
class Stamp:
    """The header of a batch, as `apply` sees it. `wall` is information only, except as the time of decisions."""

    wall: float
    nonce: str
    seq: int
    incarnation: int
    actor: str = ""
