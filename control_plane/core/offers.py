"""What the scheduler looks at, and what it answers: plain values (PROTOCOL C1). Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from control_plane.core.capacity import Shape
from control_plane.core.model import ClusterFacts, Group, Resources


@dataclass(frozen=True, slots=True)
class Offer:
    """A cluster and its room. `shapes` is None while its current generation has not reported. `changes` are tasks placed (> 0)
    or ended (< 0) since that report (C4). `queue_limit`: tasks that its agent lets wait beyond the room; 0: none. `level`: the
    feature level that its agent said on its current stream (J11); 0: none was heard."""

    facts: ClusterFacts
    shapes: tuple[Shape, ...] | None
    changes: tuple[tuple[Resources, int], ...] = ()
    queue_limit: int = 0
    level: int = 0


@dataclass(frozen=True, slots=True)
class Want:
    """Ready tasks of one group in one shard. `start_by` (wall seconds): the latest start that meets the deadline; `since`
    (wall seconds): when the first of them became ready; `run_seconds`: how long each of them takes, 0 if that is not known."""

    shard: str
    key: str
    group: Group
    count: int
    start_by: float
    since: float
    run_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Holding:
    """Attempts of one group that a shard holds on a cluster: its namespace's share, and slots it re-uses itself (C2)."""

    shard: str
    key: str
    group: Group
    cluster: str
    count: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything `place` looks at. A namespace without a weight has 1, one without a quota may have any number of live tasks.
    `closed` are namespaces that get nothing now, each with the sentence that says why. `runs` are learned run times of what
    is held, seconds by key of group."""

    offers: tuple[Offer, ...]
    wants: tuple[Want, ...]
    holdings: tuple[Holding, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)
    quotas: Mapping[str, int] = field(default_factory=dict)
    closed: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Granted:
    """Permission for `count` tasks of a group of a shard on a cluster's generation (C1)."""

    shard: str
    key: str
    cluster: str
    generation: int
    count: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Grants, and for each (shard, group key) of which tasks still wait one sentence that names what is missing.

    `returning` are the (shard, group key) whose freed slots must come back, because a higher class or an owed share waits for
    room where they are (C2), or because their namespace holds more than its quota (O7)."""

    grants: tuple[Granted, ...]
    reasons: Mapping[tuple[str, str], str]
    returning: frozenset[tuple[str, str]] = frozenset()
