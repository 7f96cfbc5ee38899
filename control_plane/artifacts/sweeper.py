"""Garbage of the object store, found by level: what no run and no use holds on to, goes (PROTOCOL J10).

Theory. Nobody is told that content became garbage; it is looked for. A folder of a run goes when the run is neither live nor in
history and nothing in it was written for an hour: an upload that is under way has a live run, and a run leaves the live state
only after it is in history. Code goes when its stamp is old. Nothing is deleted by guess: if one shard or history does not
answer, everything stays until the next round. The manifest goes first, so that nobody reads half of what is being deleted.
What has no name that we would give is somebody else's and is not looked into: an operator may have pointed us at a folder or a bucket
that holds more (at least a `lost+found`).

A restored store has forgotten runs whose content is still here, and the operator may yet choose a newer backup that knows them.
So nothing is deleted while a restore is suspected, nor for an hour after the incarnation changed (PROTOCOL J12); both are looked
at again before each request that deletes.

One replica sweeps, the owner of the fleet's shard; two that both think so do the same work, which does no harm.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

from baton.clock import Clock
from baton.errors import BatonError, WrongState
from baton.names import id_problem
from control_plane.artifacts.base import ObjectInfo, ObjectStore, ObjectStoreError
from control_plane.artifacts.gateway import CODE, MANIFEST, USED
from control_plane.artifacts.traffic import Traffic

log = logging.getLogger(__name__)

INTERVAL = 600.0
"""Seconds between rounds. Each asks for every run that has artifacts: less often keeps garbage longer, more often is work."""

GRACE = 3600.0
"""Seconds that a folder without a run stays: far above the time-out of an upload, for store clocks that are wrong as well."""

RESTORE_GRACE = 3600.0
"""Seconds without a sweep after the incarnation changed, or this replica first heard of one: time for an operator to see that he
confirmed the wrong backup. Too small: what the right one knows is deleted; too large: garbage stays after every restart."""

CODE_SECONDS = 30 * 24 * 3600.0
"""Without use: as long as finished runs are kept."""

BATCH = 200
"""Runs asked for together."""

STORE_SECONDS = 30.0
KNOWN_SECONDS = 30.0

DELETE = 500
"""Objects deleted by one request."""

_RUN = re.compile(r"[0-9a-f]{24,64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
"""Folders that are a run's or a code's. Uids of runs are hashes in hex; a wider pattern would take a folder of somebody's for a run
that nobody knows."""

Known = Callable[[Sequence[str], float], Awaitable[set[str]]]
"""Which of these uids are runs, live or finished; raises BatonError when somebody does not say. Within seconds."""

Heard = Callable[[], tuple[int, str]]
"""What this replica has heard of restores: the incarnation, and why one is suspected, empty if none is."""


class Sweeper:
    """One replica's loop."""

    def __init__(
        self,
        store: ObjectStore,
        clock: Clock,
        known: Known,
        mine: Callable[[], bool],
        heard: Heard,
        counts: Traffic | None = None,
    ) -> None:
        """`mine`: whether this replica is the one that sweeps."""
        self._store, self._clock, self._known, self._mine, self._heard = store, clock, known, mine, heard
        self._counts = counts or Traffic()
        self._incarnation, self._since = -1, 0.0
        """The incarnation at the last look, and the boot clock when it was first seen."""

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._look()
            await self._clock.sleep(INTERVAL)
            self._look()
            if not self._mine() or self._clock.boot() - self._since < RESTORE_GRACE:
                continue
            try:
                removed = await self.sweep()
            except (ObjectStoreError, BatonError) as error:
                self._counts.sweeps_failed += 1
                log.warning("artifacts are not swept now", extra={"error": str(error)})
                continue
            if removed:
                log.info("artifacts without a run were removed", extra={"folders": removed})

    async def sweep(self) -> int:
        """One round; how many folders were removed. Raises ObjectStoreError, BatonError: then the rest stays."""
        self._look()
        self._check_restore()
        removed = 0
        for namespace in await self._store.folders("", timeout=STORE_SECONDS):
            if id_problem(namespace):
                continue
            runs = await self._store.folders(f"{namespace}/", timeout=STORE_SECONDS)
            uids = [uid for uid in runs if _RUN.fullmatch(uid)]
            for start in range(0, len(uids), BATCH):
                removed += await self._sweep_runs(namespace, uids[start : start + BATCH])
            if CODE in runs:
                removed += await self._sweep_codes(f"{namespace}/{CODE}/")
        return removed

    def _look(self) -> None:
        incarnation, _ = self._heard()
        if incarnation != self._incarnation:
            self._incarnation, self._since = incarnation, self._clock.boot()

    def _check_restore(self) -> None:
        """Raises WrongState if a restore is suspected, or was confirmed since the last look."""
        incarnation, suspicion = self._heard()
        if suspicion:
            raise WrongState(f"nothing is swept while a restore is suspected: {suspicion}")
        if incarnation != self._incarnation:
            raise WrongState(f"nothing is swept so soon after a restore: the incarnation is now {incarnation}")

    async def _sweep_runs(self, namespace: str, uids: Sequence[str]) -> int:
        known = await self._known(uids, KNOWN_SECONDS)
        removed = 0
        for uid in uids:
            folder = f"{namespace}/{uid}/"
            if uid not in known and await self._newest(folder) < self._clock.wall() - GRACE:
                await self._remove(folder)
                removed += 1
        return removed

    async def _sweep_codes(self, prefix: str) -> int:
        removed = 0
        for sha256 in await self._store.folders(prefix, timeout=STORE_SECONDS):
            if not _SHA256.fullmatch(sha256):
                continue
            folder = f"{prefix}{sha256}/"
            stamps = [info.modified async for info in self._all(folder) if info.key == folder + USED]
            # Without a stamp the upload may be under way: its objects are judged by their own age.
            at = stamps[0] + CODE_SECONDS if stamps else await self._newest(folder) + GRACE
            if at < self._clock.wall():
                await self._remove(folder)
                removed += 1
        return removed

    async def _newest(self, folder: str) -> float:
        """When something in a folder was last written; 0 for an empty one."""
        newest = 0.0
        async for info in self._all(folder):
            newest = max(newest, info.modified)
        return newest

    async def _remove(self, folder: str) -> None:
        """Manifests first, then everything."""
        for manifests in (True, False):
            keys = [info.key async for info in self._all(folder) if not manifests or info.key.endswith(f"/{MANIFEST}")]
            for start in range(0, len(keys), DELETE):
                part = keys[start : start + DELETE]
                self._check_restore()
                await self._store.delete(part, timeout=STORE_SECONDS)
                self._counts.swept += len(part)

    async def _all(self, folder: str) -> AsyncIterator[ObjectInfo]:
        after = ""
        while infos := await self._store.page(folder, timeout=STORE_SECONDS, after=after):
            for info in infos:
                yield info
            after = infos[-1].key
