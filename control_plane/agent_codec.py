"""Between the core's values and the agent protocol (`baton.v1.agent`): pure translation, no decisions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from baton.v1 import agent_pb2 as pb
from baton.v1 import graph_pb2
from control_plane.controller import OwnedShard
from control_plane.core.commands import Finish, Held, SavedCheckpoint, TakeReports
from control_plane.core.files import ATTEMPT_ARTIFACTS, DIGEST_BYTES, NAME_BYTES
from control_plane.core.model import ArtifactRef, AttemptId, Outcome, PythonCall, TaskSpec
from control_plane.core.span_model import attempt_span_id
from control_plane.core.views import ArtifactView, DispatchView

_INPUTS = json.JSONEncoder(ensure_ascii=False).encode
"""Made once: `json.dumps` with options makes an encoder a call."""

MOST_REFS = ATTEMPT_ARTIFACTS + 1
"""Refs read of one report: one over the limit is enough to be refused for it."""


def ref(attempt: AttemptId) -> pb.AttemptRef:
    """An attempt's identity on the wire."""
    return pb.AttemptRef(run_uid=attempt.run, task=attempt.task, n=attempt.n, nonce=attempt.nonce)


def attempt_id(message: pb.AttemptRef) -> AttemptId:
    """Inverse of `ref`."""
    return AttemptId(message.run_uid, message.task, message.n, message.nonce)


def epoch(shard: OwnedShard) -> pb.ShardEpoch:
    """The fence of the shard's owner (PROTOCOL J12)."""
    return pb.ShardEpoch(incarnation=shard.incarnation, revision=shard.epoch_revision)


def header(shard: OwnedShard) -> dict[str, Any]:
    """The fields every owner's message starts with: shard, epoch, mark."""
    mark = pb.ShardMark(shard=shard.id, incarnation=shard.incarnation, seq=shard.seq, nonce=shard.nonce)
    return {"shard": shard.id, "epoch": epoch(shard), "mark": mark}


def held(inventory: pb.ShardInventory) -> tuple[Held, ...]:
    """Rows of a columnar inventory. Columns of unequal length are cut to the shortest."""
    columns = zip(
        inventory.run, inventory.task, inventory.n, inventory.nonce, inventory.generation, inventory.phase, strict=False
    )
    uids = inventory.run_uids
    return tuple(
        Held(AttemptId(uids[run], task, n, nonce), generation, int(phase))
        for run, task, n, nonce, generation, phase in columns
        if 0 <= run < len(uids)
    )


def reports_command(cluster: str, generation: int, reports: Iterable[pb.Reports]) -> TakeReports:
    """Several messages of one link as one command, in order."""
    started: list[tuple[AttemptId, float]] = []
    finished: list[Finish] = []
    rejected: list[tuple[AttemptId, str]] = []
    stopped: list[AttemptId] = []
    saved: list[SavedCheckpoint] = []
    for report in reports:
        started += [(attempt_id(s.attempt), s.start_wall_ms / 1000) for s in report.started]
        finished += [finish(f) for f in report.finished]
        rejected += [(attempt_id(r.attempt), r.reason[:200]) for r in report.rejected]
        stopped += [attempt_id(s) for s in report.stopped]
        saved += [SavedCheckpoint(attempt_id(c.attempt), artifact_ref(c.artifact)) for c in report.checkpoints]
    columns = (tuple(started), tuple(finished), tuple(rejected), tuple(stopped), tuple(saved))
    return TakeReports(cluster, generation, *columns)


def finish(message: pb.FinishedReport) -> Finish:
    """An attempt's end. An outcome this version does not know counts as lost: dead, nothing accepted."""
    known = Outcome.SUCCEEDED <= message.outcome <= Outcome.LOST
    return Finish(
        attempt=attempt_id(message.attempt),
        outcome=Outcome(message.outcome) if known else Outcome.LOST,
        exit_code=message.exit_code if message.HasField("exit_code") else None,
        result=message.result,
        message=message.message[:500],
        start=message.start_wall_ms / 1000,
        end=message.end_wall_ms / 1000,
        artifacts=tuple(map(artifact_ref, message.artifacts[:MOST_REFS])) if message.artifacts else (),
    )


def artifact_ref(message: pb.ArtifactRef) -> ArtifactRef:
    """A ref as an agent says it; the core judges it."""
    return ArtifactRef(message.name[: NAME_BYTES + 1], message.size, message.digest[: DIGEST_BYTES + 1])


