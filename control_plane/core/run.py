"""One run's state, as dense columns (DESIGN 13).

Theory: inside a run a task is an integer, and what is known of it lies in columns: a byte of state, counters, and sparse
maps for what few tasks have. Equal specs are one object. Only `core.fold` and its `core.moves` change a run, in `apply`;
decisions read it. What follows from the tasks' states (parents still open, counts by state, children that wait for a
skip) is kept as counters, so that no decision scans the run.

The run's own events (J10) are a ring: numbers without gaps, resumable from any kept number, part of the snapshot.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from control_plane.core.deadline import tails
from control_plane.core.events import RunCreated
from control_plane.core.files import Files
from control_plane.core.model import (
    AttemptId,
    AttemptState,
    Evidence,
    GraphTask,
    RunState,
    TaskSpec,
    TaskState,
    TriggerRule,
)
from control_plane.core.views import RunEventView

if TYPE_CHECKING:
    from control_plane.core.lanes import Lane

KEPT_EVENTS = 4096
"""Run events kept for watchers. At one event per commit that is a minute of the busiest run; fewer: a watcher that loses its
replica must list again; more: snapshots of short-lived runs grow for nobody."""

KEPT_CHANGES = 32_768
"""Task changes in the kept events together: about 3 MB in memory and 300 KB of snapshot after compression."""

KEPT_ATTEMPTS = 64
"""Ended attempts kept per task. Budgets allow a thousand and rejections have none; the newest tell the story. An attempt
that is live or whose stop is outstanding is never dropped."""

_NO_CHILDREN: list[int] = []


@dataclass(slots=True, eq=False)
class Attempt:
    """One placement. Changed by `apply` only."""

    id: AttemptId
    cluster: str
    generation: int
    placed: float
    hedge: bool
    overlap: bool
    incarnation: int
    """Of the batch that placed it; with n it is the fence (F1), which a later incarnation does not change (J12)."""
    state: AttemptState = AttemptState.PLACED
    start: float = 0.0
    end: float = 0.0
    exit_code: int | None = None
    message: str = ""
    evidence: Evidence = Evidence.UNSPECIFIED
    refused: int = 0
    reported: bool = False
    """Its own report of its end was taken: another one is a repeat."""
    preempted: bool = False
    """Stopped while its task had not ended: by a drain, or because its agent left."""


class Run:
    """One run. `header` holds what never changes."""

    __slots__ = (
        "accepted",
        "accepted_total",
        "app_failures",
        "changes",
        "children",
        "counts",
        "created",
        "event_number",
        "events",
        "failed_parents",
        "files",
        "finished",
        "header",
        "history",
        "index",
        "infra_losses",
        "lanes",
        "live",
        "next_n",
        "not_before",
        "open",
        "reason",
        "reasons",
        "refused_total",
        "result_bytes",
        "results",
        "scanned",
        "sealed",
        "skippable",
        "specs",
        "state",
        "states",
        "stops",
        "tails",
        "tasks",
        "tickets",
        "undecided",
        "unsucceeded_parents",
        "waiting",
    )

    def __init__(self, header: RunCreated, wall: float) -> None:
        self.header = header
        self.created = wall
        self.finished = 0.0
        self.sealed = False
        self.state = RunState.RUNNING
        self.reason = ""
        self.tasks: list[GraphTask] = []
        self.specs: dict[TaskSpec, TaskSpec] = {}
        self.index: dict[str, int] = {}
        self.lanes: list[Lane] = []
        self.children: list[list[int]] = []
        self.tails: list[float] = []
        self.states = bytearray()
        self.counts = [0] * (len(TaskState) + 1)
        self.open = 0
        """Tasks that are not final."""
        self.waiting: list[int] = []
        """Parents that are not final."""
        self.failed_parents: list[int] = []
        self.unsucceeded_parents: list[int] = []
        self.next_n: list[int] = []
        self.accepted = bytearray()
        self.accepted_total = 0
        self.refused_total = 0
        self.app_failures: dict[int, int] = {}
        self.infra_losses: dict[int, int] = {}
        self.not_before: dict[int, float] = {}
        self.reasons: dict[int, str] = {}
        self.results: dict[int, bytes] = {}
        self.result_bytes = 0
        self.files: Files | None = None
        """Artifacts and checkpoints, from the first one on."""
        self.history: dict[int, list[Attempt]] = {}
        self.live: dict[int, list[Attempt]] = {}
        self.stops: dict[AttemptId, Attempt] = {}
        self.undecided: dict[int, int] = {}
        """Tasks whose live set ran empty, with the n of the attempt that left last: retry or end is due."""
        self.skippable: list[int] = []
        """Pending tasks whose parents are final and whose trigger rule does not hold (may hold entries that are final now)."""
        self.tickets: dict[int, int] = {}
        self.scanned = 0
        """All tasks below this index are final (a hint of the ending of a run; not state)."""
        self.events: deque[RunEventView] = deque()
        self.changes = 0
        self.event_number = 0

    @property
    def uid(self) -> str:
        """Immutable identity."""
        return self.header.run

    @property
    def deadline(self) -> float:
        """Wall seconds (D1)."""
        return self.header.deadline

    def add_tasks(self, tasks: Iterable[GraphTask]) -> None:
        """Append, sharing equal specs."""
        specs = self.specs
        for task in tasks:
            spec = specs.setdefault(task.spec, task.spec)
            self.tasks.append(task if spec is task.spec else GraphTask(task.id, task.parents, spec))

    def seal(self) -> None:
        """All tasks are there: make the columns. Every task is PENDING after it."""
        size = len(self.tasks)
        self.sealed = True
        self.index = {task.id: index for index, task in enumerate(self.tasks)}
        self.children = [_NO_CHILDREN] * size
        self.waiting = [len(task.parents) for task in self.tasks]
        for index, task in enumerate(self.tasks):
            for parent in task.parents:
                if self.children[parent] is _NO_CHILDREN:
                    self.children[parent] = [index]
                else:
                    self.children[parent].append(index)
        timed = any(spec.expected > 0 for spec in self.specs)
        self.tails = tails(self.tasks) if timed else [0.0] * size
        self.states = bytearray([TaskState.PENDING]) * size
        self.counts[TaskState.PENDING] = self.open = size
        self.failed_parents = [0] * size
        self.unsucceeded_parents = [0] * size
        self.next_n = [1] * size
        self.accepted = bytearray(size)

    def latest_start(self, task: int) -> float:
        """Wall time at which the task must start so that its critical path ends by the deadline."""
        return self.header.deadline - self.tails[task]

    def attempt(self, task: int, n: int) -> Attempt | None:
        """The attempt of that number, if it is kept."""
        for attempt in reversed(self.history.get(task, ())):
            if attempt.id.n == n:
                return attempt
        return None

    def is_live(self, attempt: Attempt) -> bool:
        """In its task's live set (F2)."""
        return attempt in self.live.get(attempt.id.task, ())

    def trigger_holds(self, task: int) -> bool:
        """Whether the trigger rule holds, given that every parent is final."""
        return holds(self.tasks[task].spec.trigger, self.failed_parents[task], self.unsucceeded_parents[task])

    def set_state(self, task: int, new: TaskState) -> None:
        """Move a task, keeping the counts. Final states absorb (I3, I6)."""
        old = self.states[task]
        if old >= TaskState.SUCCEEDED:
            raise AssertionError(f"task {task} of run {self.uid} is final and was moved to {new!r}")
        self.counts[old] -= 1
        self.counts[new] += 1
        self.states[task] = new
        if new >= TaskState.SUCCEEDED:
            self.open -= 1

    def remember(self, attempt: Attempt) -> None:
        """Append to the task's history, dropping the oldest beyond what is kept."""
        past = self.history.setdefault(attempt.id.task, [])
        past.append(attempt)
        if len(past) > KEPT_ATTEMPTS:
            live = self.live.get(attempt.id.task, ())
            oldest = next((a for a in past if a not in live and a.id not in self.stops and a is not attempt), None)
            if oldest is not None:
                past.remove(oldest)
                if self.files:
                    self.files.forget(oldest.id.task, oldest.id.n)

    def note(self, wall: float, kind: str, rows: list[tuple[int, int, int, str, str]]) -> None:
        """Append one numbered run event; a row is (task, state, n, cluster, reason)."""
        self.event_number += 1
        tasks, states, ns, clusters, reasons = zip(*rows, strict=True) if rows else ((), (), (), (), ())
        self.keep_event(
            RunEventView(
                self.event_number,
                wall,
                self.state,
                kind,
                tasks,
                tuple(map(_TASK_STATES.__getitem__, states)),
                ns,
                clusters,
                reasons,
            )
        )

    def keep_event(self, event: RunEventView) -> None:
        """Add to the ring; the newest event always stays, whatever its size."""
        self.events.append(event)
        self.changes += len(event.tasks)
        while len(self.events) > 1 and (len(self.events) > KEPT_EVENTS or self.changes > KEPT_CHANGES):
            self.changes -= len(self.events.popleft().tasks)


_TASK_STATES: dict[int, TaskState] = {int(state): state for state in TaskState}


def holds(rule: TriggerRule, failed: int, unsucceeded: int) -> bool:
    """Whether a trigger rule holds for final parents, `failed` of which failed and `unsucceeded` did anything but succeed."""
    if rule is TriggerRule.ALL_SUCCEEDED:
        return unsucceeded == 0
    if rule is TriggerRule.ANY_FAILED:
        return failed > 0
    if rule is TriggerRule.NONE_FAILED:
        return failed == 0
    return True
