"""The agent's rules, by id: events in, records and actions out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_agent.core import events as on
from cluster_agent.core.capacity import QUEUE_FLOOR, NodeSpec
from cluster_agent.core.commands import (
    Action,
    AdoptWork,
    DropStream,
    ForgetWork,
    KillAll,
    KillIfSilent,
    RejoinExecutor,
    RenewLease,
    SendHello,
    SendReceipt,
    SendReports,
    SetBounds,
    StartWork,
    Step,
    StopWork,
)
from cluster_agent.core.machine import AgentMachine
from cluster_agent.core.model import AgentState, AttemptKey, Demand, Ended, Epoch, Mark, Outcome, Phase, WorkSpec
from cluster_agent.core.outbox import RESEND_SECONDS
from cluster_agent.core.records import (
    Booted,
    EpochRaised,
    Finished,
    Forgotten,
    MarkRaised,
    Moved,
    Record,
    Starting,
    Tombstoned,
    apply,
    snapshot,
)

F = 9.0
EPOCH = Epoch(1, 5)
ENDED = Ended(Outcome.SUCCEEDED, 0, b"42")
A = TypeVar("A", bound=Action)


def key(task: int = 0, n: int = 1) -> AttemptKey:
    return AttemptKey("run", task, n, "nonce")


def spec(cpu: int = 1000, **changes: object) -> WorkSpec:
    base = {"argv": ("true",), "env": {}, "demand": Demand(cpu), "task_id": "t", "run": "r", "fence": "1.1"}
    return WorkSpec(**{**base, "deadline_wall_ms": 0, **changes})  # type: ignore[arg-type]


class World:
    """A machine, its time, and the journal that its records would make."""

    def __init__(self, cpus: int = 2, *, leased: bool = True, state: AgentState | None = None) -> None:
        self.now = 100.0
        self.records: list[Record] = []
        self.machine = AgentMachine(state or AgentState("j", "boot"), [NodeSpec(cpus * 1000)], fence_seconds=F)
        self.records += self.machine.restore("boot").records
        self.stream = 0
        self.number = 0
        if leased:
            self.step(on.Census({}, ()))
            self.session()
            self.ack()

    def step(self, *happened: on.Event, after: float = 0.0) -> Step:
        self.now += after
        step = self.machine.step(happened, self.now)
        self.records += step.records
        return step

    def session(self, generation: int = 1, *, resumed: bool = False) -> Step:
        self.stream += 1
        self.number = 0
        opened = self.step(on.StreamOpened(self.stream))
        self.step(on.Welcomed(self.stream, generation, resumed, "cu", "fu", F, 5.0))
        return opened

    def ack(self, generation: int = 1, sent: float | None = None, wall_ms: int = 1_000_000) -> Step:
        return self.step(on.HeartbeatAcked(self.stream, generation, self.now if sent is None else sent, wall_ms))

    def dispatch(
        self,
        *tasks: int,
        generation: int = 1,
        epoch: Epoch = EPOCH,
        stream: int | None = None,
        work: WorkSpec | None = None,
        mark: Mark | None = None,
        number: int | None = None,
    ) -> Step:
        self.number = self.number + 1 if number is None else number
        work = work or spec()
        given_ = tuple(on.Assignment(key(task), work) for task in tasks)
        at = self.stream if stream is None else stream
        return self.step(on.Dispatched(at, "s0", epoch, mark, generation, self.number, given_))

    def stop(self, task: int, epoch: Epoch = EPOCH) -> Step:
        return self.step(on.StopOrdered(self.stream, "s0", epoch, None, (key(task),)))

    def settle(self, task: int, epoch: Epoch = EPOCH) -> Step:
        return self.step(on.ReportsSettled(self.stream, "s0", epoch, None, (key(task),)))

    def phase(self, task: int) -> Phase | None:
        attempt = self.machine.state.attempts.get(key(task))
        return None if attempt is None else attempt.phase


def the(step: Step, kind: type[A]) -> A:
    found = [action for action in step.actions if isinstance(action, kind)]
    assert len(found) == 1, step.actions
    return found[0]


def none(step: Step, kind: type[Action]) -> bool:
    return not any(isinstance(action, kind) for action in step.actions)


def started(step: Step) -> list[int]:
    return [order.key.task for action in step.actions if isinstance(action, StartWork) for order in action.orders]


# --- F3: what may start ---------------------------------------------------------------------------------------------------


def test_f3_a_dispatch_in_a_good_session_starts_after_its_record() -> None:
    world = World()
    step = world.dispatch(0)
    assert started(step) == [0]
    assert any(isinstance(record, Starting) for record in step.records)
    assert the(step, SendReceipt).dispatch_no == 1


def test_f3_nothing_starts_before_the_first_acknowledged_heartbeat() -> None:
    world = World(leased=False)
    world.step(on.Census({}, ()))
    world.session()
    assert started(world.dispatch(0)) == []
    assert started(world.ack()) == [0]


def test_f3_a_dispatch_of_another_stream_is_silently_refused() -> None:
    world = World()
    world.session(resumed=True)
    step = world.dispatch(0, stream=world.stream - 1)
    assert step.actions == []
    assert step.records == []
    assert world.phase(0) is None


def test_f3_a_dispatch_of_another_generation_is_silently_refused() -> None:
    step = World().dispatch(0, generation=2)
    assert step.actions == []
    assert step.records == []


def test_f3_a_lower_epoch_is_silently_refused_and_a_higher_one_is_on_disk_first() -> None:
    world = World()
    step = world.dispatch(0, epoch=Epoch(1, 7))
    assert isinstance(step.records[0], EpochRaised)
    assert step.durable
    for old in (Epoch(1, 6), Epoch(0, 99)):
        step = world.dispatch(1, epoch=old)
        assert step.actions == []
        assert world.stop(0, epoch=old).actions == []
        assert world.settle(0, epoch=old).actions == []
    assert not world.dispatch(1, epoch=Epoch(1, 7)).durable


def test_f3_a_lapse_voids_the_queue_and_opens_a_new_stream() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    assert world.phase(1) is Phase.QUEUED
    step = world.step(on.WorkEnded(key(0), ENDED), after=F)
    assert started(step) == []
    assert the(step, DropStream).stream == world.stream
    assert world.phase(1) is Phase.VOID
    assert world.dispatch(2).actions == []  # this stream is not trusted any more


def test_f3_void_attempts_are_listed_and_start_only_when_dispatched_again() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    world.step(on.StreamClosed(world.stream))
    hello = the(world.session(resumed=True), SendHello)
    assert {entry.key.task: entry.phase for entry in hello.inventory} == {0: Phase.STARTING, 1: Phase.VOID}
    assert hello.last_generation == 1
    world.step(on.WorkEnded(key(0), ENDED))
    assert world.phase(1) is Phase.VOID
    world.ack()
    assert started(world.dispatch(1)) == [1]


def test_f3_an_acknowledgement_after_the_lapse_revives_nothing() -> None:
    world = World()
    sent = world.now
    step = world.step(on.HeartbeatAcked(world.stream, 1, sent + 1, 0), after=F)
    assert none(step, RenewLease)
    assert started(world.dispatch(0)) == []


def test_f3_what_came_on_the_last_stream_may_start_until_the_next_one() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    world.step(on.StreamClosed(world.stream))
    assert started(world.step(on.WorkEnded(key(0), ENDED))) == [1]


def test_f3_a_tombstoned_attempt_never_starts() -> None:
    world = World()
    world.stop(0)
    world.step(on.WorkStopped(key(0)))
    step = world.dispatch(0)
    assert started(step) == []
    assert the(step, SendReports).stopped == (key(0),)


def test_f3_a_rejection_is_tombstoned_before_it_is_reported() -> None:
    world = World(cpus=1)
    step = world.dispatch(0, work=spec(cpu=5000))
    assert any(isinstance(record, Tombstoned) and record.rejected for record in step.records)
    assert step.durable
    assert "cpu_millis 5000 > 1000" in the(step, SendReports).rejected[0][1]
    assert started(world.dispatch(0)) == []


def test_f3_a_rejection_that_waits_for_the_disk_holds_up_no_other_report() -> None:
    world = World()
    world.dispatch(0)
    world.dispatch(1)
    step = world.step(on.WorkEnded(key(0), ENDED), on.WorkRefused(key(1), "the disk is full"))
    first, second = [action for action in step.actions if isinstance(action, SendReports)]
    assert (first.finished, first.rejected, first.needs_journal) == (((key(0), ENDED),), (), False)
    assert (second.finished, second.rejected, second.needs_journal) == ((), ((key(1), "the disk is full"),), True)


# --- F4: at most one spawn ------------------------------------------------------------------------------------------------


def test_f4_started_without_a_process_is_tombstoned_at_the_guard_and_then_reported_lost() -> None:
    world = World()
    world.dispatch(0)
    assert not none(world.step(on.ExecutorLost()), RejoinExecutor)
    assert started(world.dispatch(1)) == []
    step = world.step(on.Census({}, ()))
    assert the(step, StopWork).keys == (key(0),)
    assert none(step, SendReports)
    step = world.step(on.WorkStopped(key(0)))
    assert the(step, SendReports).finished[0][1].outcome is Outcome.LOST
    assert started(world.dispatch(0)) == []


def test_f4_a_journal_with_a_start_never_leads_to_a_second_one() -> None:
    first = World()
    first.dispatch(0)
    state = AgentState("j")
    for record in first.records:
        apply(state, record)
    again = World(state=state, leased=False)
    assert the(again.step(on.Census({}, ())), StopWork).keys == (key(0),)
    again.session(resumed=True)
    again.ack()
    assert started(again.dispatch(0)) == []


def test_f4_the_census_adopts_what_runs_and_reports_what_ended() -> None:
    first = World()
    first.dispatch(0, 1)
    state = AgentState("j")
    for record in first.records:
        apply(state, record)
    again = World(state=state, leased=False)
    step = again.step(on.Census({key(0): 1}, (on.WorkEnded(key(1), ENDED),)))
    assert none(step, StopWork)
    assert again.phase(0) is Phase.RUNNING
    assert again.phase(1) is Phase.FINISHED
    assert again.machine.vitals().shapes[0].cpu_millis == 1000


# --- F5: leases -----------------------------------------------------------------------------------------------------------


def test_f5_the_lease_counts_from_the_send_time_of_this_generations_heartbeats() -> None:
    world = World()
    assert the(world.ack(sent=world.now), RenewLease) == RenewLease(1, world.now)
    assert none(world.ack(generation=2), RenewLease)
    assert started(world.dispatch(0)) == [0]
    world.ack(sent=world.now - F + 1)  # an older one does not shorten it
    assert started(world.dispatch(1)) == [1]
    assert none(world.step(after=F - 0.1), DropStream)
    assert not none(world.step(after=0.1), DropStream)


def test_f5_an_acknowledgement_of_another_stream_renews_nothing() -> None:
    world = World()
    world.session(resumed=True)
    assert none(world.step(on.HeartbeatAcked(world.stream - 1, 1, world.now, 1)), RenewLease)


def test_f5_without_any_acknowledgement_f_counts_from_the_opening_of_the_stream() -> None:
    world = World(leased=False)
    world.session()
    assert none(world.step(after=F - 0.1), DropStream)
    assert not none(world.step(after=0.1), DropStream)


def test_f5_a_new_generation_has_no_lease_until_its_first_acknowledgement() -> None:
    world = World()
    world.session(generation=2)
    assert started(world.dispatch(0, generation=2)) == []
    assert started(world.ack(generation=2)) == [0]


def test_s6_adoption_moves_running_work_to_the_new_lease_once_it_exists() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.WorkStarted(key(0), 1))
    world.session(generation=2)
    step = world.step(on.Adopted(world.stream, "s0", EPOCH, None, 2, (key(0),)))
    assert any(isinstance(record, Moved) for record in step.records)
    assert none(step, AdoptWork)
    assert the(world.ack(generation=2), AdoptWork) == AdoptWork((key(0),), 2)
    assert none(world.ack(generation=2), AdoptWork)


def test_s6_an_adoption_confirmed_before_the_stream_broke_is_not_forgotten() -> None:
    world = World()
    world.dispatch(0)
    world.session(generation=2)
    world.step(on.Adopted(world.stream, "s0", EPOCH, None, 2, (key(0),)))
    world.session(generation=2, resumed=True)
    assert the(world.ack(generation=2), AdoptWork) == AdoptWork((key(0),), 2)


def test_s6_an_adoption_on_disk_of_which_the_executor_was_not_told_is_told_after_a_restart() -> None:
    first = World()
    first.dispatch(0)
    first.session(generation=2)
    first.step(on.Adopted(first.stream, "s0", EPOCH, None, 2, (key(0),)))
    state = AgentState("j")
    for record in first.records:
        apply(state, record)
    again = World(state=state, leased=False)
    again.step(on.Census({key(0): 1}, ()))
    again.session(generation=2, resumed=True)
    assert the(again.ack(generation=2), AdoptWork) == AdoptWork((key(0),), 2)


def test_s6_another_boot_id_is_on_disk_before_anything_else() -> None:
    step = AgentMachine(AgentState("j", "boot"), [NodeSpec(1000)], fence_seconds=F).restore("another")
    assert step.records == [Booted("another")]
    assert step.durable


def test_s6_without_adoption_work_keeps_its_old_generation() -> None:
    world = World()
    world.dispatch(0)
    world.session(generation=2)
    assert none(world.ack(generation=2), AdoptWork)
    assert world.machine.state.attempts[key(0)].generation == 1
    step = world.step(on.Adopted(world.stream, "s0", EPOCH, None, 1, (key(0),)))  # of the generation before
    assert step.actions == []


def test_f3_a_dispatch_confirms_an_adoption() -> None:
    world = World()
    world.dispatch(0)
    world.session(generation=2)
    world.ack(generation=2)
    step = world.dispatch(0, generation=2)
    assert the(step, AdoptWork) == AdoptWork((key(0),), 2)
    assert started(step) == []


def test_s8_bounds_of_the_welcome_reach_the_executor() -> None:
    world = World(leased=False)
    world.step(on.StreamOpened(1))
    assert the(world.step(on.Welcomed(1, 1, False, "cu", "fu", 28.0, 5.0)), SetBounds) == SetBounds(28.0, 5.0)
    assert world.machine.state.fence_seconds == 28.0


# --- F8: stops ------------------------------------------------------------------------------------------------------------


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


# --- J7: reports ----------------------------------------------------------------------------------------------------------


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


def test_starts_ride_in_finishes_of_the_same_batch() -> None:
    world = World()
    world.dispatch(0, 1)
    report = the(
        world.step(on.WorkStarted(key(0), 5), on.WorkStarted(key(1), 6), on.WorkEnded(key(1), ENDED)), SendReports
    )
    assert report.started == ((key(0), 5),)
    assert report.finished == ((key(1), ENDED),)


# --- J12, C3, C4, D1, G2, S5 and circumstances ----------------------------------------------------------------------------


def test_j12_the_highest_mark_is_kept_and_said() -> None:
    world = World()
    world.dispatch(0, mark=Mark(1, 10, "x"))
    assert not any(isinstance(r, MarkRaised) for r in world.dispatch(1, mark=Mark(1, 9, "y")).records)
    assert not any(isinstance(r, MarkRaised) for r in world.dispatch(1, mark=Mark(1, 10, "z")).records)
    world.dispatch(1, mark=Mark(2, 1, "w"))
    assert the(world.session(), SendHello).marks == (("s0", Mark(2, 1, "w")),)


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
    assert world.machine.vitals().attempts == 3


def test_c4_a_stream_begins_with_1_so_a_lost_first_dispatch_is_never_receipted() -> None:
    world = World()
    assert the(world.dispatch(1, number=2), SendReceipt).dispatch_no == 0
    assert the(world.dispatch(0, number=1), SendReceipt).dispatch_no == 1
    assert the(world.dispatch(1, number=2), SendReceipt).dispatch_no == 2


def test_d1_the_deadline_is_mapped_by_the_last_answered_heartbeat() -> None:
    world = World()
    world.ack(sent=world.now, wall_ms=1_000_000)
    order = the(world.dispatch(0, work=spec(deadline_wall_ms=1_030_000)), StartWork).orders[0]
    assert order.stop_boot == world.now + 30


def test_d1_nothing_starts_after_its_deadline() -> None:
    world = World()
    step = world.dispatch(0, work=spec(deadline_wall_ms=999_000))
    assert started(step) == []
    assert the(step, SendReports).finished[0][1].outcome is Outcome.DEADLINE
    assert any(isinstance(record, Finished) for record in step.records)


def test_g2_with_a_silent_guard_nothing_starts_and_no_room_is_offered() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.GuardSilence(silent=True))
    assert started(world.dispatch(1)) == []
    assert world.machine.vitals().shapes[0].cpu_millis == 0


def test_g2_at_f_the_guard_must_live_or_its_work_is_killed_stream_or_not() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.StreamClosed(world.stream))  # nobody was told of a silence, and nobody can be
    assert none(world.step(after=F - 0.1), KillIfSilent)
    assert not none(world.step(after=0.1), KillIfSilent)
    assert none(world.step(after=1.0), KillIfSilent)


def test_g2_a_guard_that_falls_silent_after_f_is_seen_to_on_the_next_stream_too() -> None:
    world = World()
    world.dispatch(0)
    world.step(after=F)
    world.session(resumed=True)
    assert not none(world.step(on.GuardSilence(silent=True)), KillIfSilent)
    assert none(world.step(on.GuardSilence(silent=True)), KillIfSilent)


def test_g2_before_f_and_after_a_renewal_a_silent_guard_is_only_told_of() -> None:
    world = World()
    world.dispatch(0)
    assert none(world.step(on.GuardSilence(silent=True)), KillIfSilent)
    world.step(on.GuardSilence(silent=False), after=F)
    world.session(resumed=True)
    world.ack()
    assert none(world.step(on.GuardSilence(silent=True)), KillIfSilent)


def test_f7_work_to_be_kept_is_no_reason_to_kill_a_silent_guard_unless_it_was_stopped() -> None:
    world = World()
    world.dispatch(0, work=spec(keep_at_fence=True))
    state = AgentState("j")
    for record in world.records:  # the flag survives a restart
        apply(state, record)
    assert state.attempts[key(0)].keep_at_fence
    assert none(world.step(after=F), KillIfSilent)
    again = World()
    again.dispatch(0, work=spec(keep_at_fence=True))
    again.stop(0)
    assert not none(again.step(after=F), KillIfSilent)


def test_g2_a_new_guard_is_told_of_the_lease_before_anything_starts() -> None:
    world = World(cpus=1)
    world.ack()
    world.dispatch(0, 1)
    world.step(on.ExecutorLost())
    sent = world.now
    step = world.step(on.Census({}, (on.WorkEnded(key(0), Ended(Outcome.LOST)),)), after=1.0)
    kinds = [type(action) for action in step.actions]
    assert the(step, RenewLease) == RenewLease(1, sent)
    assert started(step) == [1]
    assert kinds.index(RenewLease) < kinds.index(StartWork)


def test_g2_without_a_lease_a_new_guard_is_told_of_none() -> None:
    world = World()
    world.step(on.ExecutorLost())
    world.step(after=F)
    assert none(world.step(on.Census({}, ())), RenewLease)


def test_s5_a_drain_kills_again_when_the_guard_had_to_be_joined_anew() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.ExecutorLost())
    world.step(on.DrainOrdered())
    assert not none(world.step(on.Census({key(0): 1}, ())), KillAll)


def test_s5_a_drain_rejects_what_waits_and_kills_what_runs() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    step = world.step(on.DrainOrdered())
    assert not none(step, KillAll)
    assert the(step, SendReports).rejected == ((key(1), "the cluster is draining"),)
    assert not world.machine.all_dead
    world.step(on.WorkEnded(key(0), Ended(Outcome.STOPPED)))
    assert world.machine.all_dead
    assert the(world.dispatch(2), SendReports).rejected == ((key(2), "the cluster is draining"),)


def test_a_full_disk_takes_nothing_on_and_goes_on_reporting() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.DiskState(writable=False))
    assert world.dispatch(1).actions == []
    assert world.phase(1) is None
    report = the(world.step(on.WorkEnded(key(0), ENDED)), SendReports)
    assert not report.needs_journal
    world.step(on.DiskState(writable=True))
    assert started(world.dispatch(1)) == [1]


def test_a_strange_federation_is_not_joined() -> None:
    world = World()
    world.step(on.StreamOpened(9))
    assert not none(world.step(on.Welcomed(9, 2, False, "cu", "other", F, 5.0)), DropStream)
    assert world.machine.state.federation_uid == "fu"


# --- laws -----------------------------------------------------------------------------------------------------------------

moves = st.lists(
    st.tuples(
        st.sampled_from(
            ["dispatch", "stop", "settle", "started", "ended", "stopped", "refused", "stream", "next", "ack", "lost"]
        ),
        st.integers(0, 4),
        st.floats(0, 4),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(moves)
def test_law_no_key_is_started_twice_and_the_journal_folds_to_the_state(
    script: Sequence[tuple[str, int, float]],
) -> None:
    world = World(cpus=2)
    generation = 1
    starts: list[int] = []
    for move, task, pause in script:
        happened: dict[str, on.Event] = {
            "started": on.WorkStarted(key(task), 1),
            "ended": on.WorkEnded(key(task), ENDED),
            "stopped": on.WorkStopped(key(task)),
            "refused": on.WorkRefused(key(task), "no"),
        }
        steps = [world.step(after=pause)]
        if move in happened:
            held = world.phase(task) in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
            steps += [world.step(happened[move])] if held else []
        elif move == "dispatch":
            forgotten = any(isinstance(r, Forgotten) and r.key == key(task) for r in world.records)
            steps += [] if forgotten else [world.dispatch(task, generation=generation)]
        elif move == "stop":
            steps.append(world.stop(task))
        elif move == "settle":
            steps.append(world.settle(task))
        elif move == "ack":
            steps.append(world.ack(generation=generation))
        elif move == "lost":
            steps += [world.step(on.ExecutorLost()), world.step(on.Census({}, ()))]
        else:
            generation += move == "next"
            steps.append(world.session(generation))
        starts += [task for step in steps for task in started(step)]
    assert len(starts) == len(set(starts))
    for source in (world.records, list(snapshot(world.machine.state))):
        folded = AgentState("j")
        for record in source:
            apply(folded, record)
        kept = {
            k: (Phase.STARTING if a.phase is Phase.RUNNING or a.orphaned else a.phase)
            for k, a in world.machine.state.attempts.items()
            if a.phase not in (Phase.QUEUED, Phase.VOID)
        }
        assert {k: a.phase for k, a in folded.attempts.items()} == kept
        assert folded.epochs == world.machine.state.epochs


def test_every_event_has_a_handler() -> None:
    world = World()
    with pytest.raises(KeyError):
        world.step(object())  # type: ignore[arg-type]


def test_j12_a_risen_incarnation_is_obeyed_on_a_new_stream_only() -> None:
    """Owners of a restored store must hear a fresh inventory before anything of theirs is acted upon."""
    world = World()
    world.dispatch(0)
    again = world.dispatch(1, epoch=Epoch(2, 3))
    assert [type(action) for action in again.actions] == [DropStream]
    assert EpochRaised("s0", Epoch(2, 3)) in world.records
    assert not world.dispatch(1, epoch=Epoch(2, 3)).actions, "the stream is over"
    told = next(action for action in world.session(resumed=True).actions if isinstance(action, SendHello))
    assert [entry.key for entry in told.inventory] == [key(0)]
    world.ack()
    assert any(isinstance(action, StartWork) for action in world.dispatch(1, epoch=Epoch(2, 3)).actions)