def artifact_source(view: ArtifactView) -> pb.ArtifactSource:
    """An artifact with all that is needed to read it."""
    made = view.ref
    return pb.ArtifactSource(
        namespace=view.namespace,
        attempt=ref(view.attempt),
        cluster_uid=view.cluster,
        artifact=pb.ArtifactRef(name=made.name, size=made.size, digest=made.digest),
        task_id=view.task_id,
    )


def resources(spec: TaskSpec) -> graph_pb2.Resources:
    """Resources on the wire."""
    of = spec.resources
    return graph_pb2.Resources(
        cpu_millis=of.cpu_millis,
        memory_bytes=of.memory_bytes,
        disk_bytes=of.disk_bytes,
        processes=of.processes,
        extended=dict(of.extended),
    )


def template(spec: TaskSpec, keep_at_fence: bool) -> pb.DispatchTemplate:
    """What equal attempts share."""
    call = spec.python
    return pb.DispatchTemplate(
        process=graph_pb2.ProcessTask(argv=spec.argv, env=dict(spec.env)) if call is None else None,
        python=None
        if call is None
        else graph_pb2.PythonTask(
            function=call.function, args_json=call.args_json, requirements=call.requirements, code=call.code
        ),
        resources=resources(spec),
        timeout_ms=int(spec.timeout * 1000),
        grace_ms=int(spec.grace * 1000),
        keep_at_fence=keep_at_fence,
    )


def traceparent(trace_id: str, attempt: AttemptId) -> str:
    """W3C trace context of an attempt: its span id follows from its identity, so every replica says the same (DESIGN 11)."""
    if not trace_id:
        return ""
    return f"00-{trace_id}-{attempt_span_id(attempt.run, attempt.task, attempt.n)}-01"


class DispatchWriter:
    """Builds one Dispatches message, sharing templates."""

    def __init__(self, shard: OwnedShard, generation: int) -> None:
        self._message = pb.Dispatches(**header(shard), generation=generation)
        self._templates: dict[tuple[int, bool], int] = {}
        self._codes: set[str] = set()
        self.attempts: list[AttemptId] = []
        self.bytes = 0

    @property
    def count(self) -> int:
        """Attempts so far."""
        return len(self.attempts)

    def add(self, attempt: AttemptId, view: DispatchView) -> None:
        """One more attempt."""
        # Specs are interned per run (DESIGN 13), so identity is equality here, and they live as long as this message.
        shared = (id(view.spec), view.keep_at_fence)
        index = self._templates.get(shared)
        if index is None:
            index = self._templates[shared] = len(self._message.templates)
            self._message.templates.append(template(view.spec, view.keep_at_fence))
            self.bytes += self._message.templates[-1].ByteSize()
            if view.spec.python is not None:
                self._carry(view.spec.python)
        inputs = b""
        if view.inputs:
            texts = {parent: result.decode("utf-8", "replace") for parent, result in view.inputs.items()}
            inputs = _INPUTS(texts).encode()  # as `core.inline` weighs them
        self._message.dispatches.append(
            pb.Dispatch(
                attempt=ref(attempt),
                template=index,
                task_id=view.task_id,
                run=f"namespaces/{view.namespace}/runs/{view.run_id}",
                fence=view.fence,
                deadline_wall_ms=int(view.deadline * 1000),
                inputs=inputs,
                traceparent=traceparent(view.trace_id, attempt),
            )
        )
        self.bytes += 200 + len(inputs)
        if view.artifacts or view.checkpoint:
            self._refer(self._message.dispatches[-1], view)
        self.attempts.append(attempt)

    def _refer(self, dispatch: pb.Dispatch, view: DispatchView) -> None:
        """What is there before the workload starts (DESIGN 10)."""
        dispatch.artifacts.extend(map(artifact_source, view.artifacts))
        if view.checkpoint is not None:
            dispatch.checkpoint.CopyFrom(artifact_source(view.checkpoint))
        self.bytes += dispatch.ByteSize()

    def _carry(self, call: PythonCall) -> None:
        """Code travels in each message that needs it, once: no message leans on another one's arrival (J7). Stored code is named
        only, and fetched by its hash."""
        if call.code and call.code not in self._codes:
            self._codes.add(call.code)
            self._message.codes.add(sha256=call.code, zip=call.code_zip, stored=call.stored)
            self.bytes += len(call.code_zip)

    def message(self, number: int) -> pb.Dispatches:
        """The message under its dispatch number."""
        self._message.dispatch_no = number
        return self._message
