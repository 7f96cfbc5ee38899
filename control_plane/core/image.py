"""Snapshot form of a run and of a shard's remains: JSON bytes, made and read here only (`events.RunImage`, PROTOCOL J9).

A run's image holds what RunCreated, TasksAdded and RunSealed cannot say: states, counters, attempts, the event ring. What
follows from them is rebuilt, so it cannot disagree. Equal states give equal bytes. The shard's own image (run "") holds the
stops of archived runs, their names, and the times of the catalog. Keys are short: a large run has a row per attempt.

Images made before attempts kept the incarnation of their placement (F1) are read, too: theirs is the one of the snapshot.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from control_plane.core import inline
from control_plane.core.files import Carried, Files, Made
from control_plane.core.model import ArtifactRef, AttemptId, AttemptState, Evidence, RunState, TaskState
from control_plane.core.run import Attempt, Run
from control_plane.core.state import WHOLE_RUN, ShardState
from control_plane.core.views import RunEventView


def run_image(run: Run) -> bytes:
    """The mutable state of a sealed run."""
    return _bytes(
        {
            **(_files_image(run.files) if run.files else {}),
            "state": run.state,
            "reason": run.reason,
            "created": run.created,
            "finished": run.finished,
            "states": run.states.hex(),
            "accepted": run.accepted.hex(),
            "next_n": run.next_n,
            "refused": run.refused_total,
            "app": _sparse(run.app_failures),
            "infra": _sparse(run.infra_losses),
            "not_before": _sparse(run.not_before),
            "reasons": _sparse(run.reasons),
            "results": [[task, base64.b64encode(run.results[task]).decode()] for task in sorted(run.results)],
            "undecided": _sparse(run.undecided),
            "attempts": [
                [*_attempt_row(attempt), run.is_live(attempt), attempt.id in run.stops]
                for task in sorted(run.history)
                for attempt in run.history[task]
            ],
            "event_number": run.event_number,
            "events": [_event_row(event) for event in run.events],
        }
    )


def restore_run(state: ShardState, run: Run, image: bytes, incarnation: int) -> None:
    """Put a sealed run, as `apply` left it after RunSealed, into the state of its image; indices follow. `incarnation` is the
    snapshot's, for images that do not say it."""
    said = json.loads(image)
    for task in list(run.tickets):
        state.unqueue(run, task)
    run.state = RunState(said["state"])
    run.reason = said["reason"]
    run.created, run.finished = said["created"], said["finished"]
    run.states = bytearray.fromhex(said["states"])
    run.accepted = bytearray.fromhex(said["accepted"])
    run.accepted_total = sum(run.accepted)
    run.next_n = said["next_n"]
    run.refused_total = said["refused"]
    run.app_failures = dict(said["app"])
    run.infra_losses = dict(said["infra"])
    run.not_before = dict(said["not_before"])
    run.reasons = dict(said["reasons"])
    run.results = {task: base64.b64decode(result) for task, result in said["results"]}
    run.result_bytes = sum(map(inline.weight, run.results.values()))
    run.undecided = dict(said["undecided"])
    if "published" in said:
        run.files = _files_of(run.uid, said)
    for row in said["attempts"]:
        attempt = _attempt_of(run.uid, row[:-2], incarnation)
        run.history.setdefault(attempt.id.task, []).append(attempt)
        if row[-2]:
            state.join(run, attempt)
        if row[-1]:
            state.arm(run, attempt)
    run.events.clear()
    run.changes = 0
    for row in said["events"]:
        run.keep_event(_event_of(row))
    run.event_number = said["event_number"]
    _derive(run)
    _index(state, run)


def _files_image(files: Files) -> dict[str, Any]:
    """The refs of a run that has any."""

    def rows(made: dict[int, Made]) -> list[list[Any]]:
        return [
            [task, of.attempt.n, of.attempt.nonce, of.cluster, [[r.name, r.size, r.digest.hex()] for r in of.refs]]
            for task, of in sorted(made.items())
        ]

    carried = [[task, n, of.resumed, of.saved] for (task, n), of in sorted(files.carried.items())]
    return {
        "published": rows(files.published),
        "checkpoints": rows(files.checkpoints),
        "carried": carried,
        "noted": files.noted,
    }


def _files_of(run: str, said: dict[str, Any]) -> Files:
    """Inverse of `_files_image`."""

    def made(rows: list[list[Any]]) -> dict[int, Made]:
        return {
            task: Made(
                AttemptId(run, task, n, nonce),
                cluster,
                tuple(ArtifactRef(name, size, bytes.fromhex(digest)) for name, size, digest in refs),
            )
            for task, n, nonce, cluster, refs in rows
        }

    files = Files()
    files.published, files.checkpoints = made(said["published"]), made(said["checkpoints"])
    files.total = sum(len(of.refs) for of in files.published.values())
    files.carried = {(task, n): Carried(resumed, saved) for task, n, resumed, saved in said["carried"]}
    files.noted = said["noted"]
    return files


