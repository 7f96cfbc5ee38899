"""Reports of agents: what an attempt's own word changes (PROTOCOL F2, F8, C2, C3).

Theory: a report is settled by the attempt's membership in its task's live set, never by time or generation. A live member's
success is accepted once; its failure removes it; what comes from an attempt that is not live changes no task: a success is
counted as refused, everything else is known already. Every report is acknowledged, so that the agent may forget it; it
came here at least once, and may come again. Reports of other clusters' attempts are acknowledged and ignored. What a success made is
published with it (`core.publishing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from control_plane.core.commands import Finish, TakeReports
from control_plane.core.events import (
    AttemptsFinished,
    AttemptsRejected,
    AttemptsStarted,
    ResultsRefused,
    StopsConfirmed,
)
from control_plane.core.inline import RESULT_LIMIT, RUN_RESULTS_LIMIT, weight
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptId, AttemptState, OnClusterLost, Outcome
from control_plane.core.publishing import Publishing, commit_checkpoints
from control_plane.core.run import Attempt, Run
from control_plane.core.run_times import HORIZON
from control_plane.core.state import ShardState

MESSAGE_LIMIT = 500
"""Characters kept of a report's message: it is one sentence, and it is stored several times."""

PART_ATTEMPTS = 1000
"""Attempts in one AttemptsFinished: with short messages some 40 KB."""

PART_BYTES = 120 * 1024
"""Bytes of results in one AttemptsFinished: two events fit a batch of 256 KiB (J2)."""

_STATES = {
    Outcome.SUCCEEDED: AttemptState.SUCCEEDED,
    Outcome.FAILED: AttemptState.FAILED,
    Outcome.TIMED_OUT: AttemptState.FAILED,
    Outcome.DEADLINE: AttemptState.STOPPED,
    Outcome.FENCED: AttemptState.LOST,
    Outcome.STOPPED: AttemptState.STOPPED,
    Outcome.LOST: AttemptState.LOST,
}

_INFRASTRUCTURE = (Outcome.FENCED, Outcome.LOST, Outcome.STOPPED)
"""Outcomes that cost the infrastructure budget: losses and preemptions."""

_SLOT_FREED = (Outcome.SUCCEEDED, Outcome.FAILED, Outcome.TIMED_OUT)
"""Outcomes after which the slot may serve the next task (C2): the others say that the place itself is in trouble or leaves."""

Row = tuple[int, int, AttemptState, bool, int | None, bytes, str, float, float]
"""A row of AttemptsFinished."""


def take_reports(state: ShardState, command: TakeReports, batch: Batch) -> tuple[AttemptId, ...]:
    """Settle one agent's reports. Returns the attempts to be acknowledged."""
    _started(state, command, batch)
    if command.checkpoints:
        commit_checkpoints(command.checkpoints, lambda id_: _reported(state, command.cluster, id_), batch)
    gone = _finished(state, command, batch)
    _rejected(state, command, batch, gone)
    confirm_stops(state, command.cluster, command.stopped, batch)
    ids = [f.attempt for f in command.finished] + [id_ for id_, _ in command.rejected] + list(command.stopped)
    return tuple(dict.fromkeys(ids))


def confirm_stops(state: ShardState, cluster: str, stopped: Iterable[AttemptId], batch: Batch) -> None:
    """Attempts of that cluster are tombstoned, with no process and no spawn pending (F8). A member still live leaves by it:
    it is its agent's word that it never runs again."""
    gone: dict[str, dict[AttemptId, Row]] = {}
    confirmed: dict[str, dict[AttemptId, None]] = {}
    for id_ in stopped:
        attempt = state.outstanding(id_)
        if attempt is not None and attempt.cluster == cluster:
            confirmed.setdefault(id_.run, {})[id_] = None
        run, attempt = state.runs.get(id_.run), state.find(id_)
        if run and attempt and attempt.cluster == cluster and run.is_live(attempt):
            gone.setdefault(id_.run, {})[id_] = _stopped_row(attempt, batch.now)
    for run_uid, rows in gone.items():
        _emit_finished(run_uid, list(rows.values()), batch)
    for run_uid, ids in confirmed.items():
        batch.emit(StopsConfirmed(run_uid, tuple(i.task for i in ids), tuple(i.n for i in ids)))


def _stopped_row(attempt: Attempt, now: float) -> Row:
    return (attempt.id.task, attempt.id.n, AttemptState.STOPPED, True, None, b"", "stopped", 0.0, now)


def _reported(state: ShardState, cluster: str, id_: AttemptId) -> tuple[Run, Attempt] | None:
    """The attempt a report speaks of, if it is known and of that cluster."""
    run, attempt = state.runs.get(id_.run), state.find(id_)
    return (run, attempt) if run and attempt and attempt.cluster == cluster else None


def _started(state: ShardState, command: TakeReports, batch: Batch) -> None:
    columns: dict[str, dict[AttemptId, float]] = {}
    for id_, start in command.started:
        found = _reported(state, command.cluster, id_)
        if found and found[1].state is AttemptState.PLACED and found[0].is_live(found[1]):
            columns.setdefault(id_.run, {})[id_] = start
            # Agents tell the start of what does not end soon: that run times have grown is known before the first such end.
            run, spec = found[0], found[0].tasks[id_.task].spec
            state.run_times.running(run.lanes[id_.task].key, spec.program, batch.now - start)
    for uid, starts in columns.items():
        tasks, ns = tuple(i.task for i in starts), tuple(i.n for i in starts)
        batch.emit(AttemptsStarted(uid, tasks, ns, tuple(starts.values())))


