"""What an attempt needs before it starts: artifacts of its parents, the last checkpoint of its task, stored code.

Artifacts and code it cannot do without. A checkpoint only saves work: one that the store has lost, as after a restore of etcd (J12)
whose owners name what later commits have swept away, costs that work and not the run.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from dataclasses import replace

from baton.telemetry.logs import about
from cluster_agent.carrying.cache import Cache
from cluster_agent.carrying.courier import Courier, DiskFull, Missing, Undeliverable
from cluster_agent.carrying.port import Wanted
from cluster_agent.carrying.shelf import Shelf, Stamp
from cluster_agent.core.model import ArtifactSource
from cluster_agent.executors.base import AttemptKey, StartRequest

log = logging.getLogger("baton.agent")


class Fetcher:
    """Brings it. Raises Undeliverable throughout."""

    def __init__(self, shelf: Shelf, cache: Cache, courier: Courier) -> None:
        self._shelf, self._cache, self._courier = shelf, cache, courier
        self._codes: dict[str, asyncio.Lock] = {}

    async def bring(self, request: StartRequest) -> tuple[StartRequest, Stamp | None]:
        """The request as it may start now, and the stamp of the checkpoint it starts from, if it was brought. It starts at once
        then (`slots` 0): whatever ran when it was ordered may be over, or others may run."""
        try:
            await self._artifacts(request)
            stamp = await self._checkpoint(request.key, request.checkpoint) if request.checkpoint else None
            call = request.python
            if call is not None and call.stored:
                await self._code(call.tenant, call.code)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            words = f"the agent's disk is full, at {self._shelf.inputs(request.key).parent}"
            raise DiskFull(f"{words}: its operator has to free room there, or move --directory") from error
        env = dict(request.env)
        if request.artifacts:
            env["BATON_INPUT_DIR"] = str(self._shelf.inputs(request.key))
        return replace(request, env=env, artifacts=(), checkpoint=None, slots=0), stamp

    async def _artifacts(self, request: StartRequest) -> None:
        """All of its parents', some at a time; the first failure ends all."""
        places = await asyncio.to_thread(self._shelf.places, request.key, request.artifacts)
        try:
            async with asyncio.TaskGroup() as group:
                for source, place in zip(request.artifacts, places, strict=True):
                    group.create_task(self._cache.bring(source, place))
        except* (Undeliverable, OSError) as failed:
            raise failed.exceptions[0] from None

    async def _checkpoint(self, key: AttemptKey, source: ArtifactSource) -> Stamp | None:
        """Put it where the workload looks for it, in place of whatever an earlier attempt has left on this cluster: what is
        committed is newer, or as good. None if it is gone: then what was left here stays, and is news to be stored."""
        whole = False
        with await asyncio.to_thread(self._shelf.draft_checkpoint, key) as draft:
            try:
                await self._courier.fetch(Wanted(source), draft)
                draft.flush()
                whole = True
            except Missing as error:
                said = about(key.run_uid, task=key.task, attempt=key.n, checkpoint=source.ref.name, reason=str(error))
                log.warning("A checkpoint is gone from the store; the attempt starts without it.", extra=said)
            finally:
                stamp = self._shelf.place_checkpoint(key, keep=whole)
        return stamp if whole else None

    async def _code(self, namespace: str, sha256: str) -> None:
        async with self._codes.setdefault(sha256, asyncio.Lock()):
            try:
                if await asyncio.to_thread(self._shelf.has_code, sha256):
                    return
                with await asyncio.to_thread(self._shelf.draft_code, sha256) as draft:
                    await self._courier.fetch(Wanted(namespace=namespace, code_sha256=sha256), draft)
                self._shelf.place_code(sha256)
            finally:
                self._codes.pop(sha256, None)
