"""Effect logs: what chaos reads of the workloads' own notes, without a federation."""

from __future__ import annotations

from pathlib import Path

from cluster_agent.executors.base import AttemptKey
from control_plane.core import events as ev
from control_plane.core.model import GraphTask, Stamp, TaskSpec
from lab.chaos.effects import COARSE, DECIDED, Effects
from lab.checking.history import Record, Written
from lab.checking.judging import judge
from lab.checking.processes import no_overlap

RUN = "namespaces/default/runs/r"


def journal() -> list[Written]:
    """A run of two tasks; the second one is placed twice."""
    stamp = Stamp(seq=1, nonce="n1", wall=0.0, incarnation=1)
    later = Stamp(seq=2, nonce="n2", wall=0.0, incarnation=1)
    tasks = (GraphTask("a", (), TaskSpec(("true",))), GraphTask("b", (), TaskSpec(("true",))))
    happened: list[tuple[Stamp, ev.Event]] = [
        (stamp, ev.RunCreated("u1", "default", "r", 0.0, 0, 2)),
        (stamp, ev.TasksAdded("u1", tasks)),
        (stamp, ev.AttemptsPlaced("u1", "c", 1, (0, 1), (1, 1))),
        (later, ev.AttemptsPlaced("u1", "c", 1, (1,), (2,))),
    ]
    return [Written(0.0, number, "00", stamp, event) for number, (stamp, event) in enumerate(happened)]


def test_lines_become_the_lives_of_the_attempts_that_the_journal_knows(tmp_path: Path) -> None:
    effects = Effects(tmp_path, {"eu": 1000, "us": 0}, 100.0)
    (tmp_path / "eu.log").write_text(
        f"start {RUN} b 1.1 7 1110.00\ntick {RUN} b 1.1 7 1111.00\nstart {RUN} a 1.1 8 1110.50\nend {RUN} a 1.1 8 1110.50\n"
    )
    (tmp_path / "us.log").write_text(f"start {RUN} b 1.2 7 130.00\nend {RUN} b 1.2 7 131.00\n")
    first, brief, second = effects.ran(journal())
    assert (first.cluster, first.interval.key) == ("eu", AttemptKey("u1", 1, 1, "n1"))
    assert (first.interval.start, first.interval.end) == (10.0 + COARSE, 11.0 - DECIDED)
    assert (brief.interval.key.task, brief.interval.start) == (0, 10.5 + COARSE)
    assert (second.cluster, second.interval.key, second.interval.end) == (
        "us",
        AttemptKey("u1", 1, 2, "n2"),
        31.0 - DECIDED,
    )


def test_a_second_start_under_one_fence_is_another_life_and_an_unplaced_one_is_seen(tmp_path: Path) -> None:
    effects = Effects(tmp_path, {"eu": 0}, 0.0)
    (tmp_path / "eu.log").write_text(
        f"start {RUN} a 1.1 7 1.00\ntick {RUN} a 1.1 7 2.00\nstart {RUN} a 1.1 7 3.00\nstart {RUN} a 1.9 8 4.00\n"
    )
    found = effects.ran(journal())
    assert [each.interval.key for each in found] == [AttemptKey("u1", 0, 1, "n1")] * 2 + [
        AttemptKey("u1", 0, 9, "unplaced")
    ]
    assert [each.interval.start for each in found] == [1.0 + COARSE, 3.0 + COARSE, 4.0 + COARSE]


def test_copies_that_lived_at_once_are_found_in_effect_logs(tmp_path: Path) -> None:
    effects = Effects(tmp_path, {"eu": 1000, "us": 0}, 100.0)
    (tmp_path / "us.log").write_text(f"start {RUN} b 1.2 7 130.00\nend {RUN} b 1.2 7 131.00\n")
    for last, broken in (("1129.90", False), ("1130.50", True)):
        (tmp_path / "eu.log").write_text(f"start {RUN} b 1.1 7 1110.00\ntick {RUN} b 1.1 7 {last}\n")
        written = journal()
        record = Record(written, effects.ran(written), (), {}, healed=0.0, ended=40.0, died=())
        found = {each.invariant for each in judge(record, (no_overlap,))}
        assert found == ({"I9 no overlap"} if broken else set())
