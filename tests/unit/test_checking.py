"""The checkers of histories: each sees the breach it is there for, and nothing else (reliability.md 2, I1-I16).

The histories here are written by hand: a lawful one, and each broken in one place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cluster_agent.executors.base import AttemptKey
from cluster_agent.executors.fake_workload import Interval
from control_plane.core import events as ev
from control_plane.core.model import AttemptState, Evidence, GraphTask, RunState, Stamp, TaskSpec, TaskState
from lab.checking.history import Owned, Ran, Record, Restored, Said, Watched, Written
from lab.checking.judging import judge

RUN, SPEC = "run", TaskSpec(("true",))


def written(*events: ev.Event, nonce: str = "n") -> list[Written]:
    begin: tuple[ev.Event, ...] = (
        ev.RunCreated(RUN, "default", "r", 100.0, 0, 2),
        ev.TasksAdded(RUN, (GraphTask("a", (), SPEC), GraphTask("b", (0,), SPEC))),
        ev.RunSealed(RUN),
    )
    return [
        Written(float(place), place, "00", Stamp(0.0, nonce, place, 1), event)
        for place, event in enumerate((*begin, *events), 1)
    ]


def placed(task: int, n: int, **flags: bool) -> ev.AttemptsPlaced:
    return ev.AttemptsPlaced(RUN, "c", 1, (task,), (n,), **flags)


def finished(task: int, n: int, state: AttemptState = AttemptState.SUCCEEDED) -> ev.AttemptsFinished:
    return ev.AttemptsFinished(RUN, (task,), (n,), (state,), (False,), (0,), (b"",), ("",), (0.0,), (0.0,))


def ended(task: int) -> ev.TasksEnded:
    return ev.TasksEnded(RUN, (task,), (TaskState.FAILED,), ("",))


ASKED = Said("CreateRun", "r", 0.0, 9.0, ok=True, uid=RUN)

GOOD = (placed(0, 1), finished(0, 1), placed(1, 1), finished(1, 1))


RUN_END = 100.0
"""Time of the run's end in `found`."""


def found(
    *events: ev.Event, ran: tuple[Ran, ...] = (), said: tuple[Said, ...] = (ASKED,), journal: Any = None, **facts: Any
) -> set[str]:
    """Invariants that are broken. The run's end comes after `events`."""
    record = Record(list(journal or written(*events)), list(ran), said, {}, healed=50.0, ended=500.0, died=())
    finish = Written(RUN_END, 100, "00", Stamp(0.0, "end", 100, 1), ev.RunFinished(RUN, RunState.SUCCEEDED, ""))
    record.journal.append(finish)
    return {violation.invariant.partition(" ")[0] for violation in judge(replace(record, **facts))}


def life(task: int, n: int, start: float, end: float, cluster: str = "c") -> Ran:
    return Ran(cluster, Interval(AttemptKey(RUN, task, n, "n"), start, end))


def test_a_lawful_journal_is_lawful() -> None:
    assert found(*GOOD, ran=(life(0, 1, 4.5, 5.0), life(1, 1, 6.5, 7.0))) == set()


def test_two_live_attempts_are_seen() -> None:
    assert "I2" in found(placed(0, 1), placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))


def stop_confirmed(task: int, n: int) -> ev.StopsConfirmed:
    return ev.StopsConfirmed(RUN, (task,), (n,))


def test_a_hedge_is_no_breach() -> None:
    hedged = (placed(0, 1), placed(0, 2, hedge=True), finished(0, 2), placed(1, 1), finished(1, 1))
    assert found(*hedged, stop_confirmed(0, 1)) == set()
    assert found(*hedged) == {"I12"}, "nobody confirmed that the other copy was stopped"


def test_a_second_acceptance_is_seen() -> None:
    assert "I3" in found(placed(0, 1), finished(0, 1), finished(0, 1), placed(1, 1), finished(1, 1))


def test_a_result_of_a_dead_attempt_is_seen() -> None:
    lost = ev.AttemptsLost(RUN, (0,), (1,), Evidence.TIMED)
    assert "I3" in found(placed(0, 1), lost, finished(0, 1), placed(1, 1), finished(1, 1))


