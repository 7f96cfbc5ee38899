"""The journal, folded anew by a model much simpler than the product (reliability.md 2).

Theory. A task has a state, a live set, and the number of its last attempt; a generation of a cluster is open or ended; a budget
is a count. The first event that the model forbids is a violation: I1, I2, I3, I6, I7, I12, I14 and S5. Everything that other
checkers compare with the journal (what processes did, what clients were told) is compared with this fold.

After a restore (J12) the journal that counts is the one that leads to the present: what the restore undid is left out of the fold.
It stays in `placements`, for attempts of it have run, and fences must rise above theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from control_plane.core import events as ev
from control_plane.core.model import AttemptId, AttemptState, Evidence, GraphTask, TaskState, TriggerRule
from lab.checking.history import Record, Violation, Written

FAILED = (TaskState.FAILED, TaskState.DEADLINE_EXCEEDED)

SUCCEEDED, REPORTED = "succeeded", "reported dead"
"""What ends an attempt with certainty: its own word, or evidence."""


@dataclass(slots=True)
class Member:
    """An attempt as the journal tells it."""

    id: AttemptId
    cluster: str
    """The cluster's uid."""
    placed: float
    overlap: bool
    hedge: bool
    dead_at: float = -1.0
    """When the journal said that it is dead for certain, and never starts again; negative while it has not."""
    dead_why: str = ""


@dataclass(slots=True)
class TaskModel:
    """A task as the journal tells it."""

    spec: GraphTask
    state: TaskState = TaskState.PENDING
    live: dict[int, Member] = field(default_factory=dict)
    last_n: int = 0
    accepted: int = 0
    accepted_n: int = 0
    accepted_at: float = -1.0
    failures: int = 0
    losses: int = 0
    last_left: AttemptState = AttemptState.PLACED
    final_at: float = -1.0


@dataclass(slots=True)
class RunModel:
    """A run as the journal tells it."""

    uid: str
    created: ev.RunCreated
    created_at: float
    tasks: list[TaskModel] = field(default_factory=list)
    sealed: bool = False
    cancelled_at: int = 0
    """Revision of the cancel, 0 if none."""
    finished_at: float = -1.0


