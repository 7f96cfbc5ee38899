"""What the agent starts behind what runs, and whose place it gets (PROTOCOL G5, C3, C4; DESIGN 13)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster_agent.core import events as on
from cluster_agent.core.commands import SendReports, StartOrder, StartWork, Step, StopWork, WidenWork
from cluster_agent.core.lanes import AHEAD_MOST, AHEAD_SECONDS
from cluster_agent.core.model import ArtifactRef, ArtifactSource, Demand, Ended, Outcome, Phase, PythonCall, WorkSpec
from tests.unit.agent_machine_world import ENDED, World, key, none, spec, started, the

SHORT = 0.001


def call(function: str = "m:f", cpu: int = 1000, run: str = "namespaces/a/runs/r") -> WorkSpec:
    """A python task."""
    return spec(cpu, argv=(), run=run, python=PythonCall(function, "[]", (), "c0de", b"zip"))


def learned(cpus: int = 2, seconds: float = SHORT, work: WorkSpec | None = None) -> World:
    """An agent that has seen one such call: task 99."""
    world = World(cpus)
    world.dispatch(99, work=work or call())
    end(world, 99, seconds)
    world.settle(99)
    return world


def end(world: World, task: int, seconds: float = SHORT) -> Step:
    """The executor tells the end of a call."""
    return world.step(on.WorkEnded(key(task), ENDED, seconds))


def orders(step: Step) -> list[StartOrder]:
    """What starts."""
    return [order for action in step.actions if isinstance(action, StartWork) for order in action.orders]


def slots(step: Step) -> dict[int, int]:
    """How many may run at once, as told with each start."""
    return {order.key.task: order.slots for order in orders(step)}


def free(world: World) -> int:
    """Free CPU in thousandths."""
    return sum(shape.cpu_millis * shape.count for shape in world.machine.vitals().shapes)


def test_g5_short_calls_start_behind_their_like_when_there_is_no_room() -> None:
    world = learned()
    assert slots(world.dispatch(*range(6), work=call())) == {0: 1, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2}
    assert free(world) == 0
    assert {world.phase(task) for task in range(6)} == {Phase.STARTING}


def test_g5_what_was_never_seen_is_not_started_ahead() -> None:
    world = World(cpus=1)
    assert started(world.dispatch(0, 1, work=call())) == [0]
    assert world.phase(1) is Phase.QUEUED


@pytest.mark.parametrize(
    "other",
    [
        call("m:g"),
        call(run="namespaces/b/runs/r"),
        call(cpu=500),
        replace(call(), python=PythonCall("m:f", "[]", ("numpy",), "c0de", b"zip")),
        replace(call(), python=PythonCall("m:f", "[]", (), "0ther", b"zip")),
        spec(),
    ],
)
def test_g5_only_behind_its_like(other: WorkSpec) -> None:
    world = learned(cpus=1)
    world.dispatch(0, work=call())
    assert started(world.dispatch(1, work=other)) == []


def test_g5_no_more_than_a_few_milliseconds_of_learned_work() -> None:
    world = learned(cpus=1, seconds=AHEAD_SECONDS / 4)
    assert len(started(world.dispatch(*range(20), work=call()))) == 1 + 4
    assert len(started(end(world, 0, AHEAD_SECONDS / 4))) == 1
    long = learned(cpus=1, seconds=AHEAD_SECONDS * 2)
    assert len(started(long.dispatch(*range(5), work=call()))) == 1
    shortest = learned(cpus=1, seconds=0.0)
    assert len(started(shortest.dispatch(*range(100), work=call()))) == 1 + AHEAD_MOST


def test_g5_one_long_run_stops_the_prefetch_for_a_while() -> None:
    world = learned(cpus=1)
    world.dispatch(0, work=call())
    end(world, 0, 1.0)
    world.dispatch(1, work=call())
    assert started(world.dispatch(2, work=call())) == []
    task = 3
    while not started(end(world, task - 2)) or world.machine.state.attempts[key(task - 1)].phase is Phase.QUEUED:
        world.dispatch(task, work=call())
        task += 1
        assert task < 60
    assert free(world) == 0


def test_the_order_of_the_queue_is_kept() -> None:
    world = learned(cpus=1)
    world.dispatch(0, work=call())
    world.dispatch(1, work=call("m:other"))
    assert started(world.dispatch(2, work=call())) == [], "it would overtake"


def test_a_place_passes_on_and_is_given_back_by_the_last() -> None:
    world = learned(cpus=1)
    world.dispatch(0, 1, 2, work=call())
    for task in range(3):
        assert free(world) == 0
        end(world, task)
    assert free(world) == 1000


def test_room_elsewhere_goes_first_to_who_waits_behind() -> None:
    world = learned(cpus=2)
    world.dispatch(10, work=spec())
    world.dispatch(0, 1, work=call())
    world.dispatch(2, work=spec())
    step = world.step(on.WorkEnded(key(10), ENDED, 5.0))
    assert the(step, WidenWork) == WidenWork(key(1), 2)
    assert started(step) == []
    assert free(world) == 0
    end(world, 0)
    end(world, 1)
    assert world.phase(2) is Phase.STARTING


def test_f8_a_stop_of_one_that_waits_frees_no_place() -> None:
    world = learned(cpus=1)
    world.dispatch(0, 1, 2, work=call())
    assert the(world.stop(1), StopWork).keys == (key(1),)
    world.step(on.WorkEnded(key(1), Ended(Outcome.STOPPED)), on.WorkStopped(key(1)))
    assert free(world) == 0
    end(world, 0)
    assert free(world) == 0
    end(world, 2)
    assert free(world) == 1000


def test_f4_a_call_that_waits_and_is_gone_at_the_census_is_lost() -> None:
    world = learned(cpus=1)
    world.dispatch(0, 1, work=call())
    world.step(on.ExecutorLost())
    world.step(on.Census({key(0): 1}, ()))
    assert world.phase(1) is Phase.STOPPING
    report = the(world.step(on.WorkStopped(key(1))), SendReports)
    assert [ended.outcome for _, ended in report.finished] == [Outcome.LOST]


def test_a_census_does_not_count_twice_what_waits() -> None:
    world = learned(cpus=2)
    world.dispatch(0, 1, 2, 3, work=call())
    world.step(on.ExecutorLost())
    world.step(on.Census(dict.fromkeys((key(task) for task in range(4)), 1), ()))
    for task in range(4):
        end(world, task)
    assert free(world) == 2000


def test_a_new_agent_knows_no_lanes_and_is_careful() -> None:
    world = learned(cpus=1)
    world.dispatch(0, 1, work=call())
    again = World(1, leased=False, state=world.machine.state)
    again.step(on.Census({key(0): 1, key(1): 1}, ()))
    assert free(again) == 0
    end(again, 0)
    assert free(again) == 0
    end(again, 1)
    assert free(again) == 1000


def test_g1_beside_work_of_an_earlier_agent_a_call_with_a_place_starts_at_once() -> None:
    """The executor may count that work in the same environment: told "one at once", it would hold ours back for hours."""
    before = learned(cpus=2)
    before.dispatch(0, work=call())
    world = World(2, leased=False, state=before.machine.state)
    world.step(on.Census({key(0): 1}, ()))
    world.session(2)
    world.ack(2)
    assert slots(world.dispatch(1, generation=2, work=call())) == {1: 0}
    end(world, 1)
    world.dispatch(2, generation=2, work=call())
    assert started(world.dispatch(3, generation=2, work=call())) == [], "behind whom is not known"
    end(world, 0)
    assert slots(world.dispatch(4, 5, generation=2, work=call())) == {4: 2, 5: 2}


def test_a_call_that_waits_for_files_starts_at_once_when_they_are_here() -> None:
    """By then another number of its like may run than when it got its place."""
    world = learned(cpus=2)
    maker = ArtifactSource("a", key(7), "cu", ArtifactRef("x", 1, b"d" * 32), "t")
    assert slots(world.dispatch(0, work=replace(call(), artifacts=(maker,)))) == {0: 0}
    assert slots(world.dispatch(1, 2, work=call())) == {1: 2, 2: 2}


moves = st.lists(
    st.tuples(st.sampled_from(["call", "other", "end", "stop", "refuse", "long"]), st.integers(0, 30)), max_size=80
)


@settings(max_examples=100, deadline=None)
@given(moves)
def test_law_places_are_neither_lost_nor_made(script: Sequence[tuple[str, int]]) -> None:
    """At the end of everything all room is free; on the way no more is told to run at once than there is room."""
    world = learned(cpus=3)
    task = 0
    alive: list[int] = []
    for move, number in script:
        step = None
        if move in ("call", "other"):
            step = world.dispatch(task, work=call() if move == "call" else call("m:g", cpu=1500))
            task += 1
        elif alive:
            which = alive[number % len(alive)]
            if move in ("end", "long"):
                step = end(world, which, SHORT if move == "end" else 1.0)
            elif move == "refuse":
                step = world.step(on.WorkRefused(key(which), "no"))
            else:
                world.stop(which)
                step = world.step(on.WorkEnded(key(which), Ended(Outcome.STOPPED)), on.WorkStopped(key(which)))
        if step is not None:
            assert all(1 <= order.slots <= 3 for order in orders(step))
        alive = [a.key.task for a in world.machine.state.attempts.values() if a.phase is Phase.STARTING]
    while alive:
        for which in alive:
            end(world, which)
        alive = [a.key.task for a in world.machine.state.attempts.values() if a.phase is Phase.STARTING]
    assert not world.machine.vitals().attempts
    assert free(world) == 3000


def test_a_process_task_has_no_lane() -> None:
    world = learned(cpus=1)
    step = world.dispatch(0, work=spec())
    assert slots(step) == {0: 0}
    assert none(step, WidenWork)
    assert Demand(1000) == orders(step)[0].spec.demand


def test_a_long_call_that_ended_while_the_executor_was_away_is_not_learned_as_short() -> None:
    world = World(1)
    world.dispatch(0, work=call())
    world.step(on.ExecutorLost())
    world.step(on.Census({}, (on.WorkEnded(key(0), ENDED, 3600.0),)))
    assert started(world.dispatch(1, 2, work=call())) == [1]
