"""What is left of a run for its judges: the journal as etcd saw it, processes' true lives, clients' notes (reliability.md 3.5).

Theory. A history is a set of lists of facts with true times. Lists that a recorder cannot fill stay empty, and the checkers
that need them then have nothing to say: a real cluster's recorder knows no `writer`, a rehearsal has no watchers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from control_plane.core.events import Event
from control_plane.core.model import Stamp


@dataclass(frozen=True, slots=True)
class Written:
    """One event of the journal: when and where it became true."""

    at: float
    revision: int
    shard: str
    stamp: Stamp
    event: Event
    writer: str = ""
    """Replica that sent the transaction; empty if the recorder cannot know."""
    level: int = 0
    """Feature level of its batch (J11); 0: not known."""


class Key(Protocol):
    """Names an attempt: the agent's form of `control_plane.core.model.AttemptId`."""

    @property
    def run_uid(self) -> str: ...
    @property
    def task(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def nonce(self) -> str: ...


class Life(Protocol):
    """When a process lived, in true time; `end` is None while it does."""

    @property
    def key(self) -> Key: ...
    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Ran:
    """A workload process: on which cluster, in true time."""

    cluster: str
    interval: Life


@dataclass(frozen=True, slots=True)
class Said:
    """One answer a client got: true times of the call and of the answer. `number` is the run's event number, in reads."""

    op: str
    run: str
    called: float
    answered: float
    ok: bool
    uid: str = ""
    state: int = 0
    number: int = 0
    detail: str = ""
    reason: str = ""
    """Of a refusal, as `baton.errors` names it; empty for an answer that never came."""
    refused: bool = False
    """The answer said that this try was surely not applied."""


@dataclass(frozen=True, slots=True)
class Watched:
    """One event of a run as a watcher received it, in the order of receiving. `content` is equal for equal events."""

    at: float
    watcher: str
    run: str
    number: int
    content: str
    fresh: bool = False
    """The watcher had to begin anew (COMPACTED, said so): the number may be any."""


@dataclass(frozen=True, slots=True)
class Owned:
    """An owner key changed: who holds the shard from `revision` on; empty if nobody."""

    at: float
    revision: int
    shard: str
    replica: str

    @staticmethod
    def of(at: float, revision: int, shard: str, value: bytes) -> Owned:
        """From the owner key's value; empty if the key is gone."""
        return Owned(at, revision, shard, str(json.loads(value)["replica"]) if value else "")


@dataclass(frozen=True, slots=True)
class Levelled:
    """From `revision` on `member` is registered as reading up to `level` (0: it is not registered), or without a member's name: the
    federation's level is that (J11)."""

    at: float
    revision: int
    member: str
    level: int


@dataclass(frozen=True, slots=True)
class Restored:
    """The store became a backup again at `at`: what was written after `revision` until then is forgotten (J12)."""

    at: float
    revision: int
    settled: float = float("inf")
    """When an operator had confirmed it. Until then replicas may still show what is forgotten."""


@dataclass(slots=True)
class Record:
    """See the module. Times are true seconds since the start; lists are in the order of happening."""

    journal: list[Written]
    ran: list[Ran]
    said: Sequence[Said]
    deadlines: dict[str, float]
    """Run id in the client's notes -> true time of its deadline."""
    healed: float
    """From here on nothing is broken."""
    ended: float
    died: Sequence[str]
    living: Sequence[str] = ()
    """Processes that are still there at the end."""
    left: Sequence[str] = ()
    """What did not converge."""
    notes: list[tuple[float, str]] = field(default_factory=list)
    """What the nemesis did."""
    digest: str = ""
    watched: Sequence[Watched] = ()
    owners: Sequence[Owned] = ()
    restored: Sequence[Restored] = ()
    levels: Sequence[Levelled] = ()
    capacity: Mapping[str, int] = field(default_factory=dict)
    """Cluster -> workload processes that fit at one time; absent: not known, or workloads of several sizes."""
    patience: float | None = None
    """Liveness mode: seconds after healing (or its creation) within which every run must be final by its own work."""
    quiet: bool = True
    """Everything had time to settle before `ended`: what is still open then is a leak."""

    def forgotten(self, at: float, revision: int) -> bool:
        """Whether a restore has undone what was written then."""
        return any(at <= restore.at and revision > restore.revision for restore in self.restored)

    def restored_between(self, start: float, end: float) -> bool:
        """Whether what was true at `start` may be forgotten at `end`."""
        return any(start <= restore.settled and restore.at <= end for restore in self.restored)


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: which, when, and how."""

    invariant: str
    at: float
    text: str
