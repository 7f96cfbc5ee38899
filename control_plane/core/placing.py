"""Placing: binding ready tasks to grants and to freed slots (PROTOCOL C1, C2, C3; F2, S5).

Theory: the leader grants counts by group, the owner binds tasks to them in its journal, least slack first, then first in
first out (`core.lanes`). A slot freed in this batch serves the next ready task of its group in the same batch: one commit
a hop, no visit to the leader. What a task may get is asked at this very moment (`losses.wanted`): members that are fenced
leave in the same batch in which their replacement is placed (F2). Nothing goes to a cluster that is not READY and OPEN in
its current, unended generation (S5). Slots live as long as the batch; grants until they are used, replaced or dropped.
"""

from __future__ import annotations

import dataclasses

from control_plane.core.commands import DropGrants, Grant, TakeGrants
from control_plane.core.events import AttemptsLost, AttemptsPlaced
from control_plane.core.lanes import Lane
from control_plane.core.losses import Want, wanted
from control_plane.core.machine import Batch
from control_plane.core.model import Evidence
from control_plane.core.run import Run
from control_plane.core.run_times import short
from control_plane.core.state import ShardState
from control_plane.core.views import DemandLine

NO_QUOTA = 1 << 62
"""Room of a namespace without a quota."""

PLACINGS = 2000
"""Attempts placed in one batch (J2): some 10 ms, and 20 KB of log. The rest is placed in the next ones."""


def take_grants(state: ShardState, command: TakeGrants) -> None:
    """New permissions replace the old ones; those of an older term are refused silently (C3)."""
    if command.term < state.term:
        return
    state.term = command.term
    state.grants = [grant for grant in command.grants if grant.count > 0]
    state.returning = command.returning
    state.wait_reasons = dict(command.reasons)


def drop_grants(state: ShardState, command: DropGrants) -> None:
    """The time of that leader's grants is over."""
    if command.term >= state.term:
        state.grants = []


def demand(state: ShardState, now: float) -> list[DemandLine]:
    """Ready tasks by group (C1), in order of key. O(groups). Quotas are the leader's business: it says so to what waits (O7)."""
    lines = []
    for key in sorted(state.lanes):
        lane = state.lanes[key]
        head = lane.head()
        if lane.count > 0 and head is not None:
            run, task = head
            slack = run.latest_start(task) - now
            lines.append(DemandLine(key, lane.group, lane.count, slack, lane.since(), state.run_seconds(lane)))
    return lines


def _room(state: ShardState, namespace: str) -> int:
    """Attempts that the namespace's quota still allows on this shard, if it keeps the namespace: a bound that holds even without
    the leader, who counts over all shards (O7)."""
    quota = state.catalog.quota(namespace)
    return max(0, quota - state.live_in.get(namespace, 0)) if quota else NO_QUOTA


def place(state: ShardState, batch: Batch) -> None:
    """Bind what can be bound, freed slots first. Slots that find no task lapse."""
    binding = _Binding(state, batch)
    for (key, cluster, generation), count in state.slots.items():
        if _may_refill(state, key, cluster):
            binding.fill(key, cluster, generation, count)
    state.slots.clear()
    grants: list[Grant] = []
    for grant in state.grants:
        _remember(state, grant)
        left = grant.count - binding.fill(grant.group, grant.cluster, grant.generation, grant.count)
        if left:
            grants.append(dataclasses.replace(grant, count=left) if left != grant.count else grant)
    state.grants = grants
    binding.emit()


def _may_refill(state: ShardState, key: str, cluster: str) -> bool:
    """Whether a freed place there may serve what is ready now. Places in a queue are for work that is known to be short only
    (`core.queues`): if it is not any more, they go back to the leader."""
    lane = state.lanes.get(key)
    return lane is None or (key, cluster) in state.slotted or short(state.run_seconds(lane))


def _remember(state: ShardState, grant: Grant) -> None:
    """A leader permits queue places only to what is known to be short. Any other permission means that slots are free there, so
    nothing waits."""
    lane = state.lanes.get(grant.group)
    if lane is not None and lane.count:
        if short(state.run_seconds(lane)):
            state.slotted.discard((grant.group, grant.cluster))
        else:
            state.slotted.add((grant.group, grant.cluster))


class _Binding:
    """Picks of one batch, gathered into as few events as possible."""

    def __init__(self, state: ShardState, batch: Batch) -> None:
        self._state = state
        self._batch = batch
        self._budget = PLACINGS
        self._used: dict[str, int] = {}
        self._lost: dict[tuple[str, Evidence], list[tuple[int, int]]] = {}
        self._placed: dict[tuple[str, str, int, bool, bool], list[tuple[int, int]]] = {}

    def fill(self, key: str, cluster: str, generation: int, count: int) -> int:
        """Bind up to `count` tasks of a group. Returns how many of them were used."""
        state = self._state
        lane = state.lanes.get(key)
        if lane is None or not lane.count or not state.placeable(cluster, generation):
            return 0
        namespace = lane.group.namespace
        room = _room(state, namespace) - self._used.get(namespace, 0)
        if self._budget < min(count, lane.count):
            state.more = True
        target = min(count, room, self._budget)
        used = self._take(lane, cluster, generation, target)
        self._used[namespace] = self._used.get(namespace, 0) + used
        self._budget -= used
        return used

    def _take(self, lane: Lane, cluster: str, generation: int, target: int) -> int:
        state, now, used = self._state, self._batch.now, 0
        while used < target:
            found = lane.pop()
            if found is None:
                break
            state.outbox.demand = True
            run, task = found
            want = wanted(state, run, task, now)
            if want is None:
                # It changed since it was queued, or is held: its standing says when to come back.
                state.review.append((run.uid, task))
                continue
            if state.raise_level(run, task):
                state.enter_lane(run, task, now)  # it was given artifacts or a checkpoint after it was queued
                continue
            self._pick(run, task, want, cluster, generation)
            used += 1
        return used

    def _pick(self, run: Run, task: int, want: Want, cluster: str, generation: int) -> None:
        for attempt, evidence in want.lost:
            self._lost.setdefault((run.uid, evidence), []).append((task, attempt.id.n))
        key = (run.uid, cluster, generation, want.hedge, want.overlap)
        self._placed.setdefault(key, []).append((task, run.next_n[task]))

    def emit(self) -> None:
        """Decide it all: losses first, so that every set is empty when its replacement joins (F2)."""
        for (run, evidence), rows in self._lost.items():
            tasks, ns = zip(*rows, strict=True)
            self._batch.emit(AttemptsLost(run, tasks, ns, evidence))
        for (run, cluster, generation, hedge, overlap), rows in self._placed.items():
            tasks, ns = zip(*rows, strict=True)
            self._batch.emit(AttemptsPlaced(run, cluster, generation, tasks, ns, hedge, overlap))
