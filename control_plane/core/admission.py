"""What clients ask: create and cancel runs, put graphs and namespaces (PROTOCOL O8, D1, J10, J12).

Theory: every mutation is decided once and recorded with its request id in the same batch; a repeat finds the record. All
checks come before the first event, so a refusal has changed nothing. A big run comes as several events, invisible until
the last of them: a creation cut off by a takeover is thrown away, and its client's retry starts anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from control_plane.core.commands import (
    Archived,
    CancelRun,
    CreateRun,
    PutGraph,
    PutNamespace,
    Refused,
    Request,
    TakeHistory,
)
from control_plane.core.deadline import CyclicGraph, critical_path
from control_plane.core.events import (
    ARTIFACTS_LEVEL,
    GraphPut,
    NamespacePut,
    RequestRecorded,
    RunArchived,
    RunCancelRequested,
    RunCreated,
    RunFinished,
    RunSealed,
    TasksAdded,
    TasksEnded,
)
from control_plane.core.machine import Batch
from control_plane.core.model import GraphTask, RunState, TaskSpec, TaskState
from control_plane.core.state import ShardState

MAX_TASKS = 1_000_000
"""Tasks per run (DESIGN 14)."""

MAX_GRAPH_BYTES = 200 * 1024
"""Estimated bytes of a stored graph: a version is one event, and a batch has room for 256 KiB a shard (J2)."""

PART_TASKS = 1000
"""Tasks in one TasksAdded: about 2 ms to apply."""

PART_BYTES = 120 * 1024
"""Estimated bytes of one TasksAdded: two fit a batch of 256 KiB (J2)."""


def create_run(state: ShardState, command: CreateRun, batch: Batch) -> str:
    """Admit a run; returns its uid. Refused: INVALID_FIELD, LIMIT_EXCEEDED, NAME_TAKEN, INFEASIBLE, WRONG_STATE, and those of O8."""
    known = state.requests.known(command.request, batch.now)
    if known is not None:
        return known
    there = state.runs.get(command.run_uid)
    if there is not None and there.sealed:
        return command.run_uid  # created inside the system: keyed by uid (O8)
    name = (command.namespace, command.run_id)
    holder = state.names.get(name) or state.archived.get(name, ("", 0.0))[0]
    if holder:
        raise Refused("NAME_TAKEN", f"run {command.run_id} exists already in namespace {command.namespace}", "run_id")
    _check_tasks(command.tasks, batch.level)
    if command.deadline <= batch.now:
        raise Refused("INVALID_FIELD", "the deadline has passed already", "deadline_time")
    least = _critical_path(command.tasks)
    if batch.now + least > command.deadline:
        left = command.deadline - batch.now
        raise Refused(
            "INFEASIBLE", f"the critical path takes {least:.1f} s, the deadline is in {left:.1f} s", "deadline_time"
        )
    batch.emit(
        RunCreated(
            command.run_uid,
            command.namespace,
            command.run_id,
            command.deadline,
            command.priority,
            len(command.tasks),
            command.labels,
            command.annotations,
            command.graph,
            command.graph_version,
            command.resumed_from,
            command.trace_id,
        )
    )
    for part in task_parts(command.tasks):
        batch.emit(TasksAdded(command.run_uid, part))
    batch.emit(RunSealed(command.run_uid))
    _record(command.request, command.run_uid, batch)
    return command.run_uid


def task_parts(tasks: Sequence[GraphTask]) -> Iterator[tuple[GraphTask, ...]]:
    """Cut into pieces of at most `PART_TASKS` tasks and about `PART_BYTES` of storage (equal specs counted once each)."""
    begin = size = 0
    seen: set[int] = set()
    for index, task in enumerate(tasks):
        weight = _weight(task, seen)
        if index > begin and (index - begin >= PART_TASKS or size + weight > PART_BYTES):
            yield tuple(tasks[begin:index])
            begin, size, seen = index, 0, set()
            weight = _weight(task, seen)
        size += weight
    if begin < len(tasks):
        yield tuple(tasks[begin:])


def _weight(task: GraphTask, seen: set[int]) -> int:
    """Estimated stored bytes of a task; its spec counts if it is not among those seen, which it joins."""
    weight = 8 + len(task.id) + 4 * len(task.parents)
    if id(task.spec) not in seen:
        seen.add(id(task.spec))
        weight += _spec_weight(task.spec)
        python = task.spec.python
        if python is not None and python.code_zip and id(python.code_zip) not in seen:
            seen.add(id(python.code_zip))
            weight += len(python.code_zip)
    return weight


def _spec_weight(spec: TaskSpec) -> int:
    pairs = (*spec.env, *spec.selector)
    words = (*spec.argv, *spec.clusters, *spec.tolerations)
    if spec.python is not None:
        words = (*words, spec.python.function, spec.python.args_json, spec.python.code, *spec.python.requirements)
    return 120 + sum(len(key) + len(value) + 6 for key, value in pairs) + sum(len(word) + 3 for word in words)


def _check_tasks(tasks: Sequence[GraphTask], level: int) -> None:
    if not tasks:
        raise Refused("INVALID_FIELD", "a graph needs at least one task", "spec.tasks")
    if len(tasks) > MAX_TASKS:
        raise Refused(
            "LIMIT_EXCEEDED", f"a run holds at most {MAX_TASKS} tasks, this one has {len(tasks)}", "spec.tasks"
        )
    if len({task.id for task in tasks}) != len(tasks):
        raise Refused("INVALID_FIELD", "task ids must be unique in the graph", "spec.tasks")
    if level < ARTIFACTS_LEVEL and any(task.spec.python and task.spec.python.stored for task in tasks):
        message = (
            f"stored code needs feature level {ARTIFACTS_LEVEL}, the operator's federation is at {level}: "
            "it rises by itself once every replica runs a newer version"
        )
        raise Refused("WRONG_STATE", message, "spec.codes")  # older replicas would dispatch it without its bytes (J11)


def _critical_path(tasks: Sequence[GraphTask]) -> float:
    try:
        return critical_path(tasks)
    except CyclicGraph as cycle:
        raise Refused("INVALID_FIELD", str(cycle), "spec.tasks") from None


def cancel_run(state: ShardState, command: CancelRun, batch: Batch) -> str:
    """Ask a run to stop; returns its uid. Idempotent. Refused: NOT_FOUND, WRONG_STATE (final otherwise), and those of O8."""
    known = state.requests.known(command.request, batch.now)
    if known is not None:
        return known
    uid = state.names.get((command.namespace, command.run_id))
    if uid is None:
        raise Refused("NOT_FOUND", f"run {command.run_id} is not known in namespace {command.namespace}", "name")
    run = state.runs[uid]
    if run.state.final and run.state is not RunState.CANCELLED:
        raise Refused("WRONG_STATE", f"run {command.run_id} is final: {run.state.name}", "name")
    if run.state is RunState.RUNNING:
        batch.emit(RunCancelRequested(uid, command.reason))
    _record(command.request, uid, batch)
    return uid


def put_graph(state: ShardState, command: PutGraph, batch: Batch) -> tuple[str, int]:
    """Store a version; returns (uid, version). Refused: INVALID_FIELD, LIMIT_EXCEEDED, ETAG_MISMATCH, WRONG_STATE, and those of
    O8."""
    known = state.requests.known(command.request, batch.now)
    if known is not None:
        uid, _, number = known.rpartition(".")
        return uid, int(number)
    _check_tasks(command.tasks, batch.level)
    _critical_path(command.tasks)
    seen: set[int] = set()
    size = sum(_weight(task, seen) for task in command.tasks)
    if size > MAX_GRAPH_BYTES:
        raise Refused(
            "LIMIT_EXCEEDED", f"a stored graph takes at most {MAX_GRAPH_BYTES} bytes, this one {size}", "spec"
        )
    old = state.catalog.find(command.namespace, command.graph_id)
    etag = f"{old.newest.uid}.{old.newest.version}" if old else ""
    if command.etag and command.etag != etag:
        raise Refused("ETAG_MISMATCH", f"graph {command.graph_id} has changed meanwhile", "etag")
    uid, version = (old.newest.uid, old.newest.version + 1) if old else (command.uid, 1)
    batch.emit(
        GraphPut(uid, command.namespace, command.graph_id, version, command.tasks, command.labels, command.annotations)
    )
    _record(command.request, f"{uid}.{version}", batch)
    return uid, version


def put_namespace(state: ShardState, command: PutNamespace, batch: Batch) -> None:
    """Create or change a namespace. Refused: INVALID_FIELD, and those of O8."""
    if state.requests.known(command.request, batch.now) is not None:
        return
    if not command.weight > 0:
        raise Refused("INVALID_FIELD", "the weight must be above zero", "weight")
    if command.live_task_quota < 0 or command.retention < 0:
        raise Refused("INVALID_FIELD", "quota and retention must not be negative", "live_task_quota")
    batch.emit(NamespacePut(command.name, command.weight, command.live_task_quota, command.retention))
    _record(command.request, command.name, batch)


def archived(state: ShardState, command: Archived, batch: Batch) -> None:
    """History holds the run durably (J10). Unknown runs are archived already; one that has had an event since (a late result, a stop
    that was confirmed) stays live until history has that too, or what was read of it would go back (J8). Refused: WRONG_STATE if it is
    not final."""
    run = state.runs.get(command.run)
    if run is None:
        return
    if not run.state.final:
        raise Refused("WRONG_STATE", f"run {command.run} is not final")
    if run.event_number != command.number:
        return
    batch.emit(RunArchived(command.run))


FINISHED_BEFORE = "history holds the run as finished before the store was restored"


def take_history(state: ShardState, command: TakeHistory, batch: Batch) -> None:
    """A restored store says that a finished run is live: it takes history's outcome (J12). What lives of it is stopped, and the
    live state goes; the archived record answers from then on, tasks and results included. Tasks that wait are not even
    ended: nobody can see them any more. Runs that are unknown or final here are left to the archiver."""
    run = state.runs.get(command.run)
    if run is None or run.state.final:
        return
    living = tuple(run.live)
    for start in range(0, len(living), PART_TASKS):
        part = living[start : start + PART_TASKS]
        ended = (TaskState.CANCELLED,) * len(part)
        batch.emit(TasksEnded(run.uid, part, ended, (FINISHED_BEFORE,) * len(part)))
    batch.emit(RunFinished(run.uid, command.state, FINISHED_BEFORE))
    batch.emit(RunArchived(run.uid))


def _record(request: Request, resource: str, batch: Batch) -> None:
    if request.id:
        batch.emit(RequestRecorded(request.id, request.digest, resource))