class Fold:
    """See the module. `violations` are the events that the model forbids."""

    def __init__(self, record: Record) -> None:
        self.runs: dict[str, RunModel] = {}
        self.attempts: dict[AttemptId, Member] = {}
        """Of the journal that counts."""
        self.placements: dict[AttemptId, Member] = {}
        """Of the whole journal, what a restore undid included."""
        self.stopping: dict[AttemptId, Member] = {}
        """Outstanding stops: their reservations stay (F8)."""
        self.violations: list[Violation] = []
        self._generations: dict[str, tuple[int, bool]] = {}
        """Cluster -> its newest generation, and whether that has ended."""
        self._fences: dict[tuple[str, int], tuple[int, int]] = {}
        self._written: Written
        for written in record.journal:
            self._written = written
            if isinstance(written.event, ev.AttemptsPlaced):
                self._fenced(written.event)
            if record.forgotten(written.at, written.revision):
                continue
            handler = _HANDLERS.get(type(written.event))
            if handler is not None:
                handler(self, written.event)

    # -- parts of every handler ----------------------------------------------------------------------------------------

    def _broken(self, invariant: str, text: str) -> None:
        where = f"revision {self._written.revision}, shard {self._written.shard}, seq {self._written.stamp.seq}"
        self.violations.append(Violation(invariant, self._written.at, f"{text} ({where})"))

    def _run(self, uid: str) -> RunModel | None:
        run = self.runs.get(uid)
        if run is None:
            self._broken("I6 monotone states", f"an event of the unknown run {uid}")
        return run

    def _rows(self, uid: str, tasks: tuple[int, ...], ns: tuple[int, ...]) -> Iterator[tuple[TaskModel, int, str]]:
        """Task, attempt number and a name for messages, of every row of an event about attempts."""
        run = self._run(uid)
        for index, n in zip(tasks, ns, strict=True) if run is not None else ():
            task = run.tasks[index] if run is not None else None
            if task is not None:
                yield task, n, f"task {task.spec.id} of run {uid}, attempt {n}"

    def _open(self, run: RunModel, what: str) -> None:
        if run.finished_at >= 0:
            self._broken("I6 monotone states", f"{what} after run {run.uid} was final")

    def _fenced(self, event: ev.AttemptsPlaced) -> None:
        """I1 over the whole journal: (incarnation, n) rises for each task, whatever was restored in between."""
        stamp = self._written.stamp
        for index, n in zip(event.tasks, event.ns, strict=True):
            fence, before = (stamp.incarnation, n), self._fences.get((event.run, index), (0, 0))
            if fence <= before:
                name = f"task {index} of run {event.run}"
                self._broken("I1 fence", f"{name}: attempt {n} of incarnation {fence[0]} after the fence {before}")
            self._fences[event.run, index] = max(fence, before)
            id_ = AttemptId(event.run, index, n, stamp.nonce)
            self.placements[id_] = Member(id_, event.cluster, self._written.at, event.overlap, event.hedge)

    def _leave(self, task: TaskModel, n: int, dead: str, *, stop: bool = False) -> None:
        """A member leaves its live set. `dead`: why it is dead for certain, if it is. `stop`: its reservation stays."""
        member = task.live.pop(n, None)
        if member is None:
            return
        if dead:
            member.dead_at, member.dead_why = self._written.at, dead
            self.stopping.pop(member.id, None)
        elif stop:
            self.stopping[member.id] = member

    # -- runs ----------------------------------------------------------------------------------------------------------

    def created(self, event: ev.RunCreated) -> None:
        """A run begins."""
        there = self.runs.get(event.run)
        if there is not None and there.sealed:
            self._broken("I5 once", f"run {event.run} was created twice")
        self.runs[event.run] = RunModel(event.run, event, self._written.at)

    def added(self, event: ev.TasksAdded) -> None:
        """Its tasks."""
        run = self._run(event.run)
        if run is not None:
            run.tasks += [TaskModel(task) for task in event.tasks]

    def sealed(self, event: ev.RunSealed) -> None:
        """It is whole."""
        run = self._run(event.run)
        if run is not None:
            run.sealed = True

    def cancelled(self, event: ev.RunCancelRequested) -> None:
        """No new placements from here."""
        run = self._run(event.run)
        if run is not None:
            run.cancelled_at = self._written.revision

    def done(self, event: ev.RunFinished) -> None:
        """A run is final. One whose outcome history already holds ends with its tasks open (J12)."""
        run = self._run(event.run)
        if run is None:
            return
        self._open(run, "an end")
        for task in run.tasks:
            if not task.state.final and self._written.stamp.incarnation == 1:
                self._broken("I6 monotone states", f"run {event.run} is final, {task.spec.id} is {task.state.name}")
        run.finished_at = self._written.at

    # -- attempts ------------------------------------------------------------------------------------------------------

    def placed(self, event: ev.AttemptsPlaced) -> None:
        """Attempts join live sets."""
        run = self._run(event.run)
        if run is None:
            return
        self._open(run, "a placement")
        if run.cancelled_at and run.cancelled_at < self._written.revision:
            self._broken("I7 dependencies", f"a placement in {event.run} after its cancel")
        if self._generations.get(event.cluster, (event.generation, False)) < (event.generation, False):
            self._broken(
                "S5 generations", f"a placement on {event.cluster} in its unopened generation {event.generation}"
            )
        for index, (task, n, name) in zip(event.tasks, self._rows(event.run, event.tasks, event.ns), strict=True):
            if task.state.final:
                self._broken("I6 monotone states", f"{name}: placed although the task is {task.state.name}")
            if task.live and not event.hedge:
                self._broken("I2 one live attempt", f"{name}: placed beside live {sorted(task.live)}")
            if len(task.live) > 1:
                self._broken("I2 one live attempt", f"{name}: a third copy beside {sorted(task.live)}")
            if not _may_start(run, task):
                self._broken("I7 dependencies", f"{name}: placed before its parents allow it")
            id_ = AttemptId(event.run, index, n, self._written.stamp.nonce)
            task.live[n] = self.attempts[id_] = self.placements[id_]
            task.last_n = max(task.last_n, n)
            task.state = TaskState.PLACED

    def began(self, event: ev.AttemptsStarted) -> None:
        """Attempts run."""
        for task, n, name in self._rows(event.run, event.tasks, event.ns):
            if n not in task.live:
                self._broken("I3 accepted once", f"{name}: it started, but is not live")
            else:
                task.state = TaskState.RUNNING

    def finished(self, event: ev.AttemptsFinished) -> None:
        """Attempts end by their own report."""
        run = self._run(event.run)
        if run is not None:
            self._open(run, "a report taken")
        rows = self._rows(event.run, event.tasks, event.ns)
        for (task, n, name), state, infra in zip(rows, event.states, event.infra, strict=True):
            if n not in task.live:
                self._broken("I3 accepted once", f"{name}: its end was taken although it is not live")
            self._leave(task, n, SUCCEEDED if state is AttemptState.SUCCEEDED else REPORTED)
            task.last_left = state
            task.failures += state is AttemptState.FAILED and not infra
            task.losses += infra
            if state is AttemptState.SUCCEEDED:
                task.accepted += 1
                task.accepted_n, task.accepted_at = n, self._written.at
                if task.accepted > 1 or task.state.final:
                    self._broken("I3 accepted once", f"{name}: a result was accepted again")
                self._end(task, TaskState.SUCCEEDED)

    def rejected(self, event: ev.AttemptsRejected) -> None:
        """Members leave because their agent never will start them."""
        for task, n, name in self._rows(event.run, event.tasks, event.ns):
            if n not in task.live:
                self._broken("I12 released once", f"{name}: rejected, but it was not live")
            self._leave(task, n, "rejected")
            task.last_left = AttemptState.REJECTED

    def lost(self, event: ev.AttemptsLost) -> None:
        """Members leave with their cluster's generation."""
        for task, n, name in self._rows(event.run, event.tasks, event.ns):
            if n not in task.live:
                self._broken("I12 released once", f"{name}: lost, but it was not live")
            dead = REPORTED if event.evidence is Evidence.REPORTED else ""
            self._leave(task, n, dead, stop=not dead)
            task.last_left = AttemptState.LOST
            task.losses += 1

    def adopted(self, event: ev.AttemptsAdopted) -> None:
        """Members go on in another generation."""
        for task, n, name in self._rows(event.run, event.tasks, event.ns):
            if n not in task.live:
                self._broken("I2 one live attempt", f"{name}: adopted, but not live")

    def stops(self, event: ev.StopsOrdered) -> None:
        """Attempts are to be stopped; live members stay until they report."""
        for index, n in zip(event.tasks, event.ns, strict=True):
            for member in self._named(event.run, index, n):
                if member.dead_at < 0:
                    self.stopping[member.id] = member

    def stopped(self, event: ev.StopsConfirmed) -> None:
        """Stops are confirmed: no process, no spawn pending, a tombstone (F8)."""
        for index, n in zip(event.tasks, event.ns, strict=True):
            for member in self._named(event.run, index, n):
                self.stopping.pop(member.id, None)
                if member.dead_at < 0:
                    member.dead_at, member.dead_why = self._written.at, "its stop was confirmed"

    def _named(self, run: str, task: int, n: int) -> list[Member]:
        """The attempts of that number: one, unless a restore has let the number come again."""
        there = self.runs.get(run)
        live = there.tasks[task].live.get(n) if there is not None else None
        if live is not None:
            return [live]
        return [member for id_, member in self.stopping.items() if (id_.run, id_.task, id_.n) == (run, task, n)]

    # -- tasks ---------------------------------------------------------------------------------------------------------

    def again(self, event: ev.RetriesSet) -> None:
        """Tasks are ready again, within their budgets."""
        run = self._run(event.run)
        for index in event.tasks if run is not None else ():
            task = run.tasks[index] if run is not None else None
            if task is None:
                continue
            name, policy = f"task {task.spec.id} of run {event.run}", task.spec.spec.retry
            if task.state.final:
                self._broken("I6 monotone states", f"{name}: retried although {task.state.name}")
            if task.last_left is AttemptState.FAILED and task.failures >= policy.max_attempts:
                self._broken("I14 budgets", f"{name}: retried after {task.failures} of {policy.max_attempts} failures")
            if task.last_left is AttemptState.LOST and task.losses > policy.max_infrastructure_losses:
                self._broken("I14 budgets", f"{name}: retried after {task.losses} losses to infrastructure")
            task.state = TaskState.READY

    def over(self, event: ev.TasksEnded) -> None:
        """Tasks end without success; members still live are stopped."""
        run = self._run(event.run)
        for index, state in zip(event.tasks, event.states, strict=True) if run is not None else ():
            task = run.tasks[index] if run is not None else None
            if task is None:
                continue
            if task.state.final:
                text = f"{event.run}/{task.spec.id}: {task.state.name} became {state.name}"
                self._broken("I6 monotone states", text)
            self._end(task, state)

    def _end(self, task: TaskModel, state: TaskState) -> None:
        for n in list(task.live):
            self._leave(task, n, "", stop=True)
        task.state, task.final_at = state, self._written.at

    # -- fleet ---------------------------------------------------------------------------------------------------------

    def opened(self, event: ev.SessionOpened) -> None:
        """A generation begins: a greater number, and only after the one before has ended."""
        number, ended = self._generations.get(event.cluster, (0, True))
        if event.generation <= number or not ended:
            text = f"cluster {event.cluster}: generation {event.generation} opens, {number} is {'ended' if ended else 'open'}"
            self._broken("S5 generations", text)
        self._generations[event.cluster] = (event.generation, False)

    def ended(self, event: ev.ClusterLost) -> None:
        """A generation ends, once."""
        if self._generations.get(event.cluster, (event.generation, False)) != (event.generation, False):
            text = f"cluster {event.cluster}: generation {event.generation} is lost, but is not the one that lives"
            self._broken("S5 generations", text)
        self._generations[event.cluster] = (event.generation, True)


