"""`RunShard`: the machine of a shard that holds runs, namespaces and graphs (PROTOCOL J1, J2; ports in `core.machine`).

The table of contents of the graph core:

    handle   admission (clients) | reports, inventory, losses (clusters) | placing (grants)     command -> events
    settle   wake timers -> losses.review -> graph.settle_runs -> placing.place                 follow-ups -> events
    apply    fold                                                                               event   -> state
    read     reading, views                                                                     state   -> values

`handle` refuses before it emits. `settle` does what any command of the batch made possible, a bounded part of it a batch;
`due()` is at once while a part is left (J2). Grants and freed slots are bound last, so that a finished task's slot meets
the children it made ready.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from control_plane.core import admission, inventory, losses, placing, reading, reports
from control_plane.core import commands as c
from control_plane.core.events import Event, RunImage, RunSealed, TasksAdded
from control_plane.core.fold import FOLDS
from control_plane.core.graph import settle_runs
from control_plane.core.image import run_image, shard_image
from control_plane.core.invariants import check
from control_plane.core.machine import Batch
from control_plane.core.model import AttemptId, Group, Stamp, TaskState
from control_plane.core.run_times import RunTimes
from control_plane.core.state import WHOLE_RUN, ShardState
from control_plane.core.views import (
    ArtifactView,
    AttemptView,
    DemandLine,
    DispatchView,
    GraphView,
    NamespaceView,
    RunEventView,
    RunRecord,
    RunView,
    TaskView,
)

AT_ONCE = 0.0
"""A wall time that has always passed."""


def _tick(state: ShardState, _: c.Tick, batch: Batch) -> None:
    """Timers are woken by `settle`; only requests are pruned here (O8)."""
    pruned = state.requests.prune(batch.now)
    if pruned is not None:
        batch.emit(pruned)


_HANDLERS: dict[type[Any], Callable[[ShardState, Any, Batch], object]] = {
    c.CreateRun: admission.create_run,
    c.CancelRun: admission.cancel_run,
    c.PutGraph: admission.put_graph,
    c.PutNamespace: admission.put_namespace,
    c.Archived: admission.archived,
    c.TakeHistory: admission.take_history,
    c.TakeReports: reports.take_reports,
    c.TakeInventory: inventory.take_inventory,
    c.TakeTable: lambda state, command, _: losses.take_table(state, command.table),
    c.GenerationFenced: lambda state, command, _: losses.fence(state, command),
    c.TakeGrants: lambda state, command, _: placing.take_grants(state, command),
    c.DropGrants: lambda state, command, _: placing.drop_grants(state, command),
    c.Tick: _tick,
}


class RunShard:
    """One run shard (a `machine.Machine`), with its read side."""

    def __init__(self, run_times: RunTimes | None = None) -> None:
        """`run_times` may be shared by all shards of a replica: what a program takes does not depend on its run."""
        self._state = ShardState(run_times)
        self._now = 0.0

    # --- machine ------------------------------------------------------------------------------------------------------
    @property
    def outbox(self) -> c.Outbox:
        """Hints for effects after the commit (J7)."""
        return self._state.outbox

    @outbox.setter
    def outbox(self, outbox: c.Outbox) -> None:
        self._state.outbox = outbox

    def handle(self, command: c.Command, batch: Batch) -> object:
        """Decide. Raises `Refused` having emitted nothing, TypeError for a command of another machine."""
        handler = _HANDLERS.get(type(command))
        if handler is None:
            raise TypeError(f"{type(command).__name__} is not a command of a run shard")
        return handler(self._state, command, batch)

    def settle(self, batch: Batch) -> None:
        """Follow-ups of the batch. Idempotent."""
        state = self._state
        self._now = batch.now
        state.more = False
        self._wake(batch.now)
        losses.review(state, batch)
        settle_runs(state, batch)
        placing.place(state, batch)

    def apply(self, event: Event, stamp: Stamp) -> None:
        """Fold one event. Raises KeyError for an event of another machine."""
        FOLDS[type(event)](self._state, event, stamp)

    def due(self) -> float | None:
        """Wall time of the next timer, `AT_ONCE` while a part of a larger decision is left; None if there is none."""
        state = self._state
        if state.more or state.review:
            return AT_ONCE
        timers = state.timers
        while timers and not self._concerns(timers[0]):
            heapq.heappop(timers)
        times = [timers[0][0]] if timers else []
        prune = state.requests.due()
        if prune is not None:
            times.append(prune)
        return min(times, default=None)

    def levelled(self, table_seq: int) -> bool:
        """Whether hearing this table of fleet again would change nothing: it is known, and nothing lives anywhere (S5)."""
        return self._state.table.seq >= table_seq and not any(self._state.live_on.values())

    @property
    def bare(self) -> bool:
        """Nothing lives on any cluster, and nothing has to be stopped there."""
        return not any(self._state.live_on.values()) and not any(self._state.stops_on.values())

    def dump(self) -> Iterable[Event]:
        """Events that rebuild this state on an empty machine (J9). Equal states give equal dumps."""
        state = self._state
        yield from state.requests.dump()
        yield from state.catalog.dump()
        for uid in sorted(state.runs):
            run = state.runs[uid]
            yield run.header
            for part in admission.task_parts(run.tasks):
                yield TasksAdded(uid, part)
            if run.sealed:
                yield RunSealed(uid)
                yield RunImage(uid, run_image(run))
        yield RunImage("", shard_image(state))

    def validate(self) -> None:
        """Re-check all invariants. For tests and simulation."""
        check(self._state)

    def _wake(self, now: float) -> None:
        state = self._state
        while state.timers and state.timers[0][0] <= now:
            _, _, uid, task = heapq.heappop(state.timers)
            if task == WHOLE_RUN:
                state.dirty[uid] = None
            else:
                state.review.append((uid, task))

    def _concerns(self, timer: tuple[float, int, str, int]) -> bool:
        run = self._state.runs.get(timer[2])
        return run is not None and not run.state.final

    # --- read side: clusters ------------------------------------------------------------------------------------------
    def demand(self, now: float | None = None) -> list[DemandLine]:
        """Ready tasks by group (C1), slack as of wall time `now` (default: the last batch's). O(groups)."""
        return placing.demand(self._state, self._now if now is None else now)

    def held_on(self, cluster: str) -> Mapping[str, int]:
        """Attempts whose reservation is on a cluster, by group; those of archived runs are not counted."""
        return self._state.held.get(cluster, {})

    @property
    def holding(self) -> bool:
        """Whether `held_on` has anything to tell, of any cluster."""
        return any(self._state.held.values())

    def group(self, key: str) -> Group | None:
        """A group of which live runs have tasks."""
        lane = self._state.lanes.get(key)
        return lane.group if lane is not None else None

    def group_of(self, id_: AttemptId) -> str | None:
        """The key of an attempt's group; None if the attempt is not known (any more)."""
        attempt = self._state.find(id_)
        return self._state.runs[id_.run].lanes[id_.task].key if attempt is not None else None

    def place_of(self, id_: AttemptId) -> tuple[str, int] | None:
        """An attempt's cluster and generation; None if it is not known (any more)."""
        attempt = self._state.find(id_)
        return (attempt.cluster, attempt.generation) if attempt is not None else None

    def run_seconds(self, group: str) -> float:
        """Learned run time of a group's tasks, whatever they run, seconds; 0: not known."""
        return self._state.run_times.mean(group)

    @property
    def permitted(self) -> bool:
        """Permissions are left that found no task."""
        return bool(self._state.grants)

    @property
    def wanting(self) -> bool:
        """Some task waits for a place."""
        return any(lane.count for lane in self._state.lanes.values())

    def live_on(self, cluster: str) -> Iterable[AttemptId]:
        """Live attempts on a cluster, oldest first."""
        return tuple(self._state.live_on.get(cluster, ()))

    def stops_on(self, cluster: str) -> Iterable[AttemptId]:
        """Outstanding stops of a cluster (F8), also of archived runs."""
        return tuple(self._state.stops_on.get(cluster, ()))

    def attempt(self, id_: AttemptId) -> AttemptView | None:
        """An attempt of a live run, None if it is not known (any more)."""
        return reading.attempt_of(self._state, id_)

    def dispatch(self, id_: AttemptId) -> DispatchView | None:
        """What to send to its agent; None if it is not live, or being stopped."""
        run, attempt = self._state.runs.get(id_.run), self._state.find(id_)
        if run is None or attempt is None or id_ in run.stops or not run.is_live(attempt):
            return None
        return reading.dispatch_view(run, attempt)

    # --- read side: clients -------------------------------------------------------------------------------------------
    def run_by_id(self, namespace: str, run_id: str) -> RunView | None:
        """A live (not archived) run by its name."""
        uid = self._state.names.get((namespace, run_id))
        return self.run_by_uid(uid) if uid else None

    def run_by_uid(self, uid: str) -> RunView | None:
        """A live (not archived) run."""
        run = self._state.runs.get(uid)
        return reading.run_view(run) if run and run.sealed else None

    def runs(self, namespace: str) -> Iterator[RunView]:
        """A namespace's runs in order of uid, made one by one as they are asked for."""
        for uid in tuple(self._state.by_namespace.get(namespace, ())):
            yield reading.run_view(self._state.runs[uid])

    def tasks(self, uid: str, start: int, limit: int, states: Collection[TaskState] = ()) -> list[TaskView]:
        """Up to `limit` tasks from an index on, in index order, only those in `states` if any are given."""
        run = self._state.runs.get(uid)
        return reading.task_views(self._state, run, start, limit, states) if run and run.sealed else []

    def task(self, uid: str, task_id: str) -> TaskView | None:
        """One task by its id."""
        run = self._state.runs.get(uid)
        index = run.index.get(task_id) if run else None
        return reading.task_view(self._state, run, index) if run and index is not None else None

    def artifacts(self, uid: str, start: int, limit: int) -> list[ArtifactView]:
        """Published artifacts of tasks from an index on, in order of task. Those of a task come together, so the last task may
        bring a few more than `limit`."""
        run = self._state.runs.get(uid)
        return reading.published(run, start, limit) if run and run.sealed else []

    def task_at(self, uid: str, index: int) -> TaskView | None:
        """One task by its index."""
        found = self.tasks(uid, index, 1) if index >= 0 else []
        return found[0] if found else None

    def task_ids(self, uid: str, indices: Iterable[int]) -> dict[int, str]:
        """Ids of these tasks of a run, without making their views; empty if the run is not known."""
        run = self._state.runs.get(uid)
        return {index: run.tasks[index].id for index in indices} if run else {}

    def kept_events(self, uid: str) -> tuple[RunEventView, ...]:
        """The run events that are kept, oldest first; empty if the run is not known."""
        run = self._state.runs.get(uid)
        return tuple(run.events) if run else ()

    def run_events(self, uid: str, after: int) -> list[RunEventView] | None:
        """Events of a run above a number; None if some are no longer kept, or the run is not known."""
        run = self._state.runs.get(uid)
        return reading.run_events(run, after) if run and run.sealed else None

    def event_numbers(self) -> dict[str, int]:
        """Number of the last event of every live run, by uid."""
        return {uid: run.event_number for uid, run in self._state.runs.items()}

    def archivable(self) -> tuple[str, ...]:
        """Uids of final runs that are not archived yet (J10)."""
        return tuple(self._state.final)

    def run_record(self, uid: str) -> RunRecord:
        """Everything history needs. Raises KeyError if the run is not known."""
        run = self._state.runs[uid]
        tasks = tuple(reading.task_view(self._state, run, index) for index in range(len(run.tasks)))
        return RunRecord(reading.run_view(run), tasks, tuple(run.events))

    def graph(self, namespace: str, graph_id: str, version: int = 0) -> GraphView | None:
        """A version of a graph; 0 is the newest."""
        history = self._state.catalog.find(namespace, graph_id)
        return reading.graph_view(history, version) if history else None

    def graphs(self, namespace: str) -> list[GraphView]:
        """The newest versions of a namespace's graphs, in order of name."""
        graphs = self._state.catalog.graphs
        found = (reading.graph_view(graphs[key], 0) for key in sorted(graphs) if key[0] == namespace)
        return [view for view in found if view is not None]

    def namespace(self, name: str) -> NamespaceView | None:
        """A namespace put on this shard."""
        return next((view for view in self.namespaces() if view.name == name), None)

    def namespaces(self) -> list[NamespaceView]:
        """All namespaces put on this shard, in order of name."""
        return list(reading.namespace_views(self._state))
