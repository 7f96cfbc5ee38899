"""A run's trace, made from what is recorded of it (DESIGN 11).

Theory. Nothing is traced while work runs: the journal already says who owned which task from when to when, so spans are a
function of the record, and are the same whoever computes them: before and after a takeover, live or from history. Ids are
hashes of identities (run uid, task, attempt number), so a backend that gets a span twice has it once; the span id of an
attempt is the one its workload was given in TRACEPARENT, so a task's own spans hang below it.

A trace is a tree of depth three: the run; its attempts; their phases. The phases of an attempt tile it without gap: queue (the
task was ready and had no place), dispatch (placed, not yet known to run), run, report (ended, not yet accepted). Owner's times
are the control plane's: they come from the numbered run events (J10), by attempts' own times where the events are no longer
kept. Start and end of the workload are told by the cluster's clock, which may be off; causality bounds them, so they are clamped
into the time in which the attempt was owned. A task that was ready and got no place shows as a waiting span below the run.

The critical path is the chain that decided when the run ended: from the task that ended last, through its earlier attempts, to
the parent that became final last, and so on to a root.

All times are nanoseconds since the Unix epoch, 0 = not yet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from control_plane.core.model import AttemptState, Evidence, RunState
from control_plane.core.span_model import (
    Attribute,
    Change,
    RunFacts,
    Span,
    SpanKind,
    SpanLink,
    Status,
    TaskFacts,
    attempt_span_id,
    phase_span_id,
    run_span_id,
    trace_id_of,
    waiting_span_id,
)
from control_plane.core.span_times import Held, Times, critical_path, held_times


def spans(run: RunFacts, tasks: Sequence[TaskFacts], changes: Iterable[Change]) -> Iterator[Span]:
    """The trace of a run: its root, then every task's attempts in order of index, each followed by its phases."""
    times = Times(changes)
    moments = [at for task in tasks for a in task.attempts for at in (a.placed, a.start, a.end)]
    now = run.finished or max(run.now, times.last, run.created, *moments)
    found = held_times(run, tasks, times, now)
    path = critical_path(tasks, found, times)
    yield _root(run, tasks, now)
    for task in tasks:
        for held in found[task.index]:
            yield from _attempt(run, task, held, found[task.index], times, critical=(task.index, held.of.n) in path)
        waiting = _waiting(run, task, found[task.index], times, now, critical=(task.index, 0) in path)
        if waiting is not None:
            yield waiting


def _root(run: RunFacts, tasks: Sequence[TaskFacts], now: int) -> Span:
    failed = run.state in (RunState.FAILED, RunState.DEADLINE_EXCEEDED)
    attempts = [attempt for task in tasks for attempt in task.attempts]
    attributes: list[tuple[str, Attribute]] = [
        ("baton.run", run.name),
        ("baton.run.uid", run.uid),
        ("baton.outcome", run.state.name),
        ("baton.tasks", run.task_total),
        ("baton.attempts", len(attempts)),
        ("baton.losses", sum(attempt.state is AttemptState.LOST for attempt in attempts)),
        ("cicd.pipeline.name", run.graph or run.name),
        ("cicd.pipeline.run.id", run.uid),
    ]
    if run.resumed_from:
        attributes.append(("baton.resumed_from", run.resumed_from))
    if run.left_out:
        attributes.append(("baton.trace.tasks_left_out", run.left_out))
    if failed:
        attributes.append(("error.type", run.state.name))
    status = Status.ERROR if failed else Status.OK if run.state is RunState.SUCCEEDED else Status.UNSET
    return Span(
        trace_id=trace_id_of(run.uid),
        span_id=run_span_id(run.uid),
        parent_id="",
        kind=SpanKind.RUN,
        name=run.name.rpartition("/")[2],
        start=run.created,
        end=max(now, run.created),
        open=not run.finished,
        status=status,
        message=run.reason if failed else "",
        attributes=tuple(attributes),
        critical=True,
    )


