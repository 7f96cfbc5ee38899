"""TraceService: a run's trace from what is recorded of it, live or archived (DESIGN 11, PROTOCOL J8, J10).

Theory. Both sources are first brought to the public messages that history stores (`Run`, `TaskStatus`, `RunEvent`), and only then
to the core's facts: so a run's trace cannot change by being archived. Reading goes in pieces with a loop turn between them,
and everything that grows with the run is done in a thread (DESIGN 13). A trace is bounded: of a larger run the first tasks
are shown, and its root says how many were left out.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from baton import names, traces
from baton.errors import NotFound
from baton.names import InvalidName, RunName
from baton.v1 import run_pb2, trace_pb2
from control_plane.core import span_model as core
from control_plane.core import spans as of_core
from control_plane.core.model import RUN_SHARDS, AttemptState, Evidence, RunState, TaskState
from control_plane.core.shard import RunShard
from control_plane.core.views import RunEventView, RunView, TaskView
from control_plane.history import PIECE, Archive
from control_plane.peers import CallContext, Calls
from control_plane.services import translate
from control_plane.services.desk import Desk, from_history, shard_of_run
from control_plane.services.failures import invalid
from control_plane.services.methods import Asked

T = TypeVar("T")

GET_TRACE = "/baton.v1.TraceService/GetTrace"
FIND = "/baton.internal/FindRun"

MAX_TASKS = 20_000
"""Tasks of one trace: about 80,000 spans, 20 MB and two seconds of a thread. No viewer shows more."""

PART_SPANS = 1000
"""Spans of one message: with OTLP-JSON about 0.8 MB, far under the 4 MiB that clients receive."""

BREATH = 100
BREATH_SECONDS = 0.0005
"""After so many tasks, spans or events a thread that makes traces lets others run for a moment. Without it the interpreter takes
5 ms each time the owner's loop wants to go on, and a hop of another run takes thrice as long."""


@dataclass(frozen=True, slots=True)
class Record:
    """A run as history would keep it; `tasks` are the first MAX_TASKS."""

    run: run_pb2.Run
    tasks: Sequence[run_pb2.TaskStatus]
    events: Sequence[run_pb2.RunEvent]
    now: float = 0.0
    """Wall time of a look at a run that goes on."""


class Traces:
    """Makes traces."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def serve_peers(self, calls: Calls) -> None:
        """Answer for owned shards."""
        calls.register(FIND, self._at_owner)

    async def get_trace(
        self, request: trace_pb2.GetTraceRequest, asked: Asked
    ) -> AsyncIterator[trace_pb2.GetTraceResponse]:
        """TraceService.GetTrace, at the owner of the run's shard."""
        record = await self._record(names.parse_run(request.run), asked)
        spans = await asyncio.to_thread(spans_of, record)
        for start in range(request.skip, len(spans), PART_SPANS):
            part = spans[start : start + PART_SPANS]
            encoded = await asyncio.to_thread(traces.otlp_json, part) if request.otlp_json else b""
            yield trace_pb2.GetTraceResponse(spans=part, otlp_json=encoded, total=len(spans))

    async def trace(self, name: RunName, asked: Asked) -> list[trace_pb2.Span]:
        """The whole trace of a run, wherever its shard is. Raises BatonError."""
        spans: list[trace_pb2.Span] = []
        request = trace_pb2.GetTraceRequest(run=str(name)).SerializeToString()
        async for payload in self._desk.forwarder.stream(shard_of_run(name), GET_TRACE, request, asked):
            spans += trace_pb2.GetTraceResponse.FromString(payload).spans
        return spans

    async def find(self, id_: str, asked: Asked) -> RunName:
        """The run with that uid or trace id: every shard is asked, then history. Raises NotFound."""
        uid = (core.run_uid_of(id_) or id_).encode()
        found = await asyncio.gather(*(self._desk.forwarder.one(shard, FIND, uid, asked) for shard in RUN_SHARDS))
        name = next((answer.decode() for answer in found if answer != NOWHERE), "")
        if not name:
            run = await from_history(self._desk.history.by_uid(uid.decode()))
            if run is None:
                raise NotFound(f"there is no run or trace {id_}")
            name = run.name
        return names.parse_run(name)

    async def _at_owner(self, payload: bytes, context: CallContext) -> AsyncIterator[bytes]:
        uid = payload.decode()
        controller = self._desk.controller
        view = await controller.read(context.shard, lambda machine: machine.run_by_uid(uid), timeout=context.timeout)
        yield view.name.encode() if view is not None else NOWHERE

    async def _record(self, name: RunName, asked: Asked) -> Record:
        """The run, live or archived. Raises NotFound."""
        shard = shard_of_run(name)
        desk = self._desk

        def head(machine: RunShard) -> tuple[RunView | None, tuple[RunEventView, ...], dict[int, str]]:
            view = machine.run_by_id(name.namespace, name.run)
            if view is None:
                return None, (), {}
            events = machine.kept_events(view.uid)
            return view, events, machine.task_ids(view.uid, {i for event in events for i in event.tasks})

        view, events, ids = await desk.read(shard, head, asked)
        if view is None:
            return await self._archived(name)
        tasks: list[run_pb2.TaskStatus] = []
        for start in range(0, min(view.task_total, MAX_TASKS), PIECE):

            def piece(machine: RunShard, start: int = start) -> list[TaskView]:
                known = machine.run_by_id(name.namespace, name.run)
                return machine.tasks(known.uid, start, PIECE) if known is not None else []

            views = await desk.read(shard, piece, asked)
            if not views:
                return await self._archived(name)  # it was archived meanwhile
            tasks += [translate.task(each, desk.cluster_name) for each in views]
            await desk.clock.sleep(0)
        told = [translate.run_event(event, ids.__getitem__, desk.cluster_name) for event in events]
        return Record(translate.run(view, shard), tasks, told, desk.clock.wall())

    async def _archived(self, name: RunName) -> Record:
        run = await self._desk.must_be_archived(name)
        history = self._desk.history
        tasks = await from_history(history.tasks(run.uid, 0, MAX_TASKS, ()))
        return Record(run, tasks, await from_history(history.events(run.uid)))


