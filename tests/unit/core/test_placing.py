"""Binding ready tasks to grants and freed slots (PROTOCOL C1, C2, C3, O7)."""

from __future__ import annotations

import pytest

from control_plane.core.commands import DropGrants, Finish, Grant, PutNamespace, TakeGrants, TakeReports
from control_plane.core.events import AttemptsFinished, AttemptsPlaced
from control_plane.core.model import Admission, AttemptState, OnClusterLost, Outcome, Resources, TaskState
from control_plane.core.placing import PLACINGS
from control_plane.core.run_times import short
from tests.unit.core.shard_kit import START, Shard, facts, request, task


def placed(shard: Shard, uid: str = "r1") -> list[str]:
    return [view.id for view in shard.machine.tasks(uid, 0, 10_000) if view.state is TaskState.PLACED]


def test_c1_demand_is_counted_by_group() -> None:
    shard = Shard(facts("a"))
    big = Resources(cpu_millis=8000)
    shard.create(task("x"), task("y", argv=("other",)), task("z", resources=big), task("later", 0))
    lines = shard.machine.demand(START)
    assert sorted((line.group.resources.cpu_millis, line.count) for line in lines) == [(1000, 2), (8000, 1)]
    assert all(line.key == line.group.key() for line in lines)
    assert all((line.slack_seconds, line.since_wall) == (1000.0, START) for line in lines)


def test_c1_slack_is_that_of_the_most_urgent_task() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), uid="r1", deadline=500.0)
    shard.now += 5.0
    shard.create(task("x", expected=20.0), task("y", 0, expected=30.0), uid="r2", deadline=200.0)
    (line,) = shard.machine.demand(shard.now)
    assert (line.count, line.slack_seconds, line.since_wall) == (2, 150.0, START)


def test_c2_least_slack_first_then_first_in_first_out() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"), uid="r1", deadline=500.0)
    shard.create(task("urgent"), uid="r2", deadline=100.0)
    order = []
    for _ in range(3):
        shard.grant("a")
        order += [e.run + str(e.tasks) for e in shard.last() if isinstance(e, AttemptsPlaced)]
    assert order == ["r2(0,)", "r1(0,)", "r1(1,)"]


def test_c2_a_grant_binds_no_more_than_it_says_and_is_used_up() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(5)))
    shard.grant("a", 3)
    assert len(placed(shard)) == 3
    shard.settled()
    assert len(placed(shard)) == 3


def test_c2_a_grant_serves_tasks_that_become_ready_while_it_lasts() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y", 0))
    shard.grant("a", 2)
    shard.finish(shard.only(0))
    assert placed(shard) == ["y"]


def test_c2_a_freed_slot_serves_the_next_task_in_the_same_batch() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(3)))
    shard.grant("a", 1)
    shard.finish(shard.only(0))
    assert [type(event) for event in shard.last()] == [AttemptsFinished, AttemptsPlaced]
    assert placed(shard) == ["t1"]


def test_c2_a_slot_without_a_task_lapses_with_its_batch() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"))
    shard.grant("a", 1)
    shard.finish(shard.only(0))
    shard.create(task("x"), uid="r2")
    assert placed(shard, "r2") == []


def test_c2_slots_of_groups_that_must_return_are_not_used_again() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"))
    shard.grant("a", 1)
    key = shard.machine.demand()[0].key
    shard.do(TakeGrants(1, (), returning=frozenset([key])))
    shard.finish(shard.only(0))
    assert placed(shard) == []


def test_c2_a_slot_on_a_cordoned_cluster_is_not_used_again() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"))
    shard.grant("a", 1)
    shard.fleet(facts("a", admission=Admission.CORDONED))
    shard.finish(shard.only(0))
    assert placed(shard) == []


def test_f8_a_slot_whose_stop_is_outstanding_stays_reserved() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"))
    shard.grant("a", 1)
    shard.fleet(facts("a", admission=Admission.DRAINING))
    shard.fleet(facts("a"))
    shard.finish(shard.only(0))
    assert placed(shard) == []


def test_c3_older_terms_are_refused_and_newer_ones_replace() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"))
    key = shard.machine.demand()[0].key
    shard.do(TakeGrants(5, ()))
    shard.grant("a", 1, term=4)
    assert placed(shard) == []
    shard.do(TakeGrants(5, (Grant("a", 1, key, 1),)), TakeGrants(6, ()))
    assert placed(shard) == []


def test_grants_end_with_their_time_to_live() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y", 0))
    shard.grant("a", 5)
    shard.do(DropGrants(1))
    shard.do(TakeGrants(1, (), (("key", "nothing fits"),)))
    report = Finish(shard.only(0), Outcome.STOPPED, None, b"", "", 0, 0)
    shard.do(TakeReports("a", 1, finished=(report,)))
    assert placed(shard) == []


def test_reasons_of_the_leader_explain_a_waiting_task() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"))
    key = shard.machine.demand()[0].key
    shard.do(TakeGrants(1, (), ((key, "no cluster has label gpu=a100"),)))
    assert shard.task().reason == "no cluster has label gpu=a100"


