"""What the audit of a run proves, and what it does not (PROTOCOL D1, F1, F2, F6, F7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from baton.audit import DEADLINE_BOUND, NOBODY, REJECTION, REPORT, TIMER, Audit, Finding, Verdict, audit
from baton.v1 import run_pb2

T0 = 1_800_000_000
NOW = T0 + 50.0

PLACED, RUNNING = run_pb2.ATTEMPT_STATE_PLACED, run_pb2.ATTEMPT_STATE_RUNNING
WON, FAILED = run_pb2.ATTEMPT_STATE_SUCCEEDED, run_pb2.ATTEMPT_STATE_FAILED
LOST, REJECTED = run_pb2.ATTEMPT_STATE_LOST, run_pb2.ATTEMPT_STATE_REJECTED
STOPPED = run_pb2.ATTEMPT_STATE_STOPPED
KNOWN, TIMED, NONE = run_pb2.EVIDENCE_REPORTED, run_pb2.EVIDENCE_TIMED, run_pb2.EVIDENCE_NONE


def attempt(n: int, state: run_pb2.AttemptState.ValueType, *, at: float = 0.0, ended: float = 0.0, **words: Any) -> Any:
    """Attempt n; placed `at` and ended `ended` seconds after T0, each as its cluster says."""
    made = run_pb2.Attempt(n=n, state=state, **{"fence": f"1.{n}", "cluster": "eu", **words})
    made.place_time.FromNanoseconds(int((T0 + at) * 1e9))
    if at:
        made.start_time.FromNanoseconds(int((T0 + at) * 1e9))
    if ended:
        made.finish_time.FromNanoseconds(int((T0 + ended) * 1e9))
    return made


def task(*attempts: run_pb2.Attempt, accepted: int | None = None) -> run_pb2.TaskStatus:
    """A task that succeeded if one of its attempts did."""
    won = any(each.state == WON for each in attempts)
    state = run_pb2.TASK_STATE_SUCCEEDED if won else run_pb2.TASK_STATE_RUNNING
    return run_pb2.TaskStatus(
        id="a", state=state, attempts=attempts, accepted_results=int(won) if accepted is None else accepted
    )


_LEAVES = {WON: "finished", FAILED: "finished", STOPPED: "finished", LOST: "lost", REJECTED: "rejected"}


def event(number: int, kind: str, *ns: int) -> run_pb2.RunEvent:
    return run_pb2.RunEvent(number=number, kind=kind, changes=[run_pb2.TaskChange(id="a", attempt=n) for n in ns])


def judged(
    *attempts: run_pb2.Attempt,
    accepted: int | None = None,
    final: bool = True,
    ended: float = 40.0,
    events: Sequence[run_pb2.RunEvent] | None = None,
) -> Audit:
    """The audit of a run of one task, with its deadline 60 s after T0. Without `events`: each attempt left before the next one."""
    one = task(*attempts, accepted=accepted)
    if events is None:
        words = [word for each in attempts for word in (("placed", each), (_LEAVES.get(each.state, ""), each))]
        events = [event(number, kind, each.n) for number, (kind, each) in enumerate(words, 1) if kind]
    state = run_pb2.RUN_STATE_SUCCEEDED if final else run_pb2.RUN_STATE_RUNNING
    run = run_pb2.Run(name="namespaces/d/runs/r", state=state, task_count=1, accepted_results=one.accepted_results)
    run.deadline_time.seconds = T0 + 60
    if final:
        run.finish_time.FromNanoseconds(int((T0 + ended) * 1e9))
    return audit(run, [one], T0 + ended, events)


def only(found: Audit) -> Finding:
    (finding,) = found.findings
    return finding


def test_one_attempt_that_won_is_proven() -> None:
    found = judged(attempt(1, WON, at=1, ended=2))
    assert (found.verdict, found.findings) == (Verdict.PROVEN, [])
    assert (found.tasks, found.attempts, found.accepted, dict(found.handovers)) == (1, 1, 1, {})


@pytest.mark.parametrize(
    ("first", "how"),
    [
        (attempt(1, FAILED, at=1, ended=2), REPORT),
        (attempt(1, STOPPED, at=1, ended=2), REPORT),
        (attempt(1, REJECTED), REJECTION),
        (attempt(1, LOST, at=1, evidence=KNOWN), REPORT),
        (attempt(1, LOST, at=1, evidence=TIMED), TIMER),
    ],
)
def test_a_hand_over_is_proven_by_what_is_known_of_the_earlier_end(first: run_pb2.Attempt, how: str) -> None:
    found = judged(first, attempt(2, WON, at=30, ended=31))
    assert found.verdict is Verdict.PROVEN
    assert dict(found.handovers) == {how: 1}


def test_an_overlap_that_was_said_before_is_declared_and_one_that_was_not_breaks_the_promise() -> None:
    lost = attempt(1, LOST, at=1, evidence=NONE)
    said = judged(lost, attempt(2, WON, at=30, ended=31, cluster="us", overlap_possible=True))
    assert (only(said).verdict, only(said).rule, dict(said.handovers)) == (Verdict.DECLARED, "F6", {NOBODY: 1})
    silent = judged(lost, attempt(2, WON, at=30, ended=31, cluster="us"))
    assert (only(silent).verdict, only(silent).rule) == (Verdict.VIOLATED, "F6")
    hedged = judged(attempt(1, STOPPED), attempt(2, WON, hedge=True, overlap_possible=True))
    assert hedged.verdict is Verdict.DECLARED, "the first copy was reported over, but lived when the second one started"


def test_two_live_attempts_are_allowed_to_a_hedge_only() -> None:
    hedge = judged(attempt(1, RUNNING), attempt(2, PLACED, hedge=True, overlap_possible=True), final=False)
    assert (only(hedge).verdict, only(hedge).rule) == (Verdict.DECLARED, "F7")
    two = judged(attempt(1, RUNNING), attempt(2, PLACED), final=False)
    assert (only(two).verdict, only(two).rule) == (Verdict.VIOLATED, "F2")


def test_a_death_that_was_told_later_counts_from_then_on() -> None:
    """A hedged task: the first copy is lost without evidence, the second fails, the third needs the first one's end."""
    attempts = (
        attempt(1, LOST, at=1, evidence=NONE),
        attempt(2, FAILED, at=5, ended=9, cluster="us", hedge=True, overlap_possible=True),
        attempt(3, WON, at=30, ended=31, cluster="us"),
    )
    placed = [event(1, "placed", 1), event(2, "hedged", 2), event(3, "lost", 1), event(4, "finished", 2)]
    told = judged(*attempts, events=[*placed, event(5, "stopped", 1), event(6, "placed", 3)])
    assert [each.verdict for each in told.findings] == [Verdict.DECLARED]
    late = judged(*attempts, events=[*placed, event(5, "placed", 3), event(6, "stopped", 1)])
    assert [each.verdict for each in late.findings] == [Verdict.DECLARED, Verdict.VIOLATED]
    unknown = judged(*attempts, events=())
    assert [each.verdict for each in unknown.findings] == [Verdict.DECLARED, Verdict.UNPROVEN, Verdict.UNPROVEN]