def _finished(state: ShardState, command: TakeReports, batch: Batch) -> set[AttemptId]:
    """Emit what finished attempts change; returns those that left their live sets."""
    gone: set[AttemptId] = set()
    rows: dict[str, list[Row]] = {}
    refused: dict[str, dict[AttemptId, str]] = {}
    succeeded: set[tuple[str, int]] = set()
    sizes: dict[str, int] = {}
    publishing = Publishing(batch.level)
    for finish in command.finished:
        id_ = finish.attempt
        found = _reported(state, command.cluster, id_)
        if found is None or id_ in gone:
            continue
        run, attempt = found
        task = (id_.run, id_.task)
        if run.is_live(attempt) and task not in succeeded:
            used = sizes.get(id_.run, run.result_bytes)
            row = _row(finish, used)
            if finish.artifacts and row[2] is AttemptState.SUCCEEDED and (fault := publishing.add(run, finish)):
                row = (*row[:2], AttemptState.FAILED, False, row[4], b"", fault[:MESSAGE_LIMIT], *row[7:])
            if row[2] is AttemptState.SUCCEEDED:
                succeeded.add(task)
                if finish.start:
                    _learn(state, run, id_.task, finish.end - finish.start)
                sizes[id_.run] = used + weight(row[5])
            gone.add(id_)
            rows.setdefault(id_.run, []).append(row)
            if finish.outcome in _SLOT_FREED and id_ not in run.stops:
                _free(state, run, attempt)
        elif finish.outcome is Outcome.SUCCEEDED and not attempt.reported:
            refused.setdefault(id_.run, {})[id_] = finish.message[:MESSAGE_LIMIT] or "its fence was no longer good"
    publishing.emit(batch)
    for uid, columns in rows.items():
        _emit_finished(uid, columns, batch)
    for uid, late in refused.items():
        tasks, ns = tuple(i.task for i in late), tuple(i.n for i in late)
        batch.emit(ResultsRefused(uid, tasks, ns, tuple(late.values())))
    return gone


def _learn(state: ShardState, run: Run, task: int, seconds: float) -> None:
    """So long a slot was busy with it (`core.run_times`). Work that is not copied when its cluster is lost (F7) teaches nothing: what
    is queued of it would wait out the loss there, although it was never started."""
    spec = run.tasks[task].spec
    if spec.on_cluster_lost is OnClusterLost.RERUN_AFTER_FENCE:
        state.run_times.learn(run.lanes[task].key, spec.program, seconds)


def _row(finish: Finish, used: int) -> Row:
    state, message, result = _STATES[finish.outcome], finish.message[:MESSAGE_LIMIT], finish.result
    if state is not AttemptState.SUCCEEDED:
        result = b""
    elif len(result) > RESULT_LIMIT:
        state, message, result = AttemptState.FAILED, f"its result is over the limit of {RESULT_LIMIT} bytes", b""
    elif used + weight(result) > RUN_RESULTS_LIMIT:
        state, result = AttemptState.FAILED, b""
        message = f"inline results of the run would exceed {RUN_RESULTS_LIMIT} bytes, counted as JSON texts: write files instead"
    infra = finish.outcome in _INFRASTRUCTURE
    id_ = finish.attempt
    return (id_.task, id_.n, state, infra, finish.exit_code, result, message, finish.start, finish.end)


def _free(state: ShardState, run: Run, attempt: Attempt) -> None:
    """Its slot may serve the next ready task of the group in this batch (C2)."""
    lane = run.lanes[attempt.id.task]
    if lane.key not in state.returning:
        key = (lane.key, attempt.cluster, attempt.generation)
        state.slots[key] = state.slots.get(key, 0) + 1


def _emit_finished(run: str, rows: list[Row], batch: Batch) -> None:
    for part in _parts(rows):
        columns: Any = zip(*part, strict=True)
        batch.emit(AttemptsFinished(run, *columns))


def _parts(rows: list[Row]) -> Iterator[list[Row]]:
    part: list[Row] = []
    size = 0
    for row in rows:
        weight = len(row[5]) + len(row[6])
        if part and (len(part) >= PART_ATTEMPTS or size + weight > PART_BYTES):
            yield part
            part, size = [], 0
        part.append(row)
        size += weight
    if part:
        yield part


def _rejected(state: ShardState, command: TakeReports, batch: Batch, gone: set[AttemptId]) -> None:
    columns: dict[str, dict[AttemptId, str]] = {}
    for id_, reason in command.rejected:
        found = _reported(state, command.cluster, id_)
        if found and id_ not in gone and found[0].is_live(found[1]):
            columns.setdefault(id_.run, {})[id_] = reason[:MESSAGE_LIMIT]
            run, attempt = found
            if batch.now - attempt.placed > HORIZON:
                # It stood in a queue that should have been empty by then: the place must not be filled again at once.
                state.run_times.slow(run.lanes[id_.task].key, run.tasks[id_.task].spec.program)
    for uid, reasons in columns.items():
        tasks, ns = tuple(i.task for i in reasons), tuple(i.n for i in reasons)
        batch.emit(AttemptsRejected(uid, tasks, ns, tuple(reasons.values())))
