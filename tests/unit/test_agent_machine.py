"""The agent's machine in its circumstances: drains, restores, full disks (PROTOCOL S5, J12), and laws over all moves (F4)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_agent.core import events as on
from cluster_agent.core.commands import DropStream, KillAll, SendHello, SendReports, StartWork
from cluster_agent.core.model import AgentState, Ended, Epoch, Mark, Outcome, Phase
from cluster_agent.core.records import EpochRaised, Forgotten, MarkRaised, apply, snapshot
from tests.unit.agent_machine_world import ENDED, F, World, key, none, started, the


def test_j12_the_highest_mark_is_kept_and_said() -> None:
    world = World()
    world.dispatch(0, mark=Mark(1, 10, "x"))
    assert not any(isinstance(r, MarkRaised) for r in world.dispatch(1, mark=Mark(1, 9, "y")).records)
    assert not any(isinstance(r, MarkRaised) for r in world.dispatch(1, mark=Mark(1, 10, "z")).records)
    world.dispatch(1, mark=Mark(2, 1, "w"))
    assert the(world.session(), SendHello).marks == (("s0", Mark(2, 1, "w")),)


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
    assert started(world.dispatch(1, number=2)) == [1], "the same number comes again (J7)"


def test_a_strange_federation_is_not_joined() -> None:
    world = World()
    world.step(on.StreamOpened(9))
    assert not none(world.step(on.Welcomed(9, 2, False, "cu", "other", F, 5.0)), DropStream)
    assert world.machine.state.federation_uid == "fu"


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
