"""place(snapshot, now): who may use what, in which order, and why the rest waits (PROTOCOL C1-C4, S3)."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.capacity import Room, Shape, need_of
from control_plane.core.model import Admission, ClusterFacts, Generation, Group, Health, Resources
from control_plane.core.offers import Granted, Holding, Offer, Plan, Snapshot, Want
from control_plane.core.scheduler import MAX_GRANT, place

NOW = 1000.0
GIB = 1 << 30


def cluster(
    name: str,
    *shapes: Shape,
    health: Health = Health.READY,
    admission: Admission = Admission.OPEN,
    labels: tuple[tuple[str, str], ...] = (),
    taints: tuple[str, ...] = (),
    isolation: bool = False,
    namespaces: tuple[str, ...] = (),
    changes: tuple[tuple[Resources, int], ...] = (),
    silent: bool = False,
) -> Offer:
    facts = ClusterFacts(
        uid=f"u-{name}",
        name=name,
        health=health,
        admission=admission,
        generations=(Generation(3, "boot", "journal"),),
        labels=labels,
        taints=taints,
        isolation=isolation,
        namespaces=namespaces,
    )
    return Offer(facts, None if silent else shapes, changes)


def nodes(count: int, cpus: float, memory: int = 64 * GIB, total: float = 0.0) -> Shape:
    return Shape(count, int(cpus * 1000), memory, total_cpu_millis=int(total * 1000))


def group(
    namespace: str = "ns",
    cpus: float = 1.0,
    *,
    memory: int = 0,
    extended: tuple[tuple[str, int], ...] = (),
    priority: int = 0,
    isolation: bool = False,
    selector: tuple[tuple[str, str], ...] = (),
    clusters: tuple[str, ...] = (),
    tolerations: tuple[str, ...] = (),
) -> Group:
    need = Resources(int(cpus * 1000), memory, extended=extended)
    return Group(namespace, priority, need, isolation, selector, clusters, tolerations)


def want(of: Group, count: int, *, shard: str = "00", slack: float = 500.0, since: float = 990.0) -> Want:
    return Want(shard, of.key(), of, count, NOW + slack, since)


def plan_of(offers: list[Offer], wants: list[Want], **more: object) -> Plan:
    return place(Snapshot(tuple(offers), tuple(wants), **more), NOW)  # type: ignore[arg-type]


def where(plan: Plan) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for grant in plan.grants:
        counts[grant.cluster.removeprefix("u-")] += grant.count
    return dict(counts)


def got(plan: Plan, want_: Want) -> int:
    return sum(g.count for g in plan.grants if (g.shard, g.key) == (want_.shard, want_.key))


def held(of: Group, count: int, at: str = "eu", shard: str = "09") -> Holding:
    return Holding(shard, of.key(), of, f"u-{at}", count)


def test_c1_a_grant_names_the_clusters_generation_and_counts() -> None:
    w = want(group(), 2)
    plan = plan_of([cluster("eu", nodes(1, 4))], [w])
    assert plan.grants == (Granted("00", w.key, "u-eu", 3, 2),)
    assert plan.reasons == {}


def test_c1_higher_class_first_whatever_the_slack() -> None:
    low, high = want(group(priority=0), 4, slack=1), want(group(priority=5), 4, slack=900)
    plan = plan_of([cluster("eu", nodes(1, 4))], [low, high])
    assert (got(plan, low), got(plan, high)) == (0, 4)


def test_least_slack_then_longest_wait_inside_a_namespace() -> None:
    tight = want(group(cpus=1), 3, slack=100)
    old = want(group(cpus=1, memory=1), 3, slack=200, since=900)
    young = want(group(cpus=1, memory=2), 3, slack=200, since=950)
    plan = plan_of([cluster("eu", nodes(1, 5))], [young, old, tight])
    assert [got(plan, w) for w in (tight, old, young)] == [3, 2, 0]


def test_namespaces_share_by_weight_however_much_each_wants() -> None:
    a, b = want(group("a"), 1000), want(group("b"), 1000)
    plan = plan_of([cluster("eu", nodes(30, 4))], [a, b], weights={"a": 3.0})
    assert got(plan, a) == pytest.approx(3 * got(plan, b), rel=0.1)
    assert got(plan, a) + got(plan, b) == 120 - 6, "all but 5 % for urgent work"


def test_fairness_is_of_the_dominant_resource() -> None:
    cpu = want(group("cpu", cpus=3, memory=GIB), 100)
    memory = want(group("memory", cpus=1, memory=4 * GIB), 100)
    plan = plan_of([cluster("eu", nodes(1, 9, memory=18 * GIB))], [cpu, memory])
    assert (got(plan, cpu), got(plan, memory)) == (2, 3), "the example of the DRF paper"


def test_what_is_held_counts_so_a_late_comer_catches_up() -> None:
    first, late = group("first"), group("late")
    plan = plan_of([cluster("eu", nodes(1, 4, total=12))], [want(first, 9), want(late, 9)], holdings=(held(first, 8),))
    assert got(plan, want(first, 9)) == 0
    assert got(plan, want(late, 9)) == 4


def test_c2_slots_come_back_for_an_owed_share_and_for_a_higher_class_only() -> None:
    rich, poor, boss = group("rich"), group("poor"), group("rich", priority=5)
    full = [cluster("eu", nodes(1, 0, total=10))]
    holdings = (held(rich, 8), held(poor, 2, shard="08"))
    plan = plan_of(full, [want(poor, 5), want(rich, 5)], holdings=holdings)
    assert plan.returning == {("09", rich.key())}
    plan = plan_of(full, [want(boss, 5)], holdings=holdings)
    assert plan.returning == {("09", rich.key()), ("08", poor.key())}
    even = (held(rich, 5), held(poor, 5, shard="08"))
    assert plan_of(full, [want(poor, 5), want(rich, 5)], holdings=even).returning == frozenset()
    elsewhere = (held(rich, 8, at="us"),)
    pinned = want(group("poor", clusters=("eu",)), 5)
    two = [*full, cluster("us", nodes(1, 0, total=10))]
    assert plan_of(two, [pinned], holdings=elsewhere).returning == frozenset(), "its slots are of no use to who waits"


def test_c4_twenty_cpus_in_two_tens_are_no_hole_of_twenty() -> None:
    big = want(group(cpus=20), 1)
    plan = plan_of([cluster("eu", nodes(2, 10, total=32))], [big])
    assert plan.grants == ()
    assert plan.reasons["00", big.key] == "needs 20 CPUs on one node; the largest hole is 10 CPUs on eu"


def test_c4_small_holes_are_filled_first() -> None:
    small, big = want(group(cpus=2), 2, slack=100), want(group(cpus=8), 1, slack=900)
    plan = plan_of([cluster("eu", nodes(1, 8), nodes(2, 2))], [small, big])
    assert (got(plan, small), got(plan, big)) == (2, 1)


def test_c4_what_was_placed_since_the_report_is_subtracted_and_what_ended_is_added() -> None:
    one = Resources(1000)
    w = want(group(), 10)
    assert where(plan_of([cluster("eu", nodes(1, 4), changes=((one, 3),))], [w])) == {"eu": 1}
    assert where(plan_of([cluster("eu", nodes(1, 0), changes=((one, -2),))], [w])) == {"eu": 2}
    two = want(group(cpus=2), 1)
    plan = plan_of([cluster("eu", nodes(1, 0, total=4), changes=((one, -2),))], [two])
    assert plan.grants == (), "two freed slots are two holes"


def test_spread_in_proportion_to_room() -> None:
    plan = plan_of([cluster("eu", nodes(1, 8)), cluster("us", nodes(1, 4))], [want(group(), 6)])
    assert where(plan) == {"eu": 4, "us": 2}
    plan = plan_of([cluster("eu", nodes(1, 1)), cluster("us", nodes(1, 4))], [want(group(), 1)])
    assert where(plan) == {"us": 1}


@pytest.mark.parametrize(
    ("offer", "of", "reason"),
    [
        (cluster("eu", nodes(1, 4)), group(clusters=("us", "ap")), "no cluster is named us or ap; there is eu"),
        (cluster("eu", nodes(1, 4)), group(selector=(("gpu", "a100"),)), "no cluster has label gpu=a100"),
        (
            cluster("eu", nodes(1, 4), taints=("spot",)),
            group(),
            "eu has a taint that is not tolerated: spot",
        ),
        (cluster("eu", nodes(1, 4)), group(isolation=True), "needs isolation, and eu cannot enforce limits"),
        (cluster("eu", nodes(1, 4), namespaces=("x",)), group(), "eu may not serve namespace ns"),
        (cluster("eu", nodes(1, 4), health=Health.SUSPECT), group(), "eu is SUSPECT"),
        (cluster("eu", nodes(1, 4), health=Health.LOST), group(), "eu is LOST"),
        (cluster("eu", nodes(1, 4), admission=Admission.CORDONED), group(), "eu is CORDONED"),
        (cluster("eu", nodes(1, 4), admission=Admission.DRAINING), group(), "eu is DRAINING"),
        (cluster("eu", silent=True), group(), "eu has not reported free room yet"),
        (
            cluster("eu", nodes(2, 0, total=10)),
            group(cpus=20),
            "needs 20 CPUs on one node; the largest node has 10 CPUs, on eu",
        ),
        (
            cluster("eu", nodes(1, 1, total=4)),
            group(cpus=2),
            "needs 2 CPUs on one node; the largest hole is 1 CPU on eu",
        ),
        (
            cluster("eu", nodes(1, 4)),
            group(extended=(("gpu", 1),)),
            "needs 1 gpu on one node; the largest node has 0 gpu, on eu",
        ),
        (
            cluster("eu", nodes(1, 4, memory=GIB), nodes(1, 1, memory=8 * GIB)),
            group(cpus=2, memory=2 * GIB),
            "needs 2 CPUs and 2 GiB memory together on one node; no node of eu has all of it free",
        ),
    ],
)
def test_filters_and_the_sentence_of_each(offer: Offer, of: Group, reason: str) -> None:
    w = want(of, 3)
    plan = plan_of([offer], [w])
    assert plan.grants == ()
    assert plan.reasons == {("00", w.key): reason}


def test_what_matches_passes() -> None:
    offer = cluster(
        "eu", nodes(1, 4), labels=(("gpu", "a100"), ("zone", "1")), taints=("spot",), isolation=True, namespaces=("ns",)
    )
    of = group(selector=(("gpu", "a100"),), tolerations=("spot", "gpu"), isolation=True, clusters=("eu", "us"))
    assert where(plan_of([offer], [want(of, 3)])) == {"eu": 3}


def test_no_cluster_at_all_is_said() -> None:
    w = want(group(), 1)
    assert plan_of([], [w]).reasons == {("00", w.key): "no cluster has joined the federation"}


def test_headroom_is_for_urgent_work() -> None:
    offers = [cluster("eu", nodes(10, 4))]
    calm, urgent = want(group(), 100, slack=600), want(group(memory=1), 100, slack=10)
    plan = plan_of(offers, [calm])
    assert where(plan) == {"eu": 38}
    assert plan.reasons["00", calm.key] == "waits for room on eu: the rest is kept for urgent work"
    assert where(plan_of(offers, [urgent])) == {"eu": 40}
    assert where(plan_of([cluster("eu", nodes(1, 12))], [calm])) == {"eu": 12}, "a small federation keeps none"


def test_a_grant_is_bounded_and_the_rest_follows() -> None:
    w = want(group(cpus=0), 10 * MAX_GRANT)
    plan = plan_of([cluster("eu", nodes(1, 4))], [w])
    assert got(plan, w) == MAX_GRANT
    assert plan.reasons["00", w.key] == "permitted in part; the rest follows with the next plan"


def test_cost_does_not_depend_on_the_number_of_tasks() -> None:
    room = Room([nodes(1000, 64), nodes(500, 32)])
    assert room.take(need_of(Resources(1000)), 70_000) == 70_000
    assert room.fit(need_of(Resources(1000))) == 10_000
    assert len(room.classes()) <= 4


# -- properties -------------------------------------------------------------------------------------------------------

SHAPES = st.builds(
    Shape,
    count=st.integers(0, 4),
    cpu_millis=st.sampled_from([0, 500, 1000, 3000, 8000]),
    memory_bytes=st.sampled_from([0, GIB, 4 * GIB]),
    extended=st.sampled_from([(), (("gpu", 1),), (("gpu", 4),)]),
)
RESOURCES = st.builds(
    Resources,
    cpu_millis=st.sampled_from([0, 250, 1000, 2500, 9000]),
    memory_bytes=st.sampled_from([0, GIB, 3 * GIB]),
    extended=st.sampled_from([(), (("gpu", 1),)]),
)
GROUPS = st.builds(
    Group,
    namespace=st.sampled_from(["a", "b", "c"]),
    priority=st.sampled_from([0, 1]),
    resources=RESOURCES,
    require_isolation=st.booleans(),
    selector=st.sampled_from([(), (("zone", "1"),)]),
    clusters=st.sampled_from([(), ("c0",), ("c0", "c1")]),
    tolerations=st.sampled_from([(), ("spot",)]),
)
OFFERS = st.lists(
    st.tuples(
        st.lists(SHAPES, max_size=3),
        st.sampled_from([Health.READY, Health.READY, Health.SUSPECT, Health.LOST]),
        st.sampled_from([Admission.OPEN, Admission.OPEN, Admission.CORDONED]),
        st.sampled_from([(), (("zone", "1"),)]),
        st.sampled_from([(), ("spot",)]),
        st.booleans(),
        st.lists(st.tuples(RESOURCES, st.integers(-3, 3)), max_size=2),
        st.booleans(),
    ),
    max_size=4,
).map(
    lambda rows: [
        cluster(
            f"c{i}",
            *shapes,
            health=health,
            admission=admission,
            labels=labels,
            taints=taints,
            isolation=isolation,
            changes=tuple(changes),
            silent=silent and i > 0,
        )
        for i, (shapes, health, admission, labels, taints, isolation, changes, silent) in enumerate(rows)
    ]
)
WANTS = st.lists(
    st.tuples(GROUPS, st.integers(1, 40), st.floats(-10, 500), st.floats(0, 999), st.sampled_from(["00", "01"])),
    max_size=6,
    unique_by=lambda row: (row[4], row[0].key()),
).map(lambda rows: [want(g, n, slack=slack, since=since, shard=shard) for g, n, slack, since, shard in rows])


def rooms_of(offers: list[Offer]) -> dict[str, Room]:
    rooms: dict[str, Room] = {}
    for offer in offers:
        room = rooms[offer.facts.uid] = Room(offer.shapes or ())
        for resources, count in offer.changes:
            if count > 0:
                room.take(need_of(resources), count)
            else:
                room.give(need_of(resources), -count)
    return rooms


def allowed(of: Group, offer: Offer) -> bool:
    facts = offer.facts
    return (
        offer.shapes is not None
        and facts.health is Health.READY
        and facts.admission is Admission.OPEN
        and (not of.clusters or facts.name in of.clusters)
        and all(pair in facts.labels for pair in of.selector)
        and all(taint in of.tolerations for taint in facts.taints)
        and (facts.isolation or not of.require_isolation)
    )


@given(OFFERS, WANTS)
def test_no_cluster_gets_more_than_it_holds_or_what_it_must_not(offers: list[Offer], wants: list[Want]) -> None:
    plan = plan_of(offers, wants)
    by_uid = {offer.facts.uid: offer for offer in offers}
    by_key = {(w.shard, w.key): w for w in wants}
    demanded: dict[str, Counter[str]] = defaultdict(Counter)
    for grant in plan.grants:
        of = by_key[grant.shard, grant.key].group
        assert grant.count > 0
        assert allowed(of, by_uid[grant.cluster])
        for name, amount in need_of(of.resources):
            demanded[grant.cluster][name] += amount * grant.count
            assert any(free.get(name, 0) >= amount for _, free in rooms_of(offers)[grant.cluster].classes())
    for uid, needs in demanded.items():
        for name, amount in needs.items():
            free = sum(count * vector.get(name, 0) for count, vector in rooms_of(offers)[uid].classes())
            assert amount <= free, f"{uid} has {free} of {name}, {amount} were granted"
    for (shard, key), w in by_key.items():
        assert sum(g.count for g in plan.grants if (g.shard, g.key) == (shard, key)) <= w.count


@given(OFFERS, WANTS)
def test_whoever_waits_has_a_reason_and_nobody_else(offers: list[Offer], wants: list[Want]) -> None:
    plan = plan_of(offers, wants)
    waiting = {(w.shard, w.key) for w in wants if got(plan, w) < w.count}
    assert set(plan.reasons) == waiting
    assert all(reason for reason in plan.reasons.values())


@given(OFFERS, GROUPS, st.integers(1, 60))
def test_work_conserving_for_a_single_want(offers: list[Offer], of: Group, count: int) -> None:
    w = want(of, count, slack=0.0)
    rooms = rooms_of(offers)
    most = sum(rooms[o.facts.uid].fit(need_of(of.resources)) for o in offers if allowed(of, o))
    assert got(plan_of(offers, [w]), w) == min(count, most)


@given(OFFERS, WANTS)
def test_nothing_that_waits_would_still_fit_when_all_is_urgent(offers: list[Offer], wants: list[Want]) -> None:
    urgent = [Want(w.shard, w.key, w.group, w.count, NOW - 1.0, w.since) for w in wants]
    plan = plan_of(offers, urgent)
    assert not any("permitted in part" in reason or "is kept" in reason for reason in plan.reasons.values())


@given(OFFERS, WANTS, st.randoms(use_true_random=False))
def test_the_order_of_a_snapshot_does_not_matter(offers: list[Offer], wants: list[Want], chance: object) -> None:
    shuffled_offers, shuffled_wants = list(offers), list(wants)
    chance.shuffle(shuffled_offers)  # type: ignore[attr-defined]
    chance.shuffle(shuffled_wants)  # type: ignore[attr-defined]
    first, second = plan_of(offers, wants), plan_of(shuffled_offers, shuffled_wants)
    assert sorted(first.grants, key=repr) == sorted(second.grants, key=repr)
    assert first.returning == second.returning


@given(st.lists(st.sampled_from([0.5, 1.0, 2.0, 4.0]), min_size=2, max_size=4), st.integers(40, 200))
def test_over_rounds_each_namespace_gets_its_weighted_share(weights: list[float], slots: int) -> None:
    """Short tasks in rounds: all end, all is wanted again; what was used over time is what counts."""
    groups = [group(f"n{i}") for i in range(len(weights))]
    wants = [want(g, 10 * slots) for g in groups]
    by_name = {f"n{i}": weight for i, weight in enumerate(weights)}
    used: Counter[str] = Counter()
    for _ in range(5):
        plan = plan_of([cluster("eu", nodes(slots, 1))], wants, weights=by_name)
        for g, w in zip(groups, wants, strict=True):
            used[g.namespace] += got(plan, w)
    for i, weight in enumerate(weights):
        share = weight / sum(weights)
        assert used[f"n{i}"] == pytest.approx(share * used.total(), abs=0.03 * used.total() + 5 * len(weights))


def test_c4_memory_that_an_agent_does_not_account_for_bounds_nothing() -> None:
    need = need_of(Resources(cpu_millis=1000, memory_bytes=1 << 30))
    unaccounted, exhausted = Shape(1, 4000, 0), Shape(1, 4000, 0, total_memory_bytes=8 << 30)
    assert Room([unaccounted]).fit(need) == 4
    assert Room([exhausted]).fit(need) == 0


def test_o7_a_namespace_never_gets_more_than_its_quota_over_all_shards_and_clusters() -> None:
    a, b = group("a"), group("a", 2.0)
    plan = plan_of(
        [cluster("eu", nodes(20, 4)), cluster("us", nodes(20, 4))],
        [want(a, 10, shard="00"), want(b, 10, shard="01"), want(group("b"), 5, shard="02")],
        holdings=(held(a, 3), held(b, 2, shard="08")),
        quotas={"a": 7},
    )
    by_shard = Counter[str]()
    for grant in plan.grants:
        by_shard[grant.shard] += grant.count
    assert by_shard["00"] + by_shard["01"] == 2
    assert by_shard["02"] == 5
    assert {plan.reasons["00", a.key()], plan.reasons["01", b.key()]} == {"namespace a is at its quota of 7 live tasks"}


def test_o7_who_waits_for_a_quota_asks_nobody_for_a_slot_and_a_lowered_quota_asks_slots_back() -> None:
    a, b = group("a"), group("b")
    full = [cluster("eu", nodes(1, 0))]
    at_quota = plan_of(full, [want(a, 5)], holdings=(held(a, 1), held(b, 9)), quotas={"a": 1})
    assert at_quota.returning == frozenset()
    lowered = plan_of(full, [want(a, 5)], holdings=(held(a, 3),), quotas={"a": 1})
    assert lowered.returning == {("09", a.key())}
    assert not lowered.grants


def test_o7_a_closed_namespace_gets_nothing_and_says_why() -> None:
    a, b = group("a"), group("b")
    plan = plan_of([cluster("eu", nodes(9, 4))], [want(a, 3), want(b, 3)], closed={"a": "not known yet"})
    assert {grant.key for grant in plan.grants} == {b.key()}
    assert plan.reasons["00", a.key()] == "not known yet"


@given(
    quota=st.integers(1, 30),
    holds=st.lists(st.integers(0, 8), max_size=4),
    counts=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    others=st.integers(0, 20),
)
def test_o7_over_any_demand_the_quota_holds(quota: int, holds: list[int], counts: list[int], others: int) -> None:
    a = group("a")
    wants = [want(a, count, shard=f"{i:02}") for i, count in enumerate(counts)] + [want(group("b"), others)]
    holdings = tuple(held(a, count, shard=f"{10 + i}") for i, count in enumerate(holds))
    plan = plan_of([cluster("eu", nodes(30, 4))], wants, holdings=holdings, quotas={"a": quota})
    got = sum(grant.count for grant in plan.grants if grant.key == a.key())
    assert got == min(max(quota - sum(holds), 0), sum(counts)), (
        "neither more than the quota nor less than there is room for"
    )
