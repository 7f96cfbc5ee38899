"""Artifacts, checkpoints and stored code on the wire and in words: agent's reports in, dispatches and task status out."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any, cast

import pytest

from baton import artifacts, validate
from baton.cli import timeline
from baton.internal import events_pb2
from baton.v1 import agent_pb2, graph_pb2, run_pb2
from cluster_agent.transport_grpc import MESSAGE_BYTES
from control_plane import agent_codec, codec
from control_plane.core import events as ev
from control_plane.core import files
from control_plane.core.commands import SavedCheckpoint
from control_plane.core.model import ArtifactRef, AttemptId, PythonCall, TaskSpec
from control_plane.core.views import ArtifactView, DispatchView
from control_plane.dispatcher import DISPATCH_BYTES
from control_plane.refusals import TooNew
from control_plane.services import translate
from control_plane.slots import OwnedShard

ATTEMPT = AttemptId("run", 3, 2, "beef")
SHA = "ab" * 32


def source(name: str, attempt: AttemptId = ATTEMPT, task_id: str = "parent") -> ArtifactView:
    return ArtifactView("team", task_id, attempt, "cluster-uid", ArtifactRef(name, 7, b"d" * 32))


def dispatched(spec: TaskSpec, **fields: Any) -> agent_pb2.Dispatches:
    shard = SimpleNamespace(id="03", incarnation=1, epoch_revision=7, seq=2, nonce="n")
    writer = agent_codec.DispatchWriter(cast(OwnedShard, shard), 5)
    writer.add(
        ATTEMPT, DispatchView("run", "team", "r", "t", spec, 9.0, {}, "", 2, "1.2", keep_at_fence=False, **fields)
    )
    return agent_pb2.Dispatches.FromString(writer.message(1).SerializeToString())


def graph(code: graph_pb2.Code) -> graph_pb2.GraphSpec:
    spec = graph_pb2.GraphSpec(codes=[code])
    call = spec.tasks.add(id="a").python
    call.function, call.args_json, call.code = "m:f", "[]", code.sha256
    return spec


# -- reports and dispatches --------------------------------------------------------------------------------------------


def test_reports_bring_artifacts_and_checkpoints() -> None:
    ref = agent_pb2.ArtifactRef(name="checkpoint-2", size=9, digest=b"x" * 32)
    reports = agent_pb2.Reports(
        finished=[
            agent_pb2.FinishedReport(
                attempt=agent_codec.ref(ATTEMPT), outcome=agent_pb2.OUTCOME_SUCCEEDED, artifacts=[ref]
            ),
            agent_pb2.FinishedReport(attempt=agent_codec.ref(ATTEMPT), outcome=agent_pb2.OUTCOME_SUCCEEDED),
        ],
        checkpoints=[agent_pb2.CheckpointReport(attempt=agent_codec.ref(ATTEMPT), artifact=ref)],
    )
    command = agent_codec.reports_command("eu", 4, [reports])
    told = ArtifactRef("checkpoint-2", 9, b"x" * 32)
    assert [finish.artifacts for finish in command.finished] == [(told,), ()]
    assert command.checkpoints == (SavedCheckpoint(ATTEMPT, told),)


def test_foreign_refs_are_read_only_as_far_as_is_needed_to_refuse_them() -> None:
    large = agent_pb2.ArtifactRef(name="n" * 10_000, size=-1, digest=b"x" * 10_000)
    report = agent_pb2.FinishedReport(attempt=agent_codec.ref(ATTEMPT), artifacts=[large] * 1000)
    read = agent_codec.finish(report).artifacts
    assert len(read) == files.ATTEMPT_ARTIFACTS + 1
    assert (len(read[0].name), len(read[0].digest)) == (files.NAME_BYTES + 1, files.DIGEST_BYTES + 1)


def test_a_dispatch_names_what_must_be_there_first() -> None:
    before = source("checkpoint-40", ATTEMPT._replace(n=1), "t")
    made = (source("result"), source("model.bin"))
    (dispatch,) = dispatched(TaskSpec(("work",)), artifacts=made, checkpoint=before).dispatches
    assert [each.artifact.name for each in dispatch.artifacts] == ["result", "model.bin"]
    first = dispatch.artifacts[0]
    assert (first.namespace, first.task_id, first.cluster_uid) == ("team", "parent", "cluster-uid")
    assert agent_codec.attempt_id(first.attempt) == ATTEMPT
    assert (first.artifact.size, first.artifact.digest) == (7, b"d" * 32)
    assert (dispatch.checkpoint.artifact.name, dispatch.checkpoint.attempt.n) == ("checkpoint-40", 1)


def test_a_dispatch_without_artifacts_says_nothing_of_them() -> None:
    (dispatch,) = dispatched(TaskSpec(("work",))).dispatches
    assert not dispatch.artifacts
    assert not dispatch.HasField("checkpoint")


def test_the_largest_dispatch_fits_an_agents_message() -> None:
    named = "n" * files.NAME_BYTES
    widest = ArtifactView(
        "s" * 63,
        "t" * 63,
        AttemptId("r" * 24, 10**6, 10**3, "f" * 16),
        "c" * 16,
        ArtifactRef(named, 1 << 40, b"d" * 32),
    )
    message = dispatched(TaskSpec(("work",)), artifacts=(widest,) * files.RUN_ARTIFACTS)
    assert message.ByteSize() + DISPATCH_BYTES < MESSAGE_BYTES


# -- stored code -------------------------------------------------------------------------------------------------------


def test_stored_code_goes_by_its_hash_alone() -> None:
    spec = graph(graph_pb2.Code(sha256=SHA, stored=True))
    assert validate.violations(spec) == []
    tasks = translate.graph_tasks(spec)
    call = tasks[0].spec.python
    assert call == PythonCall("m:f", "[]", (), SHA, b"")
    assert call is not None
    assert call.stored
    assert translate.graph_tasks(translate.graph_spec(tasks)) == tasks
    assert translate.graph_spec(tasks).codes[0].stored
    journaled = events_pb2.Event()
    codec.write_event(ev.TasksAdded("r", tasks), journaled, codec.FEATURE_LEVEL)
    assert codec.read_event(journaled, codec.Interned()) == ev.TasksAdded("r", tasks)
    (code,) = dispatched(tasks[0].spec).codes
    assert (code.sha256, code.stored, code.zip) == (SHA, True, b"")


def test_inline_code_is_not_said_to_be_stored() -> None:
    packed = b"zip"
    tasks = translate.graph_tasks(graph(graph_pb2.Code(sha256=hashlib.sha256(packed).hexdigest(), zip=packed)))
    assert not translate.graph_spec(tasks).codes[0].stored
    (code,) = dispatched(tasks[0].spec).codes
    assert (code.stored, code.zip) == (False, packed)
    assert not PythonCall("m:f", "[]").stored


@pytest.mark.parametrize(
    ("code", "field", "words"),
    [
        (graph_pb2.Code(sha256=SHA, stored=True, zip=b"x"), "zip", "send one of them"),
        (graph_pb2.Code(sha256="AB" * 32, stored=True), "sha256", "lower-case hex"),
        (graph_pb2.Code(sha256="../" + SHA[3:], stored=True), "sha256", "lower-case hex"),
        (graph_pb2.Code(sha256=hashlib.sha256(b"").hexdigest()), "zip", "is empty"),
    ],
)
def test_faults_of_stored_code_are_named(code: graph_pb2.Code, field: str, words: str) -> None:
    (fault,) = validate.violations(graph(code))
    assert fault.field == f"spec.codes[0].{field}"
    assert words in fault.message


# -- versions and rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ev.ArtifactsPublished, ev.CheckpointsCommitted])
def test_j11_no_replica_writes_it_below_its_level(kind: type[ev.ArtifactsPublished]) -> None:
    with pytest.raises(TooNew, match="feature level 2, the federation is at 1"):
        codec.write_event(kind("r", (), (), (), (), ()), events_pb2.Event(), 1)


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "", ".a", "-a", "a/b", "a b", "é", "a\n", "x" * 128, "x" * 129])
def test_the_cores_name_rule_is_the_public_one(name: str) -> None:
    assert (files.name_problem(name) is None) == (artifacts.name_problem(name) is None)


@pytest.mark.parametrize(
    "name", ["checkpoint-1", "checkpoint-0", "checkpoint-01", "checkpoint-" + "9" * 9, "checkpoint-" + "9" * 10]
)
def test_the_cores_checkpoint_rule_is_the_public_one(name: str) -> None:
    assert files.checkpoint_number(name) == artifacts.checkpoint_number(name)
    assert (files.ATTEMPT_ARTIFACTS, files.RESULT) == (artifacts.MAX_ARTIFACTS, artifacts.RESULT)


# -- what people see -------------------------------------------------------------------------------------------------------


def moved_task() -> run_pb2.TaskStatus:
    lost = run_pb2.Attempt(n=1, cluster="eu", state=run_pb2.ATTEMPT_STATE_LOST, checkpoint="checkpoint-40")
    won = run_pb2.Attempt(
        n=2,
        cluster="us",
        state=run_pb2.ATTEMPT_STATE_SUCCEEDED,
        resumed_from="1/checkpoint-40",
        checkpoint="checkpoint-20",
    )
    return run_pb2.TaskStatus(id="train", attempts=[lost, won], state=run_pb2.TASK_STATE_SUCCEEDED, accepted_results=1)


def test_the_timeline_says_from_where_a_task_went_on() -> None:
    task = moved_task()
    assert timeline._notes(task, task.attempts[0]) == ["saved checkpoint-40"]
    assert timeline._notes(task, task.attempts[1]) == [
        "moved from eu",
        "resumed from checkpoint-40 of attempt 1",
        "saved checkpoint-20",
    ]


def test_the_hash_of_results_knows_artifacts() -> None:
    plain, other = moved_task(), moved_task()
    before = timeline.result_sha256([plain])
    refs = [agent_codec.artifact_source(source(name)) for name in ("b", "a")]
    plain.artifacts.extend(refs)
    other.artifacts.extend(reversed(refs))
    assert timeline.result_sha256([plain]) == timeline.result_sha256([other]) != before
