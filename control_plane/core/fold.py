"""`apply`: how each event changes the state (PROTOCOL J1). Total and deterministic on every log that `handle` can make.

Theory: the only module that changes what is folded, with the steps in `core.moves` that several events share. It decides
nothing that could have been decided otherwise: from an event and the state follows the next state, among it which children
become READY (their trigger rule holds) and which are due to be skipped. Children due for a skip and tasks due
for a retry or an end are only noted; `core.graph` turns the notes into events in `settle`, so that a batch cut off between
two events still goes on rightly after a takeover.

A watcher sees one numbered run event per event here, with all tasks it moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from control_plane.core import events as e
from control_plane.core import inline
from control_plane.core.files import Files
from control_plane.core.image import restore_run, restore_shard
from control_plane.core.model import AttemptId, AttemptState, Evidence, RunState, Stamp, TaskState
from control_plane.core.moves import Rows, attempt_of, end, left, note, parents_final, refs, stop_members
from control_plane.core.run import Attempt, Run
from control_plane.core.state import NAME_HOLD, WHOLE_RUN, ShardState


def _run_created(state: ShardState, event: e.RunCreated, stamp: Stamp) -> None:
    state.runs[event.run] = Run(event, stamp.wall)
    state.unsealed[event.run] = None


def _tasks_added(state: ShardState, event: e.TasksAdded, _: Stamp) -> None:
    state.runs[event.run].add_tasks(event.tasks)


def _run_sealed(state: ShardState, event: e.RunSealed, stamp: Stamp) -> None:
    run = state.runs[event.run]
    run.seal()
    state.open_lanes(run)
    state.list_run(run)
    state.wake_at(run.deadline, run.uid, WHOLE_RUN)
    rows: Rows = []
    for task, parents in enumerate(run.waiting):
        if not parents:
            parents_final(state, run, task, stamp.wall, rows)
    note(state, run, stamp, "created", rows)


def _attempts_placed(state: ShardState, event: e.AttemptsPlaced, stamp: Stamp) -> None:
    run = state.runs[event.run]
    uid, nonce, wall, cluster = run.uid, stamp.nonce, stamp.wall, event.cluster
    rows: Rows = []
    for task, n in zip(event.tasks, event.ns, strict=True):
        id_ = AttemptId(uid, task, n, nonce)
        attempt = Attempt(id_, cluster, event.generation, wall, event.hedge, event.overlap, stamp.incarnation)
        state.unqueue(run, task)
        state.join(run, attempt)
        run.remember(attempt)
        run.next_n[task] = n + 1
        run.not_before.pop(task, None)
        run.undecided.pop(task, None)
        if not event.hedge:
            run.set_state(task, TaskState.PLACED)
        state.outbox.placed.append(id_)
        rows.append((task, run.states[task], n, cluster, run.files.place(task, n) if run.files else ""))
    note(state, run, stamp, "hedged" if event.hedge else "placed", rows)


def _attempts_started(state: ShardState, event: e.AttemptsStarted, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n, start in zip(event.tasks, event.ns, event.starts, strict=True):
        attempt = attempt_of(run, task, n)
        attempt.state = AttemptState.RUNNING
        attempt.start = start
        if run.states[task] == TaskState.PLACED:
            run.set_state(task, TaskState.RUNNING)
        rows.append((task, run.states[task], n, attempt.cluster, ""))
    note(state, run, stamp, "started", rows)


def _artifacts_published(state: ShardState, event: e.ArtifactsPublished, _: Stamp) -> None:
    """No run event: the finish that follows in the same batch tells of it."""
    run = state.runs[event.run]
    files = run.files = run.files or Files()
    for attempt, ref in refs(run, event):
        files.publish(attempt.id, attempt.cluster, ref)


def _checkpoints_committed(state: ShardState, event: e.CheckpointsCommitted, stamp: Stamp) -> None:
    """A run event for the first of each attempt, and now and then: see `files.NOTED_EVERY`."""
    run = state.runs[event.run]
    files = run.files = run.files or Files()
    rows = [
        (of.id.task, run.states[of.id.task], of.id.n, of.cluster, f"saved {ref.name}, {ref.size} bytes")
        for of, ref in refs(run, event)
        if files.commit(of.id, of.cluster, ref, stamp.wall)
    ]
    if rows:
        files.noted = stamp.wall
        note(state, run, stamp, "checkpoint", rows)


def _attempts_finished(state: ShardState, event: e.AttemptsFinished, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    opened: Rows = []
    for i, task in enumerate(event.tasks):
        attempt = attempt_of(run, task, event.ns[i])
        outcome = event.states[i]
        state.leave(run, attempt)
        attempt.state = outcome
        attempt.start = event.starts[i] or attempt.start
        attempt.end = event.ends[i]
        attempt.exit_code = event.exit_codes[i]
        attempt.message = event.messages[i]
        attempt.reported = True
        if outcome is AttemptState.SUCCEEDED:
            _accept(state, run, task, event.results[i], stamp.wall, opened)
        else:
            if outcome is AttemptState.LOST:
                attempt.evidence = Evidence.REPORTED
            if event.infra[i]:
                run.infra_losses[task] = run.infra_losses.get(task, 0) + 1
                attempt.preempted = outcome is AttemptState.STOPPED
            elif outcome is AttemptState.FAILED:
                run.app_failures[task] = run.app_failures.get(task, 0) + 1
            left(state, run, attempt)
        rows.append((task, run.states[task], attempt.id.n, attempt.cluster, attempt.message))
    note(state, run, stamp, "finished", rows + opened)


def _accept(state: ShardState, run: Run, task: int, result: bytes, wall: float, opened: Rows) -> None:
    """A success is accepted, once; the other members leave with their stops outstanding (F2, I3)."""
    run.accepted[task] += 1
    run.accepted_total += 1
    if result:
        run.results[task] = result
        run.result_bytes += inline.weight(result)
    run.reasons.pop(task, None)
    stop_members(state, run, task, wall)
    end(state, run, task, TaskState.SUCCEEDED, wall, opened)


def _attempts_rejected(state: ShardState, event: e.AttemptsRejected, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n, reason in zip(event.tasks, event.ns, event.reasons, strict=True):
        attempt = attempt_of(run, task, n)
        state.leave(run, attempt)
        attempt.state = AttemptState.REJECTED
        attempt.end = stamp.wall
        attempt.message = reason
        attempt.reported = True
        left(state, run, attempt)
        rows.append((task, run.states[task], n, attempt.cluster, reason))
    note(state, run, stamp, "rejected", rows)


def _attempts_lost(state: ShardState, event: e.AttemptsLost, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n in zip(event.tasks, event.ns, strict=True):
        attempt = attempt_of(run, task, n)
        state.leave(run, attempt)
        attempt.state = AttemptState.LOST
        attempt.end = stamp.wall
        attempt.evidence = event.evidence
        if event.evidence is not Evidence.REPORTED:
            state.arm(run, attempt)  # its cluster may come back with it: stopped then, reservation until so (F8)
        run.infra_losses[task] = run.infra_losses.get(task, 0) + 1
        left(state, run, attempt)
        rows.append(
            (task, run.states[task], n, attempt.cluster, f"lost with its cluster, evidence {event.evidence.name}")
        )
    note(state, run, stamp, "lost", rows)


def _attempts_adopted(state: ShardState, event: e.AttemptsAdopted, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n in zip(event.tasks, event.ns, strict=True):
        attempt = attempt_of(run, task, n)
        attempt.generation = event.generation
        rows.append((task, run.states[task], n, attempt.cluster, f"adopted by session generation {event.generation}"))
    note(state, run, stamp, "adopted", rows)


def _stops_ordered(state: ShardState, event: e.StopsOrdered, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n in zip(event.tasks, event.ns, strict=True):
        attempt = attempt_of(run, task, n)
        state.arm(run, attempt)
        rows.append((task, run.states[task], n, attempt.cluster, event.reason))
    note(state, run, stamp, "stopping", rows)


def _stops_confirmed(state: ShardState, event: e.StopsConfirmed, stamp: Stamp) -> None:
    run = state.runs.get(event.run)
    if run is None:
        kept = state.kept[event.run]
        wanted = set(zip(event.tasks, event.ns, strict=True))
        for attempt in [a for a in kept.values() if (a.id.task, a.id.n) in wanted]:
            state.disarm(kept, attempt)
        if not kept:
            del state.kept[event.run]
        return
    rows: Rows = []
    for task, n in zip(event.tasks, event.ns, strict=True):
        attempt = attempt_of(run, task, n)
        state.disarm(run.stops, attempt)
        rows.append((task, run.states[task], n, attempt.cluster, ""))
    note(state, run, stamp, "stopped", rows)


def _results_refused(state: ShardState, event: e.ResultsRefused, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, n, message in zip(event.tasks, event.ns, event.messages, strict=True):
        attempt = attempt_of(run, task, n)
        attempt.refused += 1
        attempt.reported = True
        run.refused_total += 1
        rows.append((task, run.states[task], n, attempt.cluster, message))
    note(state, run, stamp, "refused", rows)


def _retries_set(state: ShardState, event: e.RetriesSet, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    for task, not_before, reason in zip(event.tasks, event.not_before, event.reasons, strict=True):
        n = run.undecided.pop(task)
        run.set_state(task, TaskState.READY)
        run.not_before[task] = not_before
        run.reasons[task] = reason
        state.queue(run, task, stamp.wall)
        rows.append((task, TaskState.READY, n, "", reason))
    note(state, run, stamp, "retry", rows)


_ENDED_KIND = {
    TaskState.FAILED: "failed",
    TaskState.SKIPPED: "skipped",
    TaskState.CANCELLED: "cancelled",
    TaskState.DEADLINE_EXCEEDED: "deadline",
}


def _tasks_ended(state: ShardState, event: e.TasksEnded, stamp: Stamp) -> None:
    run = state.runs[event.run]
    rows: Rows = []
    opened: Rows = []
    for task, new, reason in zip(event.tasks, event.states, event.reasons, strict=True):
        n = run.next_n[task] - 1
        state.unqueue(run, task)
        run.undecided.pop(task, None)
        run.not_before.pop(task, None)
        run.reasons[task] = reason
        stop_members(state, run, task, stamp.wall)
        end(state, run, task, new, stamp.wall, opened)
        rows.append((task, new, n, "", reason))
    note(state, run, stamp, _ENDED_KIND[event.states[0]], rows + opened)


def _run_cancel_requested(state: ShardState, event: e.RunCancelRequested, stamp: Stamp) -> None:
    run = state.runs[event.run]
    run.state = RunState.CANCELLING
    run.reason = event.reason
    state.dirty[run.uid] = None
    for task in list(run.tickets):
        state.unqueue(run, task)
    note(state, run, stamp, "cancel", [])


def _run_finished(state: ShardState, event: e.RunFinished, stamp: Stamp) -> None:
    run = state.runs[event.run]
    run.state = event.state
    run.reason = event.reason
    run.finished = stamp.wall
    state.final[run.uid] = None
    state.outbox.finished.append(run.uid)
    note(state, run, stamp, "run_finished", [])


def _run_archived(state: ShardState, event: e.RunArchived, stamp: Stamp) -> None:
    run = state.runs[event.run]
    if run.sealed:
        key = (run.header.namespace, run.header.run_id)
        state.archived.pop(key, None)
        state.archived[key] = (run.uid, stamp.wall)
    state.forget_run(run)
    while state.archived:
        key, (_, wall) = next(iter(state.archived.items()))
        if wall + NAME_HOLD >= stamp.wall:
            return
        del state.archived[key]


def _run_image(state: ShardState, event: e.RunImage, stamp: Stamp) -> None:
    if event.run:
        restore_run(state, state.runs[event.run], event.image, stamp.incarnation)
    else:
        restore_shard(state, event.image, stamp.incarnation)


FOLDS: dict[type[e.Event], Callable[[ShardState, Any, Stamp], None]] = {
    e.RequestRecorded: lambda state, event, _: state.requests.apply_recorded(event),
    e.RequestsPruned: lambda state, event, _: state.requests.apply_pruned(event),
    e.NamespacePut: lambda state, event, _: state.catalog.apply_namespace(event),
    e.GraphPut: lambda state, event, stamp: state.catalog.apply_graph(event, stamp.wall),
    e.RunCreated: _run_created,
    e.TasksAdded: _tasks_added,
    e.RunSealed: _run_sealed,
    e.AttemptsPlaced: _attempts_placed,
    e.AttemptsStarted: _attempts_started,
    e.AttemptsFinished: _attempts_finished,
    e.ArtifactsPublished: _artifacts_published,
    e.CheckpointsCommitted: _checkpoints_committed,
    e.AttemptsRejected: _attempts_rejected,
    e.AttemptsLost: _attempts_lost,
    e.AttemptsAdopted: _attempts_adopted,
    e.StopsOrdered: _stops_ordered,
    e.StopsConfirmed: _stops_confirmed,
    e.ResultsRefused: _results_refused,
    e.RetriesSet: _retries_set,
    e.TasksEnded: _tasks_ended,
    e.RunCancelRequested: _run_cancel_requested,
    e.RunFinished: _run_finished,
    e.RunArchived: _run_archived,
    e.RunImage: _run_image,
}
"""What each event does."""
