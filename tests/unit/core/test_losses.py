"""One test per rule of loss, adoption, stop, drain and hedge (PROTOCOL F2, F6, F7, F8, S3, S5, S6, S7)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from control_plane.core.commands import (
    Archived,
    Finish,
    GenerationFenced,
    Grant,
    Held,
    TakeGrants,
    TakeReports,
    TakeTable,
)
from control_plane.core.events import AttemptsAdopted, AttemptsLost, AttemptsPlaced, StopsOrdered
from control_plane.core.inventory import Phase
from control_plane.core.losses import REVIEWS
from control_plane.core.model import (
    Admission,
    AttemptId,
    AttemptState,
    ClusterFacts,
    Evidence,
    FleetTable,
    Health,
    OnClusterLost,
    Outcome,
    RetryPolicy,
    RunState,
    TaskState,
)
from tests.unit.core.shard_kit import Shard, facts, generation, task

WAIT, NEVER = OnClusterLost.WAIT, OnClusterLost.NEVER_RERUN


def placed(**changes: Any) -> tuple[Shard, AttemptId]:
    """One task, placed on cluster a; b is there too."""
    shard = Shard(facts("a"), facts("b"))
    shard.create(task("t", **changes))
    shard.grant("a")
    return shard, shard.only()


def lose(shard: Shard, evidence: Evidence = Evidence.TIMED, cluster: str = "a", *, fence: bool = True) -> None:
    """ClusterLost of the current generation, and the guard time."""
    row = shard.table.clusters[cluster]
    ended = replace(row.generations[-1], evidence=evidence)
    shard.fleet(replace(row, health=Health.LOST, generations=(*row.generations[:-1], ended)))
    if fence:
        shard.do(GenerationFenced(cluster, ended.number, evidence))
        shard.settled()


def back(shard: Shard, boot: str = "boot", journal: str = "disk", cluster: str = "a") -> None:
    """The cluster opens its next generation."""
    row = shard.table.clusters[cluster]
    new = generation(row.generation + 1, boot, journal)
    shard.fleet(replace(row, health=Health.READY, generations=(*row.generations, new)))


def held(id_: AttemptId, phase: Phase, number: int = 1) -> Held:
    return Held(id_, number, phase)


def test_f2_a_member_leaves_in_the_batch_that_places_its_replacement() -> None:
    shard, first = placed()
    lose(shard)
    assert shard.only() == first
    assert shard.machine.demand()[0].count == 1
    shard.grant("b")
    assert [type(event) for event in shard.last()] == [AttemptsLost, AttemptsPlaced]
    assert shard.only().n == 2
    assert shard.task().attempts[0].state is AttemptState.LOST


def test_f2_until_then_its_own_result_is_accepted() -> None:
    shard, first = placed()
    lose(shard)
    shard.finish(first, result=b"made it")
    assert shard.task().result == b"made it"
    assert shard.machine.demand() == []


def test_f2_after_it_the_late_result_is_refused() -> None:
    shard, first = placed()
    lose(shard)
    shard.grant("b")
    shard.finish(first, result=b"late")
    assert shard.run().refused_results == 1
    shard.finish(shard.only(), result=b"good")
    assert shard.task().result == b"good"


def test_s5_nothing_is_replaced_before_the_guard_time_is_over() -> None:
    shard, first = placed()
    lose(shard, fence=False)
    assert shard.machine.demand() == []
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    assert shard.machine.demand()[0].count == 1
    assert shard.only() == first


def test_s5_a_takeover_forgets_the_guard_time_and_waits_again() -> None:
    shard, _ = placed()
    lose(shard)
    shard.take_over()
    assert shard.machine.demand() == []
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    shard.settled()
    assert shard.machine.demand()[0].count == 1


@pytest.mark.parametrize(
    "row",
    [
        facts("b", generation(1, evidence=Evidence.TIMED)),
        facts("b", generation(1), generation(2)),
        facts("b", health=Health.SUSPECT),
        facts("b", health=Health.QUARANTINED),
        facts("b", admission=Admission.CORDONED),
        facts("b", admission=Admission.DRAINING),
    ],
    ids=["ended", "not current", "suspect", "quarantined", "cordoned", "draining"],
)
def test_s5_nothing_is_placed_where_work_must_not_go(row: ClusterFacts) -> None:
    shard = Shard(facts("a"), facts("b"))
    shard.create(task("t"))
    shard.grant("b", key="nothing")
    key = shard.machine.demand()[0].key
    table = replace(shard.table, seq=99, clusters={**shard.table.clusters, "b": row})
    shard.do(TakeTable(table), TakeGrants(1, (Grant("b", 1, key, 1),)))
    assert not shard.events(AttemptsPlaced)


def test_s5_an_older_table_is_ignored() -> None:
    shard, _ = placed()
    lose(shard)
    newest = shard.table
    shard.do(TakeTable(FleetTable(1, {"a": facts("a")})))
    assert shard.machine._state.table == newest


def test_s5_generations_that_the_table_forgot_are_fenced_with_a_later_one() -> None:
    shard, _ = placed()
    shard.fleet(facts("a", generation(40, evidence=Evidence.TIMED), generation(41)))
    shard.do(GenerationFenced("a", 40, Evidence.TIMED))
    shard.settled()
    shard.grant("b")
    (lost,) = shard.events(AttemptsLost)
    assert isinstance(lost, AttemptsLost)
    assert lost.evidence is Evidence.NONE


@pytest.mark.parametrize(
    ("evidence", "overlap"), [(Evidence.REPORTED, False), (Evidence.TIMED, False), (Evidence.NONE, True)]
)
def test_f6_overlap_is_said_before_the_copy_starts(evidence: Evidence, overlap: bool) -> None:
    shard, _ = placed()
    lose(shard, evidence)
    shard.grant("b")
    attempts = shard.task().attempts
    assert attempts[0].evidence is evidence
    assert attempts[1].overlap is overlap


def test_f6_a_third_copy_says_overlap_while_the_first_may_still_run() -> None:
    shard, first = placed(retry=RetryPolicy(max_attempts=3))
    lose(shard, Evidence.NONE)
    shard.grant("b")
    shard.finish(shard.only(), Outcome.FAILED)
    shard.later(5.0)
    shard.grant("b")
    assert shard.task().attempts[2].overlap
    shard.do(TakeReports("a", 1, stopped=(first,)))
    lose(shard, Evidence.TIMED, "b")
    shard.fleet(facts("c"))
    shard.grant("c")
    assert not shard.task().attempts[3].overlap


@pytest.mark.parametrize("policy", [WAIT, NEVER])
@pytest.mark.parametrize("evidence", [Evidence.TIMED, Evidence.NONE])
def test_f7_kept_work_is_never_replaced_by_a_loss(policy: OnClusterLost, evidence: Evidence) -> None:
    shard, first = placed(on_cluster_lost=policy)
    told = shard.machine.dispatch(first)
    assert told is not None
    assert told.keep_at_fence
    lose(shard, evidence)
    assert shard.machine.demand() == []
    assert shard.only() == first
    assert list(shard.machine.stops_on("a")) == []


@pytest.mark.parametrize("policy", [WAIT, NEVER])
def test_f7_kept_work_is_replaced_when_its_death_is_reported(policy: OnClusterLost) -> None:
    shard, _ = placed(on_cluster_lost=policy)
    lose(shard, Evidence.REPORTED)
    shard.grant("b")
    assert shard.only().n == 2


def test_f7_kept_work_is_replaced_when_the_host_was_rebooted() -> None:
    shard, _ = placed(on_cluster_lost=WAIT)
    lose(shard, Evidence.TIMED)
    back(shard, boot="another")
    shard.settled()
    shard.grant("b")
    assert shard.only().n == 2
    assert shard.task().attempts[0].evidence is Evidence.REPORTED


@pytest.mark.parametrize("policy", [WAIT, NEVER])
def test_f7_another_host_under_the_clusters_name_proves_no_reboot(policy: OnClusterLost) -> None:
    """Kept work is not stopped at F: it may still run on the first host, which only its own journal can speak for (S6)."""
    shard, first = placed(on_cluster_lost=policy)
    lose(shard, Evidence.TIMED)
    back(shard, boot="another", journal="another")
    shard.settled()
    shard.grant("b")
    assert shard.only() == first


def test_f7_waiting_work_is_adopted_when_its_cluster_lists_it() -> None:
    shard, first = placed(on_cluster_lost=WAIT)
    lose(shard)
    back(shard)
    verdict = shard.inventory(held(first, Phase.RUNNING), number=2)
    assert verdict.adopted == (first,)
    assert shard.events(AttemptsAdopted) == [AttemptsAdopted("r1", 2, (0,), (1,))]
    shard.finish(first, result=b"patience")
    assert shard.task().result == b"patience"


def test_f7_the_deadline_stops_kept_work() -> None:
    shard, first = placed(on_cluster_lost=NEVER)
    lose(shard)
    shard.later(1000.0)
    assert shard.outcome() is RunState.DEADLINE_EXCEEDED
    assert list(shard.machine.stops_on("a")) == [first]


def test_f8_a_lost_attempt_is_stopped_if_its_cluster_comes_back() -> None:
    shard, first = placed()
    lose(shard)
    shard.grant("b")
    assert list(shard.machine.stops_on("a")) == [first]


def test_f8_absence_confirms_only_a_stop_the_agent_had() -> None:
    shard, first = placed()
    shard.cancel()
    shard.inventory()
    assert list(shard.machine.stops_on("a")) == [first]
    shard.inventory(stops_sent=(first,))
    assert list(shard.machine.stops_on("a")) == []


def test_f8_a_listed_tombstone_confirms_a_dying_process_does_not() -> None:
    shard, first = placed()
    shard.cancel()
    shard.inventory(held(first, Phase.STOPPING), stops_sent=(first,))
    assert list(shard.machine.stops_on("a")) == [first]
    shard.inventory(held(first, Phase.TOMBSTONED))
    assert list(shard.machine.stops_on("a")) == []


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.VOID, Phase.RUNNING])
def test_f8_what_is_listed_and_not_live_is_stopped_again(phase: Phase) -> None:
    shard, first = placed()
    shard.cancel()
    shard.do(TakeReports("a", 1, stopped=(first,)))
    shard.inventory(held(first, phase))
    assert shard.last()[0] == StopsOrdered("r1", (0,), (1,), "its cluster lists it though it is not live")
    assert list(shard.machine.stops_on("a")) == [first]


def test_f8_what_is_listed_of_unknown_runs_is_an_orphan() -> None:
    shard, first = placed()
    shard.finish(first)
    shard.do(Archived("r1", shard.run().event_number))
    ghost = AttemptId("gone", 3, 1, "n")
    verdict = shard.inventory(held(first, Phase.RUNNING), held(ghost, Phase.QUEUED))
    assert verdict.orphans == (first, ghost)
    finished = shard.inventory(held(ghost, Phase.FINISHED))
    assert finished.orphans == ()


def test_f8_a_live_attempt_that_its_agent_tombstoned_leaves() -> None:
    shard, first = placed()
    shard.do(TakeReports("a", 1, stopped=(first,)))
    shard.settled()
    assert shard.task().state is TaskState.READY
    assert shard.task().attempts[0].state is AttemptState.STOPPED


def test_s6_a_missing_attempt_of_the_same_session_is_sent_again() -> None:
    shard, first = placed()
    assert shard.inventory().resend == (first,)
    assert shard.last() == []


def test_s6_a_missing_attempt_is_adopted_before_it_is_sent_again() -> None:
    shard, first = placed()
    lose(shard, fence=False)
    back(shard)
    verdict = shard.inventory(number=2)
    assert (verdict.adopted, verdict.resend) == ((first,), (first,))
    view = shard.machine.attempt(first)
    assert view is not None
    assert view.generation == 2


@pytest.mark.parametrize("phase", [Phase.QUEUED, Phase.VOID])
def test_f3_a_queued_attempt_is_confirmed_on_the_new_stream(phase: Phase) -> None:
    shard, first = placed()
    assert shard.inventory(held(first, phase)).confirm == (first,)


def test_s6_a_reinstalled_agents_silence_proves_nothing() -> None:
    shard, first = placed()
    lose(shard, fence=False)
    back(shard, journal="fresh")
    verdict = shard.inventory(number=2, journal="fresh")
    assert (verdict.adopted, verdict.resend) == ((), ())
    assert shard.only() == first
    assert not shard.events(AttemptsLost)


@pytest.mark.parametrize("policy", [OnClusterLost.RERUN_AFTER_FENCE, WAIT, NEVER])
def test_s6_another_boot_id_is_death_at_once(policy: OnClusterLost) -> None:
    shard, first = placed(on_cluster_lost=policy)
    lose(shard, Evidence.REPORTED, fence=False)
    back(shard, boot="another")
    shard.inventory(held(first, Phase.RUNNING), number=2, boot="another")
    (lost,) = shard.events(AttemptsLost)
    assert lost == AttemptsLost("r1", (0,), (1,), Evidence.REPORTED)
    assert shard.task().state is TaskState.READY


def test_s6_another_boot_id_under_another_journal_may_be_another_host_and_proves_nothing() -> None:
    shard, first = placed()
    lose(shard, Evidence.TIMED, fence=False)
    back(shard, boot="another", journal="another")
    shard.inventory(held(first, Phase.RUNNING), number=2, boot="another", journal="another")
    assert shard.only() == first
    assert not shard.events(AttemptsLost)


def test_s6_a_result_that_outlived_the_reboot_is_waited_for() -> None:
    shard, first = placed()
    lose(shard, Evidence.REPORTED, fence=False)
    back(shard, boot="another")
    shard.inventory(held(first, Phase.FINISHED), number=2, boot="another")
    shard.finish(first, result=b"kept on disk")
    assert shard.task().result == b"kept on disk"


def test_s6_a_stale_sessions_inventory_changes_nothing() -> None:
    shard, first = placed()
    lose(shard, fence=False)
    back(shard)
    verdict = shard.inventory(held(first, Phase.RUNNING), number=1)
    assert verdict.adopted == ()
    assert shard.last() == []


def test_s6_adoption_rescues_work_that_waited_for_a_replacement() -> None:
    shard, first = placed()
    lose(shard)
    back(shard)
    shard.inventory(held(first, Phase.RUNNING), number=2)
    shard.grant("b", key=shard.machine.group_of(first))
    assert shard.only() == first
    shard.settled()
    assert shard.machine.demand() == []


def test_s7_a_storm_holds_replacements_until_its_end() -> None:
    shard, first = placed()
    until = shard.now + 30.0
    row = facts("a", generation(1, evidence=Evidence.TIMED), health=Health.LOST)
    shard.fleet(row, storm_until=until)
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    shard.settled()
    assert shard.machine.demand() == []
    assert shard.machine.due() == until
    shard.later(30.0)
    assert shard.machine.demand()[0].count == 1
    assert shard.only() == first


def test_s7_a_task_is_held_no_longer_than_its_own_slack() -> None:
    shard = Shard(facts("a"), facts("b"))
    shard.create(task("t", expected=90.0), deadline=100.0)
    shard.grant("a")
    shard.fleet(facts("a", generation(1, evidence=Evidence.TIMED), health=Health.LOST), storm_until=shard.now + 30.0)
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    shard.settled()
    assert shard.machine.demand() == []
    shard.later(10.0)
    assert shard.machine.demand()[0].count == 1


def test_j2_the_loss_of_a_big_cluster_is_looked_at_in_parts() -> None:
    shard = Shard(facts("a"), facts("b"))
    shard.create(*(task(f"t{i}") for i in range(REVIEWS + 100)))
    shard.grant("a", REVIEWS + 100)
    shard.settled()
    lose(shard, fence=False)
    shard.do(GenerationFenced("a", 1, Evidence.TIMED))
    assert shard.machine.due() == 0.0
    shard.settled()
    assert shard.machine.demand()[0].count == REVIEWS + 100


def test_losses_have_their_own_budget() -> None:
    shard, _ = placed(retry=RetryPolicy(max_attempts=1, max_infrastructure_losses=1))
    lose(shard)
    shard.grant("b")
    lose(shard, cluster="b")
    assert shard.outcome() is RunState.FAILED
    assert "lost 2 times" in shard.task().reason
    assert [a.state for a in shard.task().attempts] == [AttemptState.LOST, AttemptState.LOST]


def test_a_drain_stops_work_which_is_replaced_when_its_end_is_reported() -> None:
    shard, first = placed()
    shard.fleet(facts("a", admission=Admission.DRAINING))
    assert shard.only() == first
    assert list(shard.machine.stops_on("a")) == [first]
    assert shard.machine.dispatch(first) is None
    shard.finish(first, Outcome.STOPPED)
    shard.grant("b")
    assert shard.only().n == 2
    assert list(shard.machine.stops_on("a")) == [first]


def test_a_drain_leaves_what_an_operator_decides_and_what_could_not_finish_again() -> None:
    shard = Shard(facts("a"))
    shard.create(task("never", on_cluster_lost=NEVER), task("long", expected=900.0))
    shard.grant("a", 2)
    shard.later(200.0)
    shard.fleet(facts("a", admission=Admission.DRAINING))
    assert list(shard.machine.stops_on("a")) == []


def test_hedge_a_second_copy_starts_at_suspect_with_its_overlap_declared() -> None:
    shard, first = placed(hedge=True)
    shard.fleet(facts("a", health=Health.SUSPECT))
    shard.grant("b")
    assert shard.events(AttemptsPlaced)[-1] == AttemptsPlaced("r1", "b", 1, (0,), (2,), hedge=True, overlap=True)
    assert [id_.n for id_ in shard.live()] == [1, 2]
    assert shard.machine.demand() == []
    shard.finish(shard.live()[1], result=b"second")
    assert shard.task().result == b"second"
    assert list(shard.machine.stops_on("a")) == [first]


def test_hedge_one_failure_only_removes_its_member() -> None:
    shard, first = placed(hedge=True)
    shard.fleet(facts("a", health=Health.SUSPECT))
    shard.grant("b")
    shard.finish(first, Outcome.FAILED)
    assert [id_.n for id_ in shard.live()] == [2]
    assert shard.outcome() is RunState.RUNNING


def test_hedge_is_given_up_when_the_cluster_is_seen_again() -> None:
    shard, first = placed(hedge=True)
    shard.fleet(facts("a", health=Health.SUSPECT))
    key = shard.machine.demand()[0].key
    shard.fleet(facts("a"))
    shard.grant("b", key=key)
    shard.settled()
    assert shard.only() == first
    assert shard.machine.demand() == []


def test_hedge_both_lost_are_replaced_by_one() -> None:
    shard, _ = placed(hedge=True)
    shard.fleet(facts("a", health=Health.SUSPECT), facts("c"))
    shard.grant("b")
    lose(shard, cluster="a")
    assert shard.machine.demand() == []
    lose(shard, Evidence.NONE, cluster="b")
    shard.grant("c")
    assert [id_.n for id_ in shard.live()] == [3]
    assert shard.task().attempts[2].overlap


def test_without_hedge_a_suspect_cluster_costs_nothing() -> None:
    shard, first = placed()
    shard.fleet(facts("a", health=Health.SUSPECT))
    assert shard.machine.demand() == []
    assert shard.only() == first


def test_s1_an_agent_speaks_only_of_its_own_cluster() -> None:
    shard, first = placed()
    report = Finish(first, Outcome.SUCCEEDED, 0, b"not mine", "", 0.0, 0.0)
    acked = shard.do(TakeReports("b", 1, finished=(report,), rejected=((first, "full"),), stopped=(first,)))
    assert acked == (first,)
    assert shard.last() == []


def test_s5_the_same_table_is_told_again_only_while_something_lives() -> None:
    shard = Shard(facts("a"))
    shard.create(task("t"))
    seq = shard.table.seq
    assert shard.machine.levelled(seq)
    assert shard.machine.bare
    assert not shard.machine.levelled(seq + 1)
    shard.grant("a")
    assert not shard.machine.levelled(seq), "a level heals what was placed just before it"
    assert not shard.machine.bare
