"""Losses: what the end of a cluster's generation means for attempts (PROTOCOL F2, F6, F7, S5, S6, S7; drains and hedges).

Theory: everything here is a level. An attempt of a generation whose ClusterLost is committed and whose guard time is over
(`state.fenced`) is *fenced*: a copy of it may start. It stays in its live set, and its own late report still counts, until
the batch that places its replacement or ends the task (F2). `review` looks at one task as it stands now and queues or ends
it; `wanted` says, at the moment of placing, what a task in a lane may get. Both may be asked at any time, any number of
times; facts that are told again after a takeover (table, fences, inventories) lead to the same place.

`wait` and `never_rerun` work (F7) is fenced only by evidence REPORTED, or when a later generation of the same agent journal
has another boot id, for nothing survives a reboot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from control_plane.core.commands import GenerationFenced
from control_plane.core.events import AttemptsLost, StopsOrdered, TasksEnded
from control_plane.core.graph import lost_too_often
from control_plane.core.machine import Batch
from control_plane.core.model import (
    Admission,
    AttemptId,
    Evidence,
    FleetTable,
    Health,
    OnClusterLost,
    RunState,
    TaskState,
)
from control_plane.core.run import Attempt, Run
from control_plane.core.state import ShardState

REVIEWS = 2000
"""Tasks looked at in one batch after the loss of a cluster (J2): about 5 ms. The rest is looked at in the next ones."""


@dataclass(frozen=True, slots=True)
class Want:
    """What a task in a lane may get now. `lost`: members that leave in the same batch (F2). `hedge`: a second copy beside
    the member that lives, never on its cluster: that one is not READY. `overlap` is said before the start (F6)."""

    lost: tuple[tuple[Attempt, Evidence], ...] = ()
    hedge: bool = False
    overlap: bool = False


def take_table(state: ShardState, table: FleetTable) -> None:
    """Fleet's table as a level (S5): look again at all work on clusters that are fenced, suspect or draining."""
    state.outbox.demand |= table.seq > state.table.seq
    if not state.see(table):
        return
    clusters = {cluster for cluster, _ in state.fenced}
    alive = {(c, a.generation) for c in clusters for a in state.live_on.get(c, {}).values()}
    state.fenced = {key: evidence for key, evidence in state.fenced.items() if key in alive}
    clusters = {cluster for cluster, _ in state.fenced}
    for cluster, here in state.live_on.items():
        facts = table.clusters.get(cluster)
        if facts is None:
            continue
        troubled = facts.health is not Health.READY or facts.admission is Admission.DRAINING
        if troubled or cluster in clusters:
            state.review.extend((id_.run, id_.task) for id_ in here)


def fence(state: ShardState, command: GenerationFenced) -> None:
    """The guard time of an ended generation is over here (S5). Older generations that fleet's table no longer holds ended
    before it; what their evidence was is forgotten, so it counts as none."""
    here = state.live_on.get(command.cluster, {})
    facts = state.table.clusters.get(command.cluster)
    oldest = facts.generations[0].number if facts and facts.generations else 0
    for attempt in here.values():
        key = (attempt.cluster, attempt.generation)
        if attempt.generation == command.generation:
            state.fenced[key] = command.evidence
        elif attempt.generation < min(oldest, command.generation):
            state.fenced.setdefault(key, Evidence.NONE)
        else:
            continue
        state.review.append((attempt.id.run, attempt.id.task))


def fenced(state: ShardState, run: Run, attempt: Attempt) -> Evidence | None:
    """Evidence with which a copy of this live attempt may start now; None if none may."""
    evidence = state.fenced.get((attempt.cluster, attempt.generation))
    if evidence is None:
        return None
    if rebooted(state.table, attempt):
        evidence = Evidence.REPORTED
    if keeps(run, attempt.id.task) and evidence is not Evidence.REPORTED:
        return None
    return evidence


def rebooted(table: FleetTable, attempt: Attempt) -> bool:
    """A later generation of the same agent journal runs under another boot id than the attempt's (S6): it is dead. Under another
    journal it may be another host, which proves nothing."""
    facts = table.clusters.get(attempt.cluster)
    mine = facts.find(attempt.generation) if facts else None
    if facts is None or mine is None:
        return False
    later = (g for g in facts.generations if g.number > mine.number and g.journal_uid == mine.journal_uid)
    return any(g.boot_id != mine.boot_id for g in later)


def keeps(run: Run, task: int) -> bool:
    """The task's work is not copied on a loss (F7), hence not stopped at F."""
    return run.tasks[task].spec.on_cluster_lost is not OnClusterLost.RERUN_AFTER_FENCE


def held_until(state: ShardState, run: Run, task: int, now: float) -> float:
    """Storm guard (S7): replacements wait for the end of the storm, or of the task's own slack, whichever is first."""
    storm = state.table.storm_until
    return min(storm, run.latest_start(task)) if storm > now else now