def test_a_number_that_does_not_rise_is_seen() -> None:
    failed = finished(0, 2, AttemptState.FAILED)
    assert "I1" in found(placed(0, 2), failed, placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))


def test_a_final_task_that_changes_is_seen() -> None:
    assert "I6" in found(*GOOD, ended(0))


def test_a_child_before_its_parent_is_seen() -> None:
    assert "I7" in found(placed(0, 1), placed(1, 1), finished(0, 1), finished(1, 1))


def test_a_second_spawn_is_seen() -> None:
    assert "F4" in found(*GOOD, ran=(life(0, 1, 4.5, 4.6), life(0, 1, 5.0, 5.1, "d")))


def test_work_before_its_commit_is_seen() -> None:
    assert "J7" in found(*GOOD, ran=(life(0, 1, 3.0, 4.5),))


def test_an_overlap_is_seen_unless_it_was_declared() -> None:
    lost = ev.AttemptsLost(RUN, (0,), (1,), Evidence.TIMED)
    rest = (finished(0, 2), placed(1, 1), finished(1, 1), stop_confirmed(0, 1))
    lives = (life(0, 1, 4.5, 6.8), life(0, 2, 6.5, 6.9), life(1, 1, 8.1, 8.9))
    assert found(placed(0, 1), lost, placed(0, 2), *rest, ran=lives) == {"I9"}
    assert found(placed(0, 1), lost, placed(0, 2, overlap=True), *rest, ran=lives) == set()


def test_a_process_that_outlives_its_end_in_the_journal_is_seen() -> None:
    lost = ev.AttemptsLost(RUN, (0,), (1,), Evidence.REPORTED)
    rest = (placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))
    lives = (life(0, 1, 4.5, 5.5), life(0, 2, 6.2, 6.8), life(1, 1, 8.1, 8.9))
    assert found(placed(0, 1), lost, *rest, ran=lives) == {"I11"}
    again = replace(lives[0], interval=Interval(AttemptKey(RUN, 0, 1, "n"), 5.5, 5.6))
    assert found(placed(0, 1), lost, *rest, ran=(again, *lives[1:])) == {"I11"}, (
        "it started after it was said to be dead"
    )


def test_a_result_without_a_process_is_seen() -> None:
    assert found(*GOOD, ran=(life(1, 1, 6.5, 6.9),)) == {"I10"}
    other = Ran("c", Interval(AttemptKey(RUN, 0, 1, "another placement"), 4.5, 4.9))
    assert "I10" in found(*GOOD, ran=(other, life(1, 1, 6.5, 6.9)))


def test_a_full_cluster_that_takes_more_is_seen() -> None:
    both = (placed(0, 1), placed(0, 2, hedge=True), finished(0, 2), placed(1, 1), finished(1, 1), stop_confirmed(0, 1))
    lives = (life(0, 1, 4.5, 5.8), life(0, 2, 5.1, 5.9), life(1, 1, 7.1, 7.9))
    assert found(*both, ran=lives, capacity={"c": 2}) == set()
    assert found(*both, ran=lives, capacity={"c": 1}) == {"I12"}


def test_a_release_of_what_was_released_is_seen() -> None:
    rejected = ev.AttemptsRejected(RUN, (0,), (1,), ("full",))
    rest = (placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1))
    assert found(placed(0, 1), rejected, *rest) == set()
    assert found(placed(0, 1), rejected, rejected, *rest) == {"I12"}


def test_a_retry_beyond_its_budget_is_seen() -> None:
    failed, again = finished(0, 1, AttemptState.FAILED), ev.RetriesSet(RUN, (0,), (0.0,), ("",))
    assert found(placed(0, 1), failed, again, placed(0, 2), finished(0, 2), placed(1, 1), finished(1, 1)) == {"I14"}


OWNERS = (Owned(0.5, 0, "00", "r1"), Owned(5.5, 5, "00", ""), Owned(5.6, 5, "00", "r2"))


def test_a_batch_of_somebody_else_is_seen() -> None:
    lawful = [replace(each, writer="r1" if each.at < 5.5 else "r2") for each in written(*GOOD)]
    assert found(journal=lawful, owners=OWNERS) == set()
    assert found(journal=[replace(each, writer="r1") for each in lawful], owners=OWNERS) == {"I13"}


