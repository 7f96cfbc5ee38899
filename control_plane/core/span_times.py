"""When what happened in a run: the owner's times of every attempt, the critical path, the check for two owners.

Theory. The numbered run events (J10) tell by the control plane's clock when a task was ready and when an attempt left its live set;
where they are no longer kept, the attempts' own times stand in. Start and end of a workload are told by the cluster's clock, which
may be off; causality bounds them (it starts after it was placed, and ends before its end is committed), so they are clamped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from control_plane.core.model import AttemptState, TaskState
from control_plane.core.span_model import AttemptFacts, Change, RunFacts, SpanEvent, TaskFacts

CLOSING = frozenset({"finished", "lost", "rejected"})
"""Kinds of run events by which an attempt leaves its live set."""

ENDING = frozenset({"failed", "skipped", "cancelled", "deadline"})
"""Kinds by which a task ends without a success."""

_TOLD = frozenset({"adopted", "checkpoint", "stopping", "stopped", "refused", "lost", "rejected"})
"""Kinds that show as events of the attempt's span."""


class Times:
    """The run events by task and attempt."""

    def __init__(self, changes: Iterable[Change]) -> None:
        self.ready: dict[int, list[int]] = {}
        self.closed: dict[tuple[int, int], int] = {}
        self.ended: dict[int, int] = {}
        self.told: dict[tuple[int, int], list[SpanEvent]] = {}
        self.last = 0
        for change in changes:
            key = (change.task, change.n)
            self.last = max(self.last, change.at)
            if change.state is TaskState.READY and (not change.n or change.kind == "retry"):
                self.ready.setdefault(change.task, []).append(change.at)
            elif change.kind in CLOSING and change.n:
                self.closed.setdefault(key, change.at)
            if change.kind in ENDING or (change.kind == "finished" and change.state is TaskState.SUCCEEDED):
                self.ended.setdefault(change.task, change.at)
            if change.kind in _TOLD and change.n:
                self.told.setdefault(key, []).append(SpanEvent(change.at, change.kind, change.reason))


@dataclass(frozen=True, slots=True)
class Held:
    """An attempt with its times in order: ready <= placed <= start <= end <= closed. 0: it did not come to that."""

    of: AttemptFacts
    ready: int
    placed: int
    start: int
    end: int
    closed: int
    open: bool


def held_times(run: RunFacts, tasks: Sequence[TaskFacts], times: Times, now: int) -> dict[int, list[Held]]:
    """Every attempt with its times, by task."""
    found = {task.index: [_owned(task.index, each, times, now) for each in task.attempts] for task in tasks}
    for task in tasks:
        mine = found[task.index]
        for place, each in enumerate(mine):
            ready = _ready(run, task, mine[:place], each, times, found)
            mine[place] = replace(each, ready=min(ready, each.placed))
    return found


def _owned(task: int, attempt: AttemptFacts, times: Times, now: int) -> Held:
    placed = attempt.placed
    live = attempt.state in (AttemptState.PLACED, AttemptState.RUNNING)
    closed = now if live else times.closed.get((task, attempt.n), 0) or attempt.end or placed
    closed = max(closed, placed)
    start = min(max(attempt.start, placed), closed) if attempt.start else 0
    end = min(max(attempt.end, start), closed) if start and attempt.end and not live else 0
    return Held(attempt, placed, placed, start, end, closed, live)


def _ready(
    run: RunFacts,
    task: TaskFacts,
    before: Sequence[Held],
    held: Held,
    times: Times,
    found: dict[int, list[Held]],
) -> int:
    """Since when the task waited for this place."""
    if held.of.hedge:
        return held.placed
    earlier = [each for each in before if not each.of.hedge]
    since = earlier[-1].closed if earlier else 0
    told = [at for at in times.ready.get(task.index, ()) if since <= at <= held.placed]
    if told:
        return told[-1] if not earlier else told[0]
    if earlier:
        return since
    return max((finish(parent, found, times) for parent in task.parents), default=0) or run.created


def finish(task: int, found: dict[int, list[Held]], times: Times) -> int:
    """When a task became final, as far as is known; 0 if it is not."""
    if task in times.ended:
        return times.ended[task]
    mine = found.get(task) or ()
    won = [each.closed for each in mine if each.of.state is AttemptState.SUCCEEDED]
    return max(won or [each.closed for each in mine], default=0)


def critical_path(tasks: Sequence[TaskFacts], found: dict[int, list[Held]], times: Times) -> set[tuple[int, int]]:
    """(task, attempt) of the chain that decided when the run ended; (task, 0) if the task was only waiting."""
    by_index = {task.index: task for task in tasks}
    path: set[tuple[int, int]] = set()
    seen: set[int] = set()
    current = max(by_index, key=lambda index: (finish(index, found, times), -index), default=None)
    while current is not None and current not in seen:
        seen.add(current)
        mine = found[current]
        winner = next((each for each in mine if each.of.state is AttemptState.SUCCEEDED), mine[-1] if mine else None)
        path.add((current, 0))
        for each in mine:
            if winner is not None and (each is winner or (not each.of.hedge and each.of.n < winner.of.n)):
                path.add((current, each.of.n))
        parents = [parent for parent in by_index[current].parents if parent in by_index]
        current = max(parents, key=lambda index: (finish(index, found, times), -index), default=None)
    return path


def overlapping_owners(changes: Iterable[Change]) -> int:
    """Placements of a task, hedges apart, while it still had an owner (F2): by the order of the journal, not by any clock. What
    the events no longer tell counts as no owner. It must be 0."""
    owner: dict[int, int] = {}
    found = 0
    for change in changes:
        if change.kind == "placed":
            found += change.task in owner
            owner[change.task] = change.n
        elif change.kind in ENDING or change.state is TaskState.SUCCEEDED:
            owner.pop(change.task, None)
        elif change.kind in CLOSING and owner.get(change.task) == change.n:
            del owner[change.task]
    return found
