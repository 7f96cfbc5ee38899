"""The graph: readiness by trigger rule, acceptance, skips, cancel, deadline, the end of a run (F2, D1, D2, J2, J10)."""

from __future__ import annotations

import pytest

from control_plane.core.commands import (
    Archived,
    CancelRun,
    CreateRun,
    Finish,
    Grant,
    PutGraph,
    PutNamespace,
    Refused,
    TakeGrants,
    TakeReports,
    Tick,
)
from control_plane.core.events import (
    AttemptsFinished,
    AttemptsPlaced,
    ResultsRefused,
    RunArchived,
    RunCreated,
    TasksAdded,
    TasksEnded,
)
from control_plane.core.graph import PART
from control_plane.core.model import AttemptState, Outcome, RunState, Stamp, TaskState, TriggerRule
from control_plane.core.run import KEPT_ATTEMPTS, KEPT_EVENTS
from tests.unit.core.shard_kit import NO_REQUEST, START, Shard, facts, request, task

S, F, K = TaskState.SUCCEEDED, TaskState.FAILED, TaskState.SKIPPED


def run_all(shard: Shard, failing: set[str], uid: str = "r1") -> None:
    """Place and finish everything; tasks in `failing` fail."""
    for _ in range(100):
        shard.grant("a", 100)
        live = [a for view in shard.machine.tasks(uid, 0, 10_000) for a in view.attempts if a.live]
        if not live:
            return
        for attempt in live:
            name = shard.task(attempt.id.task, uid).id
            shard.finish(attempt.id, Outcome.FAILED if name in failing else Outcome.SUCCEEDED, name.encode())
    raise AssertionError("the run never ends")


@pytest.mark.parametrize(
    ("rule", "parents", "expected"),
    [
        (TriggerRule.ALL_SUCCEEDED, (S, S), S),
        (TriggerRule.ALL_SUCCEEDED, (S, F), K),
        (TriggerRule.ALL_SUCCEEDED, (S, K), K),
        (TriggerRule.ALL_DONE, (F, K), S),
        (TriggerRule.ANY_FAILED, (S, F), S),
        (TriggerRule.ANY_FAILED, (S, K), K),
        (TriggerRule.NONE_FAILED, (S, K), S),
        (TriggerRule.NONE_FAILED, (S, F), K),
    ],
)
def test_trigger_rules_decide_once_all_parents_are_final(
    rule: TriggerRule, parents: tuple[TaskState, ...], expected: TaskState
) -> None:
    shard = Shard(facts("a"))
    nodes = [task("broken")]
    for index, state in enumerate(parents):
        # A child of a failed task is skipped: that makes a skipped parent.
        nodes.append(task(f"p{index}-{state.name}", *((0,) if state is K else ())))
    shard.create(*nodes, task("child", 1, 2, trigger=rule))
    run_all(shard, {"broken", *(node.id for node in nodes if node.id.endswith("FAILED"))})
    assert shard.states()[1:] == [*parents, expected]


def test_i7_a_child_is_placed_only_after_its_parents() -> None:
    shard = Shard(facts("a"))
    shard.create(task("parent"), task("child", 0))
    shard.grant("a", 10)
    assert shard.states() == [TaskState.PLACED, TaskState.PENDING]
    shard.finish(shard.only(0), result=b"seed")
    assert shard.states() == [S, TaskState.PLACED]
    told = shard.machine.dispatch(shard.only(1))
    assert told is not None
    assert told.inputs == {"parent": b"seed"}
    assert (told.run, told.task_id, told.n) == ("namespaces/ns/runs/run-r1", "child", 1)


def test_inputs_are_only_the_results_there_are() -> None:
    shard = Shard(facts("a"))
    shard.create(task("silent"), task("loud"), task("child", 0, 1))
    shard.grant("a", 10)
    shard.finish(shard.only(0))
    shard.finish(shard.only(1), result=b"1")
    told = shard.machine.dispatch(shard.only(2))
    assert told is not None
    assert told.inputs == {"loud": b"1"}


def test_a_run_whose_tasks_succeed_or_are_skipped_succeeds() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("cleanup", 0, trigger=TriggerRule.ANY_FAILED))
    run_all(shard, set())
    assert shard.states() == [S, K]
    assert shard.outcome() is RunState.SUCCEEDED
    assert list(shard.machine.archivable()) == ["r1"]


