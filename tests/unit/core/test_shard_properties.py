"""A run shard against a model of clusters that lie, repeat, forget, die and come back. After every step the invariants
I1 I2 I3 I6 I7 I12 I16 hold (`validate`), a takeover finds the same state (J1, J9), and nothing accepted is ever undone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from control_plane.core.commands import (
    Archived,
    DropGrants,
    Finish,
    GenerationFenced,
    Held,
    Refused,
    SavedCheckpoint,
    TakeReports,
    Tick,
)
from control_plane.core.events import CheckpointsCommitted
from control_plane.core.model import (
    Admission,
    ArtifactRef,
    AttemptId,
    AttemptState,
    Evidence,
    Generation,
    GraphTask,
    Health,
    OnClusterLost,
    Outcome,
    RetryPolicy,
    RunState,
    TaskSpec,
    TaskState,
    TriggerRule,
)
from tests.unit.core.shard_kit import Shard, facts

CLUSTERS = ("a", "b", "c")

artifact_names = st.sampled_from([(), (), ("x",), ("x", "y"), ("bad/name",)])

rarely = st.sampled_from([False, False, True])

specs = st.builds(
    TaskSpec,
    argv=st.just(("work",)),
    trigger=st.sampled_from([TriggerRule.ALL_SUCCEEDED, *TriggerRule]),
    retry=st.builds(
        RetryPolicy,
        max_attempts=st.integers(1, 3),
        initial_backoff=st.just(0.5),
        max_infrastructure_losses=st.integers(0, 3),
    ),
    expected=st.sampled_from([0.0, 1.0]),
    on_cluster_lost=st.sampled_from(OnClusterLost),
    hedge=st.booleans(),
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[GraphTask, ...]:
    size = draw(st.integers(1, 6))
    tasks = []
    for index in range(size):
        parents = draw(st.sets(st.integers(0, index - 1), max_size=2)) if index else set()
        spec = draw(specs)
        if not parents:
            spec = replace(spec, trigger=TriggerRule.ALL_SUCCEEDED)
        tasks.append(GraphTask(f"t{index}", tuple(sorted(parents)), spec))
    return tuple(tasks)


class ShardMachine(RuleBasedStateMachine):
    """The world: three clusters, any number of runs, one shard that is taken over now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.shard = Shard(*(facts(uid) for uid in CLUSTERS))
        self.known: list[AttemptId] = []
        self.placed_on: dict[AttemptId, str] = {}
        self.final: dict[tuple[str, int], tuple[TaskState, bytes]] = {}
        self.succeeded: dict[tuple[str, int], AttemptId] = {}
        self.confirmed: set[AttemptId] = set()
        self.runs = 0

    # --- the world moves ----------------------------------------------------------------------------------------------
    @initialize(tasks=graphs())
    def first(self, tasks: tuple[GraphTask, ...]) -> None:
        self.create(tasks, 500.0)
        self.shard.grant("a", 2)

    @rule(tasks=graphs(), deadline=st.sampled_from([20.0, 500.0]))
    def create(self, tasks: tuple[GraphTask, ...], deadline: float) -> None:
        if self.runs < 3:
            self.runs += 1
            self.shard.create(*tasks, uid=f"r{self.runs}", deadline=deadline)

    @rule(order=st.permutations(CLUSTERS), count=st.integers(1, 3))
    def grant(self, order: list[str], count: int) -> None:
        for cluster in order:
            self.shard.grant(cluster, count)

    @rule()
    def drop_grants(self) -> None:
        self.shard.do(DropGrants(1))

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0]))
    def time(self, seconds: float) -> None:
        self.shard.later(seconds)

    @rule(data=st.data(), really=st.sampled_from([False, False, False, True]))
    def cancel(self, data: st.DataObject, really: bool) -> None:
        if not really:
            return
        uid = f"r{data.draw(st.integers(1, self.runs))}"
        view = self.shard.machine.run_by_uid(uid)
        if view is None or (view.state.final and view.state is not RunState.CANCELLED):
            with pytest.raises(Refused):
                self.shard.cancel(uid)
        else:
            self.shard.cancel(uid)

    @rule()
    def archive(self) -> None:
        for uid in self.shard.machine.archivable():
            self.shard.do(Archived(uid, self.shard.run(uid).event_number))

    @rule(snapshot=st.booleans())
    def take_over(self, snapshot: bool) -> None:
        self.shard.take_over(snapshot=snapshot)

    # --- agents speak, also twice, late and out of order --------------------------------------------------------------
    @precondition(lambda self: self.known)
    @rule(
        data=st.data(), outcome=st.sampled_from([Outcome.SUCCEEDED, Outcome.SUCCEEDED, *Outcome]), again=st.booleans()
    )
    def finished(self, data: st.DataObject, outcome: Outcome, again: bool) -> None:
        id_ = data.draw(st.sampled_from(self.known))
        made = tuple(ArtifactRef(name, id_.n, bytes(32)) for name in data.draw(artifact_names))
        report = Finish(id_, outcome, 0, f"{id_.task}.{id_.n}".encode(), "said", self.shard.now, self.shard.now, made)
        acked = self.shard.do(TakeReports(self.placed_on[id_], 1, finished=(report,) * (2 if again else 1)))
        assert acked == (id_,)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def started_or_rejected(self, data: st.DataObject) -> None:
        id_ = data.draw(st.sampled_from(self.known))
        cluster = self.placed_on[id_]
        if data.draw(st.booleans()):
            self.shard.do(TakeReports(cluster, 1, started=((id_, self.shard.now),)))
        else:
            self.shard.do(TakeReports(cluster, 1, rejected=((id_, "full"),)))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), number=st.integers(1, 4))
    def saved(self, data: st.DataObject, number: int) -> None:
        """A checkpoint is taken exactly from a live attempt that has saved no later one."""
        id_ = data.draw(st.sampled_from(self.known))
        before = self.shard.machine.attempt(id_)
        told = SavedCheckpoint(id_, ArtifactRef(f"checkpoint-{number}", number, bytes(32)))
        self.shard.do(TakeReports(self.placed_on[id_], 1, checkpoints=(told,)))
        newer = before is not None and before.checkpoint < told.ref.name
        taken = any(isinstance(event, CheckpointsCommitted) for event in self.shard.last())
        assert taken == (before is not None and before.live and newer)

    @rule(cluster=st.sampled_from(CLUSTERS))
    def stopped(self, cluster: str) -> None:
        stops = tuple(self.shard.machine.stops_on(cluster))
        self.shard.do(TakeReports(cluster, 1, stopped=stops))
        assert not tuple(self.shard.machine.stops_on(cluster))
        self.confirmed.update(stops)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def foreign(self, data: st.DataObject) -> None:
        """Another cluster speaks of an attempt that is not its own."""
        id_ = data.draw(st.sampled_from(self.known))
        liar = next(uid for uid in CLUSTERS if uid != self.placed_on[id_])
        report = Finish(id_, Outcome.SUCCEEDED, 0, b"lie", "", 0.0, 0.0)
        self.shard.do(TakeReports(liar, 1, finished=(report,), stopped=(id_,)))
        assert not self.shard.last()

    @rule(data=st.data(), cluster=st.sampled_from(CLUSTERS), current=st.sampled_from([True, True, False]))
    def inventory(self, data: st.DataObject, cluster: str, current: bool) -> None:
        row = self.shard.table.clusters[cluster]
        session = row.generations[-1] if current else row.generations[0]
        mine = [id_ for id_ in self.known if self.placed_on[id_] == cluster]
        listed = data.draw(st.sets(st.sampled_from(mine))) if mine else set()
        held = [Held(id_, session.number, data.draw(st.integers(1, 6))) for id_ in sorted(listed)]
        verdict = self.shard.inventory(
            *held, cluster=cluster, number=session.number, boot=session.boot_id, journal=session.journal_uid
        )
        live = set(self.shard.machine.live_on(cluster))
        assert set(verdict.adopted) | set(verdict.confirm) | set(verdict.resend) <= live
        assert not set(verdict.orphans) & live
        assert not set(verdict.resend) & listed

    # --- fleet decides ------------------------------------------------------------------------------------------------
    @rule(
        cluster=st.sampled_from(CLUSTERS), evidence=st.sampled_from([Evidence.REPORTED, Evidence.TIMED, Evidence.NONE])
    )
    def lose(self, cluster: str, evidence: Evidence) -> None:
        row = self.shard.table.clusters[cluster]
        ended = replace(row.generations[-1], evidence=evidence)
        if not row.generations[-1].ended:
            self.shard.fleet(replace(row, health=Health.LOST, generations=(*row.generations[:-1], ended)))

    @rule(cluster=st.sampled_from(CLUSTERS), reboot=rarely, reinstall=rarely, storm=rarely)
    def come_back(self, cluster: str, reboot: bool, reinstall: bool, storm: bool) -> None:
        row = self.shard.table.clusters[cluster]
        old = row.generations[-1]
        if old.ended:
            boot = f"{old.boot_id}'" if reboot else old.boot_id
            disk = f"{old.journal_uid}'" if reinstall else old.journal_uid
            new = Generation(old.number + 1, boot, disk)
            until = self.shard.now + 10 if storm else 0.0
            self.shard.fleet(replace(row, health=Health.READY, generations=(*row.generations, new)), storm_until=until)

    @rule(cluster=st.sampled_from(CLUSTERS))
    def guard_over(self, cluster: str) -> None:
        for ended in self.shard.table.clusters[cluster].generations:
            if ended.ended:
                self.shard.do(GenerationFenced(cluster, ended.number, ended.evidence))
                self.shard.settled()
        for other in CLUSTERS:
            self.shard.grant(other, 3)

    @rule(data=st.data(), cluster=st.sampled_from(CLUSTERS), fence=st.booleans(), reboot=rarely)
    def bounce(self, data: st.DataObject, cluster: str, fence: bool, reboot: bool) -> None:
        """A whole story, which single steps tell too seldom: lost, perhaps fenced and replaced, back, and listed."""
        self.lose(cluster, data.draw(st.sampled_from([Evidence.TIMED, Evidence.NONE])))
        if fence:
            self.guard_over(cluster)
        self.placements_are_allowed()
        self.come_back(cluster, reboot, False, False)
        self.inventory(data, cluster, True)

    @rule(cluster=st.sampled_from(CLUSTERS), health=st.sampled_from([Health.READY, Health.SUSPECT]))
    def suspect(self, cluster: str, health: Health) -> None:
        row = self.shard.table.clusters[cluster]
        if row.health is not Health.LOST:
            self.shard.fleet(replace(row, health=health))

    @rule(cluster=st.sampled_from(CLUSTERS), admission=st.sampled_from(Admission))
    def admit(self, cluster: str, admission: Admission) -> None:
        self.shard.fleet(replace(self.shard.table.clusters[cluster], admission=admission))

    # --- what must hold -----------------------------------------------------------------------------------------------
    @invariant()
    def placements_are_allowed(self) -> None:
        """S5, F1: only on current, unended, READY and OPEN clusters; identities are never used twice."""
        outbox = self.shard.machine.outbox
        for id_ in outbox.placed:
            view = self.shard.machine.attempt(id_)
            assert id_ not in self.placed_on
            if view is not None:
                self.placed_on[id_] = view.cluster
                self.known.append(id_)
                row = self.shard.table.clusters[view.cluster]
                assert view.generation == row.generation
                assert not row.generations[-1].ended
        outbox.placed.clear()

    @invariant()
    def final_stays_final(self) -> None:
        """I3, I6: a final state and an accepted result never change; one attempt at most succeeded."""
        for number in range(1, self.runs + 1):
            uid = f"r{number}"
            for view in self.shard.machine.tasks(uid, 0, 100):
                key = (uid, view.index)
                if key in self.final:
                    assert self.final[key] == (view.state, view.result)
                elif view.state.final:
                    self.final[key] = (view.state, view.result)
                winners = [a.id for a in view.attempts if a.state is AttemptState.SUCCEEDED]
                assert len(winners) <= 1
                if winners:
                    assert self.succeeded.setdefault(key, winners[0]) == winners[0]

    @invariant()
    def what_a_loser_made_is_not_seen(self) -> None:
        """F2: published artifacts are those of the attempt that succeeded; a dispatch starts from an earlier attempt's checkpoint."""
        for number in range(1, self.runs + 1):
            for view in self.shard.machine.tasks(f"r{number}", 0, 100):
                assert {each.attempt for each in view.artifacts} <= {self.succeeded.get((f"r{number}", view.index))}
                for attempt in view.attempts:
                    told = self.shard.machine.dispatch(attempt.id)
                    if told is not None and told.checkpoint is not None:
                        assert told.checkpoint.attempt.n < attempt.id.n

    @invariant()
    def overlap_is_said_first(self) -> None:
        """F2, F6, F7: two copies may run only where the second one says so, or where the first is fenced by its guard."""
        for number in range(1, self.runs + 1):
            for view in self.shard.machine.tasks(f"r{number}", 0, 100):
                for older, newer in zip(view.attempts, view.attempts[1:], strict=False):
                    if older.evidence is Evidence.NONE and older.id not in self.confirmed and older.end <= newer.placed:
                        told = self.shard.machine.attempt(older.id)
                        assert newer.overlap or (told is not None and (told.refused_results or not told.stopping))
                    if older.live and newer.live:
                        assert newer.hedge
                        assert newer.overlap

    @invariant()
    def a_takeover_finds_the_same(self) -> None:
        """J1, J9: fold(log) = state = fold(dump)."""
        said = list(self.shard.machine.dump())
        assert list(self.shard.replayed().dump()) == said
        assert list(self.shard.restored().dump()) == said

    @invariant()
    def it_rests(self) -> None:
        """Nothing is due that a tick does not do."""
        self.shard.do(Tick())
        due = self.shard.machine.due()
        if due is not None and due <= self.shard.now:
            self.shard.settled()

    def teardown(self) -> None:
        """I8: after the deadline every run is final, whatever happened."""
        self.shard.later(1000.0)
        for number in range(1, self.runs + 1):
            view = self.shard.machine.run_by_uid(f"r{number}")
            assert view is None or view.state.final


ShardMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
)
TestShard = ShardMachine.TestCase
