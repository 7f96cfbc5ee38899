"""Files at the agent's core and on its wire: refs in reports, checkpoints until acknowledged, sources in dispatches (F1, F2, J7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from baton import artifact_path, checkpoint, input_path
from baton.v1 import agent_pb2, graph_pb2
from cluster_agent import translate
from cluster_agent.carrier_grpc import source_message
from cluster_agent.carrying.shelf import Kept, Shelf
from cluster_agent.core import events as on
from cluster_agent.core.commands import SendReports, StartWork, Step
from cluster_agent.core.model import ArtifactRef, ArtifactSource, AttemptKey, Ended, Outcome, PythonCall
from cluster_agent.core.outbox import RESEND_SECONDS
from cluster_agent.core.records import Finished
from cluster_agent.executors.base import AttemptKey as OuterKey
from cluster_agent.executors.base import Cause, Exited, Saved
from cluster_agent.journal_codec import decode, encode
from cluster_agent.workload import start_request, work_event
from tests.unit.agent_machine_world import EPOCH, F, World, key, none, spec, the

DIGEST = bytes(range(32))
REF = ArtifactRef("model.bin", 5, DIGEST)
MAKER = AttemptKey("run", 7, 2, "nonce")


def saved(number: int) -> ArtifactRef:
    return ArtifactRef(f"checkpoint-{number}", number, DIGEST)


def running(world: World) -> None:
    world.dispatch(0)
    world.step(on.WorkStarted(key(0), 1))


def acked(world: World, name: str) -> on.ReportsSettled:
    return on.ReportsSettled(world.stream, "s0", EPOCH, None, (), ((key(0), name),))


def told(step: Step) -> list[ArtifactRef]:
    """Checkpoints that leave with a step."""
    reports = [action for action in step.actions if isinstance(action, SendReports)]
    return [ref for report in reports for _, ref in report.checkpoints]


def test_j7_the_newest_checkpoint_is_told_at_once_and_again_until_it_is_acknowledged() -> None:
    world = World()
    running(world)
    assert told(world.step(on.WorkSaved(key(0), saved(1)))) == [saved(1)]
    assert told(world.step(after=RESEND_SECONDS / 2)) == []
    assert told(world.step(after=RESEND_SECONDS)) == [saved(1)]
    assert told(world.step(on.WorkSaved(key(0), saved(2)))) == [saved(2)]
    world.step(acked(world, "checkpoint-1"))  # of the one before: the newer one is not settled by it
    world.ack()
    assert told(world.step(after=RESEND_SECONDS)) == [saved(2)]
    world.step(acked(world, "checkpoint-2"))
    world.ack()
    assert told(world.step(after=RESEND_SECONDS)) == []
    assert world.machine.all_settled


def test_j7_a_new_stream_tells_it_again_and_a_settled_attempt_has_none() -> None:
    world = World()
    running(world)
    world.step(on.WorkSaved(key(0), saved(1)))
    world.step(on.StreamOpened(2))
    world.stream = 2
    assert told(world.step(on.Welcomed(2, 1, True, "cu", "fu", F, 5.0))) == [saved(1)]
    ended = world.step(on.WorkEnded(key(0), Ended(Outcome.FAILED, 1)))
    assert [k for k, _ in the(ended, SendReports).finished] == [key(0)]
    world.settle(0)
    world.ack()
    assert told(world.step(after=RESEND_SECONDS)) == []
    assert world.machine.all_settled


def test_a_checkpoint_of_what_does_not_run_is_not_told() -> None:
    world = World()
    assert none(world.step(on.WorkSaved(key(3), saved(1))), SendReports)
    world.dispatch(0)
    world.stop(0)
    assert none(world.step(on.WorkSaved(key(0), saved(1))), SendReports)


def test_what_has_to_be_fetched_is_not_put_behind_other_calls() -> None:
    """G5: work that waits at the executor must be a few milliseconds of it."""
    world = World(cpus=1)
    call = PythonCall("m:f", "[]", code="c", code_zip=b"z")
    plain = spec(argv=(), python=call)
    world.dispatch(0, work=plain)
    world.step(on.WorkEnded(key(0), Ended(Outcome.SUCCEEDED, 0), 0.001))
    source = ArtifactSource("default", MAKER, "cu", REF, "parent")
    world.dispatch(1, work=plain)
    assert none(world.dispatch(2, work=replace(plain, artifacts=(source,))), StartWork)
    assert none(world.dispatch(3, work=replace(plain, checkpoint=source)), StartWork)


def test_refs_survive_the_journal_and_reach_the_report() -> None:
    ended = Ended(Outcome.SUCCEEDED, 0, artifacts=(REF,))
    record = Finished(key(0), "s0", 3, ended)
    assert decode(encode(record)) == record
    [message] = translate.reports(
        SendReports(1, "s0", 1, finished=((key(0), ended),), checkpoints=((key(1), saved(4)),))
    )
    [report] = message.reports.finished
    assert [(ref.name, ref.size, ref.digest) for ref in report.artifacts] == [("model.bin", 5, DIGEST)]
    [told] = message.reports.checkpoints
    assert (told.attempt.task, told.artifact.name, told.artifact.size) == (1, "checkpoint-4", 4)


def dispatch(**source: object) -> agent_pb2.SessionResponse:
    artifact = agent_pb2.ArtifactRef(name="model.bin", size=5, digest=DIGEST)
    attempt = agent_pb2.AttemptRef(run_uid="run", task=7, n=2, nonce="nonce")
    words = {"namespace": "default", "attempt": attempt, "cluster_uid": "cu", "artifact": artifact, "task_id": "parent"}
    made = agent_pb2.ArtifactSource(**{**words, **source})  # type: ignore[arg-type]
    one = agent_pb2.Dispatch(attempt=attempt, task_id="t", artifacts=[made], checkpoint=made)
    python = graph_pb2.PythonTask(function="m:f", args_json="[]", code="abc")
    dispatches = agent_pb2.Dispatches(
        shard="s0",
        templates=[agent_pb2.DispatchTemplate(python=python)],
        dispatches=[one],
        codes=[graph_pb2.Code(sha256="abc", stored=True)],
    )
    return agent_pb2.SessionResponse(dispatches=dispatches)


def test_a_dispatch_says_what_to_fetch_and_the_executor_is_asked_for_it() -> None:
    event = translate.owner_event(1, dispatch())
    assert isinstance(event, on.Dispatched)
    source = ArtifactSource("default", MAKER, "cu", REF, "parent")
    work = event.assignments[0].spec
    assert (work.artifacts, work.checkpoint) == ((source,), source)
    assert work.python is not None
    assert (work.python.code, work.python.code_zip, work.carried) == ("abc", b"", True)
    world = World()
    order = the(world.dispatch(0, work=replace(work, run="namespaces/default/runs/r")), StartWork).orders[0]
    request = start_request(order, "eu")
    assert (request.artifacts, request.checkpoint, request.carried) == ((source,), source, True)
    assert request.python is not None
    assert request.python.stored
    assert source_message(source) == dispatch().dispatches.dispatches[0].artifacts[0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"task_id": "../up"},
        {"task_id": ""},
        {"namespace": "a/b"},
        {"artifact": agent_pb2.ArtifactRef(name="../../etc", size=1, digest=DIGEST)},
        {"artifact": agent_pb2.ArtifactRef(name="fine", size=1, digest=b"short")},
        {"attempt": agent_pb2.AttemptRef(run_uid="a/b", nonce="n")},
    ],
)
def test_a_source_that_would_lead_elsewhere_is_a_bad_message(wrong: dict[str, object]) -> None:
    with pytest.raises(translate.BadMessage):
        translate.owner_event(1, dispatch(**wrong))


def test_acknowledgements_name_their_checkpoints() -> None:
    report = agent_pb2.CheckpointReport(
        attempt=agent_pb2.AttemptRef(run_uid="run", task=0, n=1, nonce="nonce"),
        artifact=agent_pb2.ArtifactRef(name="checkpoint-3"),
    )
    acks = agent_pb2.ReportAcks(shard="s0", checkpoints=[report])
    event = translate.owner_event(1, agent_pb2.SessionResponse(report_acks=acks))
    assert isinstance(event, on.ReportsSettled)
    assert event.checkpoints == ((key(0), "checkpoint-3"),)


def test_files_that_could_not_be_moved_are_no_failure_of_the_application() -> None:
    outer = OuterKey("run", 0, 1, "nonce")
    event = work_event(Exited(outer, Cause.CARRIAGE, None, None, 1.0, 2.0, message="the store is down"))
    assert isinstance(event, on.WorkEnded)
    assert (event.ended.outcome, event.ended.message) == (Outcome.LOST, "the store is down")
    assert work_event(Saved(outer, saved(1))) == on.WorkSaved(key(0), saved(1))


# --- the agent's own tree ---------------------------------------------------------------------------------------------


def test_what_is_stored_is_remembered_and_forgotten_with_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "guard").mkdir()
    shelf, one, other = Shelf(tmp_path / "guard", tmp_path / "own"), OuterKey("r", 1, 2, "n"), OuterKey("r", 2, 1, "n")
    kept = Kept(4, (1, 2, 3), saved(4), (REF,))
    shelf.keep(one, kept)
    [place] = shelf.places(other, [ArtifactSource("default", MAKER, "cu", REF, "parent")])
    place.write_text("x")
    again = Shelf(tmp_path / "guard", tmp_path / "own")
    assert again.kept(one) == kept
    assert again.kept(other) is None
    assert again.known() == {one, other}
    again.forget([one, other])
    assert again.known() == set()


def test_a_note_that_was_torn_is_no_note(tmp_path: Path) -> None:
    (tmp_path / "guard").mkdir()
    shelf, attempt = Shelf(tmp_path / "guard", tmp_path / "own"), OuterKey("r", 1, 2, "n")
    shelf.keep(attempt, Kept())
    (tmp_path / "own" / "kept" / f"{attempt.text()}.json").write_text('{"number": 4')
    assert shelf.kept(attempt) is None


# --- inside a task ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, "text", {"a": [1, 2.5, None]}, b"", b"\x00\xff\n", "\u00fc\u2028"])
def test_a_checkpoint_comes_back_as_it_was(value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CHECKPOINT_DIR", str(tmp_path))
    assert checkpoint.load("nothing yet") == "nothing yet"
    checkpoint.save(b"before")
    checkpoint.save(value)
    assert checkpoint.load() == value
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_a_checkpoint_of_the_wrong_kind_leaves_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_CHECKPOINT_DIR", str(tmp_path))
    checkpoint.save(1)
    for wrong in (object(), {1}, float("nan")):
        with pytest.raises((TypeError, ValueError)):
            checkpoint.save(wrong)
    assert checkpoint.load() == 1
    (tmp_path / "latest").write_bytes(b"of another program")
    with pytest.raises(ValueError, match="read \\$BATON_CHECKPOINT_DIR/latest yourself"):
        checkpoint.load()


def test_outside_a_task_checkpoints_do_nothing_and_files_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BATON_CHECKPOINT_DIR", "BATON_ARTIFACTS_DIR", "BATON_INPUT_DIR", "BATON_TASK"):
        monkeypatch.delenv(name, raising=False)
    checkpoint.save(1)
    assert checkpoint.load("default") == "default"
    asks: list[Callable[[], Path]] = [lambda: artifact_path("a"), lambda: input_path("t", "a")]
    for ask in asks:
        with pytest.raises(RuntimeError, match="only a task on a cluster"):
            ask()
    with pytest.raises(ValueError, match="letters, digits"):
        artifact_path("../a")


def test_an_input_that_is_not_there_is_told_with_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATON_TASK", "t")
    monkeypatch.delenv("BATON_INPUT_DIR", raising=False)
    with pytest.raises(FileNotFoundError, match="none"):
        input_path("load", "rows")
    (tmp_path / "load").mkdir()
    (tmp_path / "load" / "rows").write_text("x")
    monkeypatch.setenv("BATON_INPUT_DIR", str(tmp_path))
    assert input_path("load", "rows").read_text() == "x"
    with pytest.raises(FileNotFoundError, match="its artifacts: rows"):
        input_path("load", "other")
