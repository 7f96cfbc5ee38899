"""The state of a run shard: what the log says, the indices over it, and what is merely known for now.

Theory: three kinds of fields.
1. Folded from events: runs, names, requests, catalog, kept stops. `dump` gives exactly these.
2. Derived, kept in step by the few methods here: live attempts and outstanding stops by cluster, lanes, live counts. They
   are rebuilt by the same methods when a log or snapshot is folded, so a takeover knows all its obligations (J7).
3. Facts and permissions that are told again after a takeover, never journaled: fleet's table, fenced generations, grants,
   and work lists (`dirty`, `review`, `timers`). Losing them loses no decision; they are levels that come again.
"""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from dataclasses import replace

from control_plane.core.catalog import Catalog
from control_plane.core.commands import Grant, Outbox
from control_plane.core.events import ARTIFACTS_LEVEL
from control_plane.core.lanes import Lane
from control_plane.core.model import (
    Admission,
    AttemptId,
    Evidence,
    FleetTable,
    Group,
    Health,
    RunState,
)
from control_plane.core.requests import Requests
from control_plane.core.run import Attempt, Run
from control_plane.core.run_times import RunTimes

WHOLE_RUN = -1
"""Task index of a timer that concerns the run: its deadline."""

NAME_HOLD = 3600.0
"""Seconds for which the name of an archived run is still refused here (J10): longer than any check of the history store that a
CreateRun of the same name may have in flight. After it the edge's look into history alone decides."""