def test_a_run_with_a_failed_task_fails_whatever_its_children_made_of_it() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("fallback", 0, trigger=TriggerRule.ANY_FAILED))
    run_all(shard, {"a"})
    assert shard.states() == [F, S]
    assert shard.outcome() is RunState.FAILED
    assert "first a" in shard.run().reason


def test_a_long_chain_is_skipped_in_one_event() -> None:
    shard = Shard(facts("a"))
    shard.create(task("t0"), *(task(f"t{i}", i - 1) for i in range(1, 5000)))
    run_all(shard, {"t0"})
    assert shard.states() == [F] + [K] * 4999
    assert len(shard.events(TasksEnded)) == 2


def test_skips_stop_where_a_rule_holds() -> None:
    shard = Shard(facts("a"))
    nodes = (task("a"), task("b", 0), task("c", 1), task("end", 2, trigger=TriggerRule.ALL_DONE), task("after", 3))
    shard.create(*nodes)
    run_all(shard, {"a"})
    assert shard.states() == [F, K, K, S, S]


def test_f2_a_result_is_accepted_once_and_repeats_change_nothing() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("b"))
    shard.grant("a")
    attempt = shard.only(0)
    shard.finish(attempt, result=b"first")
    before = list(shard.machine.dump())
    assert shard.finish(attempt, result=b"second") == (attempt,)
    assert shard.finish(attempt, Outcome.FAILED) == (attempt,)
    assert shard.last() == []
    assert list(shard.machine.dump()) == before
    assert (shard.task().result, shard.task().accepted_results) == (b"first", 1)


def test_f2_two_reports_in_one_batch_accept_once() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    attempt = shard.only(0)
    reports = tuple(Finish(attempt, Outcome.SUCCEEDED, 0, r, "", 1.0, 2.0) for r in (b"x", b"y"))
    assert shard.do(TakeReports("a", 1, finished=reports)) == (attempt,)
    assert shard.task().result == b"x"


def test_f1_a_report_under_another_nonce_is_acknowledged_and_ignored() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    wrong = shard.only(0)._replace(nonce="other")
    assert shard.do(TakeReports("a", 1, finished=(Finish(wrong, Outcome.SUCCEEDED, 0, b"", "", 0, 0),))) == (wrong,)
    assert shard.last() == []


def test_f8_late_results_are_counted_and_never_accepted() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    attempt = shard.only(0)
    shard.cancel()
    assert shard.finish(attempt, result=b"late") == (attempt,)
    shard.finish(attempt, result=b"late")
    assert len(shard.events(ResultsRefused)) == 1
    assert (shard.run().refused_results, shard.run().accepted_results) == (1, 0)
    assert shard.task().attempts[0].refused_results == 1
    assert shard.task().state is TaskState.CANCELLED


def test_started_reports_move_a_task_to_running_once() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    attempt = shard.only(0)
    assert shard.do(TakeReports("a", 1, started=((attempt, 5.0),))) == ()
    assert shard.task().state is TaskState.RUNNING
    assert shard.task().attempts[0].start == 5.0
    shard.do(TakeReports("a", 1, started=((attempt, 6.0),)))
    assert shard.last() == []


def test_results_over_the_limits_fail_the_attempt() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    shard.finish(shard.only(0), result=b"x" * (16 * 1024 + 1))
    assert shard.outcome() is RunState.FAILED
    assert "limit" in shard.task().reason


def test_cancel_stops_everything_and_keeps_stops_outstanding() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("b"), task("c", 0))
    shard.grant("a")
    attempt = shard.only(0)
    shard.cancel()
    assert shard.outcome() is RunState.CANCELLED
    assert set(shard.states()) == {TaskState.CANCELLED}
    assert list(shard.machine.stops_on("a")) == [attempt]
    assert shard.machine.dispatch(attempt) is None
    assert shard.machine.demand() == []
    shard.do(TakeReports("a", 1, stopped=(attempt,)))
    assert list(shard.machine.stops_on("a")) == []


