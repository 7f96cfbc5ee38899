"""The agent's rules of telling: stops, reports, rejections, vitals (PROTOCOL F8, J7, C3, C4)."""

from __future__ import annotations

from cluster_agent.core import events as on
from cluster_agent.core.capacity import QUEUE_FLOOR
from cluster_agent.core.commands import ForgetWork, SendReceipt, SendReports, StopWork
from cluster_agent.core.machine import GATHER_SECONDS
from cluster_agent.core.model import AgentState
from cluster_agent.core.outbox import RESEND_SECONDS, START_SECONDS
from cluster_agent.core.records import Forgotten, apply
from tests.unit.agent_machine_world import ENDED, EPOCH, F, World, key, none, spec, started, the


def test_f8_a_stop_is_durable_at_once_and_reported_when_confirmed() -> None:
    world = World()
    world.dispatch(0)
    step = world.stop(0)
    assert step.durable
    assert the(step, StopWork).grace_seconds == 3.0
    assert none(step, SendReports)
    assert world.machine.vitals().shapes[0].cpu_millis == 1000  # held until the death is confirmed
    step = world.step(on.WorkStopped(key(0)))
    assert the(step, SendReports).stopped == (key(0),)
    assert world.machine.vitals().shapes[0].cpu_millis == 2000


def test_f8_stopping_an_unknown_attempt_tombstones_it() -> None:
    world = World()
    step = world.stop(7)
    assert step.durable
    assert the(step, StopWork).keys == (key(7),)
    assert started(world.dispatch(7)) == []
    assert the(world.step(on.WorkStopped(key(7))), SendReports).stopped == (key(7),)


def test_f8_a_stop_is_not_bound_to_a_generation_and_repeats_are_answered() -> None:
    world = World()
    world.dispatch(0)
    world.session(generation=2)
    assert the(world.stop(0), StopWork).keys == (key(0),)
    assert none(world.stop(0), StopWork)
    world.step(on.WorkStopped(key(0)))
    assert the(world.stop(0), SendReports).stopped == (key(0),)


def test_f8_a_stop_overtakes_the_queue() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    world.stop(1)
    assert started(world.step(on.WorkEnded(key(0), ENDED))) == []


def test_f8_a_stop_that_was_not_confirmed_is_given_again_after_a_restart() -> None:
    first = World()
    first.dispatch(0)
    first.stop(0)
    state = AgentState("j")
    for record in first.records:
        apply(state, record)
    again = World(state=state, leased=False)
    assert the(again.step(on.Census({key(0): 1}, ())), StopWork).keys == (key(0),)


def test_f8_a_late_result_goes_along_as_evidence() -> None:
    world = World()
    world.dispatch(0)
    world.stop(0)
    world.step(on.WorkEnded(key(0), ENDED))
    report = the(world.step(on.WorkStopped(key(0))), SendReports)
    assert report.stopped == (key(0),)
    assert report.finished == ((key(0), ENDED),)


def test_j7_reports_repeat_on_an_unbroken_stream_and_on_every_new_one() -> None:
    world = World()
    world.dispatch(0)
    assert the(world.step(on.WorkEnded(key(0), ENDED)), SendReports).finished == ((key(0), ENDED),)
    world.ack()
    assert none(world.step(after=RESEND_SECONDS - 0.1), SendReports)
    assert the(world.step(after=0.2), SendReports).finished == ((key(0), ENDED),)
    world.step(on.StreamClosed(world.stream))
    world.step(on.StreamOpened(world.stream + 1))
    step = world.step(on.Welcomed(world.stream + 1, 1, True, "cu", "fu", F, 5.0))
    assert the(step, SendReports).finished == ((key(0), ENDED),)


def test_j7_nothing_is_forgotten_before_its_acknowledgement() -> None:
    world = World()
    world.dispatch(0)
    assert none(world.settle(0), ForgetWork)  # it still runs
    world.step(on.WorkEnded(key(0), ENDED))
    step = world.settle(0)
    assert the(step, ForgetWork).keys == (key(0),)
    assert Forgotten(key(0)) in step.records
    assert world.machine.all_settled
    assert none(world.step(after=RESEND_SECONDS), SendReports)


def test_j7_an_acknowledgement_of_an_older_report_does_not_settle_a_newer_fact() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.WorkEnded(key(0), ENDED))
    world.stop(0)
    assert none(world.settle(0), ForgetWork)
    world.step(on.WorkStopped(key(0)))
    assert the(world.settle(0), ForgetWork).keys == (key(0),)