class ShardState:
    """All of a run shard. Plain data with the operations that keep indices in step."""

    def __init__(self, run_times: RunTimes | None = None) -> None:
        """`run_times`: what other shards have learned, too; by default nobody has."""
        # 1. folded
        self.runs: dict[str, Run] = {}
        self.requests = Requests()
        self.catalog = Catalog()
        self.kept: dict[str, dict[AttemptId, Attempt]] = {}
        """Outstanding stops of archived runs, by run (J10)."""
        self.archived: dict[tuple[str, str], tuple[str, float]] = {}
        """(namespace, run id) -> (uid, wall time) of runs archived lately, oldest first."""
        # 2. derived
        self.names: dict[tuple[str, str], str] = {}
        self.by_namespace: dict[str, list[str]] = {}
        self.unsealed: dict[str, None] = {}
        self.final: dict[str, None] = {}
        self.live_on: dict[str, dict[AttemptId, Attempt]] = {}
        self.stops_on: dict[str, dict[AttemptId, Attempt]] = {}
        self.live_in: dict[str, int] = {}
        self.held: dict[str, dict[str, int]] = {}
        """Cluster -> lane key -> attempts of live runs that hold room there: live, or with a stop outstanding (F8)."""
        self.lanes: dict[str, Lane] = {}
        self._lane_of: dict[Group, Lane] = {}
        self._serial = 0
        # 3. known for now
        self.table = FleetTable()
        self.fenced: dict[tuple[str, int], Evidence] = {}
        """Ended generations whose guard time is over here (S5)."""
        self.term = 0
        self.grants: list[Grant] = []
        self.returning: frozenset[str] = frozenset()
        self.wait_reasons: dict[str, str] = {}
        self.run_times = run_times or RunTimes()
        self.slotted: set[tuple[str, str]] = set()
        """(lane key, cluster) of which all that is held was permitted for free slots; of others some may only wait there."""
        self.slots: dict[tuple[str, str, int], int] = {}
        """(lane key, cluster, generation) -> slots freed in this batch (C2)."""
        self.timers: list[tuple[float, int, str, int]] = []
        self.dirty: dict[str, None] = {}
        """Runs that may have follow-ups."""
        self.review: deque[tuple[str, int]] = deque()
        """Tasks whose standing must be looked at again (losses, hedges, drains)."""
        self.more = False
        """A part of the last batch's work was left for the next one (J2)."""
        self.outbox = Outbox()

    # --- runs ---------------------------------------------------------------------------------------------------------
    def open_lanes(self, run: Run) -> None:
        """Find or make the lane of every task of a sealed run."""
        header = run.header
        by_spec: dict[int, Lane] = {}
        for spec in run.specs:
            by_spec[id(spec)] = self._lane(
                Group(
                    header.namespace,
                    header.priority,
                    spec.resources,
                    spec.require_isolation,
                    spec.selector,
                    spec.clusters,
                    spec.tolerations,
                    ARTIFACTS_LEVEL if spec.python is not None and spec.python.stored else 0,
                )
            )
        run.lanes = [by_spec[id(task.spec)] for task in run.tasks]
        for lane in run.lanes:
            lane.users += 1

    def _lane(self, group: Group) -> Lane:
        """The lane of a group."""
        lane = self._lane_of.get(group)
        if lane is None:
            lane = self._lane_of[group] = Lane(group)
            self.lanes[lane.key] = lane
        return lane

    def _part(self, lane: Lane) -> None:
        """A task belongs to a lane no more."""
        lane.users -= 1
        if not lane.users:
            del self.lanes[lane.key], self._lane_of[lane.group]

    def list_run(self, run: Run) -> None:
        """A sealed run becomes visible."""
        header = run.header
        self.unsealed.pop(run.uid, None)
        self.names[header.namespace, header.run_id] = run.uid
        bisect.insort(self.by_namespace.setdefault(header.namespace, []), run.uid)

    def forget_run(self, run: Run) -> None:
        """The live state of an archived or torn run goes; its outstanding stops stay (J10)."""
        header = run.header
        del self.runs[run.uid]
        self.unsealed.pop(run.uid, None)
        self.final.pop(run.uid, None)
        if not run.sealed:
            return
        for task in list(run.tickets):
            self.unqueue(run, task)
        for attempt in run.stops.values():
            self._hold(run, attempt, -1)
        for lane in run.lanes:
            self._part(lane)
        self.names.pop((header.namespace, header.run_id), None)
        uids = self.by_namespace[header.namespace]
        uids.pop(bisect.bisect_left(uids, run.uid))
        if not uids:
            del self.by_namespace[header.namespace]
        if run.stops:
            self.kept[run.uid] = run.stops

    # --- attempts -----------------------------------------------------------------------------------------------------
    def join(self, run: Run, attempt: Attempt) -> None:
        """An attempt enters its task's live set (F2)."""
        run.live.setdefault(attempt.id.task, []).append(attempt)
        self.live_on.setdefault(attempt.cluster, {})[attempt.id] = attempt
        namespace = run.header.namespace
        self.live_in[namespace] = self.live_in.get(namespace, 0) + 1
        if attempt.id not in run.stops:
            self._hold(run, attempt, 1)

    def leave(self, run: Run, attempt: Attempt) -> None:
        """An attempt leaves its task's live set (F2)."""
        task = attempt.id.task
        members = run.live[task]
        members.remove(attempt)
        if not members:
            del run.live[task]
        here = self.live_on[attempt.cluster]
        del here[attempt.id]
        if not here:
            del self.live_on[attempt.cluster]
        namespace = run.header.namespace
        self.live_in[namespace] -= 1
        if not self.live_in[namespace]:
            del self.live_in[namespace]
        if attempt.id not in run.stops:
            self._hold(run, attempt, -1)

    def _hold(self, run: Run, attempt: Attempt, change: int) -> None:
        """An attempt takes or gives back its room."""
        key = run.lanes[attempt.id.task].key
        here = self.held.setdefault(attempt.cluster, {})
        here[key] = here.get(key, 0) + change
        if not here[key]:
            del here[key]

    def arm(self, run: Run, attempt: Attempt) -> None:
        """An attempt's stop becomes outstanding (F8)."""
        if attempt.id not in run.stops:
            run.stops[attempt.id] = attempt
            self.stops_on.setdefault(attempt.cluster, {})[attempt.id] = attempt
            self.outbox.stops.append((attempt.cluster, attempt.id))
            if not run.is_live(attempt):
                self._hold(run, attempt, 1)

    def disarm(self, stops: dict[AttemptId, Attempt], attempt: Attempt) -> None:
        """An outstanding stop is confirmed (F8)."""
        if stops.pop(attempt.id, None) is not None:
            here = self.stops_on[attempt.cluster]
            del here[attempt.id]
            if not here:
                del self.stops_on[attempt.cluster]
            run = self.runs.get(attempt.id.run)
            if run is not None and not run.is_live(attempt):
                self._hold(run, attempt, -1)

    def find(self, id_: AttemptId) -> Attempt | None:
        """The attempt of that identity (F1), the nonce included, if its run is live and it is kept."""
        run = self.runs.get(id_.run)
        attempt = run.attempt(id_.task, id_.n) if run else None
        return attempt if attempt is not None and attempt.id == id_ else None

    def outstanding(self, id_: AttemptId) -> Attempt | None:
        """The attempt whose stop is outstanding, also of an archived run."""
        run = self.runs.get(id_.run)
        return (run.stops if run else self.kept.get(id_.run, {})).get(id_)

    # --- queues -------------------------------------------------------------------------------------------------------
    def queue(self, run: Run, task: int, now: float) -> None:
        """A READY task joins its lane, or waits for the end of its backoff first."""
        if run.state is not RunState.RUNNING or task in run.tickets:
            return
        ready_at = run.not_before.get(task, 0.0)
        if ready_at > now:
            self.wake_at(ready_at, run.uid, task)
        else:
            self.enter_lane(run, task, now)

    def enter_lane(self, run: Run, task: int, now: float) -> None:
        """A task waits for a place from now on (it may already do)."""
        if task not in run.tickets:
            self.raise_level(run, task)
            self._serial += 1
            run.lanes[task].push(self._serial, now, run, task)
            self.outbox.demand = True

    def unqueue(self, run: Run, task: int) -> None:
        """A task waits for no place any more, if it did."""
        if run.tickets and run.lanes[task].leave(run, task):
            self.outbox.demand = True

    def run_seconds(self, lane: Lane) -> float:
        """Learned run time of the lane's ready tasks, 0 if it is not known."""
        return self.run_times.of(lane.key, lane.programs)

    def raise_level(self, run: Run, task: int) -> bool:
        """From when a task starts from stored content (parents' artifacts, a checkpoint), only an agent that reads of it may have
        it (J11): its lane becomes the one that says so, and the room that its attempts hold goes with it. Whether it moved; it
        must hold no ticket."""
        files, before = run.files, run.lanes[task]
        if files is None or before.group.level >= ARTIFACTS_LEVEL or not files.given(task, run.tasks[task].parents):
            return False
        live = run.live.get(task, ())
        holding = [each for each in run.history.get(task, ()) if each in live or each.id in run.stops]
        for attempt in holding:
            self._hold(run, attempt, -1)
        after = run.lanes[task] = self._lane(replace(before.group, level=ARTIFACTS_LEVEL))
        after.users += 1
        self._part(before)
        for attempt in holding:
            self._hold(run, attempt, 1)
        return True

    def wake_at(self, wall: float, run: str, task: int) -> None:
        """Look at a task, or at a whole run, at that time."""
        self._serial += 1
        heapq.heappush(self.timers, (wall, self._serial, run, task))

    # --- fleet --------------------------------------------------------------------------------------------------------
    def see(self, table: FleetTable) -> bool:
        """Take a table unless ours is newer; False then. The same one again is a level, and looked at again."""
        if table.seq < self.table.seq:
            return False
        self.table = table
        return True

    def placeable(self, cluster: str, generation: int) -> bool:
        """Whether new work may go there (S3, S5): READY, OPEN, the current generation and not ended."""
        facts = self.table.clusters.get(cluster)
        if facts is None or not facts.generations:
            return False
        current = facts.generations[-1]
        return (
            facts.health is Health.READY
            and facts.admission is Admission.OPEN
            and current.number == generation
            and not current.ended
        )
