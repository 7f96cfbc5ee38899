"""Short work may wait beyond free room, nobody else has to wait for it (core.queues, core.run_times; PROTOCOL C2, C3; DESIGN 8)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.capacity import Shape
from control_plane.core.model import Admission, ClusterFacts, Generation, Group, Health, Resources
from control_plane.core.offers import Holding, Offer, Plan, Snapshot, Want
from control_plane.core.queues import HORIZON, SHORTEST, room_of
from control_plane.core.run_times import MAX_MIXED, MAX_PROGRAMS, SLOW, TICK, RunTimes, short
from control_plane.core.scheduler import place

NOW = 1000.0
ONE_CPU = Resources(1000)
LIMIT = 512


def offer(name: str = "eu", slots: int = 2, *, free: int | None = None, limit: int = LIMIT, changed: int = 0) -> Offer:
    facts = ClusterFacts(f"u-{name}", name, Health.READY, Admission.OPEN, (Generation(3, "boot", "journal"),))
    shape = Shape(1, 1000 * (slots if free is None else free), 0, total_cpu_millis=1000 * slots)
    return Offer(facts, (shape,), ((ONE_CPU, changed),) if changed else (), limit)


def group(namespace: str = "ns", *, priority: int = 0, label: str = "") -> Group:
    selector = ((label, "1"),) if label else ()
    return Group(namespace, priority, ONE_CPU, False, selector, (), ())


def want(of: Group, count: int = 1000, *, shard: str = "00", slack: float = 500.0) -> Want:
    return Want(shard, of.key(), of, count, NOW + slack, 990.0)


def holding(of: Group, count: int, *, at: str = "eu", shard: str = "00") -> Holding:
    return Holding(shard, of.key(), of, f"u-{at}", count)


def plan_of(offers: list[Offer], wants: list[Want], runs: dict[Group, float], *held: Holding, **more: Any) -> Plan:
    times = {of.key(): seconds for of, seconds in runs.items()}
    wants = [replace(each, run_seconds=times.get(each.key, 0.0)) for each in wants]
    return place(Snapshot(tuple(offers), tuple(wants), held, runs=times, **more), NOW)


def got(plan: Plan, w: Want, at: str = "") -> int:
    return sum(g.count for g in plan.grants if (g.shard, g.key) == (w.shard, w.key) and at in g.cluster)


@pytest.mark.parametrize("run", [0.0, HORIZON * 1.01, 60.0])
def test_work_that_is_long_or_unknown_gets_slots_only(run: float) -> None:
    a = want(group())
    assert got(plan_of([offer()], [a], {a.group: run}), a) == 2


@pytest.mark.parametrize("run", [0.002, 0.01, 0.05, HORIZON])
def test_short_work_fills_the_horizon_of_all_slots(run: float) -> None:
    a = want(group())
    assert got(plan_of([offer(slots=4)], [a], {a.group: run}), a) == pytest.approx(4 * HORIZON / run, abs=1)


def test_no_ops_are_taken_for_tasks_of_a_millisecond() -> None:
    a = want(group(), 10_000)
    runs = {a.group: TICK}
    assert got(plan_of([offer(limit=5000)], [a], runs), a) == 2 * HORIZON / SHORTEST
    assert got(plan_of([offer(slots=1, limit=5000)], [a], runs), a) == HORIZON / SHORTEST


def test_no_agent_gets_more_than_it_lets_wait() -> None:
    a = want(group())
    assert got(plan_of([offer(limit=20)], [a], {a.group: 0.001}), a) == 20
    assert got(plan_of([offer(limit=20, free=0)], [a], {a.group: 0.001}, holding(a.group, 15)), a) == 5
    assert got(plan_of([offer(limit=0)], [a], {a.group: 0.001}), a) == 2, (
        "an agent that says nothing has no queue of ours"
    )


def test_a_queue_is_filled_up_and_not_over() -> None:
    a = want(group())
    runs = {a.group: 0.01}
    assert got(plan_of([offer(free=0)], [a], runs, holding(a.group, 50)), a) == 0
    assert got(plan_of([offer(free=0)], [a], runs, holding(a.group, 20)), a) == 30


def test_slots_held_by_long_work_do_not_drain() -> None:
    a, long = want(group()), group(label="x")
    held = holding(long, 1)
    assert got(plan_of([offer(free=1)], [a], {a.group: 0.01, long: 100.0}, held), a) == 25
    assert got(plan_of([offer(free=0)], [a], {a.group: 0.01, long: 100.0}, holding(long, 2)), a) == 0


def test_who_must_wait_for_a_slot_keeps_its_class_and_those_below_out_of_the_queue() -> None:
    short, unknown = want(group()), want(group(priority=1), 5)
    plan = plan_of([offer()], [short, unknown], {short.group: 0.001})
    assert (got(plan, short), got(plan, unknown)) == (0, 2)
    same = want(group("other"), 5)
    plan = plan_of([offer()], [short, same], {short.group: 0.001})
    assert got(plan, short) + got(plan, same) == 2
    below = want(group("other", priority=-1), 5)
    plan = plan_of([offer()], [short, below], {short.group: 0.01})
    assert (got(plan, short), got(plan, below)) == (50, 0)


def test_who_comes_later_in_a_namespace_keeps_nobody_out() -> None:
    short, later = want(group()), want(group(label="x"), 5, slack=900.0)
    facts = offer().facts
    at = Offer(
        ClusterFacts(facts.uid, "eu", facts.health, facts.admission, facts.generations, (("x", "1"),)),
        offer().shapes,
        queue_limit=LIMIT,
    )
    assert got(plan_of([at], [short, later], {short.group: 0.01}), short) == 50
    first = want(group(label="x"), 5, slack=1.0)
    assert got(plan_of([at], [short, first], {short.group: 0.01}), short) == 0


def test_queues_are_shared_by_weight_like_slots() -> None:
    a, b = want(group("a")), want(group("b"))
    runs = {a.group: 0.001, b.group: 0.001}
    plan = plan_of([offer()], [a, b], runs, weights={"a": 3.0})
    assert got(plan, a) / got(plan, b) == pytest.approx(3.0, rel=0.1)
    assert got(plan, a) + got(plan, b) == 500


def test_quotas_hold_in_queues() -> None:
    a = want(group())
    assert got(plan_of([offer()], [a], {a.group: 0.001}, quotas={"ns": 7}), a) == 7


def test_urgent_work_of_the_same_namespace_gets_the_queue_drained() -> None:
    """It comes first in the order and got nothing: what the other has queued gives its places back within the horizon."""
    short, urgent = want(group()), want(group(label="x"), 1, slack=1.0)
    held = holding(short.group, 50)
    facts = offer().facts
    at = Offer(
        ClusterFacts(facts.uid, "eu", facts.health, facts.admission, facts.generations, (("x", "1"),)),
        offer(free=0).shapes,
    )
    plan = plan_of([at], [short, urgent], {short.group: 0.01}, held)
    assert plan.returning == {("00", short.key)}
    later = want(group(label="x"), 1, slack=900.0)
    assert plan_of([at], [short, later], {short.group: 0.01}, held).returning == frozenset()


def test_a_higher_class_gets_the_queue_drained() -> None:
    short, above = want(group()), want(group(priority=1), 1)
    plan = plan_of([offer(free=0)], [short, above], {short.group: 0.01}, holding(short.group, 50))
    assert plan.returning == {("00", short.key)}


def test_a_queue_whose_tasks_turned_out_long_is_given_back() -> None:
    a = want(group())
    held = holding(a.group, 50)
    assert plan_of([offer(free=0)], [a], {a.group: 0.015}, held).returning == frozenset()
    assert plan_of([offer(free=0)], [a], {a.group: 0.05}, held).returning == {("00", a.key)}
    assert plan_of([offer(free=0)], [a], {a.group: 5.0}, held).returning == {("00", a.key)}


def test_c4_what_ends_in_front_of_a_queue_is_no_free_room() -> None:
    """The report says: nothing free, and 50 are held, 48 of which wait. 30 ended since: the next 30 of the queue run."""
    unknown = want(group(label=""), 10)
    long = {unknown.group: 100.0}
    assert got(plan_of([offer(free=0, changed=-30)], [unknown], long, holding(group("b"), 20)), unknown) == 0
    assert got(plan_of([offer(free=0, changed=-49)], [unknown], long, holding(group("b"), 1)), unknown) == 1
    assert got(plan_of([offer(free=0, changed=-50)], [unknown], long), unknown) == 2


@given(st.integers(1, 8), st.integers(0, 40), st.integers(0, 40))
def test_c4_room_is_what_is_not_held(slots: int, before: int, ended: int) -> None:
    ended = min(ended, before)
    free = max(0, slots - before)
    room = room_of(offer(slots=slots, free=free, changed=-ended), {"cpu": 1000 * (before - ended)})
    assert room.fit((("cpu", 1000),)) == max(0, slots - (before - ended))


P, Q = ("steps:run", "sha"), ("steps:walk", "sha")


def test_run_times_rise_fast_and_fall_slowly() -> None:
    times = RunTimes()
    assert times.of("g", [P]) == 0.0
    times.learn("g", P, 0.0)
    assert times.of("g", [P]) == TICK
    times.learn("g", P, 60.0)
    assert times.of("g", [P]) > 5.0, "one task of a minute closes a queue"
    for _ in range(20):
        times.learn("g", P, 0.001)
    assert times.of("g", [P]) > HORIZON, "twenty short ones do not open it again"
    for _ in range(200):
        times.learn("g", P, 0.001)
    assert times.of("g", [P]) < 0.01
    times.learn("g", P, 0.1)
    assert times.of("g", [P]) < 0.02, "one slow start does not empty it"
    times.learn("g", P, -5.0)
    assert times.of("g", [P]) > 0.0, "a clock that stepped back says nothing"


def test_a_program_whose_task_came_back_unstarted_is_not_short_for_a_dozen_ends() -> None:
    times = RunTimes()
    for _ in range(100):
        times.learn("g", P, 0.001)
    for _ in range(200):
        times.slow("g", P)
    assert not short(times.of("g", [P]))
    assert not short(times.mean("g"))
    for _ in range(10):
        times.learn("g", P, 0.001)
    assert not short(times.of("g", [P])), "a few ends do not fill the same queue again"
    for _ in range(10):
        times.learn("g", P, 0.001)
    assert short(times.of("g", [P])), "a cluster that stood still for a moment is forgiven"
    times.learn("g", P, 60.0)
    times.slow("g", P)
    assert times.of("g", [P]) > SLOW, "what is known to be worse stays so"


def test_a_task_that_still_runs_only_raises_what_is_known() -> None:
    times = RunTimes()
    times.running("g", P, 0.1)
    assert times.of("g", [P]) == 0.0, "it may run for hours: work that never ended is not short"
    times.learn("g", P, 60.0)
    times.running("g", P, 0.1)
    assert times.of("g", [P]) == 60.0
    times.learn("h", P, 0.001)
    times.running("h", P, 0.1)
    assert times.of("h", [P]) > 0.01


def test_a_group_is_as_slow_as_the_slowest_program_that_is_ready() -> None:
    times = RunTimes()
    times.learn("g", P, 0.001)
    assert times.of("g", [P, Q]) == 0.0, "what never ran is unknown, whatever ran before it"
    times.learn("g", Q, 0.1)
    assert times.of("g", [P, Q]) == 0.1
    assert 0.001 < times.mean("g") < 0.1
    assert times.of("other", [P]) == 0.0
    many = [(f"f{n}", "") for n in range(MAX_MIXED + 1)]
    for program in many:
        times.learn("g", program, 0.001)
    assert times.of("g", many[1:]) == pytest.approx(0.001)
    assert times.of("g", many) == 0.0, "too many to look at"


def test_run_times_are_bounded_and_the_one_unused_longest_goes() -> None:
    times = RunTimes()
    for number in range(MAX_PROGRAMS):
        times.learn(str(number), P, 1.0)
    times.learn("0", P, 1.0)
    times.learn("new", P, 1.0)
    assert (times.of("0", [P]), times.of("new", [P]), times.of("1", [P])) == (1.0, 1.0, 0.0)
    assert (times.mean("0"), times.mean("1")) == (1.0, 0.0)
