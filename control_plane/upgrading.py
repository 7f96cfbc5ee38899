"""The feature level rises by itself, once everybody reads the higher one (PROTOCOL J11).

Theory. A federation that an older program made stays at that program's level until somebody raises it, and refuses what the newer
program could do. As etcd does with its cluster version, nobody has to remember: the owner of fleet raises the level when every
registered replica reads more, and has for HOLD. The hold is for whoever is not registered at the moment: raising is one way, so an
older replica that crashed, or is between two starts of a rolling upgrade, could never register again. Who is registered is judged
from the view here, which only delays; the raise itself reads the members and compares the level's mod_revision, which every
registration changes (`registration`). Two owners of fleet, or a dead one, do no harm for the same reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.clock import Clock
from control_plane.refusals import IncompatibleFederation
from control_plane.registration import raise_feature_level
from control_plane.store.base import Store, StoreError
from control_plane.view import View

log = logging.getLogger(__name__)

LOOK = 5.0
"""Seconds between looks. Larger: a later raise; smaller: wake-ups for what happens once in months."""

HOLD = 60.0
"""Seconds for which everybody must have read the higher level: above a replica's restart. Too small: a replica of the older version
that is being restarted is shut out; too large: an upgrade's features come late."""


class Upgrading:
    """The loop of one replica; it acts while `leads()` (this replica owns fleet)."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        view: View,
        *,
        leads: Callable[[], bool],
        level: Callable[[], int],
    ) -> None:
        """`level()`: the level in force, as last read."""
        self._store, self._clock, self._view = store, clock, view
        self._leads, self._level = leads, level

    async def run(self) -> None:
        """Until cancelled. Raises Corrupt."""
        wanted, since = 0, 0.0
        while True:
            await self._clock.sleep(LOOK)
            level, now = self._readable(), self._clock.boot()
            if not self._leads() or level <= self._level():
                wanted = 0
            elif level != wanted:
                wanted, since = level, now
            elif now - since >= HOLD:
                await self._raise(level)
                wanted = 0

    def _readable(self) -> int:
        """What every registered replica reads, as last heard; 0 if none is known."""
        return min((member.feature_level for member in self._view.members.values()), default=0)

    async def _raise(self, level: int) -> None:
        try:
            now = await raise_feature_level(self._store, self._clock, level)
        except (IncompatibleFederation, StoreError) as error:
            log.info("the feature level stays", extra={"wanted": level, "error": str(error)})
        else:
            log.info("the feature level is raised", extra={"level": now})
