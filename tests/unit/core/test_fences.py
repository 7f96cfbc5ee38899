"""An attempt's fence is of the batch that placed it, whatever incarnation it is shown in later (PROTOCOL F1, J12)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from control_plane.agent_codec import DispatchWriter
from control_plane.core.commands import Held
from control_plane.core.events import RunImage
from control_plane.core.inventory import Phase
from control_plane.core.model import AttemptId, AttemptState, Evidence, Outcome, Stamp, TaskState
from control_plane.core.shard import RunShard
from control_plane.services import translate
from control_plane.slots import OwnedShard
from tests.unit.core.shard_kit import Shard, facts, generation, task


def placed_before_a_restore() -> tuple[Shard, AttemptId]:
    """`t` has an attempt of incarnation 1; the store is in incarnation 2 now."""
    shard = Shard(facts("a"))
    shard.create(task("t"))
    shard.grant()
    attempt = shard.only()
    shard.incarnation = 2
    shard.do()
    return shard, attempt


def dispatched(shard: Shard, attempt: AttemptId) -> str:
    """The fence that its agent is told now."""
    owned = OwnedShard(
        id="00",
        machine=shard.machine,
        seq=shard.seq,
        nonce="nonce",
        incarnation=shard.incarnation,
        epoch_revision=9,
        owner_value=b"",
    )
    view = shard.machine.dispatch(attempt)
    assert view is not None
    writer = DispatchWriter(owned, 1)
    writer.add(attempt, view)
    (dispatch,) = writer.message(1).dispatches
    return dispatch.fence


def shown(shard: Shard) -> list[str]:
    """The fences that clients and history are told."""
    return [attempt.fence for attempt in translate.task(shard.task(), str).attempts]


def test_f1_agents_are_told_the_fence_of_the_placement() -> None:
    shard, attempt = placed_before_a_restore()
    assert dispatched(shard, attempt) == "1.1"


def test_f1_clients_are_told_the_fence_of_the_placement() -> None:
    shard, attempt = placed_before_a_restore()
    assert shown(shard) == ["1.1"]
    shard.finish(attempt, Outcome.LOST)
    shard.later(60)
    shard.grant()
    assert shown(shard) == ["1.1", "2.2"]
    assert dispatched(shard, shard.only()) == "2.2"
    shard.finish(shard.only())
    assert shard.states() == [TaskState.SUCCEEDED]
    assert [view.fence for view in shard.machine.run_record("r1").tasks[0].attempts] == ["1.1", "2.2"]


@pytest.mark.parametrize("rebuild", [Shard.replayed, Shard.restored])
def test_f1_a_takeover_changes_no_fence(rebuild: Callable[[Shard], RunShard]) -> None:
    shard, attempt = placed_before_a_restore()
    said = list(shard.machine.dump())
    shard.machine = rebuild(shard)
    assert shown(shard) == [dispatched(shard, attempt)] == ["1.1"]
    assert list(shard.machine.dump()) == said


@pytest.mark.parametrize("phase", [None, Phase.QUEUED, Phase.VOID])
@pytest.mark.parametrize("number", [1, 2])
def test_j12_what_had_not_started_before_a_restore_is_never_started_under_its_old_fence(
    number: int, phase: Phase | None
) -> None:
    """Its agent may have reported it, and forgotten it, after the backup; later attempts may have run then (F1, F4)."""
    shard, attempt = placed_before_a_restore()
    if number == 2:
        shard.fleet(facts("a", generation(1), generation(2)))
    listed = [] if phase is None else [Held(attempt, 1, phase)]
    verdict = shard.inventory(*listed, number=number, incarnation=2)
    assert attempt not in (*verdict.adopted, *verdict.confirm, *verdict.resend, *verdict.orphans)
    view = shard.machine.attempt(attempt)
    assert view is not None
    assert (view.state, view.evidence, view.stopping) == (AttemptState.LOST, Evidence.REPORTED, phase is not None)
    shard.later(60)
    shard.grant()
    assert shown(shard) == ["1.1", "2.2"]


@pytest.mark.parametrize("phase", [Phase.RUNNING, Phase.FINISHED, Phase.STOPPING])
def test_j12_what_had_started_before_a_restore_goes_on(phase: Phase) -> None:
    shard, attempt = placed_before_a_restore()
    shard.inventory(Held(attempt, 1, phase), incarnation=2)
    assert shard.only() == attempt
    assert shard.task().state is TaskState.PLACED


@pytest.mark.parametrize("incarnation", [0, 1])
def test_j12_an_inventory_from_before_the_restore_proves_nothing(incarnation: int) -> None:
    shard, attempt = placed_before_a_restore()
    assert shard.inventory(incarnation=incarnation).resend == (attempt,)


def test_j9_images_without_the_incarnation_take_the_snapshots() -> None:
    shard, attempt = placed_before_a_restore()
    shard.cancel()
    assert shard.machine.attempt(attempt) is not None
    machine = RunShard()
    for event in shard.machine.dump():
        old = _without_incarnations(event) if isinstance(event, RunImage) and event.run else event
        machine.apply(old, Stamp(shard.now, "snapshot", shard.seq, 7))
    machine.validate()
    view = machine.attempt(attempt)
    assert view is not None
    assert (view.fence, view.live, view.stopping) == ("7.1", False, True)
    assert list(machine.stops_on("a")) == [attempt]


def _without_incarnations(event: RunImage) -> RunImage:
    """As versions wrote it that did not keep them."""
    image = json.loads(event.image)
    image["attempts"] = [[*row[:17], *row[-2:]] for row in image["attempts"]]
    return replace(event, image=json.dumps(image).encode())
