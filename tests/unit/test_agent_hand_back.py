"""What waits too long at an agent goes back (PROTOCOL C3, F3; `cluster_agent/core/capacity.py`, PATIENCE_SECONDS)."""

from __future__ import annotations

from cluster_agent.core import events as on
from cluster_agent.core.capacity import PATIENCE_SECONDS, QUEUE_FLOOR
from cluster_agent.core.commands import SendReports, Step
from cluster_agent.core.machine import AWAY_SECONDS
from cluster_agent.core.model import ArtifactRef, ArtifactSource, Phase
from cluster_agent.core.records import Tombstoned
from cluster_agent.journal_codec import decode, encode
from tests.unit.agent_machine_world import ENDED, World, key, spec, started, the

TICK = 0.25


def ticks(world: World, seconds: float) -> list[Step]:
    """The steps that an agent takes while nothing happens."""
    return [world.step(after=TICK) for _ in range(round(seconds / TICK))]


def back(steps: list[Step]) -> list[int]:
    """Tasks that were rejected."""
    sent = [action for step in steps for action in step.actions if isinstance(action, SendReports)]
    return [held.task for report in sent for held, _ in report.rejected]


def test_c3_what_waits_too_long_is_tombstoned_and_then_rejected() -> None:
    world = World(cpus=2)
    assert started(world.dispatch(0, 1, 2, 3)) == [0, 1]
    assert back(ticks(world, PATIENCE_SECONDS - TICK)) == []
    step = world.step(after=TICK)
    assert back([step]) == [2, 3]
    tombstones = [record for record in step.records if isinstance(record, Tombstoned)]
    assert [record.key.task for record in tombstones] == [2, 3]
    assert step.durable, "on disk before it is said (F3)"
    assert the(step, SendReports).needs_journal
    assert all(decode(encode(record)) == record for record in tombstones)
    assert [world.phase(task) for task in range(4)] == [Phase.STARTING, Phase.STARTING, *[Phase.TOMBSTONED] * 2]
    assert world.machine.handed_back == 2


def test_f3_what_went_back_never_starts_and_is_told_until_it_is_acknowledged() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    ticks(world, PATIENCE_SECONDS)
    assert started(world.step(on.WorkEnded(key(0), ENDED))) == []
    assert started(world.dispatch(1)) == []
    assert world.phase(1) is Phase.TOMBSTONED
    world.settle(1)
    assert world.phase(1) is None


def test_each_waits_its_own_time() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    ticks(world, 1.0)
    world.dispatch(2)
    assert back(ticks(world, PATIENCE_SECONDS - 1.0)) == [1]
    assert back(ticks(world, 1.0)) == [2]


def test_a_queue_that_moves_is_left_alone() -> None:
    world = World(cpus=1)
    world.dispatch(*range(6))
    for task in range(10):
        assert back([*ticks(world, TICK), world.step(on.WorkEnded(key(task), ENDED))]) == []
        world.dispatch(6 + task)
    assert world.machine.vitals().queue_limit == QUEUE_FLOOR


def test_what_was_started_is_not_handed_back_while_its_files_are_fetched() -> None:
    source = ArtifactSource("ns", key(9), "cu", ArtifactRef("out", 1, b"d"), "t")
    world = World(cpus=1)
    assert started(world.dispatch(0, work=spec(artifacts=(source,)))) == [0]
    assert back(ticks(world, 10 * PATIENCE_SECONDS)) == []
    assert world.phase(0) is Phase.STARTING


def test_an_agent_that_stood_still_counts_no_waiting() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    assert back([world.step(after=max(AWAY_SECONDS, PATIENCE_SECONDS) + TICK)]) == []
    assert back(ticks(world, PATIENCE_SECONDS - TICK)) == []
    assert back([world.step(after=TICK)]) == [1]


def test_a_disk_that_refuses_keeps_what_waits() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    world.step(on.DiskState(writable=False))
    assert back(ticks(world, 2 * PATIENCE_SECONDS)) == []
    assert back([world.step(on.DiskState(writable=True))]) == [1]


def test_nobody_is_asked_to_wait_here_until_a_place_came_free() -> None:
    world = World(cpus=1)
    world.dispatch(0, 1)
    assert world.machine.vitals().queue_limit == QUEUE_FLOOR
    ticks(world, PATIENCE_SECONDS)
    assert world.machine.vitals().queue_limit == 0
    world.step(on.WorkEnded(key(0), ENDED))
    assert world.machine.vitals().queue_limit == QUEUE_FLOOR
