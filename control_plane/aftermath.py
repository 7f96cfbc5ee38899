"""After a restore: runs that are live in the store but finished in history take history's outcome (PROTOCOL J12).

Theory. A restored store is older than history, so runs that had finished may be live again. In the incarnation that finished them
this cannot be: a run goes into history only after its end was committed (J10). So whoever takes a shard in a later incarnation
asks history for every live run of it, once; a raised incarnation makes every owner take its shards anew. It is a level: a
check that was cut off is done by the next owner, and one that is done twice finds nothing.

Until the answer comes such a run goes on, and may do work again; no result of that is ever shown, since of two outcomes history
shows the earlier.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

from baton.clock import Clock
from baton.telemetry.logs import about
from control_plane.bell import Bell
from control_plane.core.commands import Refused, TakeHistory
from control_plane.core.model import FLEET, RunState
from control_plane.core.shard import RunShard
from control_plane.history import History, HistoryDown
from control_plane.refusals import NotOwned, OutcomeUnknown, StoreDown

if TYPE_CHECKING:
    from control_plane.controller import Controller, OwnedShard
    from control_plane.core.commands import Outbox

log = logging.getLogger(__name__)

FIRST_INCARNATION = 1
"""Of a store that was never restored: nothing to ask there."""

AGAIN = 2.0
"""Seconds until shards whose check failed are looked at again. Larger: finished runs live longer; smaller: load on a history that
is down."""

TIMEOUT = 10.0
"""Seconds for one read or commit of a shard."""

_FINAL = {int(state): state for state in RunState if state.final}


class Aftermath:
    """One replica's loop, and a controller `Listener`."""

    def __init__(self, history: History, controller: Controller, clock: Clock) -> None:
        self._history, self._controller = history, controller
        self._bell = Bell(clock)
        self._due: dict[str, OwnedShard] = {}

    def taken(self, shard: OwnedShard) -> None:
        """See `controller.Listener`: what it says is live may have ended in an earlier incarnation."""
        if shard.id != FLEET and shard.incarnation > FIRST_INCARNATION:
            self._due[shard.id] = shard
            self._bell.ring()

    def committed(self, shard: OwnedShard, outbox: Outbox) -> None:
        """See `controller.Listener`."""

    def dropped(self, shard: str) -> None:
        """See `controller.Listener`: its next owner asks."""
        self._due.pop(shard, None)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._bell.wait(AGAIN)
            for shard in list(self._due.values()):
                try:
                    await self._check(shard)
                except (HistoryDown, NotOwned, StoreDown, OutcomeUnknown, Refused) as error:
                    log.warning(
                        "finished runs may be live: history could not be asked",
                        extra={"shard": shard.id, "error": str(error)},
                    )
                    continue
                if self._due.get(shard.id) is shard:
                    del self._due[shard.id]

    async def _check(self, shard: OwnedShard) -> None:
        """Ask for all live runs of a shard. Raises HistoryDown, NotOwned, StoreDown, OutcomeUnknown, Refused."""
        for uid in await self._controller.read(shard.id, _open_runs, timeout=TIMEOUT):
            past = await self._history.by_uid(uid)
            state = _FINAL.get(past.state) if past is not None else None
            if state is not None:
                await self._controller.submit(shard.id, TakeHistory(uid, state), timeout=TIMEOUT)
                log.warning("a finished run was live again", extra=about(uid, shard=shard.id, state=state.name))


def _open_runs(machine: object) -> list[str]:
    shard = cast(RunShard, machine)
    final = set(shard.archivable())
    return [uid for uid in shard.event_numbers() if uid not in final]
