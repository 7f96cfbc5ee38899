"""Critical paths, slack and backoff (PROTOCOL D1)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.core.deadline import (
    INFRASTRUCTURE_BACKOFF_CAP,
    REJECTION_PAUSE,
    CyclicGraph,
    application_backoff,
    critical_path,
    infrastructure_backoff,
    jitter,
    rejection_pause,
    tails,
)
from control_plane.core.model import RetryPolicy
from tests.unit.core.shard_kit import Shard, facts, task


def test_a_tail_is_the_longest_way_to_a_leaf() -> None:
    graph = [
        task("a", expected=1.0),
        task("b", 0, expected=5.0),
        task("c", 0, expected=2.0),
        task("d", 1, 2, expected=1.0),
    ]
    assert tails(graph) == [7.0, 6.0, 3.0, 1.0]
    assert critical_path(graph) == 7.0
    assert critical_path([]) == 0.0


def test_parents_may_come_later_in_the_list() -> None:
    assert tails([task("child", 1, expected=2.0), task("parent", expected=3.0)]) == [2.0, 5.0]


@pytest.mark.parametrize("graph", [[task("a", 0)], [task("a", 1), task("b", 0)], [task("a", 5)], [task("a", -1)]])
def test_cycles_and_strangers_are_named(graph: list[object]) -> None:
    with pytest.raises(CyclicGraph, match="a"):
        tails(graph)  # type: ignore[arg-type]


def test_a_long_chain_needs_no_recursion() -> None:
    chain = [task("t0", expected=1.0), *(task(f"t{i}", i - 1, expected=1.0) for i in range(1, 20_000))]
    assert critical_path(chain) == 20_000.0


@given(st.text(max_size=5), st.integers(0, 1000), st.integers(1, 50))
def test_jitter_is_a_fixed_draw_from_the_unit_interval(run: str, index: int, n: int) -> None:
    draw = jitter(run, index, n)
    assert 0.0 <= draw < 1.0
    assert draw == jitter(run, index, n)


def test_jitter_differs_between_attempts_and_is_spread() -> None:
    draws = [jitter("run", index, 1) for index in range(1000)]
    assert len(set(draws)) == 1000
    assert 0.45 < sum(draws) / 1000 < 0.55
    assert jitter("run", 0, 1) != jitter("run", 0, 2)


@given(st.integers(1, 100), st.floats(0, 0.999), st.floats(0.01, 100), st.floats(0.01, 100), st.floats(1, 10))
def test_application_backoff_stays_under_its_bound(
    n: int, draw: float, first: float, cap: float, growth: float
) -> None:
    wait = application_backoff(RetryPolicy(100, first, cap, growth), n, draw)
    assert 0.0 <= wait <= min(cap, first * growth ** (n - 1))


def test_other_waits_are_bounded() -> None:
    assert infrastructure_backoff(1, 0.999) < 0.1
    assert infrastructure_backoff(1000, 0.999) <= INFRASTRUCTURE_BACKOFF_CAP
    assert REJECTION_PAUSE / 2 <= rejection_pause(0.0) <= rejection_pause(0.999) <= REJECTION_PAUSE


def test_slack_counts_the_critical_path() -> None:
    shard = Shard(facts("a"))
    shard.create(task("a", expected=10.0), task("b", 0, expected=20.0), deadline=100.0)
    assert shard.machine.demand(shard.now)[0].slack_seconds == 70.0
    shard.grant("a")
    shard.finish(shard.only(0))
    assert shard.machine.demand(shard.now) == []