def _attempt(
    run: RunFacts, task: TaskFacts, held: Held, all_held: Sequence[Held], times: Times, *, critical: bool
) -> list[Span]:
    """An attempt's span and its phases."""
    of = held.of
    failed = of.state in (AttemptState.FAILED, AttemptState.LOST)
    whole = Span(
        trace_id=trace_id_of(run.uid),
        span_id=attempt_span_id(run.uid, task.index, of.n),
        parent_id=run_span_id(run.uid),
        kind=SpanKind.ATTEMPT,
        name=task.id,
        start=held.ready,
        end=held.closed,
        open=held.open,
        task=task.id,
        n=of.n,
        cluster=of.cluster,
        status=Status.ERROR if failed else Status.OK if of.state is AttemptState.SUCCEEDED else Status.UNSET,
        message=of.message if failed else "",
        attributes=_attributes(task, held, all_held),
        events=tuple(times.told.get((task.index, of.n), ())),
        links=_links(run, task, held, all_held),
        critical=critical,
    )
    phases = (
        (SpanKind.QUEUE, held.ready, held.placed),
        (SpanKind.DISPATCH, held.placed, held.start or held.closed),
        (SpanKind.EXECUTE, held.start, (held.end or held.closed) if held.start else 0),
        (SpanKind.REPORT, held.end, held.closed if held.end else 0),
    )
    reached = [phase for phase in phases if phase[1] and (phase[0] is not SpanKind.REPORT or phase[2] > phase[1])]
    last = reached[-1][0]
    return [
        whole,
        *(
            replace(
                whole,
                span_id=phase_span_id(run.uid, task.index, of.n, kind),
                parent_id=whole.span_id,
                kind=kind,
                name=f"{task.id} {_WORD[kind]}",
                start=start,
                end=end,
                open=held.open and kind is last,
                status=whole.status if kind is SpanKind.EXECUTE else Status.UNSET,
                message=whole.message if kind is SpanKind.EXECUTE else "",
                attributes=(("baton.task", task.id), ("baton.attempt", of.n), ("baton.cluster", of.cluster)),
                events=(),
                links=(),
            )
            for kind, start, end in reached
        ),
    ]


_WORD = {
    SpanKind.QUEUE: "queue",
    SpanKind.DISPATCH: "dispatch",
    SpanKind.EXECUTE: "run",
    SpanKind.REPORT: "report",
}


def _attributes(task: TaskFacts, held: Held, all_held: Sequence[Held]) -> tuple[tuple[str, Attribute], ...]:
    of = held.of
    earlier = [each.of for each in all_held if each.of.n < of.n]
    found: list[tuple[str, Attribute]] = [
        ("baton.task", task.id),
        ("baton.task.index", task.index),
        ("baton.attempt", of.n),
        ("baton.fence", of.fence),
        ("baton.cluster", of.cluster),
        ("baton.generation", of.generation),
        ("baton.outcome", of.state.name),
        ("baton.retries", sum(each.state is AttemptState.FAILED for each in earlier)),
        ("baton.losses", sum(each.state is AttemptState.LOST for each in earlier)),
        ("baton.overlap_possible", of.overlap),
        ("cicd.pipeline.task.name", task.id),
    ]
    if of.evidence is not Evidence.UNSPECIFIED:
        found.append(("baton.evidence", of.evidence.name.lower()))
    if of.hedge:
        found.append(("baton.hedge", True))
    if of.refused:
        found.append(("baton.refused_results", of.refused))
    if of.resumed:
        found.append(("baton.resumed_from_checkpoint", of.resumed))
    if of.checkpoint:
        found.append(("baton.checkpoint", of.checkpoint))
    if of.exit_code is not None:
        found.append(("baton.exit_code", of.exit_code))
    if of.state in (AttemptState.FAILED, AttemptState.LOST):
        found.append(("error.type", of.state.name))
    before = _before(held, all_held)
    if before is not None and not of.hedge and before.of.cluster != of.cluster:
        found.append(("baton.moved_from", before.of.cluster))
    return tuple(found)


def _before(held: Held, all_held: Sequence[Held]) -> Held | None:
    """The owner before this attempt; for a hedge the one it is a copy of."""
    earlier = [each for each in all_held if each.of.n < held.of.n and not each.of.hedge]
    return earlier[-1] if earlier else None


_RELATION = {AttemptState.FAILED: "retries", AttemptState.REJECTED: "rejected"}


def _links(run: RunFacts, task: TaskFacts, held: Held, all_held: Sequence[Held]) -> tuple[SpanLink, ...]:
    before = _before(held, all_held)
    if before is None:
        return ()
    relation = "hedges" if held.of.hedge else _RELATION.get(before.of.state, "replaces")
    return (SpanLink(attempt_span_id(run.uid, task.index, before.of.n), relation),)


def _waiting(
    run: RunFacts, task: TaskFacts, held: Sequence[Held], times: Times, now: int, *, critical: bool
) -> Span | None:
    """The time in which a task was ready and got no place any more."""
    ready = times.ready.get(task.index)
    last = max((each.closed for each in held), default=0)
    if not ready or ready[-1] < last or any(each.ready == ready[-1] for each in held):
        return None
    end = times.ended.get(task.index, 0) if task.state.final else now
    if end <= ready[-1]:
        return None
    return Span(
        trace_id=trace_id_of(run.uid),
        span_id=waiting_span_id(run.uid, task.index),
        parent_id=run_span_id(run.uid),
        kind=SpanKind.QUEUE,
        name=f"{task.id} queue",
        start=ready[-1],
        end=end,
        open=not task.state.final,
        task=task.id,
        attributes=(("baton.task", task.id), ("baton.task.index", task.index), ("baton.outcome", task.state.name)),
        message=task.reason,
        critical=critical,
    )