def test_cancel_is_idempotent_and_refuses_other_final_runs() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.cancel()
    shard.cancel()
    shard.create(task("a"), uid="r2")
    run_all(shard, set(), "r2")
    with pytest.raises(Refused, match="SUCCEEDED") as refused:
        shard.cancel("r2")
    assert refused.value.reason == "WRONG_STATE"
    with pytest.raises(Refused) as refused:
        shard.cancel("r3")
    assert refused.value.reason == "NOT_FOUND"


def test_j2_a_big_cancel_is_a_sequence_of_parts() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(PART + 500)))
    shard.cancel()
    assert shard.outcome() is RunState.CANCELLING
    assert shard.machine.due() == 0.0
    shard.grant("a", 10)
    assert not shard.events(AttemptsPlaced)
    shard.settled()
    assert shard.outcome() is RunState.CANCELLED


def test_d2_the_deadline_ends_what_is_open_and_stops_it() -> None:
    shard = Shard(facts("a"))
    shard.create(task("done"), task("runs"), task("waits", 1), deadline=10.0)
    shard.grant("a", 2)
    shard.finish(shard.only(0))
    running = shard.only(1)
    assert shard.machine.due() == START + 10.0
    shard.later(10.0)
    assert shard.outcome() is RunState.DEADLINE_EXCEEDED
    assert shard.states() == [S, TaskState.DEADLINE_EXCEEDED, TaskState.DEADLINE_EXCEEDED]
    assert list(shard.machine.stops_on("a")) == [running]
    shard.finish(running, result=b"too late")
    assert shard.task(1).state is TaskState.DEADLINE_EXCEEDED
    assert shard.run().refused_results == 1


def test_what_the_deadline_finds_waiting_keeps_the_reason_why() -> None:
    shard = Shard(facts("a"))
    shard.create(task("runs"), task("waits", clusters=("mars",)), deadline=10.0)
    here, nowhere = (line.key for line in shard.machine.demand())
    shard.do(TakeGrants(1, (Grant("a", 1, here, 1),), reasons=((nowhere, "no cluster is named mars"),)))
    shard.later(10.0)
    assert shard.task(0).reason == "the run's deadline passed"
    assert shard.task(1).reason == "the run's deadline passed; it waited: no cluster is named mars"
    assert "waits waited: no cluster is named mars" in shard.run().reason


def test_d2_the_first_terminal_decision_wins_over_the_deadline() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), deadline=10.0)
    shard.grant("a")
    shard.now += 11.0
    shard.finish(shard.only(0))  # the report is decided first, in the same batch in which the deadline is noticed
    assert shard.outcome() is RunState.SUCCEEDED
    assert shard.task().state is S


def test_nothing_is_placed_after_the_deadline() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), deadline=10.0)
    shard.now += 10.0
    shard.grant("a", key=shard.machine.demand()[0].key)
    assert not shard.events(AttemptsPlaced)


def test_j10_an_archived_run_goes_and_its_stops_stay_until_confirmed() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    attempt = shard.only(0)
    with pytest.raises(Refused):
        shard.do(Archived("r1", shard.run().event_number))
    shard.cancel()
    shard.do(Archived("r1", shard.run().event_number))
    assert shard.machine.run_by_uid("r1") is None
    assert list(shard.machine.archivable()) == []
    assert list(shard.machine.stops_on("a")) == [attempt]
    assert list(shard.restored().stops_on("a")) == [attempt]
    shard.do(TakeReports("a", 1, stopped=(attempt,)))
    assert list(shard.machine.stops_on("a")) == []
    shard.do(Archived("r1", 1))
    assert shard.last() == []


def test_j10_a_run_with_an_event_that_history_lacks_stays_live() -> None:
    """What was read of it must not go back (J8)."""
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.grant("a")
    attempt = shard.only(0)
    shard.cancel()
    number = shard.run().event_number
    shard.do(TakeReports("a", 1, stopped=(attempt,)))
    assert shard.run().event_number > number
    shard.do(Archived("r1", number))
    assert list(shard.machine.archivable()) == ["r1"]
    shard.do(Archived("r1", shard.run().event_number))
    assert shard.machine.run_by_uid("r1") is None


def test_j10_the_name_of_an_archived_run_stays_taken_for_a_while() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    shard.cancel()
    shard.do(Archived("r1", shard.run().event_number))
    again = CreateRun(NO_REQUEST, "ns", "run-r1", "other", START + 9999, 0, (task("a"),), named=True)
    with pytest.raises(Refused) as refused:
        shard.do(again)
    assert refused.value.reason == "NAME_TAKEN"
    shard.machine = shard.restored()
    with pytest.raises(Refused):
        shard.do(again)


