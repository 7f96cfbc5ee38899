"""Artifacts are seen exactly if their attempt's success is accepted (F2); the next attempt starts from the last checkpoint that a
live attempt committed, whoever owns the shard then (J7, J9)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from control_plane.core.commands import (
    Archived,
    CreateRun,
    Finish,
    GenerationFenced,
    Refused,
    SavedCheckpoint,
    TakeReports,
)
from control_plane.core.events import ArtifactsPublished, AttemptsFinished, CheckpointsCommitted
from control_plane.core.files import (
    ATTEMPT_ARTIFACTS,
    NAME_BYTES,
    NOTED_EVERY,
    RUN_ARTIFACTS,
    checkpoint_number,
    name_problem,
)
from control_plane.core.machine import Batch
from control_plane.core.model import (
    ArtifactRef,
    AttemptId,
    Evidence,
    GraphTask,
    Outcome,
    PythonCall,
    RetryPolicy,
    Stamp,
    TaskState,
)
from control_plane.core.publishing import PART_REFS
from control_plane.core.run import KEPT_ATTEMPTS
from control_plane.core.shard import RunShard
from control_plane.core.views import ArtifactView
from tests.unit.core.shard_kit import NO_REQUEST, Shard, facts, generation, task

DIGEST = b"d" * 32
AGAIN = RetryPolicy(max_attempts=5, initial_backoff=0.0)


def ref(name: str, size: int = 5, digest: bytes = DIGEST) -> ArtifactRef:
    return ArtifactRef(name, size, digest)


def finish(attempt: AttemptId, *made: ArtifactRef, outcome: Outcome = Outcome.SUCCEEDED, result: bytes = b"") -> Finish:
    return Finish(attempt, outcome, 0, result, "", 1.0, 2.0, made)


def report(shard: Shard, *finished: Finish, cluster: str = "a") -> object:
    return shard.do(TakeReports(cluster, 1, finished=finished))


def save(shard: Shard, attempt: AttemptId, *numbers: int, cluster: str = "a") -> list[CheckpointsCommitted]:
    """The agent tells checkpoints; what that changed."""
    told = tuple(SavedCheckpoint(attempt, ref(f"checkpoint-{number}", number)) for number in numbers)
    shard.do(TakeReports(cluster, 1, checkpoints=told))
    return [event for event in shard.last() if isinstance(event, CheckpointsCommitted)]


def started(*tasks: GraphTask, count: int = 1) -> Shard:
    shard = Shard(facts("a"), facts("b"))
    shard.create(*tasks)
    shard.grant("a", count)
    return shard


def names(views: tuple[ArtifactView, ...]) -> list[str]:
    return [view.ref.name for view in views]


# -- artifacts ---------------------------------------------------------------------------------------------------------


def test_f2_artifacts_come_with_the_success_in_one_batch_and_before_it() -> None:
    shard = started(task("t"))
    attempt = shard.only()
    report(shard, finish(attempt, ref("model.bin", 7), ref("result")))
    published, finished = (event for event in shard.last() if isinstance(event, ArtifactsPublished | AttemptsFinished))
    assert published == ArtifactsPublished("r1", (0, 0), (1, 1), ("model.bin", "result"), (7, 5), (DIGEST, DIGEST))
    assert isinstance(finished, AttemptsFinished)
    assert shard.task().artifacts == (
        ArtifactView("ns", "t", attempt, "a", ref("model.bin", 7)),
        ArtifactView("ns", "t", attempt, "a", ref("result")),
    )


def test_f2_what_is_not_accepted_publishes_nothing() -> None:
    shard = started(task("t", retry=AGAIN))
    attempt = shard.only()
    report(shard, finish(attempt, ref("late")), cluster="b")
    assert not shard.last(), "another cluster's word"
    report(shard, finish(attempt, ref("half"), outcome=Outcome.FAILED))
    assert shard.task().artifacts == ()
    report(shard, finish(attempt, ref("late")))
    assert not shard.events(ArtifactsPublished)


def test_f2_a_repeated_report_publishes_once() -> None:
    shard = started(task("t"))
    done = finish(shard.only(), ref("x"))
    report(shard, done, done)
    report(shard, done)
    assert names(shard.task().artifacts) == ["x"]


@pytest.mark.parametrize(
    ("made", "result", "fault"),
    [
        ([ref(f"f{n}") for n in range(ATTEMPT_ARTIFACTS + 1)], b"", f"over the limit of {ATTEMPT_ARTIFACTS}"),
        ([ref("../etc")], b"", "'../etc': use 1 to 128 letters"),
        ([ref(".hidden")], b"", "'.hidden'"),
        ([ref("")], b"", "''"),
        ([ref("a" * (NAME_BYTES + 1))], b"", "use 1 to 128"),
        ([ref("checkpoint-3")], b"", "name of a checkpoint"),
        ([ref("a"), ref("a")], b"", "one name"),
        ([ref("a", -1)], b"", "without a size"),
        ([ref("a", digest=b"short")], b"", "digest"),
        ([ref("result")], b"1", "came twice"),
    ],
)
def test_a_success_with_a_bad_artifact_is_a_failure_that_says_so(
    made: list[ArtifactRef], result: bytes, fault: str
) -> None:
    shard = started(task("t"))
    report(shard, finish(shard.only(), *made, result=result))
    assert shard.states() == [TaskState.FAILED]
    assert fault in shard.task().attempts[0].message
    assert shard.task().artifacts == ()
    assert shard.task().result == b""


def test_a_run_publishes_a_bounded_number() -> None:
    full = [ref(f"f{n}") for n in range(ATTEMPT_ARTIFACTS)]
    fitting = RUN_ARTIFACTS // ATTEMPT_ARTIFACTS
    shard = started(*(task(f"t{n}") for n in range(fitting + 1)), count=fitting + 1)
    attempts = [shard.only(n) for n in range(fitting + 1)]
    report(shard, *(finish(attempt, *full) for attempt in attempts))
    sizes = [len(event.tasks) for event in shard.last() if isinstance(event, ArtifactsPublished)]
    assert max(sizes) <= PART_REFS
    assert sum(sizes) == fitting * ATTEMPT_ARTIFACTS
    assert shard.states().count(TaskState.FAILED) == 1
    assert f"would exceed {RUN_ARTIFACTS}" in shard.task(fitting).attempts[0].message


def test_children_are_told_what_their_parents_made() -> None:
    shard = started(task("a"), task("b"), task("c", 0, 1), count=2)
    report(shard, finish(shard.only(0), ref("x"), ref("result")), finish(shard.only(1), result=b"2"))
    shard.grant("a")
    told = shard.machine.dispatch(shard.only(2))
    assert told is not None
    assert dict(told.inputs) == {"b": b"2"}
    assert [(view.task_id, view.ref.name) for view in told.artifacts] == [("a", "x"), ("a", "result")]
    assert told.checkpoint is None


def test_a_list_goes_by_task() -> None:
    shard = started(task("a"), task("b"), task("c"), count=3)
    report(shard, *(finish(shard.only(n), ref("x"), ref("y")) for n in (2, 0)))
    assert [(v.task_id, v.ref.name) for v in shard.machine.artifacts("r1", 0, 3)] == [
        ("a", "x"),
        ("a", "y"),
        ("c", "x"),
        ("c", "y"),
    ]
    assert [view.task_id for view in shard.machine.artifacts("r1", 1, 1)] == ["c", "c"]
    assert shard.machine.artifacts("r1", 3, 10) == shard.machine.artifacts("none", 0, 10) == []


# -- checkpoints -------------------------------------------------------------------------------------------------------


def lose_a(shard: Shard) -> None:
    """Cluster a dies; its generation is fenced, and b gets the work."""
    shard.fleet(facts("a", generation(1, evidence=Evidence.TIMED)))
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    shard.settled()
    shard.grant("b")


def test_the_next_attempt_starts_from_the_last_checkpoint_wherever_it_runs() -> None:
    shard = started(task("t"))
    first = shard.only()
    save(shard, first, 39)
    save(shard, first, 40)
    lose_a(shard)
    second = shard.only()
    told = shard.machine.dispatch(second)
    assert told is not None
    assert told.checkpoint == ArtifactView("ns", "t", first, "a", ref("checkpoint-40", 40))
    view = shard.task()
    assert view.checkpoint == told.checkpoint
    assert [(a.checkpoint, a.resumed_from) for a in view.attempts] == [("checkpoint-40", ""), ("", "1/checkpoint-40")]
    placed = [e for e in shard.machine.kept_events("r1") if e.kind == "placed"]
    assert placed[-1].reasons == ("resumes from checkpoint-40 of attempt 1",)


def test_a_retry_after_a_failure_starts_from_it_too() -> None:
    shard = started(task("t", retry=AGAIN))
    first = shard.only()
    told = (SavedCheckpoint(first, ref("checkpoint-1")),)
    shard.do(TakeReports("a", 1, finished=(finish(first, outcome=Outcome.FAILED),), checkpoints=told))
    shard.settled()
    shard.grant("a")
    dispatch = shard.machine.dispatch(shard.only())
    assert dispatch is not None
    assert dispatch.checkpoint is not None
    assert dispatch.checkpoint.attempt == first


def test_numbers_rise_within_an_attempt_and_start_again_in_the_next() -> None:
    shard = started(task("t"))
    first = shard.only()
    (event,) = save(shard, first, 2, 3, 1)
    assert event.names == ("checkpoint-3",), "the newest of one report only"
    assert save(shard, first, 3) == save(shard, first, 2) == []
    assert save(shard, first, 10), "numbers, not words"
    lose_a(shard)
    second = shard.only()
    own = save(shard, second, 1, cluster="b")
    assert own
    dispatch = shard.machine.dispatch(second)
    assert dispatch is not None
    assert dispatch.checkpoint is None, "its own checkpoint is not what it started from"


@pytest.mark.parametrize(
    "name", ["checkpoint-0", "checkpoint-01", "checkpoint-", "checkpoint-x", "x", "checkpoint-1e3"]
)
def test_what_is_no_checkpoint_is_not_committed(name: str) -> None:
    shard = started(task("t"))
    shard.do(TakeReports("a", 1, checkpoints=(SavedCheckpoint(shard.only(), ref(name)),)))
    assert not shard.last()
    shard.do(TakeReports("a", 1, checkpoints=(SavedCheckpoint(shard.only(), ref("checkpoint-1", digest=b"")),)))
    assert not shard.last()


def test_f2_only_live_attempts_commit_checkpoints() -> None:
    shard = started(task("t"))
    first = shard.only()
    assert save(shard, first, 1, cluster="b") == [], "another cluster's word"
    assert save(shard, first._replace(nonce="other"), 1) == []
    assert save(shard, first._replace(run="gone"), 1) == []
    save(shard, first, 1)
    lose_a(shard)
    assert save(shard, first, 2) == [], "its fence is no longer good"
    view = shard.task()
    assert view.checkpoint is not None
    assert view.checkpoint.ref.name == "checkpoint-1"


def test_a_final_task_keeps_no_checkpoint() -> None:
    shard = started(task("t"))
    attempt = shard.only()
    save(shard, attempt, 1)
    report(shard, finish(attempt, ref("x")))
    view = shard.task()
    assert view.checkpoint is None
    assert view.attempts[0].checkpoint == "checkpoint-1", "the story stays"
    assert save(shard, attempt, 2) == []


def test_watchers_hear_of_the_first_checkpoint_and_of_later_ones_now_and_then() -> None:
    shard = started(task("t"))
    attempt = shard.only()

    def heard() -> list[str]:
        return [e.reasons[0] for e in shard.machine.kept_events("r1") if e.kind == "checkpoint"]

    for number in range(1, 6):
        save(shard, attempt, number)
    assert heard() == ["saved checkpoint-1, 1 bytes"]
    shard.later(NOTED_EVERY)
    save(shard, attempt, 6)
    assert heard() == ["saved checkpoint-1, 1 bytes", "saved checkpoint-6, 6 bytes"]
    assert shard.task().attempts[0].checkpoint == "checkpoint-6"


def test_attempts_that_are_forgotten_take_their_story_with_them_but_not_the_checkpoint() -> None:
    shard = Shard(facts("a"))
    shard.create(task("t"), deadline=1e6)
    shard.grant("a")
    first = shard.only()
    save(shard, first, 1)
    for _ in range(KEPT_ATTEMPTS + 3):
        shard.do(TakeReports("a", 1, rejected=((shard.only(), "full"),)))
        shard.later(120)
        shard.grant("a")
    view = shard.task()
    assert first not in [attempt.id for attempt in view.attempts]
    assert view.checkpoint is not None
    assert view.checkpoint.attempt == first
    assert view.attempts[-1].resumed_from == "1/checkpoint-1"


# -- takeovers and versions --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rebuild", [Shard.replayed, Shard.restored])
def test_a_takeover_knows_the_same(rebuild: Callable[[Shard], RunShard]) -> None:
    shard = started(task("a"), task("b", 0), task("c"), count=2)
    save(shard, shard.only(2), 4)
    report(shard, finish(shard.only(0), ref("x"), ref("result", 1 << 40)))
    shard.grant("a")
    said = [shard.task(n) for n in range(3)], shard.machine.dispatch(shard.only(1)), list(shard.machine.dump())
    shard.machine = rebuild(shard)
    assert (
        [shard.task(n) for n in range(3)],
        shard.machine.dispatch(shard.only(1)),
        list(shard.machine.dump()),
    ) == said
    assert save(shard, shard.only(2), 4) == []
    assert save(shard, shard.only(2), 5)


def test_a_run_without_artifacts_has_nothing_of_them_in_its_image() -> None:
    shard = started(task("t"))
    report(shard, finish(shard.only()))
    assert b"published" not in b"".join(getattr(event, "image", b"") for event in shard.machine.dump())


def test_archived_runs_leave_nothing() -> None:
    shard = started(task("t"))
    report(shard, finish(shard.only(), ref("x")))
    assert names(shard.machine.run_record("r1").tasks[0].artifacts) == ["x"]
    shard.do(Archived("r1", shard.run().event_number))
    assert shard.machine.artifacts("r1", 0, 10) == []


def test_j11_nothing_of_it_is_written_at_an_older_feature_level() -> None:
    shard = started(task("t"))
    attempt = shard.only()
    batch = Batch(Stamp(shard.now, "nonce", 99, 1), shard.machine.apply, level=1)
    told = (SavedCheckpoint(attempt, ref("checkpoint-1")),)
    shard.machine.handle(TakeReports("a", 1, checkpoints=told), batch)
    assert batch.events == []
    shard.machine.handle(TakeReports("a", 1, finished=(finish(attempt, ref("x")),)), batch)
    shard.machine.settle(batch)
    assert "feature level 2" in shard.task().attempts[0].message
    assert not any(isinstance(event, ArtifactsPublished | CheckpointsCommitted) for event in batch.events)


def test_j11_stored_code_waits_for_its_feature_level() -> None:
    shard = Shard(facts("a"))
    stored = task("t", argv=(), python=PythonCall("m:f", "[]", code="ab" * 32))
    command = CreateRun(NO_REQUEST, "ns", "run", "r1", shard.now + 60, 0, (stored,))
    batch = Batch(Stamp(shard.now, "nonce", 99, 1), shard.machine.apply, level=1)
    with pytest.raises(Refused, match="feature level 2"):
        shard.machine.handle(command, batch)
    assert batch.events == []
    assert shard.do(command) == "r1"


def test_names() -> None:
    assert name_problem("a") is name_problem("Model-1.0_x.bin") is name_problem("checkpoint-x") is None
    assert name_problem("é") is not None
    assert [checkpoint_number(name) for name in ("checkpoint-1", "checkpoint-999999999")] == [1, 999_999_999]
    assert checkpoint_number("checkpoint-1000000000") == checkpoint_number("checkpoint-٣") == 0
