"""The storm guard: many clusters lost at once are more likely one network's fault than many deaths (PROTOCOL S7).

Theory. Losing sight is not death. If a third of a federation vanishes within one recovery time L+G, the likeliest cause lies
between us and them; moving everything at once would double the work, and crush who is left. So tasks are held for up to
2(L+G) from the first loss, once per storm; owners shorten it to a task's own slack. A goodbye or a reboot (evidence
REPORTED) is a known death and does not count; nor does a generation without any heartbeat, which had nothing to lose and
served nothing (`fleet.started_nothing`): else whoever can say Hello could stir a storm, or water one down. With fewer than
three serving clusters there is no majority to learn from, and no storm guard.

A storm lasts from its first loss to the end of its hold. Losses inside it belong to it and never lengthen it; losses after
it start counting anew.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from control_plane.core.model import Evidence

MIN_SERVING = 3
"""S7. With two, one loss is half of all and says nothing about the cause."""

MIN_LOST = 2
"""S7. One loss is one loss, however few there are."""

HOLD_FACTOR = 2.0
"""S7: the hold is this many (L+G). Shorter: an outage just longer than L+G doubles everything; longer: real disasters wait."""


@dataclass(frozen=True, slots=True)
class Loss:
    """A cluster was lost without a word. `wall` in seconds; `recovery` is its generation's L+G in seconds."""

    wall: float
    cluster: str
    recovery: float


@dataclass(slots=True)
class Storm:
    """What the guard remembers: the recent losses of no storm yet, and until when (wall) the last storm holds."""

    losses: list[Loss] = field(default_factory=list)
    until: float = 0.0

    def lost(self, loss: Loss, evidence: Evidence) -> None:
        """Fold a ClusterLost."""
        if evidence is Evidence.REPORTED or loss.wall < self.until:
            return
        self.losses = [*self._recent(loss.wall), loss]

    def held(self, until: float) -> None:
        """Fold a StormHeld: its losses are spent."""
        self.until = until
        self.losses = []

    def verdict(self, now: float, serving: Collection[str]) -> float | None:
        """Until when to hold if a storm begins at `now`; None if none does. `serving` are uids with a session right now."""
        recent = self._recent(now)
        lost = {loss.cluster for loss in recent}
        total = len(lost.union(serving))
        if total < MIN_SERVING or len(lost) < MIN_LOST or 3 * len(lost) <= total:
            return None
        return min(loss.wall for loss in recent) + HOLD_FACTOR * max(loss.recovery for loss in recent)

    def _recent(self, now: float) -> list[Loss]:
        """Losses within L+G of `now`. A wall clock that stepped back makes a loss look future: it still counts."""
        return [loss for loss in self.losses if now - loss.wall <= loss.recovery]