@pytest.mark.parametrize(
    ("tasks", "deadline", "reason"),
    [
        ((), 10.0, "INVALID_FIELD"),
        ((task("a", 0),), 10.0, "INVALID_FIELD"),
        ((task("a", 1), task("b", 0)), 10.0, "INVALID_FIELD"),
        ((task("a", 7),), 10.0, "INVALID_FIELD"),
        ((task("a"), task("a")), 10.0, "INVALID_FIELD"),
        ((task("a"),), 0.0, "INVALID_FIELD"),
        ((task("a", expected=6.0), task("b", 0, expected=6.0)), 10.0, "INFEASIBLE"),
    ],
)
def test_a_refused_run_changes_nothing(tasks: tuple[object, ...], deadline: float, reason: str) -> None:
    shard = Shard(facts("a"))
    before = list(shard.machine.dump())
    with pytest.raises(Refused) as refused:
        shard.create(*tasks, deadline=deadline)  # type: ignore[arg-type]
    assert refused.value.reason == reason
    assert shard.last() == []
    assert list(shard.machine.dump()) == before


def test_a_taken_name_is_refused() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    with pytest.raises(Refused) as refused:
        shard.do(CreateRun(NO_REQUEST, "ns", "run-r1", "other", START + 10, 0, (task("a"),)))
    assert refused.value.reason == "NAME_TAKEN"


def test_j2_a_big_graph_comes_in_pieces_and_is_invisible_until_sealed() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(2500)))
    pieces = [event for event in shard.last() if isinstance(event, TasksAdded)]
    assert [len(piece.tasks) for piece in pieces] == [1000, 1000, 500]
    torn = Shard(facts("a"))
    for event in shard.last()[:2]:
        torn.machine.apply(event, Stamp(START, "n", 1, 1))
    torn.machine.validate()
    assert torn.machine.run_by_uid("r1") is None
    assert list(torn.machine.runs("ns")) == []
    assert torn.machine.demand() == []
    # Its client's retry starts anew; without one, the next batch throws the torn piece away.
    torn.create(task("only"))
    assert torn.run().task_total == 1
    for event in shard.last()[:2]:
        torn.machine.apply(event if not isinstance(event, RunCreated) else _renamed(event), Stamp(START, "n", 1, 1))
        if isinstance(event, RunCreated):
            break
    torn.do(Tick())
    assert [type(event) for event in torn.last()] == [RunArchived]


def _renamed(event: RunCreated) -> RunCreated:
    return RunCreated("r9", "ns", "run-r9", event.deadline, 0, event.task_total)


def test_large_specs_make_smaller_pieces() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}", argv=("x" * 10_000, str(i))) for i in range(30)))
    pieces = [event for event in shard.last() if isinstance(event, TasksAdded)]
    assert [len(piece.tasks) for piece in pieces] == [12, 12, 6]


def test_equal_specs_are_one_object() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}", argv=("same", "words")) for i in range(3)))
    specs = {id(view.spec) for view in shard.machine.tasks("r1", 0, 10)}
    assert len(specs) == 1


def test_run_events_are_numbered_without_gaps_and_survive_a_takeover() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("b", 0))
    run_all(shard, set())
    events = shard.machine.run_events("r1", 0)
    assert events is not None
    assert [event.number for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events] == ["created", "placed", "finished", "placed", "finished", "run_finished"]
    assert events[2].tasks == (0, 1)
    assert events[2].states == (S, TaskState.READY)
    assert shard.restored().run_events("r1", 3) == events[3:]
    assert shard.machine.run_events("r1", 6) == []


def test_run_events_are_bounded_and_say_when_older_ones_are_gone() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a", retry=task("x").spec.retry))
    shard.grant("a")
    attempt = shard.only(0)
    for number in range(KEPT_EVENTS + 10):
        shard.machine._state.runs["r1"].note(START, "test", [(0, TaskState.PLACED, number, "a", "")])
    assert shard.machine.run_events("r1", 0) is None
    assert len(shard.machine.run_events("r1", shard.run().event_number - KEPT_EVENTS) or []) == KEPT_EVENTS
    assert attempt.n == 1