def test_the_order_is_that_of_the_events_and_without_them_it_is_not_proven() -> None:
    attempts = (attempt(1, FAILED, at=1, ended=2), attempt(2, WON, at=30, ended=31))
    beside = [event(1, "placed", 1), event(2, "placed", 2), event(3, "finished", 1), event(4, "finished", 2)]
    assert (only(judged(*attempts, events=beside)).rule, only(judged(*attempts, events=())).rule) == ("F2", "F2")
    assert judged(*attempts, events=beside).verdict is Verdict.VIOLATED
    assert judged(*attempts, events=()).verdict is Verdict.UNPROVEN


def test_fences_rise_also_over_a_restore() -> None:
    again = attempt(2, WON, at=30, ended=31, fence="2.2")
    assert judged(attempt(1, FAILED, at=1, ended=2), again).verdict is Verdict.PROVEN
    back = judged(attempt(2, FAILED, at=1, ended=2), attempt(1, WON, at=30, ended=31))
    assert {each.rule for each in back.findings} == {"F1", "F2"}
    same = judged(attempt(2, FAILED, at=1, ended=2), attempt(3, WON, at=30, ended=31, fence="1.2"))
    assert only(same).rule == "F1"


def test_a_result_is_accepted_once_and_under_the_fence_in_force() -> None:
    twice = judged(attempt(1, WON, at=1, ended=2), attempt(2, WON, at=3, ended=4), accepted=2)
    assert only(twice).text == "2 results were accepted"
    assert judged(attempt(1, WON, at=1, ended=2), accepted=0).verdict is Verdict.VIOLATED
    stale = judged(attempt(1, WON, at=1, ended=20), attempt(2, STOPPED, at=15, ended=21))
    assert "fence 1.2 was in force" in stale.findings[0].text
    hedge = judged(attempt(1, WON, at=1, ended=20), attempt(2, STOPPED, at=15, ended=21, hedge=True))
    assert hedge.verdict is Verdict.DECLARED


def test_a_clock_that_contradicts_the_order_proves_nothing() -> None:
    first = attempt(1, FAILED, at=1, ended=35)
    assert only(judged(first, attempt(2, WON, at=30, ended=31))).verdict is Verdict.UNPROVEN
    elsewhere = judged(first, attempt(2, WON, at=30, ended=31, cluster="us"))
    assert elsewhere.verdict is Verdict.PROVEN, "clocks of two hosts are not compared"


def test_the_deadline() -> None:
    assert judged(attempt(1, WON, at=1, ended=2), ended=60 + DEADLINE_BOUND).verdict is Verdict.PROVEN
    late = judged(attempt(1, WON, at=1, ended=2), ended=61 + DEADLINE_BOUND)
    assert (only(late).verdict, only(late).rule) == (Verdict.UNPROVEN, "D1")
    open_ = judged(attempt(1, RUNNING, at=1), final=False, ended=61 + DEADLINE_BOUND)
    assert "is not final" in only(open_).text
    placed = judged(attempt(1, WON, at=70, ended=71))
    assert (only(placed).verdict, only(placed).rule) == (Verdict.VIOLATED, "D1")


def test_a_final_run_counts_as_its_tasks_do() -> None:
    run = run_pb2.Run(name="r", state=run_pb2.RUN_STATE_SUCCEEDED, task_count=1, accepted_results=2)
    assert audit(run, [task(attempt(1, WON))], NOW).verdict is Verdict.VIOLATED
    run.task_count = 2
    assert only(audit(run, [task(attempt(1, WON))], NOW)).rule == "J10"
