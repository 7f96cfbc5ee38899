"""The agent's rules of starting: what may start (PROTOCOL F3), and at most once (F4). Events in, records and actions out."""

from __future__ import annotations

from cluster_agent.core import events as on
from cluster_agent.core.commands import (
    AdoptWork,
    DropStream,
    RejoinExecutor,
    RenewLease,
    SendHello,
    SendReceipt,
    SendReports,
    StopWork,
)
from cluster_agent.core.model import AgentState, Epoch, Outcome, Phase
from cluster_agent.core.records import EpochRaised, Starting, Tombstoned, apply
from tests.unit.agent_machine_world import ENDED, F, World, key, none, spec, started, the


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


def test_f3_a_dispatch_confirms_an_adoption() -> None:
    world = World()
    world.dispatch(0)
    world.session(generation=2)
    world.ack(generation=2)
    step = world.dispatch(0, generation=2)
    assert the(step, AdoptWork) == AdoptWork((key(0),), 2)
    assert started(step) == []
