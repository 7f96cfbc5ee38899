"""The fleet shard, one test per rule (PROTOCOL S1, S3-S8, F6, O8): commands in, events and tables out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from control_plane.core import events as ev
from control_plane.core.commands import (
    Command,
    FleetTick,
    LoseCluster,
    ObserveHealth,
    OpenSession,
    Refused,
    Request,
    SessionGrant,
    SetAdmission,
)
from control_plane.core.events import Event
from control_plane.core.fleet import KEPT_GENERATIONS, Fleet
from control_plane.core.machine import Batch
from control_plane.core.model import Admission, Evidence, Generation, Health, Stamp

HELLO = OpenSession(
    cluster_name="eu",
    cluster_uid="u-eu",
    instance="i1",
    boot_id="boot1",
    journal_uid="journal1",
    replica="r1",
    profile="fast",
    lost_seconds=15.0,
    guard_seconds=5.0,
    orphan_killer=True,
)


class Told:
    """A fleet with a log, a clock and batches of one command."""

    def __init__(self) -> None:
        self.fleet = Fleet()
        self.log: list[tuple[Event, Stamp]] = []
        self.wall = 1000.0
        self.seq = 0

    def __call__(self, *commands: Command) -> object:
        self.seq += 1
        batch = Batch(Stamp(self.wall, f"nonce{self.seq}", self.seq, 1), self.fleet.apply)
        reply: object = None
        try:
            for command in commands:
                reply = self.fleet.handle(command, batch)
            self.fleet.settle(batch)
        finally:
            self.log += [(event, batch.stamp) for event in batch.events]
            self.fleet.validate()
        self.events = batch.events
        return reply

    def open(self, name: str = "eu", **changes: object) -> SessionGrant:
        hello = replace(HELLO, cluster_name=name, cluster_uid=f"u-{name}", **changes)  # type: ignore[arg-type]
        grant = self(hello)
        assert isinstance(grant, SessionGrant)
        return grant

    def lose(self, name: str = "eu", evidence: Evidence = Evidence.TIMED, generation: int = 0) -> None:
        number = generation or self.fleet.table().clusters[f"u-{name}"].generation
        self(LoseCluster(f"u-{name}", number, evidence, "no heartbeat"))

    def refused(self, command: Command) -> str:
        with pytest.raises(Refused) as caught:
            self(command)
        assert not self.fleet.outbox.table or self.log, "a refusal emits nothing"
        return caught.value.reason

    def generations(self, name: str = "eu") -> tuple[Generation, ...]:
        return self.fleet.table().clusters[f"u-{name}"].generations


def granted(generation: int, *, resumed: bool) -> SessionGrant:
    return SessionGrant("u-eu", generation, resumed, "fast", 20.0)


@pytest.fixture
def told() -> Told:
    return Told()


def test_s1_first_hello_adds_the_cluster_and_opens_generation_1(told: Told) -> None:
    assert told.open() == granted(1, resumed=False)
    assert [type(event).__name__ for event in told.events] == ["ClusterAdded", "SessionOpened"]
    facts = told.fleet.table().clusters["u-eu"]
    assert (facts.name, facts.health, facts.admission, facts.create_wall) == (
        "eu",
        Health.READY,
        Admission.OPEN,
        1000.0,
    )


def test_s1_second_living_instance_is_refused(told: Told) -> None:
    told.open()
    again = replace(HELLO, instance="i2", first_session_alive=True)
    assert told.refused(again) == "SECOND_INSTANCE"
    assert told.refused(replace(again, journal_uid="j9", boot_id="b9")) == "SECOND_INSTANCE"
    assert told.open(first_session_alive=True).resumed, "its own stream is no rival"


def test_s6_same_boot_and_journal_resume(told: Told) -> None:
    told.open()
    assert told.open(instance="i2", replica="r2") == granted(1, resumed=True)
    assert told.events == []


def test_s6_another_boot_of_the_same_host_ends_at_once_and_opens_the_next_in_one_batch(told: Told) -> None:
    told.open()
    assert told.open(boot_id="boot2") == granted(2, resumed=False)
    lost, opened = told.events
    assert isinstance(lost, ev.ClusterLost)
    assert (lost.generation, lost.evidence) == (1, Evidence.REPORTED)
    assert isinstance(opened, ev.SessionOpened)
    assert [g.evidence for g in told.generations()] == [Evidence.REPORTED, Evidence.UNSPECIFIED]


@pytest.mark.parametrize("boot", ["boot1", "boot2"])
def test_s6_another_journal_waits_for_its_loss_whatever_its_boot_id(told: Told, boot: str) -> None:
    told.open()
    stranger = replace(HELLO, journal_uid="journal2", boot_id=boot, instance="i2")
    assert told.refused(stranger) == "GENERATION_ENDING"
    told.lose()
    assert told(stranger) == granted(2, resumed=False)


def test_s5_a_generation_ends_exactly_once(told: Told) -> None:
    told.open()
    told.lose()
    again = LoseCluster("u-eu", 1, Evidence.REPORTED, "goodbye")
    assert told.refused(again) == "WRONG_STATE"
    told.open()
    assert told.refused(again) == "WRONG_STATE", "not the next one either"
    assert told.refused(replace(again, cluster="u-nowhere")) == "WRONG_STATE"


def test_s5_no_generation_number_is_ever_used_again(told: Told) -> None:
    assert told.open(last_generation=7).generation == 8
    told.lose()
    assert told.open(last_generation=3).generation == 9


def test_j12_an_agent_ahead_of_this_history_gets_a_new_generation_and_no_proof(told: Told) -> None:
    told.open()
    assert told.open(last_generation=5) == granted(6, resumed=False)
    assert told.generations()[0].evidence is Evidence.NONE


def test_s5_the_table_is_a_level_with_a_rising_seq_and_keeps_32_generations(told: Told) -> None:
    for boot in range(KEPT_GENERATIONS + 8):
        before = told.fleet.table().seq
        told.open(boot_id=f"boot{boot}")
        assert told.fleet.table().seq > before
    numbers = [g.number for g in told.generations()]
    assert numbers == list(range(9, KEPT_GENERATIONS + 9))


@pytest.mark.parametrize(
    ("killer", "claimed", "recorded"),
    [
        (True, Evidence.TIMED, Evidence.TIMED),
        (False, Evidence.TIMED, Evidence.NONE),
        (True, Evidence.NONE, Evidence.NONE),
        (False, Evidence.REPORTED, Evidence.REPORTED),
        (True, Evidence.UNSPECIFIED, Evidence.NONE),
    ],
)
def test_f6_evidence_is_no_better_than_the_guard(
    told: Told, killer: bool, claimed: Evidence, recorded: Evidence
) -> None:
    told.open(orphan_killer=killer)
    told.lose(evidence=claimed)
    assert told.generations()[-1].evidence is recorded
    assert told.fleet.table().clusters["u-eu"].health is Health.LOST


def test_s3_suspect_and_back_is_idempotent_and_only_for_the_living_generation(told: Told) -> None:
    told.open()
    told(ObserveHealth("u-eu", 1, suspect=True), ObserveHealth("u-eu", 1, suspect=True))
    assert told.events == [ev.HealthChanged("u-eu", Health.SUSPECT)]
    told(ObserveHealth("u-eu", 2, suspect=False), ObserveHealth("u-us", 1, suspect=True))
    assert told.events == []
    told(ObserveHealth("u-eu", 1, suspect=False))
    assert told.fleet.table().clusters["u-eu"].health is Health.READY
    told.lose()
    told(ObserveHealth("u-eu", 1, suspect=False))
    assert told.fleet.table().clusters["u-eu"].health is Health.LOST


def test_s8_a_resumed_session_is_told_the_lease_of_its_generation(told: Told) -> None:
    """F5: an agent that lived by another F than fleet and owners wait for could run beside a copy of its work."""
    first = told.open()
    assert (first.profile, first.recovery_seconds) == ("fast", 20.0)
    longer = told.open(profile="patient", lost_seconds=540.0, guard_seconds=60.0)
    shorter = told.open(profile="hasty", lost_seconds=10.0, guard_seconds=5.0)
    assert longer == shorter == replace(first, resumed=True)
    (session,) = told.fleet.live()
    assert (session.profile, session.lost_seconds, told.generations()[-1].guard_seconds) == ("fast", 15.0, 5.0)
    told.lose()
    second = told.open(profile="patient", lost_seconds=540.0, guard_seconds=60.0)
    assert (second.resumed, second.profile, second.recovery_seconds) == (False, "patient", 600.0)
    (session,) = told.fleet.live()
    assert (session.profile, session.lost_seconds) == ("patient", 540.0)
    assert [g.guard_seconds for g in told.generations()] == [5.0, 60.0]


def storm_of(told: Told) -> float:
    return told.fleet.table().storm_until


def test_s7_two_of_three_within_the_window_hold_from_the_first_loss_once(told: Told) -> None:
    for name in ("a", "b", "c"):
        told.open(name)
    told.lose("a")
    assert storm_of(told) == 0
    told.wall += 20.0
    told.lose("b")
    assert storm_of(told) == 1000.0 + 2 * 20.0
    told.wall += 5.0
    told.lose("c")
    assert storm_of(told) == 1040.0, "once per storm"
    assert [e for e, _ in told.log if isinstance(e, ev.StormHeld)] == [ev.StormHeld(1040.0)]


def test_s7_more_losses_inside_a_storm_do_not_prolong_it(told: Told) -> None:
    for name in "abcde":
        told.open(name)
    for name in "abcd":
        told.lose(name)
        told.wall += 10.0
    assert storm_of(told) == 1040.0
    assert sum(isinstance(e, ev.StormHeld) for e, _ in told.log) == 1


def test_s7_a_loss_of_an_old_storm_starts_no_new_one(told: Told) -> None:
    for name in "abc":
        told.open(name)
    told.lose("a")
    told.wall = 1020.0
    told.lose("b")
    told.wall = 1040.0
    told.lose("c")
    assert storm_of(told) == 1040.0


def test_s7_exactly_a_third_is_not_more_than_a_third(told: Told) -> None:
    for name in "abcdef":
        told.open(name)
    told.lose("a")
    told.lose("b")
    assert storm_of(told) == 0
    told.lose("c")
    assert storm_of(told) == 1040.0


def test_s7_outside_the_window_or_with_two_clusters_there_is_no_storm(told: Told) -> None:
    for name in "abc":
        told.open(name)
    told.lose("a")
    told.wall += 20.5
    told.lose("b")
    assert storm_of(told) == 0
    few = Told()
    few.open("a")
    few.open("b")
    few.lose("a")
    few.lose("b")
    assert storm_of(few) == 0


def test_s7_known_deaths_do_not_count(told: Told) -> None:
    for name in "abcd":
        told.open(name)
    told.lose("a", Evidence.REPORTED)
    told.open("b", boot_id="boot2")
    told.lose("c")
    assert storm_of(told) == 0


def never_begun(name: str, generation: int = 1, *idle: str) -> LoseCluster:
    idling = frozenset(f"u-{each}" for each in idle)
    return LoseCluster(f"u-{name}", generation, Evidence.TIMED, "no heartbeat at all", begun=False, idle=idling)


def test_s7_generations_without_any_heartbeat_stir_no_storm(told: Told) -> None:
    for name in ("a", "b", "c", "fake1", "fake2", "fake3"):
        told.open(name)
    told(never_begun("fake1"), never_begun("fake2"), never_begun("fake3"))
    assert storm_of(told) == 0
    assert told.generations("fake1")[-1].evidence is Evidence.REPORTED
    told.open("fake1")
    told(never_begun("fake1", 2))
    told.lose("a")
    assert storm_of(told) == 0, "one real loss is one loss"


def test_s7_who_lives_without_a_heartbeat_does_not_water_a_storm_down(told: Told) -> None:
    fakes = [f"fake{n}" for n in range(9)]
    for name in ("a", "b", "c", *fakes):
        told.open(name)
    idle = frozenset(f"u-{each}" for each in fakes)
    lost = [LoseCluster(f"u-{name}", 1, Evidence.TIMED, "no heartbeat", idle=idle) for name in ("a", "b")]
    told(*lost)
    assert storm_of(told) == 1040.0


def test_s6_work_adopted_into_a_generation_without_a_heartbeat_may_still_run(told: Told) -> None:
    """F6, F7: what an earlier generation left behind without proof of death may have been adopted; nothing proves its end."""
    told.open()
    told.lose(evidence=Evidence.TIMED)
    told.open()
    told(never_begun("eu", 2))
    told.open()
    told(never_begun("eu", 3))
    assert [g.evidence for g in told.generations()] == [Evidence.TIMED] * 3
    rebooted = Told()
    rebooted.open()
    rebooted.open(boot_id="boot2")
    rebooted(never_begun("eu", 2))
    assert [g.evidence for g in rebooted.generations()] == [Evidence.REPORTED] * 2


def test_s7_a_cluster_that_came_back_and_went_again_is_one_cluster(told: Told) -> None:
    for name in "abc":
        told.open(name)
    told.lose("a")
    told.open("a")
    told.lose("a")
    assert storm_of(told) == 0


def test_s7_after_a_storm_the_next_one_needs_losses_of_its_own(told: Told) -> None:
    for name in "abc":
        told.open(name)
    told.lose("a")
    told.lose("b")
    told.open("a")
    told.open("b")
    told.wall = 1041.0
    told.lose("a")
    assert storm_of(told) == 1040.0
    told.lose("c")
    assert storm_of(told) == 1081.0


def uuid7(wall: float, tail: int = 0) -> str:
    digits = f"{int(wall * 1000):012x}"
    return f"{digits[:8]}-{digits[8:]}-7000-8000-{tail:012x}"


def cordon(
    request: str, admission: Admission = Admission.CORDONED, digest: str = "d", name: str = "eu"
) -> SetAdmission:
    return SetAdmission(Request(request, digest), name, admission)


def test_o8_the_same_request_gets_the_same_answer_and_changes_nothing_twice(told: Told) -> None:
    told.open()
    first = cordon(uuid7(1000))
    assert told(first) == "u-eu"
    told(cordon("", Admission.OPEN))
    assert told(first) == "u-eu"
    assert told.events == []
    assert told.fleet.table().clusters["u-eu"].admission is Admission.OPEN
    assert told.refused(cordon(uuid7(1000), digest="other")) == "REQUEST_ID_REUSED"
    assert told.refused(cordon(uuid7(1301))) == "REQUEST_ID_AHEAD"
    assert told.refused(cordon("nonsense")) == "INVALID_FIELD"
    assert told.refused(cordon(uuid7(1001), name="mars")) == "NOT_FOUND"


def test_o8_records_expire_by_event_after_an_hour_and_are_never_executed_again(told: Told) -> None:
    told.open()
    young_with_an_old_id = cordon(uuid7(900), Admission.DRAINING)
    old = cordon(uuid7(800))
    told(old)
    told.wall += 100
    told(young_with_an_old_id)
    assert told.fleet.due() == 1000.0 + 3600.0
    told.wall = 4600.0
    told(FleetTick())
    assert told.events == [ev.RequestsPruned(uuid7(800))]
    assert told.refused(old) == "REQUEST_ID_EXPIRED"
    assert told(young_with_an_old_id) == "u-eu"
    told.wall = 4700.0
    told(FleetTick())
    assert told.fleet.due() is None


def test_admission_stays_over_generations(told: Told) -> None:
    told.open()
    told(cordon("", Admission.DRAINING))
    told.open(boot_id="boot2")
    assert told.fleet.table().clusters["u-eu"].admission is Admission.DRAINING


def test_an_incomplete_hello_is_denied(told: Told) -> None:
    assert told.refused(replace(HELLO, boot_id="")) == "DENIED"


def folded(events: list[tuple[Event, Stamp]]) -> Fleet:
    fleet = Fleet()
    for event, stamp in events:
        fleet.apply(event, stamp)
    return fleet


NAMES = st.sampled_from("abcd")


class FleetStory(RuleBasedStateMachine):
    """Random agents, losses and cordons against the promises of S5, and J1: state is the fold of the log, and of the dump."""

    def __init__(self) -> None:
        super().__init__()
        self.told = Told()

    @rule(
        name=NAMES,
        boot=st.integers(1, 3),
        journal=st.integers(1, 2),
        instance=st.integers(1, 2),
        alive=st.booleans(),
        last=st.integers(0, 3),
    )
    def hello(self, name: str, boot: int, journal: int, instance: int, alive: bool, last: int) -> None:
        try:
            grant = self.told.open(
                name,
                boot_id=f"b{boot}",
                journal_uid=f"j{journal}",
                instance=f"i{instance}",
                first_session_alive=alive,
                last_generation=last,
            )
        except Refused:
            return
        current = self.told.generations(name)[-1]
        assert (current.number, current.boot_id, current.journal_uid) == (grant.generation, f"b{boot}", f"j{journal}")
        assert not current.ended

    @rule(name=NAMES, back=st.integers(0, 2), evidence=st.sampled_from([Evidence.TIMED, Evidence.REPORTED]))
    def lose(self, name: str, back: int, evidence: Evidence) -> None:
        facts = self.told.fleet.table().clusters.get(f"u-{name}")
        try:
            self.told.lose(name, evidence, generation=max((facts.generation if facts else 0) - back, 1))
        except Refused:
            return

    @rule(name=NAMES, suspect=st.booleans())
    def observe(self, name: str, suspect: bool) -> None:
        facts = self.told.fleet.table().clusters.get(f"u-{name}")
        self.told(ObserveHealth(f"u-{name}", facts.generation if facts else 1, suspect))

    @rule(name=NAMES, admission=st.sampled_from(Admission), tail=st.integers(0, 2))
    def admit(self, name: str, admission: Admission, tail: int) -> None:
        try:
            self.told(cordon(uuid7(1000, tail), admission, digest=f"{name}{admission}", name=name))
        except Refused:
            return

    @rule(seconds=st.sampled_from([0.5, 10.0, 30.0, 4000.0]))
    def wait(self, seconds: float) -> None:
        self.told.wall += seconds
        self.told(FleetTick())

    @invariant()
    def every_generation_ends_once_and_before_the_next_opens(self) -> None:
        opened: dict[str, int] = {}
        ended: dict[str, int] = {}
        for event, _ in self.told.log:
            if isinstance(event, ev.SessionOpened):
                assert opened.get(event.cluster, 0) == ended.get(event.cluster, 0), "the predecessor has ended"
                assert event.generation > opened.get(event.cluster, 0)
                opened[event.cluster] = event.generation
            if isinstance(event, ev.ClusterLost):
                assert event.generation == opened[event.cluster] != ended.get(event.cluster), "exactly once"
                ended[event.cluster] = event.generation

    @invariant()
    def state_is_the_fold_of_the_log_and_of_the_dump(self) -> None:
        image = list(self.told.fleet.dump())
        assert list(folded(self.told.log).dump()) == image
        restored = folded([(event, Stamp(0.0, "snapshot", 0, 1)) for event in image])
        restored.validate()
        assert list(restored.dump()) == image
        assert restored.table() == self.told.fleet.table()


TestFleetStory = FleetStory.TestCase
TestFleetStory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
