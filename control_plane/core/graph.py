"""The graph rules: what follows for a run from what happened to its tasks (PROTOCOL F2, D1, D2; J2).

Theory: `core.fold` leaves notes (tasks whose live set ran empty, children whose rule cannot hold), and `follow_up` turns
them into events, in `settle`, until none is left:

    undecided task --failure class, budget, deadline--> RetriesSet | TasksEnded(FAILED)
    due for a skip --with all that are skipped by it--> TasksEnded(SKIPPED)
    cancelled, or past its deadline                 --> TasksEnded(CANCELLED | DEADLINE_EXCEEDED), in parts
    no open task                                    --> RunFinished

Failure classes: FAILED is the application's (its own budget, backoff with full jitter); LOST is the infrastructure's (its
own budget, short backoff); STOPPED with `infra` is a preemption (counted there, replaced at once); STOPPED without it was
cut off by the deadline, whose verdict is awaited; REJECTED costs nothing.

State of a finished run: DEADLINE_EXCEEDED or CANCELLED if a task ended so; else FAILED if any task FAILED, whatever its
children made of that; else SUCCEEDED.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from control_plane.core.deadline import application_backoff, infrastructure_backoff, jitter, rejection_pause
from control_plane.core.events import RetriesSet, RunArchived, RunFinished, TasksEnded
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptState, RunState, TaskState
from control_plane.core.run import Attempt, Run, holds
from control_plane.core.state import ShardState

OVERDUE = "the run's deadline passed"
WAITED = f"{OVERDUE}; it waited: "
"""Reason of what the deadline ended, and how it begins where a task waited for a place."""

WORDS = 64 * 1024
"""Characters of waiting reasons in one batch: with the rest of `PART` tasks it stays below 256 KiB (J2). Tasks of a group wait for the
same reason, so those beyond it lose nothing that is not said elsewhere."""

PART = 2000
"""Tasks ended in one batch of a larger decision (J2): about 5 ms of decide and apply. Every part leaves a correct state: a
cancelled or overdue run places nothing meanwhile."""


def settle_runs(state: ShardState, batch: Batch) -> None:
    """Follow up every run that something happened to. Sets `state.more` if a part is left for the next batch."""
    for uid in list(state.unsealed):
        # Only a creation cut off by a takeover is still unsealed here: nobody was told of it, so it goes.
        batch.emit(RunArchived(uid))
    for uid in list(state.dirty):
        del state.dirty[uid]
        run = state.runs.get(uid)
        if run is not None and not run.state.final:
            follow_up(state, run, batch)


def follow_up(state: ShardState, run: Run, batch: Batch) -> None:
    """Emit what is due for one run."""
    ending = run.state is RunState.CANCELLING or batch.now >= run.deadline
    while not ending and (run.undecided or run.skippable):
        if run.undecided:
            _decide(run, batch)
        if run.skippable:
            _skip(run, batch)
    if ending:
        run.skippable.clear()
        _end_part(state, run, batch)
    if run.open:
        # While it ends, what is open is the part left for the next batch.
        if ending:
            state.dirty[run.uid] = None
            state.more = True
        else:
            state.dirty.pop(run.uid, None)
        return
    state.dirty.pop(run.uid, None)
    batch.emit(_verdict(run))


def _decide(run: Run, batch: Batch) -> None:
    """Retry or end every task whose live set ran empty (F2)."""
    retries: list[tuple[int, float, str]] = []
    ended: list[tuple[int, str]] = []
    for task, n in run.undecided.items():
        attempt = run.attempt(task, n)
        if attempt is None:
            raise AssertionError(f"the last attempt of undecided task {task} of run {run.uid} is not kept")
        wait, why = _retry(run, task, attempt, batch.now)
        if wait is None:
            ended.append((task, why))
        else:
            retries.append((task, batch.now + wait, why))
    if retries:
        batch.emit(RetriesSet(run.uid, *_columns(retries)))
    if ended:
        tasks, reasons = _columns(ended)
        batch.emit(TasksEnded(run.uid, tasks, (TaskState.FAILED,) * len(tasks), reasons))


def _retry(run: Run, task: int, attempt: Attempt, now: float) -> tuple[float | None, str]:
    """Seconds until the task may be placed again, None if it may not; and why."""
    policy = run.tasks[task].spec.retry
    draw = jitter(run.uid, task, attempt.id.n)
    losses = run.infra_losses.get(task, 0)
    cause = attempt.message or attempt.state.name.lower()
    if attempt.state is AttemptState.REJECTED:
        return rejection_pause(draw), f"no room on the cluster: {cause}"
    if attempt.state is AttemptState.FAILED:
        failures = run.app_failures.get(task, 0)
        if failures >= policy.max_attempts:
            return None, f"failed {failures} of {policy.max_attempts} times: {cause}"
        wait = application_backoff(policy, failures, draw)
        why = f"failure {failures} of {policy.max_attempts}: {cause}"
    elif attempt.state is AttemptState.STOPPED and not attempt.preempted:
        return run.deadline - now, f"cut off by its deadline: {cause}"
    elif losses > policy.max_infrastructure_losses:
        return None, lost_too_often(losses)
    elif attempt.state is AttemptState.STOPPED:
        return 0.0, f"preempted: {cause}"
    else:
        wait = infrastructure_backoff(losses, draw)
        why = f"infrastructure loss {losses}: {cause}"
    if now + wait >= run.deadline:
        return None, f"the next try would start {wait:.1f} s from now, after the deadline; {why}"
    return wait, why


def lost_too_often(losses: int) -> str:
    """Why a task ends that was lost beyond its budget."""
    return f"lost {losses} times to infrastructure failures, more than its budget allows"


def _skip(run: Run, batch: Batch) -> None:
    """Skip what cannot run, and all that is skipped by that, in one event; iteratively, for chains are long."""
    seeds = [task for task in run.skippable if run.states[task] == TaskState.PENDING]
    run.skippable.clear()
    if not seeds:
        return
    waiting: dict[int, int] = {}
    order = list(dict.fromkeys(seeds))
    for task in order:  # grows while it is walked
        for child in run.children[task]:
            waiting[child] = waiting.get(child, run.waiting[child]) - 1
            spec = run.tasks[child].spec
            # A skipped parent is one that did not succeed, and did not fail.
            if not waiting[child] and not holds(spec.trigger, run.failed_parents[child], 1):
                order.append(child)
    reason = "its trigger rule cannot hold any more"
    batch.emit(TasksEnded(run.uid, tuple(order), (TaskState.SKIPPED,) * len(order), (reason,) * len(order)))


def _end_part(state: ShardState, run: Run, batch: Batch) -> None:
    """End up to `PART` open tasks of a cancelled or overdue run (D2): the first terminal decision wins. What the deadline found
    waiting keeps the reason why: afterwards nobody else could tell."""
    cancelled = run.state is RunState.CANCELLING
    tasks: list[int] = []
    states, index = run.states, run.scanned
    while index < len(states) and len(tasks) < PART:
        if states[index] < TaskState.SUCCEEDED:
            tasks.append(index)
        index += 1
    if not tasks:
        return
    new = TaskState.CANCELLED if cancelled else TaskState.DEADLINE_EXCEEDED
    if cancelled:
        reasons = [f"cancelled: {run.reason}" if run.reason else "cancelled"] * len(tasks)
    else:
        reasons = _overdue(state, run, tasks)
    batch.emit(TasksEnded(run.uid, tuple(tasks), (new,) * len(tasks), tuple(reasons)))
    run.scanned = index


def _overdue(state: ShardState, run: Run, tasks: Iterable[int]) -> list[str]:
    """Why each of these was not done by the deadline."""
    reasons, room = [], WORDS
    for task in tasks:
        waited = ""
        if task in run.tickets:
            waited = state.wait_reasons.get(run.lanes[task].key, "") or run.reasons.get(task, "")
        room -= len(waited)
        reasons.append(WAITED + waited if waited and room >= 0 else OVERDUE)
    return reasons


def _verdict(run: Run) -> RunFinished:
    counts = run.counts
    if counts[TaskState.DEADLINE_EXCEEDED]:
        waited = ((task, why.removeprefix(WAITED)) for task, why in run.reasons.items() if why.startswith(WAITED))
        told = next((f"; {run.tasks[task].id} waited: {why}" for task, why in waited), "")
        return RunFinished(
            run.uid, RunState.DEADLINE_EXCEEDED, f"the deadline passed before every task was final{told}"
        )
    if counts[TaskState.CANCELLED]:
        return RunFinished(run.uid, RunState.CANCELLED, run.reason)
    failed = counts[TaskState.FAILED]
    if failed:
        first = run.states.find(TaskState.FAILED)
        why = run.reasons.get(first, "")
        return RunFinished(run.uid, RunState.FAILED, f"{failed} failed, first {run.tasks[first].id}: {why}")
    return RunFinished(run.uid, RunState.SUCCEEDED, "")


def _columns(rows: Iterable[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(zip(*rows, strict=True))