def test_j7_a_fact_that_was_never_told_is_not_forgotten_with_an_older_report() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.WorkEnded(key(0), ENDED))
    world.stop(0)
    late = on.ReportsSettled(world.stream, "s0", EPOCH, None, (key(0),))  # of the report that it had ended
    step = world.step(on.WorkStopped(key(0)), late)
    assert none(step, ForgetWork)
    assert the(step, SendReports).stopped == (key(0),)


def test_j7_a_dispatch_of_what_ended_is_answered_with_its_report() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.WorkEnded(key(0), ENDED))
    step = world.dispatch(0)
    assert started(step) == []
    assert the(step, SendReports).finished == ((key(0), ENDED),)


def test_starts_ride_in_finishes_that_come_soon() -> None:
    world = World()
    world.dispatch(0, 1)
    assert none(world.step(on.WorkStarted(key(0), 5), on.WorkStarted(key(1), 6)), SendReports)
    report = the(world.step(on.WorkEnded(key(1), ENDED), after=START_SECONDS / 2), SendReports)
    assert (report.started, report.finished) == ((), ((key(1), ENDED),))
    assert world.machine.due(world.now), "a tick must tell the other one"
    report = the(world.step(after=START_SECONDS), SendReports)
    assert (report.started, report.finished) == (((key(0), 5),), ())
    assert none(world.step(after=START_SECONDS), SendReports), "once"


def test_c3_beyond_the_queue_work_is_rejected() -> None:
    world = World(cpus=1)
    step = world.dispatch(*range(QUEUE_FLOOR + 3))
    assert started(step) == [0]
    rejected = the(step, SendReports).rejected
    assert [item[0].task for item in rejected] == [QUEUE_FLOOR, QUEUE_FLOOR + 1, QUEUE_FLOOR + 2]


def test_c3_what_the_executor_refuses_is_rejected_at_no_cost() -> None:
    world = World()
    world.dispatch(0)
    report = the(world.step(on.WorkRefused(key(0), "the lease has passed")), SendReports)
    assert report.rejected == ((key(0), "the lease has passed"),)
    assert world.machine.vitals().attempts == 0


def test_c4_vitals_name_the_last_dispatch_without_a_gap() -> None:
    world = World()
    world.dispatch(0)
    assert world.machine.vitals().included == (("s0", EPOCH, 1),)
    assert the(world.dispatch(1, number=4), SendReceipt).dispatch_no == 1
    assert world.machine.vitals().included == (("s0", EPOCH, 1),)
    assert the(world.dispatch(2, number=2), SendReceipt).dispatch_no == 2
    assert world.machine.vitals().attempts == 2


def test_f3_a_repeated_dispatch_does_not_start_what_was_rejected_and_forgotten_since() -> None:
    """Found by the simulator (message repeated): the owner has placed it elsewhere by then."""
    world = World()
    world.dispatch(0, number=1)
    world.step(on.WorkRefused(key(0), "the lease has passed"))
    world.settle(0)
    assert world.phase(0) is None
    assert the(world.dispatch(0, number=1), SendReceipt).dispatch_no == 1
    assert world.phase(0) is None


def test_c4_a_stream_begins_with_1_so_a_lost_first_dispatch_is_never_receipted() -> None:
    world = World()
    assert the(world.dispatch(1, number=2), SendReceipt).dispatch_no == 0
    assert the(world.dispatch(0, number=1), SendReceipt).dispatch_no == 1
    assert the(world.dispatch(1, number=2), SendReceipt).dispatch_no == 2


def test_reports_gather_for_a_moment_while_more_work_waits_here() -> None:
    """DESIGN 13: no slot waits for their answer, so they share a message, and a commit."""
    world = World(cpus=1)
    big = spec(700)  # one at a time
    world.dispatch(*range(6), work=big)
    assert not none(world.step(on.WorkEnded(key(0), ENDED)), SendReports), "the first leaves at once"
    assert none(world.step(on.WorkEnded(key(1), ENDED), after=0.002), SendReports)
    assert 0.0 < world.machine.gathering(world.now) <= GATHER_SECONDS
    assert none(world.step(on.WorkEnded(key(2), ENDED), after=0.002), SendReports)
    told = the(world.step(after=GATHER_SECONDS), SendReports)
    assert [each[0] for each in told.finished] == [key(1), key(2)]
    assert world.machine.gathering(world.now) == 0.0


def test_reports_leave_at_once_when_nothing_waits_here() -> None:
    world = World(cpus=1)
    big = spec(700)
    world.dispatch(0, 1, work=big)
    world.step(on.WorkEnded(key(0), ENDED))
    assert not none(world.step(on.WorkEnded(key(1), ENDED), after=0.001), SendReports)
    world.dispatch(2, work=big)
    assert not none(world.step(on.WorkEnded(key(2), ENDED), after=0.001), SendReports)
