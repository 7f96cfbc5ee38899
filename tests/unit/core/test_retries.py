"""Failure classes and their budgets (DESIGN 9, PROTOCOL C3, D2)."""

from __future__ import annotations

import pytest

from control_plane.core.commands import TakeReports
from control_plane.core.events import AttemptsFinished, RetriesSet
from control_plane.core.model import Outcome, RetryPolicy, RunState, TaskState
from tests.unit.core.shard_kit import Shard, facts, task

APPLICATION = RetryPolicy(max_attempts=3, initial_backoff=8.0, max_backoff=60.0, multiplier=2.0)


def placed(policy: RetryPolicy, deadline: float = 1000.0) -> Shard:
    shard = Shard(facts("a"))
    shard.create(task("t", retry=policy), deadline=deadline)
    shard.grant("a")
    return shard


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.TIMED_OUT])
def test_application_failures_are_retried_up_to_their_budget(outcome: Outcome) -> None:
    shard = placed(APPLICATION)
    for left in (2, 1, 0):
        shard.finish(shard.only(), outcome)
        if left:
            assert shard.task().state is TaskState.READY
            assert f"failure {3 - left} of 3" in shard.task().reason
            shard.later(60.0)
            shard.grant("a")
    assert shard.outcome() is RunState.FAILED
    assert "failed 3 of 3 times" in shard.task().reason


def test_backoff_is_within_its_bound_and_holds_the_task_back() -> None:
    shard = placed(APPLICATION)
    shard.finish(shard.only(), Outcome.FAILED)
    wait = shard.task().ready_at - shard.now
    assert 0.0 <= wait < 8.0
    assert shard.machine.demand() == []
    assert shard.machine.due() == shard.task().ready_at
    shard.later(wait)
    assert shard.machine.demand()[0].count == 1


def test_a_takeover_keeps_the_backoff() -> None:
    shard = placed(APPLICATION)
    shard.finish(shard.only(), Outcome.FAILED)
    due = shard.machine.due()
    for machine in (shard.replayed(), shard.restored()):
        assert machine.due() == due


def test_a_retry_that_would_start_after_the_deadline_is_given_up_now() -> None:
    shard = placed(RetryPolicy(max_attempts=9, initial_backoff=1e9, max_backoff=1e9))
    shard.finish(shard.only(), Outcome.FAILED)
    assert shard.outcome() is RunState.FAILED
    assert "after the deadline" in shard.task().reason


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.FENCED])
def test_infrastructure_losses_do_not_cost_the_application_budget(outcome: Outcome) -> None:
    shard = placed(RetryPolicy(max_attempts=1, max_infrastructure_losses=2))
    for _ in range(2):
        shard.finish(shard.only(), outcome)
        assert shard.task().state is TaskState.READY
        shard.later(10.0)
        shard.grant("a")
    shard.finish(shard.only(), outcome)
    assert shard.outcome() is RunState.FAILED
    assert "lost 3 times" in shard.task().reason


def test_a_preempted_task_is_ready_at_once_and_counted() -> None:
    shard = placed(RetryPolicy(max_attempts=1, max_infrastructure_losses=1))
    shard.finish(shard.only(), Outcome.STOPPED)
    assert shard.task().ready_at <= shard.now
    assert shard.machine.demand()[0].count == 1
    shard.grant("a")
    shard.finish(shard.only(), Outcome.STOPPED)
    assert shard.outcome() is RunState.FAILED


def test_a_rejection_costs_nothing_but_a_moment() -> None:
    shard = placed(RetryPolicy(max_attempts=1, max_infrastructure_losses=0))
    for _ in range(5):
        shard.do(TakeReports("a", 1, rejected=((shard.only(), "no room for 8 CPUs"),)))
        assert shard.machine.demand() == []
        assert 0.0 < shard.task().ready_at - shard.now <= 0.1
        shard.later(0.1)
        shard.grant("a")
    shard.finish(shard.only())
    assert shard.outcome() is RunState.SUCCEEDED


def test_what_the_deadline_cut_off_waits_for_the_deadlines_verdict() -> None:
    shard = placed(RetryPolicy(max_attempts=5), deadline=10.0)
    shard.later(9.0)
    shard.finish(shard.only(), Outcome.DEADLINE)
    assert shard.machine.demand() == []
    assert shard.outcome() is RunState.RUNNING
    shard.later(1.0)
    assert shard.outcome() is RunState.DEADLINE_EXCEEDED


def test_a_cancelled_run_retries_nothing() -> None:
    shard = placed(APPLICATION)
    attempt = shard.only()
    shard.cancel()
    shard.finish(attempt, Outcome.FAILED)
    assert not shard.events(RetriesSet)
    assert shard.task().state is TaskState.CANCELLED


@pytest.mark.parametrize(("why", "told"), [("enough", "cancelled: enough"), ("", "cancelled")])
def test_a_cancelled_task_tells_the_reason_if_there_is_one(why: str, told: str) -> None:
    shard = placed(APPLICATION)
    shard.cancel(reason=why)
    assert shard.task().reason == told


@pytest.mark.parametrize("snapshot", [False, True])
def test_j2_a_batch_cut_off_before_its_retry_goes_on_after_a_takeover(snapshot: bool) -> None:
    shard = placed(APPLICATION)
    attempt = shard.only()
    shard.finish(attempt, Outcome.FAILED)
    stamp, events = shard.log.pop()
    assert [type(event) for event in events] == [AttemptsFinished, RetriesSet]
    shard.log.append((stamp, events[:1]))
    shard.machine = shard.replayed()
    shard.take_over(snapshot=snapshot)
    assert shard.task().state is TaskState.READY
    assert shard.events(RetriesSet) == events[1:]
