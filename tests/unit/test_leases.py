"""Lease arithmetic (PROTOCOL F5, S8)."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.leases import (
    DEFAULT_PROFILE,
    PROFILES,
    LeaseValues,
    UnsafeLease,
    calmness,
    changes,
    check,
    from_millis,
    recovery_seconds,
    ride_out_seconds,
    safety,
    to_millis,
)

seconds = st.integers(1, 600_000).map(lambda ms: ms / 1000)


@st.composite
def safe_values(draw: st.DrawFn) -> LeaseValues:
    heartbeat = draw(seconds)
    fence = 3 * heartbeat + 3 + draw(seconds)
    kill = draw(seconds)
    least = ((fence + kill) / (1 - 0.083) + 2.5) * 1.083
    guard = draw(seconds)
    return LeaseValues("drawn", heartbeat, fence, kill, max(0.0, least - guard) + draw(seconds), guard)


@pytest.mark.parametrize("name", PROFILES)
def test_f5_every_profile_holds_both_inequalities(name: str) -> None:
    check(PROFILES[name])
    assert PROFILES[name].profile == name


def test_f5_profiles_do_what_the_pages_say() -> None:
    assert recovery_seconds(PROFILES["fast"]) == 20
    assert recovery_seconds(PROFILES["balanced"]) == 42
    assert ride_out_seconds(PROFILES["balanced"]) == 25
    assert recovery_seconds(PROFILES["patient"]) == 600
    assert DEFAULT_PROFILE == "balanced"


def test_f5_refusal_prints_both_sides() -> None:
    with pytest.raises(UnsafeLease) as caught:
        check(replace(PROFILES["fast"], lost=10))
    text = str(caught.value)
    assert "(F + K)/(1 - rho) + P + X < (L + G)/(1 + rho)" in text
    assert "17.767 s" in text
    assert "13.850 s" in text
    with pytest.raises(UnsafeLease, match=r"F >= m\*h \+ T_rpc \+ E: 9.000 s against 18.000 s"):
        check(replace(PROFILES["fast"], heartbeat=5))


@pytest.mark.parametrize("bad", [{"rho": 1.0}, {"heartbeat": 0.0}, {"kill": -1.0}, {"fence": float("nan")}])
def test_f5_nonsense_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UnsafeLease):
        check(replace(PROFILES["fast"], **bad))  # type: ignore[arg-type]


@given(safe_values())
def test_f5_a_copy_never_starts_before_the_old_work_is_dead(values: LeaseValues) -> None:
    check(values)
    dead_by = (values.fence + values.kill) / (1 - values.rho) + values.pause + values.in_flight
    assert dead_by < recovery_seconds(values) / (1 + values.rho)


@given(safe_values(), seconds)
def test_f5_waiting_longer_never_makes_it_unsafe(values: LeaseValues, more: float) -> None:
    assert safety(replace(values, lost=values.lost + more)).holds
    assert calmness(replace(values, fence=values.fence + more)).holds


@given(safe_values(), safe_values())
def test_s8_every_mixture_on_the_way_is_safe(old: LeaseValues, new: LeaseValues) -> None:
    steps = (old, *changes(old, new))
    assert steps[-1] == new
    for before, after in itertools.pairwise(steps):
        for agent in (before, after):
            for fleet in (before, after):
                assert safety(replace(agent, lost=fleet.lost, guard=fleet.guard)).holds


def test_s8_growing_raises_the_wait_first_and_shrinking_lowers_it_last() -> None:
    fast, balanced = PROFILES["fast"], PROFILES["balanced"]
    first, *_, last = changes(fast, balanced)
    assert (first.fence, recovery_seconds(first)) == (fast.fence, recovery_seconds(balanced))
    assert last == balanced
    first, *_, last = changes(balanced, fast)
    assert (first.fence, recovery_seconds(first)) == (fast.fence, recovery_seconds(balanced))
    assert last == fast
    assert changes(fast, fast) == ()


@pytest.mark.parametrize("name", PROFILES)
def test_values_survive_the_wire(name: str) -> None:
    wire = to_millis(PROFILES[name])
    assert wire["profile"] == name
    millis = {key: int(value) for key, value in wire.items() if key != "profile"}
    assert from_millis(name, base=None, **millis) == PROFILES[name]
    with pytest.raises(UnsafeLease):
        from_millis("fast", heartbeat_ms=0, fence_ms=0, kill_ms=0, lost_ms=0, guard_ms=0)
