"""Answers from a shard's state, as values (PROTOCOL J8). Reads change nothing, and cost what they return."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from control_plane.core.catalog import GraphHistory
from control_plane.core.files import Files, Made
from control_plane.core.losses import keeps
from control_plane.core.model import AttemptId, TaskState, fence_of
from control_plane.core.run import Attempt, Run
from control_plane.core.state import ShardState
from control_plane.core.views import (
    ArtifactView,
    AttemptView,
    DispatchView,
    GraphView,
    NamespaceView,
    RunEventView,
    RunView,
    TaskView,
)


def run_view(run: Run) -> RunView:
    """The run as it stands."""
    header = run.header
    return RunView(
        uid=header.run,
        namespace=header.namespace,
        run_id=header.run_id,
        state=run.state,
        reason=run.reason,
        deadline=header.deadline,
        created=run.created,
        finished=run.finished,
        priority=header.priority,
        task_total=header.task_total,
        tasks_by_state={state: run.counts[state] for state in TaskState if run.counts[state]},
        labels=header.labels,
        annotations=header.annotations,
        graph=header.graph,
        graph_version=header.graph_version,
        resumed_from=header.resumed_from,
        trace_id=header.trace_id,
        event_number=run.event_number,
        accepted_results=run.accepted_total,
        refused_results=run.refused_total,
    )


def attempt_view(run: Run, attempt: Attempt) -> AttemptView:
    """An attempt of a live run."""
    saved, resumed = run.files.told(attempt.id) if run.files else ("", "")
    return AttemptView(
        id=attempt.id,
        incarnation=attempt.incarnation,
        cluster=attempt.cluster,
        generation=attempt.generation,
        state=attempt.state,
        hedge=attempt.hedge,
        overlap=attempt.overlap,
        evidence=attempt.evidence,
        live=run.is_live(attempt),
        stopping=attempt.id in run.stops,
        placed=attempt.placed,
        start=attempt.start,
        end=attempt.end,
        exit_code=attempt.exit_code,
        message=attempt.message,
        refused_results=attempt.refused,
        checkpoint=saved,
        resumed_from=resumed,
    )


def artifact_views(run: Run, made: Made | None) -> tuple[ArtifactView, ...]:
    """What an attempt of a live run made."""
    if made is None:
        return ()
    task_id, namespace = run.tasks[made.attempt.task].id, run.header.namespace
    return tuple(ArtifactView(namespace, task_id, made.attempt, made.cluster, ref) for ref in made.refs)


def published(run: Run, start: int, limit: int) -> list[ArtifactView]:
    """Artifacts of tasks from index `start` on, in order of task; those of a task come together, so there may be a few more than
    `limit`."""
    found: list[ArtifactView] = []
    if run.files is not None:
        for task in sorted(task for task in run.files.published if task >= start):
            if len(found) >= limit:
                break
            found += artifact_views(run, run.files.published[task])
    return found


def _inputs(run: Run, files: Files, parents: Iterable[int]) -> tuple[ArtifactView, ...]:
    made = (files.published.get(parent) for parent in parents)
    return tuple(view for of in made for view in artifact_views(run, of))


def _first(views: tuple[ArtifactView, ...]) -> ArtifactView | None:
    return views[0] if views else None


def task_view(state: ShardState, run: Run, index: int) -> TaskView:
    """A task with all its kept attempts. Why it waits for a place is the scheduler's sentence."""
    task, files = run.tasks[index], run.files
    value = TaskState(run.states[index])
    reason = run.reasons.get(index, "")
    if index in run.tickets:
        reason = state.wait_reasons.get(run.lanes[index].key, reason)
    return TaskView(
        id=task.id,
        index=index,
        state=value,
        reason=reason,
        ready_at=run.not_before.get(index, 0.0),
        parents=tuple(run.tasks[parent].id for parent in task.parents),
        attempts=tuple(attempt_view(run, attempt) for attempt in run.history.get(index, ())),
        result=run.results.get(index, b""),
        accepted_results=run.accepted[index],
        spec=task.spec,
        artifacts=artifact_views(run, files.published.get(index)) if files else (),
        checkpoint=_first(artifact_views(run, files.checkpoints.get(index))) if files else None,
    )


def task_views(state: ShardState, run: Run, start: int, limit: int, states: Collection[TaskState]) -> list[TaskView]:
    """Up to `limit` tasks from index `start` on, in index order; only those in `states`, if any are given."""
    wanted = bytes(states)
    found: list[TaskView] = []
    for index in range(max(0, start), len(run.tasks)):
        if len(found) >= limit:
            break
        if not wanted or run.states[index] in wanted:
            found.append(task_view(state, run, index))
    return found


def dispatch_view(run: Run, attempt: Attempt) -> DispatchView:
    """What its agent is told of a live attempt."""
    index, files = attempt.id.task, run.files
    task, header = run.tasks[index], run.header
    return DispatchView(
        run=f"namespaces/{header.namespace}/runs/{header.run_id}",
        namespace=header.namespace,
        run_id=header.run_id,
        task_id=task.id,
        spec=task.spec,
        deadline=header.deadline,
        inputs={run.tasks[parent].id: run.results[parent] for parent in task.parents if parent in run.results},
        trace_id=header.trace_id,
        n=attempt.id.n,
        fence=fence_of(attempt.incarnation, attempt.id.n),
        keep_at_fence=keeps(run, index),
        artifacts=_inputs(run, files, task.parents) if files else (),
        checkpoint=_first(artifact_views(run, files.start_from(attempt.id))) if files else None,
    )


def attempt_of(state: ShardState, id_: AttemptId) -> AttemptView | None:
    """The attempt, None if its run is archived or it is no longer kept."""
    attempt = state.find(id_)
    return attempt_view(state.runs[id_.run], attempt) if attempt else None


def run_events(run: Run, after: int) -> list[RunEventView] | None:
    """Kept events above a number, in order; None if some of them are no longer kept (WATCH_COMPACTED)."""
    if after >= run.event_number:
        return []
    first = run.events[0].number
    if after + 1 < first:
        return None
    # Numbers have no gaps, so the place in the ring is known; a deque is fast at both ends, and watchers are near its end.
    newest = run.event_number - after
    events = run.events
    return [events[index] for index in range(len(events) - newest, len(events))]


def graph_view(history: GraphHistory, version: int) -> GraphView | None:
    """That version of a graph (0: the newest), None if it is not kept."""
    for put, wall in reversed(history.versions):
        if version in (0, put.version):
            return GraphView(
                put.uid,
                put.namespace,
                put.graph_id,
                put.version,
                put.tasks,
                put.labels,
                put.annotations,
                history.created,
                wall,
            )
    return None


def namespace_views(state: ShardState) -> Iterator[NamespaceView]:
    """Namespaces put on this shard, in order of name."""
    for name in sorted(state.catalog.namespaces):
        put = state.catalog.namespaces[name]
        yield NamespaceView(name, put.weight, put.live_task_quota, put.retention, state.live_in.get(name, 0))