def wanted(state: ShardState, run: Run, task: int, now: float) -> Want | None:
    """What the task may get now; None if it may get nothing (any more)."""
    if run.state is not RunState.RUNNING or now >= run.deadline:
        return None
    members = run.live.get(task)
    if not members:
        if run.states[task] != TaskState.READY or run.not_before.get(task, 0.0) > now:
            return None
        return Want(overlap=_uncertain(run, task))
    verdicts = [(attempt, fenced(state, run, attempt)) for attempt in members]
    lost = tuple((attempt, evidence) for attempt, evidence in verdicts if evidence is not None)
    if len(lost) == len(members):
        if held_until(state, run, task, now) > now:
            return None
        overlap = _uncertain(run, task) or any(evidence is Evidence.NONE for _, evidence in lost)
        return Want(lost=lost, overlap=overlap)
    if len(members) == 1 and _suspected(state, run, members[0]):
        return Want(hedge=True, overlap=True)
    return None


def _uncertain(run: Run, task: int) -> bool:
    """An earlier attempt was lost without evidence, and nobody has told its death since (F6)."""
    past = run.history.get(task, ())
    return any(a.evidence is Evidence.NONE and not a.reported and a.id in run.stops for a in past)


def _suspected(state: ShardState, run: Run, attempt: Attempt) -> bool:
    """A hedged task's only member is on a cluster that is not seen well (S3, F7), and is not being stopped."""
    facts = state.table.clusters.get(attempt.cluster)
    return (
        run.tasks[attempt.id.task].spec.hedge
        and not keeps(run, attempt.id.task)
        and facts is not None
        and facts.health in (Health.SUSPECT, Health.LOST)
        and attempt.id not in run.stops
    )


def review(state: ShardState, batch: Batch) -> None:
    """Look again at up to `REVIEWS` tasks."""
    orders = Orders()
    for _ in range(min(REVIEWS, len(state.review))):
        uid, task = state.review.popleft()
        run = state.runs.get(uid)
        if run is not None and run.state is RunState.RUNNING and batch.now < run.deadline:
            _review(state, run, task, batch.now, orders)
    orders.emit(batch)
    if state.review:
        state.more = True


def _review(state: ShardState, run: Run, task: int, now: float, orders: Orders) -> None:
    members = run.live.get(task)
    if not members:
        if run.states[task] == TaskState.READY:
            state.queue(run, task, now)
        return
    for attempt in members:
        if attempt.id not in run.stops and _drained(state, run, attempt, now):
            orders.stop(attempt)
    lost = [(a, evidence) for a in members if (evidence := fenced(state, run, a)) is not None]
    if len(lost) < len(members):
        if len(members) == 1 and _suspected(state, run, members[0]):
            state.enter_lane(run, task, now)
        return
    losses = run.infra_losses.get(task, 0) + len(lost)
    if losses > run.tasks[task].spec.retry.max_infrastructure_losses:
        orders.exhaust(run.uid, task, lost, lost_too_often(losses))
        return
    hold = held_until(state, run, task, now)
    if hold > now:
        state.wake_at(hold, run.uid, task)
    else:
        state.enter_lane(run, task, now)


def _drained(state: ShardState, run: Run, attempt: Attempt, now: float) -> bool:
    """A drain moves work that can finish again in time. `never_rerun` work stays: only an operator moves it (F7)."""
    facts = state.table.clusters.get(attempt.cluster)
    spec = run.tasks[attempt.id.task].spec
    return (
        facts is not None
        and facts.admission is Admission.DRAINING
        and spec.on_cluster_lost is not OnClusterLost.NEVER_RERUN
        and now + spec.expected < run.deadline
    )


class Orders:
    """Outcomes of reviews, gathered into as few events as possible."""

    def __init__(self) -> None:
        self._stops: dict[str, dict[AttemptId, None]] = {}
        self._lost: dict[tuple[str, Evidence], dict[AttemptId, None]] = {}
        self._ended: dict[str, dict[int, str]] = {}

    def stop(self, attempt: Attempt) -> None:
        """Stop it because its cluster drains."""
        self._stops.setdefault(attempt.id.run, {})[attempt.id] = None

    def exhaust(self, run: str, task: int, lost: Iterable[tuple[Attempt, Evidence]], reason: str) -> None:
        """End a task with its fenced members: its loss budget is spent."""
        for attempt, evidence in lost:
            self._lost.setdefault((run, evidence), {})[attempt.id] = None
        self._ended.setdefault(run, {})[task] = reason

    def emit(self, batch: Batch) -> None:
        """Decide it all."""
        for run, ids in self._stops.items():
            batch.emit(StopsOrdered(run, tuple(i.task for i in ids), tuple(i.n for i in ids), "its cluster drains"))
        for (run, evidence), ids in self._lost.items():
            batch.emit(AttemptsLost(run, tuple(i.task for i in ids), tuple(i.n for i in ids), evidence))
        for run, ended in self._ended.items():
            states = (TaskState.FAILED,) * len(ended)
            batch.emit(TasksEnded(run, tuple(ended), states, tuple(ended.values())))
