"""Moves finished runs into history, then lets their live state go (PROTOCOL J10).

Theory. Every owner archives the runs of its own shards: read the final run, insert it if absent, and only when that is durable
commit `Archived`. A crash anywhere in between repeats the insert, which changes nothing. A short delay lets watchers see the
end live. If history is down, runs stay live and are tried again: that costs memory, never truth.

Reading goes in pieces with a loop turn between them, so that a run of 100,000 tasks does not hold up heartbeats; a final run
changes no more (late refusals of results that come meanwhile are evidence kept in the log).

Retention is per namespace, and applied where the namespace's own shard is owned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from baton.clock import Clock
from baton.v1 import run_pb2
from control_plane.controller import Controller, OwnedShard
from control_plane.core.commands import Archived
from control_plane.core.model import FLEET, shard_of
from control_plane.core.shard import RunShard
from control_plane.core.views import RunEventView, RunView, TaskView
from control_plane.history import PIECE, Archive, History, HistoryDown, Piece, attempt_key
from control_plane.refusals import NotOwned, StoreDown

log = logging.getLogger(__name__)

DELAY = 5.0
"""Seconds a final run stays live. Less: more watchers read the end from history; more: memory of finished runs."""

INTERVAL = 0.5
"""Seconds between looks."""

BATCH_TASKS = 20_000
"""Tasks inserted together: a transaction of about 0.3 s, far below what other processes wait for the file."""

READ_TIMEOUT = 10.0
"""Seconds for one read of a shard."""

DOWN_PAUSE = 5.0
"""Seconds until history is tried again after a failure."""

PRUNE_INTERVAL = 60.0
PRUNE_RUNS = 500
"""Runs forgotten per namespace and interval: 700,000 a day."""

RETENTION = 30 * 24 * 3600.0
"""Seconds that finished runs are kept where the namespace says nothing (admin.proto)."""


@dataclass(frozen=True, slots=True)
class Translator:
    """How views become what the public calls answer; the edge's business, handed in by the composition root."""

    run: Callable[[RunView, str], run_pb2.Run]
    """(run, its shard)"""
    task: Callable[[TaskView], run_pb2.TaskStatus]
    event: Callable[[RunEventView, Callable[[int], str]], run_pb2.RunEvent]
    """(event, index -> task id)"""


def _nobody(archive: Archive) -> None:
    """Nobody wants to know."""


class Archiver:
    """One replica's loop."""

    def __init__(
        self,
        history: History,
        controller: Controller,
        clock: Clock,
        translator: Translator,
        archived: Callable[[Archive], None] = _nobody,
    ) -> None:
        """`archived` is told of every run that is in history; it must be quick and must not raise."""
        self._history, self._controller, self._clock, self._translator = history, controller, clock, translator
        self._archived = archived
        self._seen: dict[str, float] = {}
        """Run uid -> boot clock when it was first seen final here."""
        self._pruned = clock.boot()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._clock.sleep(INTERVAL)
            try:
                await self._round()
                if self._clock.boot() - self._pruned >= PRUNE_INTERVAL:
                    self._pruned = self._clock.boot()
                    await self._prune()
            except HistoryDown as error:
                log.warning("history is down: finished runs stay live", extra={"error": str(error)})
                await self._clock.sleep(DOWN_PAUSE)

    async def _round(self) -> None:
        """Everything that is due. Raises HistoryDown."""
        now = self._clock.boot()
        final: set[str] = set()
        for shard in list(self._controller.owned().values()):
            if shard.id == FLEET or shard.lost:
                continue
            uids = _machine(shard).archivable()
            if not uids:
                continue
            final.update(uids)
            due = [uid for uid in uids if now - self._seen.setdefault(uid, now) >= DELAY]
            if due:
                await self._archive(shard, due)
        self._seen = {uid: since for uid, since in self._seen.items() if uid in final}

    async def _archive(self, shard: OwnedShard, uids: list[str]) -> None:
        """Insert, then say so."""
        batch: list[Archive] = []
        size = 0
        for place, uid in enumerate(uids):
            try:
                archive = await self._collect(shard, uid)
            except (NotOwned, StoreDown):
                return  # whoever owns the shard next does it
            if archive is not None:
                batch.append(archive)
                size += archive.run.task_count
            if batch and (size >= BATCH_TASKS or place == len(uids) - 1):
                await self._history.insert(batch)
                for done in batch:
                    self._controller.post(shard.id, Archived(done.run.uid))
                    self._archived(done)
                batch, size = [], 0

    async def _collect(self, shard: OwnedShard, uid: str) -> Archive | None:
        """One run, whole; None if it is gone. Raises NotOwned, StoreDown."""

        def head(machine: RunShard) -> tuple[RunView | None, tuple[RunEventView, ...], dict[int, str]]:
            events = machine.kept_events(uid)
            return machine.run_by_uid(uid), events, machine.task_ids(uid, {i for event in events for i in event.tasks})

        view, events, ids = await self._controller.read(shard.id, head, timeout=READ_TIMEOUT)
        if view is None or not view.state.final:
            return None
        pieces: list[Piece] = []
        for start in range(0, view.task_total, PIECE):
            tasks = await self._controller.read(
                shard.id,
                lambda machine, start=start: machine.tasks(uid, start, PIECE),  # type: ignore[misc]  # a default
                timeout=READ_TIMEOUT,
            )
            response = run_pb2.ListTasksResponse(tasks=[self._translator.task(t) for t in tasks])
            nonces = {attempt_key(t.index, a.id.n): a.id.nonce for t in tasks for a in t.attempts}
            pieces.append(Piece(start, response, nonces))
            await self._clock.sleep(0)
        told: list[run_pb2.RunEvent] = []
        for event in events:
            told.append(self._translator.event(event, ids.__getitem__))
            if len(told) % PIECE == 0:
                await self._clock.sleep(0)
        return Archive(shard.incarnation, self._translator.run(view, shard.id), tuple(pieces), tuple(told))

    async def _prune(self) -> None:
        """Forget what is older than its namespace keeps. Raises HistoryDown."""
        for namespace in await self._history.namespaces():
            shard = self._controller.owned().get(shard_of(namespace, ""))
            if shard is None:
                continue
            known = _machine(shard).namespace(namespace)
            kept = known.retention if known is not None and known.retention > 0 else RETENTION
            dropped = await self._history.forget(namespace, self._clock.wall() - kept, PRUNE_RUNS)
            if dropped:
                log.info("finished runs were forgotten", extra={"namespace": namespace, "runs": dropped})


def _machine(shard: OwnedShard) -> RunShard:
    return cast(RunShard, shard.machine)
