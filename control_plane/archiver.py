"""Moves finished runs into history, then lets their live state go (PROTOCOL J10).

Theory. Every owner archives the runs of its own shards: read the final run, insert it if absent, and only when that is durable
commit `Archived`. A crash anywhere in between repeats the insert, which changes nothing. A short delay lets watchers see the
end live: it counts from the run's recorded end, so a change of owner does not begin it anew. If history is down, runs stay live and
are tried again: that costs memory, never truth.

History needs neither the store nor the lease: what was final at a commit stays final. So while the store is away runs are inserted as
ever, from memory, and once a restore is suspected (J12) all of them are, at once, also those of shards that were lost to it: the
restored store may know nothing of them, and nobody else will ever tell. Should such a run live again, its owner finds it in history
(`aftermath.py`); a second insert of the same run, by whomever, changes nothing.

Reading goes in pieces with a loop turn between them, so that a run of 100,000 tasks does not hold up heartbeats; a final run
changes no more (late refusals of results that come meanwhile are evidence kept in the log).

Retention is per namespace, and applied where the namespace's own shard is owned.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

from baton.clock import Clock
from baton.v1 import run_pb2
from control_plane.controller import Controller, OwnedShard
from control_plane.core.commands import Archived
from control_plane.core.model import shard_of
from control_plane.core.shard import RunShard
from control_plane.core.views import RunEventView, RunView, TaskView
from control_plane.history import PIECE, Archive, History, HistoryDown, Piece, attempt_key
from control_plane.refusals import NotOwned, StoreDown
from control_plane.survivors import Survivor, Survivors

log = logging.getLogger(__name__)

T = TypeVar("T")

DELAY = 5.0
"""Seconds a final run stays live after its end. Less: more watchers read the end from history; more: memory of finished runs."""

INTERVAL = 0.5
"""Seconds between looks."""

REPEAT = 5.0
"""Seconds until a run that is in history is archived again, because `Archived` did not get through: the store is away, or the shard's
inbox was full. Less: the same rows again and again while the store is away; more: memory of finished runs."""

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
        *,
        survivors: Survivors,
        suspected: Callable[[], tuple[int, bool]],
    ) -> None:
        """`archived` is told of every run that is in history; it must be quick and must not raise. `suspected` says the store's
        incarnation as last heard, and whether it is suspected to be restored."""
        self._history, self._controller, self._clock, self._translator = history, controller, clock, translator
        self._archived, self._survivors, self._suspected = archived, survivors, suspected
        self._tried: dict[tuple[int, str], float] = {}
        """(incarnation, run uid) -> boot clock when it was last inserted from here."""
        self._seen: dict[str, float] = {}
        """Run uid -> boot clock when it was first seen final here: for wall clocks that disagree."""
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
        incarnation, suspected = self._suspected()
        now = self._clock.boot()
        self._tried = {run: since for run, since in self._tried.items() if suspected or now - since < REPEAT}
        self._survivors.forget_old()
        if suspected:
            for known in list(self._survivors.all_of(incarnation)):
                await self._archive(known, known.unarchived())
            return
        final: set[str] = set()
        for survivor in self._survivors.with_ends():
            uids = survivor.machine.archivable() if self._controller.acting else survivor.unarchived()
            if uids:
                final.update(uids)
                await self._archive(survivor, [uid for uid in uids if self._due(survivor, uid, now)])
        self._seen = {uid: since for uid, since in self._seen.items() if uid in final}

    def _due(self, survivor: Survivor, uid: str, now: float) -> bool:
        """Whether its end is long enough ago, by the clocks of the replicas or by our own sight."""
        view = survivor.machine.run_by_uid(uid)
        by_wall = view is not None and self._clock.wall() - view.finished >= DELAY
        return by_wall or now - self._seen.setdefault(uid, now) >= DELAY

    async def _archive(self, survivor: Survivor, uids: Sequence[str]) -> None:
        """Insert, then say so."""
        batch: list[Archive] = []
        size = 0
        incarnation = survivor.shard.incarnation
        due = [uid for uid in uids if (incarnation, uid) not in self._tried]
        for place, uid in enumerate(due):
            try:
                archive = await self._collect(survivor, uid)
            except (NotOwned, StoreDown):
                return  # whoever owns the shard next does it
            if archive is not None:
                batch.append(archive)
                size += archive.run.task_count
            if batch and (size >= BATCH_TASKS or place == len(due) - 1):
                await self._history.insert(batch)
                for done in batch:
                    self._tried[incarnation, done.run.uid] = self._clock.boot()
                    self._controller.post(survivor.shard.id, Archived(done.run.uid, done.number))
                    self._archived(done)
                batch, size = [], 0

    async def _read(self, survivor: Survivor, question: Callable[[RunShard], T]) -> T:
        """Ask the shard. Without a store to wait for, its state in memory: of a run that was final at a commit it tells nothing that
        is not so, but for refusals that may not be durable yet. Raises NotOwned, StoreDown."""
        if survivor.dropped is not None or not self._controller.acting or self._suspected()[1]:
            return question(survivor.machine)
        return await self._controller.read(survivor.shard.id, question, timeout=READ_TIMEOUT)

    async def _collect(self, survivor: Survivor, uid: str) -> Archive | None:
        """One run, whole; None if it is gone. Raises NotOwned, StoreDown."""
        shard = survivor.shard

        def head(machine: RunShard) -> tuple[RunView | None, tuple[RunEventView, ...], dict[int, str]]:
            events = machine.kept_events(uid)
            return machine.run_by_uid(uid), events, machine.task_ids(uid, {i for event in events for i in event.tasks})

        view, events, ids = await self._read(survivor, head)
        if view is None or not view.state.final:
            return None
        pieces: list[Piece] = []
        for start in range(0, view.task_total, PIECE):

            def tasks(machine: RunShard, start: int = start) -> Sequence[TaskView]:
                return machine.tasks(uid, start, PIECE)

            found = await self._read(survivor, tasks)
            response = run_pb2.ListTasksResponse(tasks=[self._translator.task(t) for t in found])
            nonces = {attempt_key(t.index, a.id.n): a.id.nonce for t in found for a in t.attempts}
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
