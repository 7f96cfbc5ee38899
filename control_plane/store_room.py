"""Room in the store: new work is refused before the store is full, so that old work can still end (PROTOCOL J9).

Theory. An etcd whose quota is exhausted refuses every write, and with that every finish and cancel, which are what would make room
again. So creations stop at 70 % of the quota; the rest is for snapshots, finishes and cancels. What is in use is judged, not
the file: pages that a compaction freed are used again, and the file never shrinks by itself. But etcd refuses by the file, so a
file that is nearly as large as the quota counts too, and only a defragmentation helps it.

A look is a level and a few seconds old; the 30 % are far more than can be created in between. A store that does not answer changes
nothing: then nothing is created anyway.
"""

from __future__ import annotations

import logging

from baton.clock import Clock
from control_plane.core import commands
from control_plane.store.base import Store, StoreError, StoreStatus

log = logging.getLogger(__name__)

POLL_INTERVAL = 5.0
"""Seconds between looks. Larger: more may be created past the limit; smaller: a call for a number that moves slowly."""

POLL_TIMEOUT = 5.0

ADMISSION_SHARE = 0.7
"""J9: share of the quota in use from which nothing is created. Larger: a full store before old work has ended; smaller: room idles."""

FILE_SHARE = 0.95
"""Share of the quota that the file may take although much of it is free."""

DEFAULT_QUOTA = 2 << 30
"""Bytes; etcd's own default, for servers before 3.6, which do not tell."""

CREATIONS = (commands.CreateRun, commands.PutGraph, commands.PutNamespace)
"""What makes the store grow for long. Everything else ends something, or is small."""


class StoreRoom:
    """One replica's look at the store's size. `refusal`: why nothing may be created now; empty if it may."""

    def __init__(self, store: Store, clock: Clock, quota_bytes: int = 0) -> None:
        """`quota_bytes`: the quota of a server that does not tell its own; 0 means etcd's default."""
        self._store, self._clock = store, clock
        self._quota = quota_bytes or DEFAULT_QUOTA
        self.refusal = ""

    def refuses(self, command: object) -> str:
        """Why this command may not be decided now; empty if it may."""
        return self.refusal if isinstance(command, CREATIONS) else ""

    async def run(self) -> None:
        """Look now and then, until cancelled."""
        while True:
            try:
                self._judge(await self._store.status(timeout=POLL_TIMEOUT))
            except StoreError as error:
                log.debug("the store's size is not known now", extra={"error": str(error)})
            await self._clock.sleep(POLL_INTERVAL)

    def _judge(self, status: StoreStatus) -> None:
        before, self.refusal = self.refusal, refusal(status, self._quota)
        if bool(before) != bool(self.refusal):
            fields = {
                "in_use": status.in_use_bytes,
                "file": status.db_bytes,
                "quota": status.quota_bytes or self._quota,
            }
            log.warning("creations are refused" if self.refusal else "creations are admitted again", extra=fields)


def refusal(status: StoreStatus, untold: int) -> str:
    """Why nothing may be created now; empty if it may. `untold`: the quota of a server that does not tell its own, in bytes."""
    quota = status.quota_bytes or untold
    if quota < 0:
        return ""
    if status.in_use_bytes >= ADMISSION_SHARE * quota:
        return (
            f"the store holds {status.in_use_bytes} of {quota} bytes: nothing is created above {ADMISSION_SHARE:.0%} of its "
            "quota, so that what runs can end"
        )
    if status.db_bytes >= FILE_SHARE * quota:
        return (
            f"the store's file has {status.db_bytes} of {quota} bytes: nothing is created above {FILE_SHARE:.0%} of its quota; "
            "defragment etcd"
        )
    return ""
