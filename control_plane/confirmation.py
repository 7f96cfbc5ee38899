"""An operator's word that the store was restored on purpose, taken no earlier than it is safe (PROTOCOL J12, F5; `core.quiet`).

One per replica. It counts on this replica's own boot clock from when the view, or at the latest the call itself, first saw the
suspicion. Lease profiles are remembered as long as the process lives: a cluster that joined after the backup is in no restored
table, and its work runs as long as its own profile says.
"""

from __future__ import annotations

import math

from baton.clock import Clock
from baton.errors import WrongState
from baton.leases import DEFAULT_PROFILE, PROFILES, recovery_seconds
from control_plane.core.quiet import Quiet, quiet_seconds
from control_plane.restore import RestoreDetector
from control_plane.view import View

RECOVERY = {name: recovery_seconds(values) for name, values in PROFILES.items()}
"""L + G by profile, seconds."""


class Confirmation:
    """Waits are told, never slept: the caller comes again."""

    def __init__(self, detector: RestoreDetector, view: View, clock: Clock) -> None:
        self._detector, self._view, self._clock = detector, view, clock
        self._quiet = Quiet()
        self._profiles: set[str] = set()
        view.subscribe(self._changed)

    async def confirm(self, now: bool) -> int:
        """Raise the incarnation and lift the stop; the incarnation that is then in force. `now`: at once, though work from after the
        backup may still run beside its repetition. Raises WrongState with the seconds left, Unavailable."""
        return await self._detector.confirm_restored(None if now else self._may_lift)

    def _changed(self, topic: str) -> None:
        if topic == "restore":
            self._quiet.see(self._view.restore_suspected, self._clock.boot())
        elif topic == "table":
            self._profiles |= {facts.profile for facts in self._view.table.clusters.values()}

    def _may_lift(self, suspicion: str) -> None:
        """Raises WrongState while work from after the backup may still run."""
        now = self._clock.boot()
        self._quiet.see(suspicion, now)
        needed = quiet_seconds(self._profiles, RECOVERY, DEFAULT_PROFILE)
        left = self._quiet.seconds_left(needed, now)
        if left > 0:
            raise WrongState(
                f"work from after the backup may still run; every agent has ended it in {math.ceil(left)} s:"
                " confirm again then, or with `now` if you know that none survives",
                retry_after=left,
            )