def test_o7_a_namespaces_quota_bounds_its_live_attempts_here() -> None:
    shard = Shard(facts("a"))
    shard.do(PutNamespace(request(1), "ns", 1.0, 2, 0.0))
    shard.create(*(task(f"t{i}") for i in range(5)))
    assert shard.machine.demand()[0].count == 5, (
        "the leader, who counts over all shards, says that they wait for the quota"
    )
    shard.grant("a", 5)
    assert len(placed(shard)) == 2
    assert [line.count for line in shard.machine.demand()] == [3]
    shard.finish(shard.only(0))
    assert len(placed(shard)) == 2


def test_j2_a_big_placement_is_made_in_parts() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(PLACINGS + 10)))
    shard.grant("a", PLACINGS + 10)
    assert len(placed(shard)) == PLACINGS
    shard.settled()
    assert len(placed(shard)) == PLACINGS + 10


def test_cancelled_tasks_leave_their_lane() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), uid="r1")
    shard.create(task("x"), uid="r2")
    shard.cancel("r1")
    assert shard.machine.demand()[0].count == 1
    shard.grant("a", 2)
    assert placed(shard, "r2") == ["x"]


def test_demand_says_what_a_task_of_the_group_took() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(4)))
    assert [line.run_seconds for line in shard.machine.demand(START)] == [0.0]
    shard.grant("a")
    done = Finish(shard.only(0), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.04)
    shard.do(TakeReports("a", 1, finished=(done,)))
    assert [line.run_seconds for line in shard.machine.demand(START)] == [pytest.approx(0.04)]


def test_a_start_that_is_told_by_itself_says_that_run_times_have_grown() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(4)))
    shard.grant("a", 2)
    shard.do(TakeReports("a", 1, started=((shard.only(0), START - 0.5),)))
    assert [line.run_seconds for line in shard.machine.demand(START)] == [0.0], "it may run for hours"
    done = Finish(shard.only(0), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.04)
    shard.do(TakeReports("a", 1, finished=(done,)))
    shard.do(TakeReports("a", 1, started=((shard.only(1), START - 0.5),)))
    assert [line.run_seconds for line in shard.machine.demand(START)] == [pytest.approx(0.04 + 0.46 / 8)]


def test_c3_what_came_back_from_a_queue_is_not_short_and_its_place_is_not_filled_again() -> None:
    shard = Shard(facts("a"), facts("b"))
    shard.create(*(task(f"t{i}") for i in range(20)))
    shard.grant("a")
    shard.do(
        TakeReports("a", 1, finished=(Finish(shard.only(0), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.001),))
    )
    shard.grant("a", 5)
    full, *waiting = sorted(shard.machine.live_on("a"))
    shard.do(TakeReports("a", 1, rejected=((full, "the local queue is full"),)))
    (line,) = shard.machine.demand(shard.now)
    assert line.run_seconds == pytest.approx(0.001, abs=1e-6), "a refusal at once says nothing about run times"
    shard.now += 2.1
    shard.do(TakeReports("a", 1, rejected=tuple((attempt, "it waited") for attempt in waiting[:3])))
    (line,) = shard.machine.demand(shard.now)
    assert not short(line.run_seconds)
    shard.later(0.2)
    left = set(shard.machine.live_on("a"))
    done = Finish(min(left), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.001)
    shard.do(TakeReports("a", 1, finished=(done,)))
    assert set(shard.machine.live_on("a")) < left, "it was one of a queue: the leader has to say who gets it"
    shard.grant("b", 30)
    again = [attempt for attempt in shard.machine.live_on("b") if attempt.n == 2]
    assert {attempt.task for attempt in again} == {attempt.task for attempt in (full, *waiting[:3])}
    assert all(shard.task(attempt.task).attempts[0].state is AttemptState.REJECTED for attempt in again)


def test_f7_work_that_is_not_copied_is_never_taken_for_short() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}", on_cluster_lost=OnClusterLost.WAIT) for i in range(4)))
    shard.grant("a")
    done = Finish(shard.only(0), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.04)
    shard.do(TakeReports("a", 1, finished=(done,)))
    assert [line.run_seconds for line in shard.machine.demand(START)] == [0.0]


def test_c2_a_place_in_a_queue_serves_only_what_is_known_to_be_short() -> None:
    """A leader may have permitted it beyond the slots: work that takes a minute would wait there while another cluster is free."""
    shard = Shard(facts("a"))

    def finish_one() -> list[str]:
        before = set(shard.machine.live_on("a"))
        done = Finish(min(before), Outcome.SUCCEEDED, 0, b"", "", START, START + 0.04)
        shard.do(TakeReports("a", 1, finished=(done,)))
        return [new.run for new in set(shard.machine.live_on("a")) - before]

    shard.create(*(task(f"t{i}") for i in range(20)))
    shard.grant("a")
    assert finish_one() == ["r1"], "a slot serves whatever is ready"
    shard.grant("a", 5)
    assert finish_one() == ["r1"], "and so does a queue place while all that is ready is short"
    shard.create(*(task(f"u{i}", argv=("another",)) for i in range(20)), uid="r2")
    assert finish_one() == [], "nobody knows how long the others take"
    shard.grant("a")
    assert len(finish_one()) == 1, "slots were free, so nothing waits there"