def test_attempt_history_is_bounded() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    for _ in range(KEPT_ATTEMPTS + 5):
        shard.grant("a")
        shard.do(TakeReports("a", 1, rejected=((shard.only(0), "full"),)))
        shard.later(1.0)
    attempts = shard.task().attempts
    assert len(attempts) == KEPT_ATTEMPTS
    assert attempts[-1].id.n == KEPT_ATTEMPTS + 5
    assert attempts[-1].state is AttemptState.REJECTED


def test_big_reports_are_cut_into_events_that_fit_a_batch() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(20)))
    shard.grant("a", 20)
    reports = [Finish(shard.only(i), Outcome.SUCCEEDED, 0, b"x" * 16_000, "", 0, 0) for i in range(20)]
    shard.do(TakeReports("a", 1, finished=tuple(reports)))
    assert len([event for event in shard.last() if isinstance(event, AttemptsFinished)]) == 3
    assert shard.outcome() is RunState.SUCCEEDED


def test_runs_are_listed_in_order_of_uid_and_namespace() -> None:
    shard = Shard(facts("a"))
    for uid in ("r3", "r1", "r2"):
        shard.create(task("a"), uid=uid)
    shard.create(task("a"), uid="r0", namespace="other")
    assert [view.uid for view in shard.machine.runs("ns")] == ["r1", "r2", "r3"]
    view = shard.machine.run_by_id("other", "run-r0")
    assert view is not None
    assert view.name == "namespaces/other/runs/run-r0"


def test_tasks_are_filtered_by_state() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("b"), task("c", 0))
    assert [view.id for view in shard.machine.tasks("r1", 0, 10, {TaskState.READY})] == ["a", "b"]
    assert [view.id for view in shard.machine.tasks("r1", 1, 1)] == ["b"]
    found = shard.machine.task("r1", "c")
    assert found is not None
    assert found.parents == ("a",)


def test_run_record_holds_all_of_a_run() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"), task("b", 0))
    run_all(shard, set())
    record = shard.machine.run_record("r1")
    assert record.run == shard.run()
    assert [view.result for view in record.tasks] == [b"a", b"b"]
    assert record.events[-1].kind == "run_finished"


def test_graphs_are_versioned_and_guarded_by_etag() -> None:
    shard = Shard()
    put = PutGraph(request(1), "ns", "etl", "g1", (task("a"),))
    assert shard.do(put) == ("g1", 1)
    assert shard.do(put) == ("g1", 1)
    view = shard.machine.graph("ns", "etl")
    assert view is not None
    with pytest.raises(Refused) as refused:
        shard.do(PutGraph(request(2), "ns", "etl", "g2", (task("b"),), etag="old"))
    assert refused.value.reason == "ETAG_MISMATCH"
    assert shard.do(PutGraph(request(3), "ns", "etl", "g2", (task("b"),), etag=view.etag)) == ("g1", 2)
    assert [v.version for v in shard.machine.graphs("ns")] == [2]
    old = shard.machine.graph("ns", "etl", 1)
    assert old is not None
    assert old.tasks == (task("a"),)
    shard.now += 100
    assert shard.restored().graph("ns", "etl") == shard.machine.graph("ns", "etl")


def test_namespaces_are_put_and_checked() -> None:
    shard = Shard()
    shard.do(PutNamespace(request(1), "ns", 2.0, 7, 60.0))
    view = shard.machine.namespace("ns")
    assert view is not None
    assert (view.weight, view.live_task_quota, view.retention) == (2.0, 7, 60.0)
    with pytest.raises(Refused):
        shard.do(PutNamespace(request(2), "ns", float("nan"), 7, 60.0))
    with pytest.raises(Refused):
        shard.do(PutNamespace(request(3), "ns", 1.0, -1, 60.0))


def test_a_command_of_another_machine_is_a_mistake() -> None:
    with pytest.raises(TypeError):
        Shard().do("not a command")  # type: ignore[arg-type]


def test_cancel_records_its_request() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a"))
    cancel = CancelRun(request(5), "ns", "run-r1", "enough")
    assert shard.do(cancel) == "r1"
    shard.do(Archived("r1", shard.run().event_number))
    assert shard.do(cancel) == "r1"
