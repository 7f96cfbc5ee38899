"""Inventories: what a cluster still holds, against what it should hold (PROTOCOL S6, F3, F7, F8).

For every live attempt of the cluster, by the generation it lives in:

| its generation | listed as | then |
|---|---|---|
| the session's | queued, void | confirm: dispatch again (F3) |
| the session's | not listed | resend under the same identity (S6) |
| older, other journal uid | anything | nothing: a reinstalled agent's silence is no proof of death, nor is another host's |
| older, same journal, other boot id | anything but finished | lost, evidence REPORTED: nothing survives a reboot |
| older, both unchanged | queued, void, running, not listed | adopt; confirm or resend as above, after the adoption |
| any | finished, stopping, tombstoned | nothing: its report is on its way |

After a restore (J12) one row more, before those that confirm, resend or adopt: what was *placed in an earlier incarnation* than the
Hello's, and is queued, void or not listed, is lost, evidence REPORTED, and stopped if it is listed. The store has forgotten what
became of it: its report may have been taken, and a later attempt may have run. Started now it would run twice under one identity
(F4), or under a fence below one that was used (F1). It cannot be started any more: on this stream only we could confirm it (F3).

A listed attempt that is not live is stopped again; a stop is confirmed by a tombstone, or by absence if the agent had the
stop when it made the inventory (F8). An attempt that is being stopped is neither adopted nor sent again.
"""

from __future__ import annotations

from enum import IntEnum

from control_plane.core.commands import Held, InventoryVerdict, TakeInventory
from control_plane.core.events import AttemptsAdopted, AttemptsLost, StopsOrdered
from control_plane.core.losses import take_table
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptId, ClusterFacts, Evidence
from control_plane.core.reports import confirm_stops
from control_plane.core.run import Attempt
from control_plane.core.state import ShardState


class Phase(IntEnum):
    """Numbers of baton.v1.AttemptPhase."""

    QUEUED = 1
    VOID = 2
    RUNNING = 3
    FINISHED = 4
    TOMBSTONED = 5
    STOPPING = 6


_WAITING = (Phase.QUEUED, Phase.VOID)
_ALIVE = (Phase.QUEUED, Phase.VOID, Phase.RUNNING)


def take_inventory(state: ShardState, command: TakeInventory, batch: Batch) -> InventoryVerdict:
    """Compare and decide; returns what to tell the agent after the commit. A stale session's inventory changes nothing."""
    take_table(state, command.table)
    facts = state.table.clusters.get(command.cluster)
    if facts is not None and facts.generations:
        current = facts.generations[-1]
        if command.generation < current.number or (command.generation == current.number and current.ended):
            return InventoryVerdict()
    held = {item.attempt: item for item in command.held}
    orphans = _stray(state, command, held, batch)
    _confirmed(state, command, held, batch)
    sorting = _Sorting(command, facts, held)
    for id_, attempt in state.live_on.get(command.cluster, {}).items():
        sorting.add(attempt, stopping=state.outstanding(id_) is not None)
    for run, ids in _by_run(sorting.dead + sorting.forgotten).items():
        batch.emit(AttemptsLost(run, *_columns(ids), Evidence.REPORTED))
    for run, ids in _by_run([id_ for id_ in sorting.forgotten if id_ in held]).items():
        batch.emit(StopsOrdered(run, *_columns(ids), "it was placed before the store was restored"))
    for run, ids in _by_run(sorting.adopted).items():
        tasks, ns = _columns(ids)
        batch.emit(AttemptsAdopted(run, command.generation, tasks, ns))
    return InventoryVerdict(tuple(sorting.adopted), tuple(sorting.confirm), tuple(sorting.resend), orphans)


class _Sorting:
    """Sorts the cluster's live attempts by the table above."""

    def __init__(self, command: TakeInventory, facts: ClusterFacts | None, held: dict[AttemptId, Held]) -> None:
        self._command = command
        self._facts = facts
        self._held = held
        self.adopted: list[AttemptId] = []
        self.confirm: list[AttemptId] = []
        self.resend: list[AttemptId] = []
        self.dead: list[AttemptId] = []
        self.forgotten: list[AttemptId] = []
        """Not started, and placed before the store was restored."""

    def add(self, attempt: Attempt, *, stopping: bool) -> None:
        """One live attempt, in the generation it lives in."""
        id_, generation = attempt.id, attempt.generation
        item = self._held.get(id_)
        phase = item.phase if item else None
        if generation > self._command.generation:
            return
        if generation < self._command.generation:
            origin = self._facts.find(generation) if self._facts else None
            if origin is None:
                return
            if origin.journal_uid != self._command.journal_uid:
                return  # only the same journal proves that it is the same host
            if origin.boot_id != self._command.boot_id:
                if phase != Phase.FINISHED:
                    self.dead.append(id_)
                return
            if stopping or phase not in (None, *_ALIVE):
                return
            if self._restored_since(attempt, phase):
                self.forgotten.append(id_)
                return
            self.adopted.append(id_)
        if stopping:
            return
        if self._restored_since(attempt, phase):
            self.forgotten.append(id_)
        elif phase is None:
            self.resend.append(id_)
        elif phase in _WAITING:
            self.confirm.append(id_)

    def _restored_since(self, attempt: Attempt, phase: int | None) -> bool:
        """Whether it has not been started on this host, as far as the host knows, and is of an earlier incarnation than the Hello."""
        return attempt.incarnation < self._command.incarnation and phase in (None, *_WAITING)


def _stray(
    state: ShardState, command: TakeInventory, held: dict[AttemptId, Held], batch: Batch
) -> tuple[AttemptId, ...]:
    """Arm the stops of what runs or may run there though it is not live (F8). Returns those of runs unknown here."""
    orphans: list[AttemptId] = []
    strays: list[AttemptId] = []
    here = state.live_on.get(command.cluster, {})
    for id_, item in held.items():
        if item.phase not in _ALIVE or id_ in here or state.outstanding(id_) is not None:
            continue
        attempt = state.find(id_)
        if attempt is not None and attempt.cluster == command.cluster:
            strays.append(id_)
        else:
            orphans.append(id_)
    for run, ids in _by_run(strays).items():
        batch.emit(StopsOrdered(run, *_columns(ids), "its cluster lists it though it is not live"))
    return tuple(orphans)


def _confirmed(state: ShardState, command: TakeInventory, held: dict[AttemptId, Held], batch: Batch) -> None:
    stopped = []
    for id_ in state.stops_on.get(command.cluster, {}):
        item = held.get(id_)
        if (item is None and id_ in command.stops_sent) or (item is not None and item.phase == Phase.TOMBSTONED):
            stopped.append(id_)
    confirm_stops(state, command.cluster, stopped, batch)


def _by_run(ids: list[AttemptId]) -> dict[str, list[AttemptId]]:
    grouped: dict[str, list[AttemptId]] = {}
    for id_ in ids:
        grouped.setdefault(id_.run, []).append(id_)
    return grouped


def _columns(ids: list[AttemptId]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(i.task for i in ids), tuple(i.n for i in ids)
