"""Between the wire (`baton.v1`) and the core's values. Knows both, decides nothing.

A message that breaks its own shape (an index out of range, a missing part) raises BadMessage: the stream is then
closed, for what else is on it cannot be trusted either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from baton.leases import LeaseValues, from_millis
from baton.v1 import agent_pb2, cluster_pb2, graph_pb2
from cluster_agent.core import events as on
from cluster_agent.core.capacity import FreeShape
from cluster_agent.core.commands import SendHello, SendReceipt, SendReports, Vitals
from cluster_agent.core.model import AttemptKey, Demand, Ended, Epoch, Mark, Outcome, Phase, PythonCall, WorkSpec

REPORT_BYTES = 512 << 10
"""Most payload in one Reports message: well under gRPC's 4 MiB, and small enough that heartbeats get their turn."""

_PHASES = {
    Phase.QUEUED: agent_pb2.ATTEMPT_PHASE_QUEUED,
    Phase.VOID: agent_pb2.ATTEMPT_PHASE_VOID,
    Phase.STARTING: agent_pb2.ATTEMPT_PHASE_RUNNING,
    Phase.RUNNING: agent_pb2.ATTEMPT_PHASE_RUNNING,
    Phase.STOPPING: agent_pb2.ATTEMPT_PHASE_STOPPING,
    Phase.FINISHED: agent_pb2.ATTEMPT_PHASE_FINISHED,
    Phase.TOMBSTONED: agent_pb2.ATTEMPT_PHASE_TOMBSTONED,
}

_OUTCOMES = {
    Outcome.SUCCEEDED: agent_pb2.OUTCOME_SUCCEEDED,
    Outcome.FAILED: agent_pb2.OUTCOME_FAILED,
    Outcome.TIMED_OUT: agent_pb2.OUTCOME_TIMED_OUT,
    Outcome.DEADLINE: agent_pb2.OUTCOME_DEADLINE,
    Outcome.FENCED: agent_pb2.OUTCOME_FENCED,
    Outcome.STOPPED: agent_pb2.OUTCOME_STOPPED,
    Outcome.LOST: agent_pb2.OUTCOME_LOST,
}


class BadMessage(ValueError):
    """The control plane said something that has no meaning."""


@dataclass(frozen=True, slots=True)
class HelloFacts:
    """What a Hello says that does not change while the process lives."""

    cluster: str
    instance: str
    boot_id: str
    journal_uid: str
    labels: Mapping[str, str]
    taints: tuple[str, ...]
    namespaces: tuple[str, ...]
    isolation: bool
    orphan_killer: bool
    profile: str
    agent_version: str
    feature_level: int


# --- to the control plane ---------------------------------------------------------------------------------------------


def hello(action: SendHello, facts: HelloFacts, vitals: Vitals) -> agent_pb2.SessionRequest:
    """First message of a stream (S1)."""
    by_shard: dict[str, agent_pb2.ShardInventory] = {}
    runs: dict[str, dict[str, int]] = {}
    for entry in action.inventory:
        columns = by_shard.setdefault(entry.shard, agent_pb2.ShardInventory(shard=entry.shard))
        index = runs.setdefault(entry.shard, {})
        columns.run.append(index.setdefault(entry.key.run_uid, len(index)))
        columns.task.append(entry.key.task)
        columns.n.append(entry.key.n)
        columns.nonce.append(entry.key.nonce)
        columns.generation.append(entry.generation)
        columns.phase.append(_PHASES[entry.phase])
    for shard, columns in by_shard.items():
        columns.run_uids.extend(runs[shard])
    message = agent_pb2.Hello(
        cluster=facts.cluster,
        instance=facts.instance,
        boot_id=facts.boot_id,
        journal_uid=facts.journal_uid,
        inventory=by_shard.values(),
        marks=[
            agent_pb2.ShardMark(shard=shard, incarnation=mark.incarnation, seq=mark.seq, nonce=mark.nonce)
            for shard, mark in action.marks
        ],
        shapes=[_shape(shape) for shape in vitals.shapes],
        labels=facts.labels,
        taints=facts.taints,
        isolation=facts.isolation,
        orphan_killer=facts.orphan_killer,
        profile=facts.profile,
        agent_version=facts.agent_version,
        federation_uid=action.federation_uid,
        feature_level=facts.feature_level,
        namespaces=facts.namespaces,
        last_generation=action.last_generation,
    )
    return agent_pb2.SessionRequest(hello=message)


