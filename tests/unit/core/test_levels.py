"""What starts from stored content goes only to agents that read of it (PROTOCOL J11): an older one would start it without."""

from __future__ import annotations

import pytest

from control_plane.core.capacity import Shape
from control_plane.core.commands import Finish, GenerationFenced, SavedCheckpoint, TakeReports
from control_plane.core.events import ARTIFACTS_LEVEL
from control_plane.core.model import (
    Admission,
    ArtifactRef,
    AttemptId,
    ClusterFacts,
    Evidence,
    Generation,
    Group,
    Health,
    Outcome,
    PythonCall,
    Resources,
    RetryPolicy,
)
from control_plane.core.offers import Offer, Plan, Snapshot, Want
from control_plane.core.scheduler import place
from control_plane.demand_wire import decode_group, encode_group
from tests.unit.core.shard_kit import Shard, facts, generation, task

OLD, NEW = 1, ARTIFACTS_LEVEL
NOW = 1000.0
REF = ArtifactRef("model", 5, b"d" * 32)
AGAIN = RetryPolicy(max_attempts=5, initial_backoff=0.0)


def offer(name: str, level: int, cpus: int = 8) -> Offer:
    generations = (Generation(1, "boot", "journal"),)
    of = ClusterFacts(f"u-{name}", name, Health.READY, Admission.OPEN, generations, agent_version=f"0.{level}.0")
    return Offer(of, (Shape(1, cpus * 1000, 1 << 40),), level=level)


def group(level: int) -> Group:
    return Group("ns", 0, Resources(1000), False, (), (), (), level)


def want(of: Group, count: int = 1) -> Want:
    return Want("00", of.key(), of, count, NOW + 500, NOW - 1)


def plan_of(of: Group, *offers: Offer) -> Plan:
    return place(Snapshot(offers, (want(of, 4),)), NOW)


# -- the leader --------------------------------------------------------------------------------------------------------


def test_only_agents_of_the_level_are_permitted() -> None:
    plan = plan_of(group(NEW), offer("eu", OLD, cpus=100), offer("us", NEW))
    assert {grant.cluster for grant in plan.grants} == {"u-us"}
    assert not plan.reasons


def test_other_work_goes_anywhere() -> None:
    assert sum(grant.count for grant in plan_of(group(0), offer("eu", OLD, cpus=2), offer("us", 0, cpus=2)).grants) == 4


def test_what_waits_is_told_whose_agent_is_too_old() -> None:
    plan = plan_of(group(NEW), offer("eu", OLD), offer("us", 0))
    assert plan.grants == ()
    (reason,) = plan.reasons.values()
    assert "no cluster with an agent of feature level 2" in reason
    assert "eu runs 0.1.0, us runs 0.0.0" in reason


@pytest.mark.parametrize("level", [0, NEW])
def test_groups_travel_with_their_level_and_without_one_as_ever(level: int) -> None:
    assert decode_group(encode_group(group(level))) == group(level)
    assert encode_group(group(0)).count(",") + 1 == encode_group(group(NEW)).count(",")
    assert group(0).key() != group(NEW).key()


# -- the owner ---------------------------------------------------------------------------------------------------------


def levels(shard: Shard) -> list[int]:
    """Of the groups that wait, in order."""
    return sorted(line.group.level for line in shard.machine.demand(shard.now) for _ in range(line.count))


def publish(shard: Shard, attempt: AttemptId) -> None:
    finish = Finish(attempt, Outcome.SUCCEEDED, 0, b"", "", 1.0, 2.0, (REF,))
    shard.do(TakeReports(shard.cluster_of(attempt), 1, finished=(finish,)))


def save(shard: Shard, attempt: AttemptId) -> None:
    saved = (SavedCheckpoint(attempt, ArtifactRef("checkpoint-1", 5, b"d" * 32)),)
    shard.do(TakeReports(shard.cluster_of(attempt), 1, checkpoints=saved))


def test_a_child_of_artifacts_asks_for_the_level_and_its_sisters_do_not() -> None:
    shard = Shard(facts("a"))
    shard.create(task("parent"), task("child", 0), task("sister"), task("cousin", 2))
    shard.grant(count=2)
    assert levels(shard) == []
    publish(shard, shard.only(0))
    assert levels(shard) == [NEW]
    shard.finish(shard.only(2))
    assert levels(shard) == [NEW], "the sister's place served the cousin at once (C2)"
    assert shard.live(3)
    shard.grant()
    assert shard.live(1)


def test_a_place_that_files_freed_serves_the_next_that_needs_them() -> None:
    shard = Shard(facts("a"))
    shard.create(task("parent"), task("one", 0), task("two", 0))
    shard.grant()
    publish(shard, shard.only(0))
    shard.grant()
    shard.finish(shard.only(1))
    assert shard.live(2), "one commit a hop (C2)"


def test_stored_code_asks_for_the_level_from_the_start() -> None:
    shard = Shard(facts("a"))
    carried = task("carried", argv=(), python=PythonCall("m:f", "[]", code="ab" * 32, code_zip=b"zip"))
    stored = task("stored", argv=(), python=PythonCall("m:f", "[]", code="ab" * 32))
    shard.create(carried, stored)
    assert levels(shard) == [0, NEW]


def level_of(shard: Shard, attempt: AttemptId) -> int:
    """What its room is accounted under."""
    of = shard.machine.group(shard.machine.group_of(attempt) or "")
    assert of is not None
    return of.level


def test_a_checkpoint_that_comes_while_the_replacement_waits_still_counts() -> None:
    """A lost cluster's last reports may be committed after the task was queued again. What its attempt holds moves along: the
    invariants, which every batch here checks, count room by group."""
    shard = Shard(facts("a"), facts("b"))
    shard.create(task("t", retry=AGAIN))
    shard.grant("a")
    first = shard.only()
    shard.fleet(facts("a", generation(1, evidence=Evidence.REPORTED), health=Health.LOST))
    shard.do(GenerationFenced("a", 1, Evidence.REPORTED))
    shard.settled()
    assert levels(shard) == [0]
    save(shard, first)
    shard.grant("b")
    assert shard.live() == [first], "what was permitted is for a group that it left"
    assert levels(shard) == [NEW]
    shard.grant("b")
    second = shard.only()
    assert second.n == 2
    assert level_of(shard, second) == NEW


def test_a_retry_from_a_checkpoint_asks_for_the_level() -> None:
    shard = Shard(facts("a"))
    shard.create(task("t", retry=RetryPolicy(max_attempts=5, initial_backoff=1.0)))
    shard.grant()
    first = shard.only()
    save(shard, first)
    assert level_of(shard, first) == 0, "it did not start from one"
    shard.finish(first, Outcome.FAILED)
    shard.later(5)
    assert levels(shard) == [NEW]
    shard.grant()
    assert level_of(shard, shard.only()) == NEW


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_takeover_asks_for_the_same(snapshot: bool) -> None:
    shard = Shard(facts("a"))
    shard.create(task("parent"), task("child", 0), task("other"))
    shard.grant(count=2)
    publish(shard, shard.only(0))
    assert levels(shard) == [NEW]
    shard.take_over(snapshot=snapshot)
    assert levels(shard) == [NEW]
    shard.grant()
    assert level_of(shard, shard.only(1)) == NEW
    shard.take_over(snapshot=snapshot)
    shard.finish(shard.only(1))
    shard.finish(shard.only(2))
    assert shard.run().state.final