NOWHERE = b"-"
"""Answer of a shard that does not hold the run: an empty one would be no answer to a peer."""


def check_trace(request: trace_pb2.GetTraceRequest, _now: float) -> None:
    """A request for a trace. Raises InvalidField."""
    try:
        names.parse_run(request.run)
    except InvalidName as error:
        raise invalid("run", str(error)) from None
    if request.skip < 0:
        raise invalid("skip", f"is {request.skip}: use 0 for all spans")


def go_on(request: trace_pb2.GetTraceRequest, response: trace_pb2.GetTraceResponse) -> None:
    """Change a request so that it goes on after what was passed on."""
    request.skip += len(response.spans)


# -- from records to spans ---------------------------------------------------------------------------------------------


def record_of(archive: Archive) -> Record:
    """A run as the archiver inserted it."""
    tasks = [task for piece in archive.pieces[: MAX_TASKS // PIECE] for task in piece.response.tasks]
    return Record(archive.run, tasks, archive.events)


def spans_of(record: Record) -> list[trace_pb2.Span]:
    """The trace of a record. Pure, and slow for large runs: not for the loop."""
    run, tasks = facts(record)
    return [_span(span) for span in gently(of_core.spans(run, tasks, changes(record.events)))]


def gently(items: Iterable[T]) -> Iterator[T]:
    """The same items, with a moment for other threads now and then."""
    for place, item in enumerate(items, 1):
        yield item
        if not place % BREATH:
            _NEVER.wait(BREATH_SECONDS)


_NEVER = threading.Event()
"""Is not set: waiting for it lets other threads run."""


def facts(record: Record) -> tuple[core.RunFacts, list[core.TaskFacts]]:
    """What the core wants to know."""
    run = record.run
    index = {task.id: task.index for task in record.tasks}
    of_run = core.RunFacts(
        uid=run.uid,
        name=run.name,
        state=RunState(run.state),
        reason=run.reason,
        created=run.create_time.ToNanoseconds(),
        finished=run.finish_time.ToNanoseconds(),
        deadline=run.deadline_time.ToNanoseconds(),
        task_total=run.task_count,
        graph=run.graph,
        resumed_from=run.resumed_from,
        left_out=max(0, run.task_count - len(record.tasks)),
        now=int(record.now * 1e9),
    )
    return of_run, [_task(task, index) for task in gently(record.tasks)]


def _task(task: run_pb2.TaskStatus, index: dict[str, int]) -> core.TaskFacts:
    return core.TaskFacts(
        index=task.index,
        id=task.id,
        state=TaskState(task.state),
        reason=task.reason,
        parents=tuple(index[parent] for parent in task.parents if parent in index),
        attempts=tuple(_attempt(attempt) for attempt in task.attempts),
    )


def _attempt(attempt: run_pb2.Attempt) -> core.AttemptFacts:
    return core.AttemptFacts(
        n=attempt.n,
        fence=attempt.fence,
        cluster=attempt.cluster,
        generation=attempt.generation,
        state=AttemptState(attempt.state),
        placed=attempt.place_time.ToNanoseconds(),
        start=attempt.start_time.ToNanoseconds(),
        end=attempt.finish_time.ToNanoseconds(),
        exit_code=attempt.exit_code if attempt.HasField("exit_code") else None,
        message=attempt.message,
        evidence=Evidence(attempt.evidence),
        overlap=attempt.overlap_possible,
        hedge=attempt.hedge,
        refused=attempt.refused_results,
        checkpoint=attempt.checkpoint,
        resumed=attempt.resumed_from,
    )


def changes(events: Iterable[run_pb2.RunEvent]) -> Iterator[core.Change]:
    """All rows of run events, in order."""
    for event in gently(events):
        at = event.time.ToNanoseconds()
        for row in gently(event.changes):
            yield core.Change(at, event.kind, row.index, row.attempt, TaskState(row.state), row.reason)


def _span(span: core.Span) -> trace_pb2.Span:
    made = trace_pb2.Span(
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_id=span.parent_id,
        kind=int(span.kind),  # type: ignore[arg-type]  # equal numbers, by contract of core.span_model
        name=span.name,
        open=span.open,
        task=span.task,
        attempt=span.n,
        cluster=span.cluster,
        status=int(span.status),  # type: ignore[arg-type]  # as above
        message=span.message,
        critical=span.critical,
        links=[trace_pb2.SpanLink(span_id=link.span_id, relation=link.relation) for link in span.links],
    )
    made.start_time.FromNanoseconds(span.start)
    made.end_time.FromNanoseconds(span.end)
    for key, value in span.attributes:
        made.attributes[key].CopyFrom(_value(value))
    for event in span.events:
        made.events.add(name=event.name, detail=event.detail).time.FromNanoseconds(event.at)
    return made


def _value(value: core.Attribute) -> trace_pb2.SpanValue:
    if isinstance(value, bool):
        return trace_pb2.SpanValue(flag=value)
    return trace_pb2.SpanValue(number=value) if isinstance(value, int) else trace_pb2.SpanValue(text=value)
