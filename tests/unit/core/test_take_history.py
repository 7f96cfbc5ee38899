"""A finished run that a restored store shows as live takes history's outcome (PROTOCOL J12; F8, J10)."""

from __future__ import annotations

import pytest

from control_plane.core.commands import CreateRun, Refused, TakeHistory
from control_plane.core.model import RunState
from tests.unit.core.shard_kit import NO_REQUEST, Shard, facts, task


def test_j12_the_live_state_goes_and_what_lives_of_it_is_stopped() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"), task("y"), task("child", 0))
    shard.create(task("z"), uid="r2")
    shard.grant("a", 3)
    running = [shard.only(0), shard.only(1)]
    other = shard.only(0, "r2")
    shard.do(TakeHistory("r1", RunState.SUCCEEDED))
    assert shard.machine.run_by_uid("r1") is None
    assert shard.machine.outbox.finished == ["r1"]
    assert set(shard.machine.stops_on("a")) == set(running), "F8: until their agent says so"
    assert list(shard.machine.live_on("a")) == [other]
    assert shard.machine.demand() == []
    shard.settled()


@pytest.mark.parametrize("snapshot", [False, True])
def test_j12_a_successor_knows_the_stops_and_the_taken_name(snapshot: bool) -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"))
    shard.grant("a")
    running = shard.only()
    shard.do(TakeHistory("r1", RunState.FAILED))
    shard.take_over(snapshot=snapshot)
    assert list(shard.machine.stops_on("a")) == [running]
    with pytest.raises(Refused, match="exists already"):
        shard.do(CreateRun(NO_REQUEST, "ns", "run-r1", "r9", shard.now + 9.0, 0, (task("x"),), named=True))


def test_j12_what_is_final_or_unknown_here_is_left_alone() -> None:
    shard = Shard(facts("a"))
    shard.create(task("x"))
    shard.cancel()
    shard.do(TakeHistory("r1", RunState.SUCCEEDED), TakeHistory("r7", RunState.SUCCEEDED))
    assert shard.outcome() is RunState.CANCELLED
    assert shard.last() == []


def test_j12_thousands_that_live_are_stopped_in_storable_parts() -> None:
    shard = Shard(facts("a"))
    shard.create(*(task(f"t{i}") for i in range(1500)))
    shard.grant("a", 1500)
    shard.do(TakeHistory("r1", RunState.SUCCEEDED))
    assert len(tuple(shard.machine.stops_on("a"))) == 1500
    assert shard.machine.run_by_uid("r1") is None