def test_a_second_batch_at_a_seq_is_seen() -> None:
    journal = written(*GOOD)
    journal[5] = replace(journal[5], stamp=replace(journal[5].stamp, seq=journal[4].stamp.seq, nonce="m"))
    assert "I13" in found(journal=journal)


def opened(generation: int) -> ev.SessionOpened:
    return ev.SessionOpened("c", generation, "b", "j", "i", "r", "fast", 15.0, 5.0, (), (), False, True, (), "")


def lost_cluster(generation: int) -> ev.ClusterLost:
    return ev.ClusterLost("c", generation, Evidence.TIMED, "")


def test_a_generation_ends_once_and_before_the_next() -> None:
    assert found(opened(1), lost_cluster(1), opened(2), journal=None, said=()) & {"S5"} == set()
    assert "S5" in found(opened(1), opened(2))
    assert "S5" in found(opened(1), lost_cluster(1), lost_cluster(1))
    assert "S5" in found(opened(2), lost_cluster(2), opened(1))


def test_a_refusal_that_was_not_one_is_seen() -> None:
    refusal = Said("CreateRun", "r", 0.0, 2.0, ok=False, reason="STORE_UNAVAILABLE", refused=True)
    assert found(*GOOD, said=(refusal, replace(ASKED, called=3.0))) == {"I5"}
    unknown = replace(refusal, refused=False)
    assert found(*GOOD, said=(unknown, replace(ASKED, called=3.0))) == set()


def test_a_client_in_its_own_way_is_seen() -> None:
    taken = Said("CreateRun", "r", 0.0, 9.0, ok=False, reason="NAME_TAKEN", refused=True)
    assert "I5" in found(*GOOD, said=(taken,))


def seen(number: int, watcher: str = "w", content: str = "") -> Watched:
    return Watched(10.0 + number, watcher, RUN, number, content or f"event {number}")


def test_a_watch_with_a_gap_a_repeat_or_two_truths_is_seen() -> None:
    whole = (seen(1), seen(2), seen(3))
    assert found(*GOOD, watched=whole) == set()
    assert found(*GOOD, watched=(seen(1), seen(3))) == {"I16"}
    assert found(*GOOD, watched=(seen(1), seen(1))) == {"I16"}
    assert found(*GOOD, watched=(seen(1), replace(seen(3), fresh=True))) == set(), "COMPACTED was said"
    assert found(*GOOD, watched=(*whole, seen(1, "v", "something else"))) == {"I16"}


def test_a_run_that_does_not_move_on_is_seen_in_liveness_mode() -> None:
    assert found(*GOOD, patience=60.0) == set()
    assert found(*GOOD, patience=40.0) == {"I15"}


def test_what_a_restore_has_undone_is_left_out_but_its_fences_count() -> None:
    """J12: attempt 1 of the first life has run; the same number of the same incarnation is a fence that did not rise."""
    first = written(placed(0, 1))
    second = [
        replace(
            each,
            at=each.at + 10.0,
            revision=each.revision,
            stamp=replace(each.stamp, nonce="m", incarnation=incarnation),
        )
        for incarnation in (1,)
        for each in written(*GOOD)[3:]
    ]
    restored = (Restored(9.0, 3, settled=10.0),)
    assert found(journal=first + second, restored=restored, said=()) == {"I1"}
    raised = [replace(each, stamp=replace(each.stamp, incarnation=2)) for each in second]
    assert found(journal=first + raised, restored=restored, said=()) == set()


def test_an_acknowledged_run_that_is_not_there_is_seen() -> None:
    said = Said("CreateRun", "r", 0.0, 9.0, ok=True, uid="other")
    assert "I4" in found(*GOOD, said=(said,))


def test_a_read_that_goes_back_is_seen() -> None:
    first = Said("GetRun", "r", 10.0, 11.0, ok=True, uid=RUN, state=1, number=7)
    said = (first, replace(first, called=12.0, answered=13.0, number=5))
    assert "J8" in found(*GOOD, said=said)