def heartbeat(vitals: Vitals, *, seq: int, generation: int, guard_silent: bool) -> agent_pb2.SessionRequest:
    """ "Alive" and "this is free" in one (S2, C4)."""
    message = agent_pb2.Heartbeat(
        seq=seq,
        generation=generation,
        shapes=[_shape(shape) for shape in vitals.shapes],
        included=[
            agent_pb2.IncludedDispatch(shard=shard, epoch=_epoch(epoch), dispatch_no=number)
            for shard, epoch, number in vitals.included
        ],
        attempts=vitals.attempts,
        guard_silent=guard_silent,
    )
    return agent_pb2.SessionRequest(heartbeat=message)


def receipt(action: SendReceipt) -> agent_pb2.SessionRequest:
    """Dispatches arrived."""
    return agent_pb2.SessionRequest(
        receipt=agent_pb2.DispatchReceipt(
            shard=action.shard, epoch=_epoch(action.epoch), dispatch_no=action.dispatch_no
        )
    )


def reports(action: SendReports) -> Iterator[agent_pb2.SessionRequest]:
    """The reports, in messages of bounded size."""
    message = agent_pb2.Reports(shard=action.shard, generation=action.generation)
    message.started.extend(
        agent_pb2.StartedReport(attempt=_ref(key), start_wall_ms=wall_ms) for key, wall_ms in action.started
    )
    message.rejected.extend(
        agent_pb2.RejectedReport(attempt=_ref(key), reason=reason) for key, reason in action.rejected
    )
    message.stopped.extend(_ref(key) for key in action.stopped)
    size = 0
    for key, ended in action.finished:
        weight = len(ended.result) + len(ended.message) + 128
        if size and size + weight > REPORT_BYTES:
            yield agent_pb2.SessionRequest(reports=message)
            message, size = agent_pb2.Reports(shard=action.shard, generation=action.generation), 0
        message.finished.append(_finished(key, ended))
        size += weight
    yield agent_pb2.SessionRequest(reports=message)


def log_chunk(request: str, offset: int, data: bytes = b"", *, end: bool, error: str = "") -> agent_pb2.SessionRequest:
    """A part of the answer to a LogRequest."""
    return agent_pb2.SessionRequest(
        log=agent_pb2.LogChunk(request=request, offset=offset, data=data, end=end, error=error)
    )


def goodbye(generation: int) -> agent_pb2.SessionRequest:
    """The last message: all work is dead (S5)."""
    return agent_pb2.SessionRequest(goodbye=agent_pb2.Goodbye(generation=generation))


def _shape(shape: FreeShape) -> cluster_pb2.NodeShape:
    return cluster_pb2.NodeShape(
        count=shape.count,
        cpu_millis=shape.cpu_millis,
        memory_bytes=shape.memory_bytes,
        disk_bytes=shape.disk_bytes,
        extended=dict(shape.extended),
        total_cpu_millis=shape.total_cpu_millis,
        total_memory_bytes=shape.total_memory_bytes,
    )


def _finished(key: AttemptKey, ended: Ended) -> agent_pb2.FinishedReport:
    return agent_pb2.FinishedReport(
        attempt=_ref(key),
        outcome=_OUTCOMES[ended.outcome],
        exit_code=ended.exit_code,
        result=ended.result,
        message=ended.message,
        start_wall_ms=ended.start_wall_ms,
        end_wall_ms=ended.end_wall_ms,
        late=ended.late,
    )


def _ref(key: AttemptKey) -> agent_pb2.AttemptRef:
    return agent_pb2.AttemptRef(run_uid=key.run_uid, task=key.task, n=key.n, nonce=key.nonce)


def _epoch(epoch: Epoch) -> agent_pb2.ShardEpoch:
    return agent_pb2.ShardEpoch(incarnation=epoch.incarnation, revision=epoch.revision)


# --- from the control plane -------------------------------------------------------------------------------------------


def lease_values(welcome: agent_pb2.Welcome, base: LeaseValues) -> LeaseValues:
    """The session's timing. `base` has what does not travel. Raises UnsafeLease if it breaks F5."""
    lease = welcome.lease
    return from_millis(
        lease.profile,
        heartbeat_ms=lease.heartbeat_ms,
        fence_ms=lease.fence_ms,
        kill_ms=lease.kill_ms,
        lost_ms=lease.lost_ms,
        guard_ms=lease.guard_ms,
        base=base if lease.profile in ("", base.profile) else None,
    )


