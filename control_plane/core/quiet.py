"""How long after a restore was suspected nothing may be placed (PROTOCOL J12, F5).

Theory. Work that was placed after the backup is unknown to the restored store, so its repetition may start as soon as somebody
places again, and no ClusterLost and no guard time stands before it. But from the moment the suspicion is in the store no heartbeat
is acknowledged (S2 compares its absence), so every agent fences what may be rerun: by F + K after the last acknowledged heartbeat,
which was sent before the suspicion was put, hence before anybody saw it. L + G is chosen so that it passes later on any permitted
clock (F5). So once L + G, the longest of any cluster, has passed on the clock of one replica since that replica first saw the
suspicion, no such work is alive. What is not in memory is not counted: a replica that restarts counts anew.

Limits. Work of `wait` and `never_rerun` (F7) is stopped by no fence: where the store forgot its placement, it may overlap with its
repetition until its agent is told to stop it (F8). Work without a guard (evidence `none`, F6) is bound by nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(slots=True)
class Quiet:
    """The suspicion that one replica sees, empty if none, and when it first saw it (seconds of its boot clock)."""

    suspicion: str = ""
    since: float = 0.0

    def see(self, suspicion: str, now: float) -> None:
        """What is suspected now. Another suspicion, or the same one after a time without, starts anew."""
        if suspicion != self.suspicion:
            self.suspicion, self.since = suspicion, now

    def seconds_left(self, needed: float, now: float) -> float:
        """Until `needed` seconds (`quiet_seconds`) have passed since the suspicion was first seen; 0 if they have."""
        return max(0.0, self.since + needed - now)


def quiet_seconds(profiles: Iterable[str], recovery: Mapping[str, float], default: str) -> float:
    """The longest L + G among clusters of these lease profiles, in seconds. `recovery`: profile -> L + G. A profile that is not
    known, and a federation without clusters, count as `default`, which must be known."""
    return max((recovery.get(profile, recovery[default]) for profile in profiles), default=recovery[default])
