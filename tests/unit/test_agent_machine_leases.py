"""The agent's rules of time: leases, adoption, silent guards, deadlines (PROTOCOL F5, F7, S6, S8, G2, D1)."""

from __future__ import annotations

from cluster_agent.core import events as on
from cluster_agent.core.capacity import NodeSpec
from cluster_agent.core.commands import (
    AdoptWork,
    DropStream,
    KillIfSilent,
    RenewLease,
    SendReports,
    SetBounds,
    StartWork,
)
from cluster_agent.core.machine import AgentMachine
from cluster_agent.core.model import AgentState, Ended, Outcome
from cluster_agent.core.records import Booted, Finished, Moved, apply
from tests.unit.agent_machine_world import ENDED, EPOCH, F, World, key, none, spec, started, the


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


def test_s8_bounds_of_the_welcome_reach_the_executor() -> None:
    world = World(leased=False)
    world.step(on.StreamOpened(1))
    assert the(world.step(on.Welcomed(1, 1, False, "cu", "fu", 28.0, 5.0)), SetBounds) == SetBounds(28.0, 5.0)
    assert world.machine.state.fence_seconds == 28.0


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


def test_f5_a_tick_has_something_to_do_when_f_is_over_and_not_before() -> None:
    world = World()
    assert not world.machine.due(world.now + F - 0.1)
    assert world.machine.due(world.now + F + 0.1)
    world.step(after=F + 0.1)
    assert not world.machine.due(world.now + 100.0), "the lapse is noticed once"


def test_j7_a_tick_has_something_to_do_while_a_report_is_not_acknowledged() -> None:
    world = World()
    world.dispatch(0)
    world.step(on.WorkEnded(key(), ENDED))
    assert world.machine.due(world.now)
    world.settle(0)
    assert not world.machine.due(world.now)
