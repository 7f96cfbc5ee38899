"""How tasks and attempts move when what is told of them is folded: the steps that several events share (PROTOCOL J1, F2, F8).

Theory: events differ in what they say, not in what follows from it. A task that becomes final opens its children or leaves them
due for a skip, whether it succeeded, failed or was cancelled; a member that leaves without success makes a retry or an end due,
whether it failed, was refused or was lost; a task that is decided stops the members still live (F2). Each of these is said once,
here, so that no event can forget a part of it. Like `core.fold`, the only caller, this decides nothing: it notes what is due.
"""

from __future__ import annotations

from collections.abc import Iterator

from control_plane.core import events as e
from control_plane.core.model import ArtifactRef, AttemptState, Stamp, TaskState
from control_plane.core.run import Attempt, Run
from control_plane.core.state import ShardState

Rows = list[tuple[int, int, int, str, str]]
"""(task, state, n, cluster, reason) of a run event."""


def attempt_of(run: Run, task: int, n: int) -> Attempt:
    """The attempt that an event names. Raises AssertionError if the run has none such: `handle` made no such log."""
    attempt = run.attempt(task, n)
    if attempt is None:
        raise AssertionError(f"attempt {n} of task {task} of run {run.uid} is not known")
    return attempt


def refs(run: Run, event: e.ArtifactsPublished | e.CheckpointsCommitted) -> Iterator[tuple[Attempt, ArtifactRef]]:
    """Each file that the event names, with the attempt that made it. Raises AssertionError as `attempt_of`."""
    attempts = (attempt_of(run, task, n) for task, n in zip(event.tasks, event.ns, strict=True))
    return zip(attempts, map(ArtifactRef, event.names, event.sizes, event.digests), strict=True)


def left(state: ShardState, run: Run, attempt: Attempt) -> None:
    """A member left without success: if it was the last, retry or end is due. A task that waited for a place in its stead (its
    other members were fenced) waits no more until that is decided."""
    task = attempt.id.task
    state.dirty[run.uid] = None
    if task not in run.live:
        state.unqueue(run, task)
        run.undecided[task] = attempt.id.n
    else:
        state.review.append((run.uid, task))


def stop_members(state: ShardState, run: Run, task: int, wall: float) -> None:
    """The task is decided: members still live leave, their stops outstanding (F2, F8)."""
    for attempt in list(run.live.get(task, ())):
        state.leave(run, attempt)
        attempt.state = AttemptState.STOPPED
        attempt.end = wall
        state.arm(run, attempt)


def end(state: ShardState, run: Run, task: int, new: TaskState, wall: float, opened: Rows) -> None:
    """A task becomes final; children whose last open parent it was are READY or due for a skip."""
    state.unqueue(run, task)
    run.set_state(task, new)
    if run.files:
        run.files.checkpoints.pop(task, None)  # nothing will start from it
    state.dirty[run.uid] = None
    succeeded = new is TaskState.SUCCEEDED
    failed = not succeeded and new is not TaskState.SKIPPED
    for child in run.children[task]:
        run.waiting[child] -= 1
        if not succeeded:
            run.unsucceeded_parents[child] += 1
            run.failed_parents[child] += failed
        if not run.waiting[child] and run.states[child] == TaskState.PENDING:
            parents_final(state, run, child, wall, opened)


def parents_final(state: ShardState, run: Run, task: int, wall: float, opened: Rows) -> None:
    """No parent of a task is open any more: it is READY if its trigger rule holds, else due for a skip."""
    if run.trigger_holds(task):
        run.set_state(task, TaskState.READY)
        state.queue(run, task, wall)
        opened.append((task, TaskState.READY, 0, "", ""))
    else:
        run.skippable.append(task)
        state.dirty[run.uid] = None


def note(state: ShardState, run: Run, stamp: Stamp, kind: str, rows: Rows) -> None:
    """Tell watchers: one run event, with the tasks that it moved."""
    run.note(stamp.wall, kind, rows)
    state.outbox.runs.add(run.uid)
