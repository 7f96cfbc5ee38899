"""Between the wire (`baton.v1`) and the core's values. Knows both, decides nothing.

A message that breaks its own shape (an index out of range, a missing part) raises BadMessage: the stream is then
closed, for what else is on it cannot be trusted either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from baton.artifacts import name_problem
from baton.leases import LeaseValues, from_millis
from baton.names import id_problem, task_id_problem
from baton.v1 import agent_pb2, cluster_pb2, graph_pb2
from cluster_agent.core import events as on
from cluster_agent.core.capacity import FreeShape
from cluster_agent.core.commands import SendHello, SendReceipt, SendReports, Vitals
from cluster_agent.core.model import (
    ArtifactRef,
    ArtifactSource,
    AttemptKey,
    Demand,
    Ended,
    Epoch,
    Mark,
    Outcome,
    Phase,
    PythonCall,
    WorkSpec,
)

ARTIFACT_WEIGHT = 180
"""Bytes of a ref in a report: a name of full length, a digest, a size."""

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


DIGEST_BYTES = 32
"""Of a sha-256."""


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
        queue_limit=vitals.queue_limit,
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
        agent_pb2.RejectedReport(attempt=_ref(key), reason=_text(reason)) for key, reason in action.rejected
    )
    message.stopped.extend(_ref(key) for key in action.stopped)
    message.checkpoints.extend(
        agent_pb2.CheckpointReport(attempt=_ref(key), artifact=_artifact(ref)) for key, ref in action.checkpoints
    )
    size = 0
    for key, ended in action.finished:
        weight = len(ended.result) + len(ended.message) + ARTIFACT_WEIGHT * len(ended.artifacts) + 128
        if size and size + weight > REPORT_BYTES:
            yield agent_pb2.SessionRequest(reports=message)
            message, size = agent_pb2.Reports(shard=action.shard, generation=action.generation), 0
        message.finished.append(_finished(key, ended))
        size += weight
    yield agent_pb2.SessionRequest(reports=message)


def log_chunk(request: str, offset: int, data: bytes = b"", *, end: bool, error: str = "") -> agent_pb2.SessionRequest:
    """A part of the answer to a LogRequest."""
    return agent_pb2.SessionRequest(
        log=agent_pb2.LogChunk(request=request, offset=offset, data=data, end=end, error=_text(error))
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
    report = agent_pb2.FinishedReport(
        attempt=_ref(key),
        outcome=_OUTCOMES[ended.outcome],
        exit_code=ended.exit_code,
        result=ended.result,
        message=_text(ended.message),
        start_wall_ms=ended.start_wall_ms,
        end_wall_ms=ended.end_wall_ms,
        late=ended.late,
    )
    if ended.artifacts:
        report.artifacts.extend(map(_artifact, ended.artifacts))
    return report


def _text(words: str) -> str:
    """Words as the wire can have them. An exception's text and a file's name may hold half a surrogate pair; protobuf
    refuses that with an exception, which would end this agent, and every one that the attempt comes to after it."""
    return words.encode(errors="backslashreplace").decode()


def _artifact(ref: ArtifactRef) -> agent_pb2.ArtifactRef:
    return agent_pb2.ArtifactRef(name=ref.name, size=ref.size, digest=ref.digest)


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
            saved = tuple((read_key(each.attempt), each.artifact.name) for each in acks.checkpoints)
            epoch = _read_epoch(acks.epoch)
            return on.ReportsSettled(stream, acks.shard, epoch, _mark(acks), _keys(acks.attempts), saved)
    return None


def read_key(ref: agent_pb2.AttemptRef) -> AttemptKey:
    """The identity of an attempt (F1). Raises BadMessage for one that cannot name a file."""
    run_uid, nonce = ref.run_uid, ref.nonce
    names = run_uid + nonce
    if not run_uid or not nonce or "." in names or "/" in names or "\0" in names:
        raise BadMessage(f"no attempt can be known as {run_uid!r}, {nonce!r}")
    return AttemptKey(run_uid, ref.task, ref.n, nonce)


def _dispatched(stream: int, message: agent_pb2.Dispatches) -> on.Dispatched:
    codes = {code.sha256: b"" if code.stored else code.zip for code in message.codes}
    templates = [_template(template, codes) for template in message.templates]
    return on.Dispatched(
        stream,
        message.shard,
        _read_epoch(message.epoch),
        _mark(message),
        message.generation,
        message.dispatch_no,
        tuple(_assignment(dispatch, templates) for dispatch in message.dispatches),
    )


@dataclass(frozen=True, slots=True)
class _Template:
    """What attempts of one message share; read once for all of them, and then the same objects in each."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    demand: Demand
    processes: int
    timeout_seconds: float | None
    grace_seconds: float
    keep_at_fence: bool
    python: PythonCall | None


def _template(template: agent_pb2.DispatchTemplate, codes: Mapping[str, bytes]) -> _Template:
    return _Template(
        argv=tuple(template.process.argv),
        env=dict(template.process.env),
        demand=_demand(template.resources),
        processes=template.resources.processes,
        timeout_seconds=template.timeout_ms / 1000 if template.timeout_ms > 0 else None,
        grace_seconds=max(0, template.grace_ms) / 1000,
        keep_at_fence=template.keep_at_fence,
        python=_python_call(template.python, codes) if template.HasField("python") else None,
    )


def _assignment(dispatch: agent_pb2.Dispatch, templates: Sequence[_Template]) -> on.Assignment:
    if not 0 <= dispatch.template < len(templates):
        raise BadMessage(f"template {dispatch.template} of {len(templates)}")
    template = templates[dispatch.template]
    spec = WorkSpec(
        argv=template.argv,
        env=template.env,
        demand=template.demand,
        task_id=dispatch.task_id,
        run=dispatch.run,
        fence=dispatch.fence,
        deadline_wall_ms=dispatch.deadline_wall_ms,
        processes=template.processes,
        timeout_seconds=template.timeout_seconds,
        grace_seconds=template.grace_seconds,
        keep_at_fence=template.keep_at_fence,
        inputs=dispatch.inputs,
        traceparent=dispatch.traceparent,
        python=template.python,
        artifacts=tuple(map(_source, dispatch.artifacts)) if dispatch.artifacts else (),
        checkpoint=_source(dispatch.checkpoint) if dispatch.HasField("checkpoint") else None,
    )
    return on.Assignment(read_key(dispatch.attempt), spec)


def _python_call(task: graph_pb2.PythonTask, codes: Mapping[str, bytes]) -> PythonCall:
    if task.code and task.code not in codes:
        raise BadMessage(f"code {task.code} does not come with the message that names it")
    code = codes.get(task.code, b"")
    return PythonCall(task.function, task.args_json, tuple(task.requirements), task.code, code)


def _source(source: agent_pb2.ArtifactSource) -> ArtifactSource:
    """Where an artifact lies. Raises BadMessage for names that would lead out of the folder they are put into."""
    ref, namespace, task = source.artifact, source.namespace, source.task_id
    problem = name_problem(ref.name) or id_problem(namespace) or task_id_problem(task)
    if problem or len(ref.digest) != DIGEST_BYTES or ref.size < 0:
        raise BadMessage(f"artifact {ref.name!r} of task {task!r}: {problem or 'no size, or no digest'}")
    maker = read_key(source.attempt)
    return ArtifactSource(namespace, maker, source.cluster_uid, ArtifactRef(ref.name, ref.size, ref.digest), task)


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
