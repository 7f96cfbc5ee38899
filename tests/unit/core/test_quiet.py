"""The quiet time after a restore was suspected (PROTOCOL J12, F5)."""

from __future__ import annotations

import pytest

from baton.leases import DEFAULT_PROFILE, PROFILES, recovery_seconds
from control_plane.core.quiet import Quiet, quiet_seconds

RECOVERY = {name: recovery_seconds(values) for name, values in PROFILES.items()}


@pytest.mark.parametrize(
    ("profiles", "seconds"),
    [
        ((), 42.0),
        (("fast",), 20.0),
        (("fast", "balanced", "fast"), 42.0),
        (("fast", "patient"), 600.0),
        (("fast", "of-a-later-version"), 42.0),
        (("", "patient"), 600.0),
    ],
)
def test_j12_the_most_patient_cluster_says_how_long(profiles: tuple[str, ...], seconds: float) -> None:
    assert quiet_seconds(profiles, RECOVERY, DEFAULT_PROFILE) == seconds


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_f5_all_work_is_dead_when_the_quiet_time_is_over(profile: str) -> None:
    """The last acknowledged heartbeat was sent before the suspicion was seen; both clocks as far apart as is permitted."""
    lease = PROFILES[profile]
    dead_by = (lease.fence + lease.kill) / (1 - lease.rho) + lease.pause + lease.in_flight
    assert dead_by < quiet_seconds([profile], RECOVERY, DEFAULT_PROFILE) / (1 + lease.rho)


def test_j12_the_time_counts_from_the_first_sight() -> None:
    quiet = Quiet()
    quiet.see("s", 100.0)
    assert quiet.seconds_left(20.0, 100.0) == 20.0
    quiet.see("s", 115.0)
    assert quiet.seconds_left(20.0, 119.0) == 1.0
    assert quiet.seconds_left(20.0, 120.0) == 0.0
    assert quiet.seconds_left(20.0, 500.0) == 0.0


def test_j12_another_suspicion_and_one_that_came_again_count_anew() -> None:
    quiet = Quiet()
    quiet.see("s", 100.0)
    quiet.see("t", 110.0)
    assert quiet.seconds_left(20.0, 121.0) == 9.0
    quiet.see("", 125.0)
    quiet.see("t", 130.0)
    assert quiet.seconds_left(20.0, 131.0) == 19.0