def _may_start(run: RunModel, task: TaskModel) -> bool:
    """I7: the trigger rule, over the parents' final states."""
    parents = [run.tasks[index].state for index in task.spec.parents]
    if not all(state.final for state in parents):
        return False
    match task.spec.spec.trigger:
        case TriggerRule.ALL_SUCCEEDED:
            return all(state is TaskState.SUCCEEDED for state in parents)
        case TriggerRule.ANY_FAILED:
            return any(state in FAILED for state in parents)
        case TriggerRule.NONE_FAILED:
            return not any(state in FAILED for state in parents)
    return True


_HANDLERS: dict[type, Callable[[Fold, object], None]] = {
    ev.RunCreated: Fold.created,  # type: ignore[dict-item]  # each handler takes the type it is keyed by
    ev.TasksAdded: Fold.added,  # type: ignore[dict-item]
    ev.RunSealed: Fold.sealed,  # type: ignore[dict-item]
    ev.AttemptsPlaced: Fold.placed,  # type: ignore[dict-item]
    ev.AttemptsStarted: Fold.began,  # type: ignore[dict-item]
    ev.AttemptsFinished: Fold.finished,  # type: ignore[dict-item]
    ev.AttemptsRejected: Fold.rejected,  # type: ignore[dict-item]
    ev.AttemptsLost: Fold.lost,  # type: ignore[dict-item]
    ev.AttemptsAdopted: Fold.adopted,  # type: ignore[dict-item]
    ev.StopsOrdered: Fold.stops,  # type: ignore[dict-item]
    ev.StopsConfirmed: Fold.stopped,  # type: ignore[dict-item]
    ev.RetriesSet: Fold.again,  # type: ignore[dict-item]
    ev.TasksEnded: Fold.over,  # type: ignore[dict-item]
    ev.RunCancelRequested: Fold.cancelled,  # type: ignore[dict-item]
    ev.RunFinished: Fold.done,  # type: ignore[dict-item]
    ev.SessionOpened: Fold.opened,  # type: ignore[dict-item]
    ev.ClusterLost: Fold.ended,  # type: ignore[dict-item]
}
