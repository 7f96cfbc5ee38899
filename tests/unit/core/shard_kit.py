"""A shard under test: batches as the controller makes them, a log that can be replayed, and short words for commands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from control_plane.core.commands import (
    CancelRun,
    Command,
    CreateRun,
    Finish,
    Grant,
    Held,
    InventoryVerdict,
    Outbox,
    Request,
    TakeGrants,
    TakeInventory,
    TakeReports,
    TakeTable,
    Tick,
)
from control_plane.core.events import Event
from control_plane.core.machine import Batch
from control_plane.core.model import (
    Admission,
    AttemptId,
    ClusterFacts,
    Evidence,
    FleetTable,
    Generation,
    GraphTask,
    Health,
    Outcome,
    RunState,
    Stamp,
    TaskSpec,
    TaskState,
)
from control_plane.core.shard import RunShard
from control_plane.core.views import RunView, TaskView

START = 1_800_000_000.0
SPEC = TaskSpec(("work",))
NO_REQUEST = Request("", "")


def request(number: int, wall: float = START, digest: str = "d") -> Request:
    """A request id of that wall time."""
    millis = f"{int(wall * 1000):012x}"
    return Request(f"{millis[:8]}-{millis[8:]}-7000-8000-{number:012x}", digest)


def facts(
    uid: str,
    *generations: Generation,
    health: Health = Health.READY,
    admission: Admission = Admission.OPEN,
) -> ClusterFacts:
    return ClusterFacts(uid, uid, health, admission, generations or (generation(1),))


def generation(
    number: int, boot: str = "boot", journal: str = "disk", evidence: Evidence = Evidence.UNSPECIFIED
) -> Generation:
    return Generation(number, boot, journal, evidence)


class Shard:
    """One run shard with time, a fleet table and a log."""

    def __init__(self, *clusters: ClusterFacts) -> None:
        self.machine = RunShard()
        self.now = START
        self.seq = 0
        self.incarnation = 1
        self.log: list[tuple[Stamp, list[Event]]] = []
        self.table = FleetTable()
        if clusters:
            self.fleet(*clusters)

    # --- batches ------------------------------------------------------------------------------------------------------
    def do(self, *commands: Command) -> object:
        """One batch; returns the last command's reply."""
        self.seq += 1
        stamp = Stamp(self.now, f"nonce{self.seq}", self.seq, self.incarnation)
        batch = Batch(stamp, self.machine.apply)
        reply: object = None
        try:
            for command in commands:
                reply = self.machine.handle(command, batch)
        finally:
            self.machine.settle(batch)
            self.log.append((stamp, batch.events))
            self.machine.validate()
        return reply

    def last(self) -> list[Event]:
        """Events of the last batch."""
        return self.log[-1][1]

    def events(self, kind: type[Event]) -> list[Event]:
        """All events of a kind."""
        return [event for _, events in self.log for event in events if isinstance(event, kind)]

    def settled(self) -> None:
        """Tick until nothing is due now."""
        for _ in range(1000):
            due = self.machine.due()
            if due is None or due > self.now:
                return
            self.do(Tick())
        raise AssertionError("the shard never comes to rest")

    def later(self, seconds: float) -> None:
        """Time passes; timers run at the end of it."""
        self.now += seconds
        self.settled()

    # --- clients ------------------------------------------------------------------------------------------------------
    def create(self, *tasks: GraphTask, uid: str = "r1", deadline: float = 1000.0, namespace: str = "ns") -> str:
        """A run of that uid and name; the deadline is in seconds from now."""
        command = CreateRun(NO_REQUEST, namespace, f"run-{uid}", uid, self.now + deadline, 0, tuple(tasks))
        assert self.do(command) == uid
        return uid

    def cancel(self, uid: str = "r1", reason: str = "enough") -> None:
        self.do(CancelRun(NO_REQUEST, "ns", f"run-{uid}", reason))

    def run(self, uid: str = "r1") -> RunView:
        view = self.machine.run_by_uid(uid)
        assert view is not None
        return view

    def task(self, index: int = 0, uid: str = "r1") -> TaskView:
        view = self.machine.task_at(uid, index)
        assert view is not None
        return view

    def states(self, uid: str = "r1") -> list[TaskState]:
        return [view.state for view in self.machine.tasks(uid, 0, 10_000)]

    def outcome(self, uid: str = "r1") -> RunState:
        return self.run(uid).state

    # --- fleet --------------------------------------------------------------------------------------------------------
    def fleet(self, *clusters: ClusterFacts, storm_until: float = 0.0) -> None:
        """Rows of the table that change; the others stay."""
        rows = {**self.table.clusters, **{row.uid: row for row in clusters}}
        self.table = FleetTable(self.table.seq + 1, rows, storm_until)
        self.do(TakeTable(self.table))
        self.settled()

    def grant(self, cluster: str = "a", count: int = 1, *, term: int = 1, key: str | None = None) -> None:
        """Grant to every waiting group, or to one."""
        current = self.table.clusters[cluster].generation
        keys = [key] if key else [line.key for line in self.machine.demand(self.now)]
        self.do(TakeGrants(term, tuple(Grant(cluster, current, k, count) for k in keys)))

    # --- agents -------------------------------------------------------------------------------------------------------
    def live(self, index: int = 0, uid: str = "r1") -> list[AttemptId]:
        return [attempt.id for attempt in self.task(index, uid).attempts if attempt.live]

    def only(self, index: int = 0, uid: str = "r1") -> AttemptId:
        (attempt,) = self.live(index, uid)
        return attempt

    def cluster_of(self, attempt: AttemptId) -> str:
        view = self.machine.attempt(attempt)
        assert view is not None
        return view.cluster

    def finish(self, attempt: AttemptId, outcome: Outcome = Outcome.SUCCEEDED, result: bytes = b"") -> object:
        report = Finish(attempt, outcome, 0, result, outcome.name.lower(), self.now - 1, self.now)
        return self.do(TakeReports(self.cluster_of(attempt), 1, finished=(report,)))

    def inventory(
        self,
        *held: Held,
        cluster: str = "a",
        number: int = 1,
        boot: str = "boot",
        journal: str = "disk",
        stops_sent: Sequence[AttemptId] = (),
        incarnation: int = 0,
    ) -> InventoryVerdict:
        reply = self.do(
            TakeInventory(cluster, number, boot, journal, held, self.table, frozenset(stops_sent), incarnation),
        )
        assert isinstance(reply, InventoryVerdict)
        return reply

    # --- takeovers ----------------------------------------------------------------------------------------------------
    def replayed(self) -> RunShard:
        """A new owner's machine, from the log."""
        machine = RunShard()
        for stamp, events in self.log:
            for event in events:
                machine.apply(event, stamp)
        machine.validate()
        return machine

    def restored(self) -> RunShard:
        """A new owner's machine, from a snapshot made now."""
        machine = RunShard()
        for event in self.machine.dump():
            machine.apply(event, Stamp(self.now, "snapshot", self.seq, self.incarnation))
        machine.validate()
        return machine

    def take_over(self, *, snapshot: bool = False) -> None:
        """Another replica takes the shard: what is not folded is gone, and told again."""
        self.machine = self.restored() if snapshot else self.replayed()
        self.machine.outbox = Outbox()  # hints of old batches: effects are derived from state (J7)
        self.do(TakeTable(self.table))
        self.settled()


def task(name: str, *parents: int, spec: TaskSpec = SPEC, **changes: Any) -> GraphTask:
    """A node; keyword arguments change its spec."""
    return GraphTask(name, parents, replace(spec, **changes) if changes else spec)
