"""The timing of a lease: how long work may run unheard, and when a copy of it may start (PROTOCOL F5, S8).

Leases give liveness, fences give safety: nothing here decides which result is accepted, it only keeps two copies
from overlapping in time. Both planes read the same values, so both use this module.

An agent counts from `t`, the time *before sending* the last acknowledged heartbeat, on a clock that counts suspend:

    t -------- h h h --------- F ........ K ......|            agent: starts nothing from F on, all is dead at F + K
    t ------------------ L ----------------- G ------|         control plane: lost at L, a copy starts at L + G

* **Safe**: `(F + K)/(1 - rho) + P + X < (L + G)/(1 + rho)`. The old work is gone, on the slowest permitted clock,
  before a copy starts on the fastest one.
* **Calm** (not trigger-happy): `F >= m*h + T_rpc + E`. Missing m heartbeats, one slow answer and one etcd failover do
  not reach F.

`check` refuses values that break either and prints both sides. `changes` orders a change of values (S8): between two
neighbouring steps an agent may hold either F while fleet holds either L + G, and all of these pairs must be safe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final


class UnsafeLease(ValueError):
    """Values that break an inequality of F5; the text prints both sides."""


@dataclass(frozen=True, slots=True)
class LeaseValues:
    """The values of F5. All are seconds, except `misses` (a count) and `rho` (a rate)."""

    profile: str
    """Name for people."""
    heartbeat: float
    """h: time between heartbeats."""
    fence: float
    """F: from the send time of the last acknowledged heartbeat, nothing is started and work begins to stop."""
    kill: float
    """K: this long after F, all is dead (TERM, KILL, reaping)."""
    lost: float
    """L: a session key unchanged for so long is lost (S4)."""
    guard: float
    """G: an owner waits this long after the loss before a copy starts (S5)."""
    pause: float = 2.0
    """P: longest pause of a guard that still counts as `timed` evidence (F6)."""
    in_flight: float = 0.5
    """X: effects still under way after death."""
    rho: float = 0.083
    """Clock-rate error. 8.3 % is what chrony may slew by default, and it bends the boot clock too."""
    misses: int = 3
    """m: heartbeats that may be missed without a lapse."""
    rpc: float = 2.0
    """T_rpc: longest answer of the control plane that is not a failure."""
    election: float = 1.0
    """E: an etcd failover, measured 1.0 s."""


@dataclass(frozen=True, slots=True)
class Sides:
    """An inequality with numbers in it."""

    rule: str
    left: float
    right: float
    holds: bool

    def __str__(self) -> str:
        return f"{self.rule}: {self.left:.3f} s against {self.right:.3f} s"


def safety(values: LeaseValues) -> Sides:
    """Old work is dead before a copy may start (F5). Needs 0 <= rho < 1."""
    left = (values.fence + values.kill) / (1 - values.rho) + values.pause + values.in_flight
    right = (values.lost + values.guard) / (1 + values.rho)
    return Sides("safe needs (F + K)/(1 - rho) + P + X < (L + G)/(1 + rho)", left, right, left < right)


def calmness(values: LeaseValues) -> Sides:
    """Ordinary hiccups do not reach F (F5)."""
    right = values.misses * values.heartbeat + values.rpc + values.election
    return Sides("not trigger-happy needs F >= m*h + T_rpc + E", values.fence, right, values.fence >= right)


def check(values: LeaseValues) -> None:
    """Raise `UnsafeLease`, with both sides in its text, unless the values keep F5."""
    for item in fields(values):
        number = getattr(values, item.name)
        if item.name != "profile" and not 0 <= number < float("inf"):
            raise UnsafeLease(
                f"lease profile {values.profile!r}: {item.name} is {number}; it must be finite, 0 or more"
            )
    if not values.heartbeat > 0 or values.rho >= 1:
        raise UnsafeLease(f"lease profile {values.profile!r}: heartbeat must be above 0 s and rho below 1")
    broken = [str(sides) for sides in (safety(values), calmness(values)) if not sides.holds]
    if broken:
        raise UnsafeLease(f"lease profile {values.profile!r}: " + "; ".join(broken))


def recovery_seconds(values: LeaseValues) -> float:
    """Time from the last acknowledged heartbeat of a dead cluster to the start of a copy."""
    return values.lost + values.guard


def ride_out_seconds(values: LeaseValues) -> float:
    """Longest outage that neither stops nor doubles work: what F leaves once the answer after it is counted."""
    return values.fence - values.rpc - values.election


PROFILES: Final[dict[str, LeaseValues]] = {
    # For tests, demos and work that is cheap to repeat. Smaller and a garbage collection of the whole host fences work.
    "fast": LeaseValues("fast", heartbeat=2, fence=9, kill=5, lost=15, guard=5),
    # Rides out 25 s of outage: an etcd failover, a rolling restart of the replicas, a flapping link.
    "balanced": LeaseValues("balanced", heartbeat=3, fence=28, kill=5, lost=36, guard=6, misses=8),
    # For tasks of hours, where a rerun costs more than ten minutes of waiting; K leaves room to write a checkpoint.
    "patient": LeaseValues("patient", heartbeat=10, fence=460, kill=30, lost=540, guard=60, pause=5, rpc=5, election=3),
}
DEFAULT_PROFILE: Final = "balanced"


def changes(old: LeaseValues, new: LeaseValues) -> tuple[LeaseValues, ...]:
    """The steps from `old` to `new` (S8): L + G grows first, then F moves, then L + G shrinks; the last one is `new`.

    Each step is committed, and has reached every agent, before the next. Raises UnsafeLease if an end is unsafe.
    """
    check(old)
    check(new)
    wide = max(old, new, key=recovery_seconds)
    grown = replace(old, lost=wide.lost, guard=wide.guard)
    moved = replace(new, lost=wide.lost, guard=wide.guard)
    steps: list[LeaseValues] = []
    held = old
    for step in (grown, moved, new):
        if step != held:
            steps.append(step)
            held = step
    return tuple(steps)


def to_millis(values: LeaseValues) -> dict[str, str | int]:
    """The fields of `baton.v1.LeaseValues`, by name."""
    return {
        "profile": values.profile,
        "heartbeat_ms": round(values.heartbeat * 1000),
        "fence_ms": round(values.fence * 1000),
        "kill_ms": round(values.kill * 1000),
        "lost_ms": round(values.lost * 1000),
        "guard_ms": round(values.guard * 1000),
    }


def from_millis(
    profile: str,
    *,
    heartbeat_ms: int,
    fence_ms: int,
    kill_ms: int,
    lost_ms: int,
    guard_ms: int,
    base: LeaseValues | None = None,
) -> LeaseValues:
    """Inverse of `to_millis`. What does not travel (P, X, rho, m, T_rpc, E) is that of `base`; without one it is the
    named profile's, or for an unknown name the default's, which then must tolerate one miss only. Raises UnsafeLease.
    """
    known = base or PROFILES.get(profile) or replace(PROFILES[DEFAULT_PROFILE], misses=1)
    values = replace(
        known,
        profile=profile,
        heartbeat=heartbeat_ms / 1000,
        fence=fence_ms / 1000,
        kill=kill_ms / 1000,
        lost=lost_ms / 1000,
        guard=guard_ms / 1000,
    )
    check(values)
    return values