def welcomed(stream: int, welcome: agent_pb2.Welcome, values: LeaseValues) -> on.Welcomed:
    """The session stands."""
    return on.Welcomed(
        stream,
        welcome.generation,
        welcome.resumed,
        welcome.cluster_uid,
        welcome.federation_uid,
        values.fence,
        values.kill,
    )


def owner_event(stream: int, message: agent_pb2.SessionResponse) -> on.Event | None:
    """What an owner said; None if the message is not an owner's. Raises BadMessage."""
    match message.WhichOneof("message"):
        case "dispatches":
            return _dispatched(stream, message.dispatches)
        case "stops":
            stops = message.stops
            return on.StopOrdered(stream, stops.shard, _read_epoch(stops.epoch), _mark(stops), _keys(stops.attempts))
        case "adoptions":
            moved = message.adoptions
            epoch = _read_epoch(moved.epoch)
            return on.Adopted(stream, moved.shard, epoch, _mark(moved), moved.generation, _keys(moved.attempts))
        case "report_acks":
            acks = message.report_acks
            return on.ReportsSettled(stream, acks.shard, _read_epoch(acks.epoch), _mark(acks), _keys(acks.attempts))
    return None


def read_key(ref: agent_pb2.AttemptRef) -> AttemptKey:
    """The identity of an attempt (F1). Raises BadMessage for one that cannot name a file."""
    if not ref.run_uid or not ref.nonce or any(mark in ref.run_uid + ref.nonce for mark in "./\0"):
        raise BadMessage(f"no attempt can be known as {ref.run_uid!r}, {ref.nonce!r}")
    return AttemptKey(ref.run_uid, ref.task, ref.n, ref.nonce)


def _dispatched(stream: int, message: agent_pb2.Dispatches) -> on.Dispatched:
    codes = {code.sha256: code.zip for code in message.codes}
    return on.Dispatched(
        stream,
        message.shard,
        _read_epoch(message.epoch),
        _mark(message),
        message.generation,
        message.dispatch_no,
        tuple(_assignment(dispatch, message, codes) for dispatch in message.dispatches),
    )


def _assignment(
    dispatch: agent_pb2.Dispatch, message: agent_pb2.Dispatches, codes: Mapping[str, bytes]
) -> on.Assignment:
    if not 0 <= dispatch.template < len(message.templates):
        raise BadMessage(f"template {dispatch.template} of {len(message.templates)}")
    template = message.templates[dispatch.template]
    spec = WorkSpec(
        argv=tuple(template.process.argv),
        env=dict(template.process.env),
        demand=_demand(template.resources),
        task_id=dispatch.task_id,
        run=dispatch.run,
        fence=dispatch.fence,
        deadline_wall_ms=dispatch.deadline_wall_ms,
        processes=template.resources.processes,
        timeout_seconds=template.timeout_ms / 1000 if template.timeout_ms > 0 else None,
        grace_seconds=max(0, template.grace_ms) / 1000,
        keep_at_fence=template.keep_at_fence,
        inputs=dispatch.inputs,
        traceparent=dispatch.traceparent,
        python=_python_call(template.python, codes) if template.HasField("python") else None,
    )
    return on.Assignment(read_key(dispatch.attempt), spec)


def _python_call(task: graph_pb2.PythonTask, codes: Mapping[str, bytes]) -> PythonCall:
    if task.code and task.code not in codes:
        raise BadMessage(f"code {task.code} does not come with the message that names it")
    code = codes.get(task.code, b"")
    return PythonCall(task.function, task.args_json, tuple(task.requirements), task.code, code)


def _demand(resources: graph_pb2.Resources) -> Demand:
    if min(resources.cpu_millis, resources.memory_bytes, resources.disk_bytes, *resources.extended.values(), 0) < 0:
        raise BadMessage("resources below nothing")
    extended = tuple(sorted(resources.extended.items()))
    return Demand(resources.cpu_millis, resources.memory_bytes, resources.disk_bytes, extended)


def _keys(refs: Iterable[agent_pb2.AttemptRef]) -> tuple[AttemptKey, ...]:
    return tuple(read_key(ref) for ref in refs)


def _read_epoch(epoch: agent_pb2.ShardEpoch) -> Epoch:
    return Epoch(epoch.incarnation, epoch.revision)


def _mark(
    message: agent_pb2.Dispatches | agent_pb2.Stops | agent_pb2.Adoptions | agent_pb2.ReportAcks,
) -> Mark | None:
    if not message.HasField("mark"):
        return None
    return Mark(message.mark.incarnation, message.mark.seq, message.mark.nonce)
