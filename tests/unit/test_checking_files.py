"""The judges of artifacts and checkpoints see what they are there for (PROTOCOL F2)."""

from __future__ import annotations

from control_plane.core import events as ev
from control_plane.core.model import AttemptState, Evidence, Stamp, TaskState
from lab.checking.files import checkpoints_are_of_the_living, only_winners_publish
from lab.checking.fold import Fold
from lab.checking.history import Record, Written

PLACED = ev.AttemptsPlaced("r", "c", 1, (0,), (1,))
PUBLISHED = ev.ArtifactsPublished("r", (0,), (1,), ("x",), (1,), (b"d",))


def finished(state: AttemptState = AttemptState.SUCCEEDED, n: int = 1) -> ev.AttemptsFinished:
    return ev.AttemptsFinished("r", (0,), (n,), (state,), (False,), (0,), (b"",), ("",), (1.0,), (2.0,))


def saved(number: int, n: int = 1) -> ev.CheckpointsCommitted:
    return ev.CheckpointsCommitted("r", (0,), (n,), (f"checkpoint-{number}",), (1,), (b"d",))


def found(*batches: tuple[ev.Event, ...]) -> list[str]:
    journal = [
        Written(float(place), place, "00", Stamp(float(place), f"n{place}", place, 1), event)
        for place, batch in enumerate(batches, 1)
        for event in batch
    ]
    record = Record(journal, [], (), {}, healed=0.0, ended=99.0, died=())
    fold = Fold(Record([], [], (), {}, healed=0.0, ended=99.0, died=()))
    checkers = (only_winners_publish, checkpoints_are_of_the_living)
    return [violation.invariant for checker in checkers for violation in checker(record, fold)]


def test_what_is_lawful_is_lawful() -> None:
    assert found((PLACED,), (saved(1),), (saved(3),), (PUBLISHED, finished())) == []


def test_an_artifact_without_its_success_is_seen() -> None:
    assert found((PLACED,), (PUBLISHED,)) == ["F2 artifacts"]
    assert found((PLACED,), (PUBLISHED,), (finished(),)) == ["F2 artifacts"], "another batch is too late"
    assert found((PLACED,), (PUBLISHED, finished(AttemptState.FAILED))) == ["F2 artifacts"]


def test_a_checkpoint_of_the_dead_is_seen() -> None:
    lost = ev.AttemptsLost("r", (0,), (1,), Evidence.TIMED)
    for end in (lost, finished(), finished(AttemptState.FAILED), ev.AttemptsRejected("r", (0,), (1,), ("full",))):
        assert found((PLACED,), (end,), (saved(1),)) == ["F2 checkpoints"]
    over = ev.TasksEnded("r", (0,), (TaskState.CANCELLED,), ("",))
    assert found((PLACED,), (over,), (saved(1),)) == ["F2 checkpoints"]


def test_a_number_that_does_not_rise_is_seen() -> None:
    assert found((PLACED,), (saved(2),), (saved(2),)) == ["F2 checkpoints"]