def _derive(run: Run) -> None:
    """Recompute the counters that follow from the tasks' states."""
    run.counts = [run.states.count(value) for value in range(len(TaskState) + 1)]
    run.open = sum(run.counts[: TaskState.SUCCEEDED])
    run.skippable = []
    for index, task in enumerate(run.tasks):
        parents = [TaskState(run.states[parent]) for parent in task.parents]
        run.waiting[index] = sum(not state.final for state in parents)
        final = [state for state in parents if state.final]
        run.failed_parents[index] = sum(state not in (TaskState.SUCCEEDED, TaskState.SKIPPED) for state in final)
        run.unsucceeded_parents[index] = sum(state is not TaskState.SUCCEEDED for state in final)
        if run.states[index] == TaskState.PENDING and not run.waiting[index]:
            run.skippable.append(index)


def _index(state: ShardState, run: Run) -> None:
    """Queue what is ready, and look at the run once."""
    if run.state.final:
        state.final[run.uid] = None
        return
    state.dirty[run.uid] = None
    state.wake_at(run.deadline, run.uid, WHOLE_RUN)
    for index, value in enumerate(run.states):
        if value == TaskState.READY:
            # Queued as of its creation: the true moment is not stored, and only orders groups among each other.
            if run.not_before.get(index, 0.0) > run.created:
                state.wake_at(run.not_before[index], run.uid, index)
            else:
                state.queue(run, index, run.created)


def shard_image(state: ShardState) -> bytes:
    """What is left of archived runs, and the catalog's times."""
    kept = [
        [run, *_attempt_row(attempt)]
        for run in sorted(state.kept)
        for attempt in sorted(state.kept[run].values(), key=lambda a: a.id)
    ]
    names = [[namespace, run_id, uid, wall] for (namespace, run_id), (uid, wall) in state.archived.items()]
    return _bytes({"kept": kept, "archived": names, "catalog": state.catalog.times()})


def restore_shard(state: ShardState, image: bytes, incarnation: int) -> None:
    """Inverse of `shard_image`; after the catalog's own events. `incarnation` as in `restore_run`."""
    said = json.loads(image)
    for run, *row in said["kept"]:
        attempt = _attempt_of(run, row, incarnation)
        state.kept.setdefault(run, {})[attempt.id] = attempt
        state.stops_on.setdefault(attempt.cluster, {})[attempt.id] = attempt
    for namespace, run_id, uid, wall in said["archived"]:
        state.archived[namespace, run_id] = (uid, wall)
    state.catalog.restore_times(said["catalog"])


def _attempt_row(a: Attempt) -> list[Any]:
    ended = [a.start, a.end, a.exit_code, a.message, a.evidence, a.refused, a.reported, a.preempted, a.incarnation]
    return [a.id.task, a.id.n, a.id.nonce, a.cluster, a.generation, a.placed, a.hedge, a.overlap, a.state, *ended]


def _attempt_of(run: str, row: list[Any], incarnation: int) -> Attempt:
    task, n, nonce, cluster, generation, placed, hedge, overlap, state, start, end, code, message, evidence = row[:14]
    return Attempt(
        AttemptId(run, task, n, nonce),
        cluster,
        generation,
        placed,
        hedge,
        overlap,
        row[17] if len(row) > 17 else incarnation,
        AttemptState(state),
        start,
        end,
        code,
        message,
        Evidence(evidence),
        row[14],
        row[15],
        row[16],
    )


def _event_row(event: RunEventView) -> list[Any]:
    clusters = sorted(set(event.clusters))
    place = {cluster: index for index, cluster in enumerate(clusters)}
    return [
        event.number,
        event.wall,
        event.run_state,
        event.kind,
        event.tasks,
        bytes(event.states).hex(),
        event.ns,
        clusters,
        [place[cluster] for cluster in event.clusters],
        [[index, reason] for index, reason in enumerate(event.reasons) if reason],
    ]


def _event_of(row: list[Any]) -> RunEventView:
    number, wall, run_state, kind, tasks, states, ns, clusters, places, sparse = row
    reasons = [""] * len(tasks)
    for index, reason in sparse:
        reasons[index] = reason
    return RunEventView(
        number,
        wall,
        RunState(run_state),
        kind,
        tuple(tasks),
        tuple(map(TaskState, bytes.fromhex(states))),
        tuple(ns),
        tuple(clusters[place] for place in places),
        tuple(reasons),
    )


def _sparse(column: dict[int, Any]) -> Iterable[tuple[int, Any]]:
    return sorted(column.items())


def _bytes(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
