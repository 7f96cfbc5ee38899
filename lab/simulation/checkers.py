"""Judges: each reads the record, knows one promise, and says in words where it was broken (reliability.md 2.1).

Theory. The journal is folded here anew, by a model much simpler than the product: a task has a state, a live set, and the number
of its last attempt. The first event that the model forbids is a violation. What processes did in true time, and what clients were
told, is compared with that fold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from control_plane.core import events as ev
from control_plane.core.model import AttemptId, AttemptState, GraphTask, TaskState, TriggerRule
from lab.simulation.record import Record, Written

DEADLINE_BOUND = 30.0
"""Seconds after a deadline, or after healing if that is later, within which every task is final (I8): an expired lease, a takeover
and its recovery, an election, skewed wall clocks, and slack."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: which, when, and how."""

    invariant: str
    at: float
    text: str


@dataclass(slots=True)
class Member:
    """An attempt as the journal tells it."""

    id: AttemptId
    placed: float
    overlap: bool
    hedge: bool


@dataclass(slots=True)
class TaskModel:
    """A task as the journal tells it."""

    spec: GraphTask
    state: TaskState = TaskState.PENDING
    live: dict[int, Member] = field(default_factory=dict)
    last_n: int = 0
    accepted: int = 0
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
    """The journal, folded by a simple model. `violations` are events that it forbids: I1, I2, I3, I6, I7, I16."""

    def __init__(self, record: Record) -> None:
        self.runs: dict[str, RunModel] = {}
        self.attempts: dict[AttemptId, Member] = {}
        self.violations: list[Violation] = []
        self.started: set[AttemptId] = set()
        self._written: Written
        for written in record.journal:
            self._written = written
            handler = _HANDLERS.get(type(written.event))
            if handler is not None:
                handler(self, written.event)

    # -- helpers -----------------------------------------------------------------------------------------------------------

    def _broken(self, invariant: str, text: str) -> None:
        where = f"revision {self._written.revision}, shard {self._written.shard}, seq {self._written.stamp.seq}"
        self.violations.append(Violation(invariant, self._written.at, f"{text} ({where})"))

    def _tasks(self, run: str, indices: tuple[int, ...]) -> Iterator[tuple[int, TaskModel]]:
        model = self.runs.get(run)
        if model is None:
            self._broken("I6 monotone states", f"an event of the unknown run {run}")
            return
        for index in indices:
            yield index, model.tasks[index]

    def _alive(self, model: RunModel, what: str) -> None:
        if model.finished_at >= 0:
            self._broken("I6 monotone states", f"{what} after run {model.uid} was final")

    # -- events ------------------------------------------------------------------------------------------------------------

    def created(self, event: ev.RunCreated) -> None:
        """A run begins."""
        there = self.runs.get(event.run)
        if there is not None and there.sealed:
            self._broken("I5 once", f"run {event.run} was created twice")
        self.runs[event.run] = RunModel(event.run, event, self._written.at)

    def added(self, event: ev.TasksAdded) -> None:
        """Its tasks."""
        self.runs[event.run].tasks += [TaskModel(task) for task in event.tasks]

    def sealed(self, event: ev.RunSealed) -> None:
        """It is whole."""
        self.runs[event.run].sealed = True

    def placed(self, event: ev.AttemptsPlaced) -> None:
        """Attempts join live sets."""
        run = self.runs[event.run]
        self._alive(run, "a placement")
        if run.cancelled_at and run.cancelled_at < self._written.revision:
            self._broken("I7 dependencies", f"a placement in {event.run} after its cancel")
        for (index, task), n in zip(self._tasks(event.run, event.tasks), event.ns, strict=True):
            name = f"task {task.spec.id} of run {event.run}, attempt {n}"
            if task.state.final:
                self._broken("I6 monotone states", f"{name}: placed although the task is {task.state.name}")
            if task.live and not event.hedge:
                self._broken("I2 one live attempt", f"{name}: placed beside live {sorted(task.live)}")
            if n <= task.last_n:
                self._broken("I1 fence", f"{name}: numbers do not rise ({task.last_n} was there)")
            if not self._may_start(run, task):
                self._broken("I7 dependencies", f"{name}: placed before its parents allow it")
            id_ = AttemptId(event.run, index, n, self._written.stamp.nonce)
            member = Member(id_, self._written.at, event.overlap, event.hedge)
            task.live[n] = self.attempts[id_] = member
            task.last_n = max(task.last_n, n)
            task.state = TaskState.PLACED

    def _may_start(self, run: RunModel, task: TaskModel) -> bool:
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

    def began(self, event: ev.AttemptsStarted) -> None:
        """Attempts run."""
        for (_, task), n in zip(self._tasks(event.run, event.tasks), event.ns, strict=True):
            if n not in task.live:
                self._broken("I3 accepted once", f"{event.run}/{task.spec.id}: attempt {n} started, but is not live")
            else:
                task.state = TaskState.RUNNING

    def finished(self, event: ev.AttemptsFinished) -> None:
        """Attempts end by their own report."""
        self._alive(self.runs[event.run], "a report taken")
        columns = zip(self._tasks(event.run, event.tasks), event.ns, event.states, strict=True)
        for (_, task), n, state in columns:
            name = f"task {task.spec.id} of run {event.run}, attempt {n}"
            if n not in task.live:
                self._broken("I3 accepted once", f"{name}: its end was taken although it is not live")
            task.live.pop(n, None)
            if state is AttemptState.SUCCEEDED:
                task.accepted += 1
                if task.accepted > 1 or task.state.final:
                    self._broken("I3 accepted once", f"{name}: a result was accepted again")
                task.live.clear()
                self._end(task, TaskState.SUCCEEDED)

    def left(self, event: ev.AttemptsRejected | ev.AttemptsLost) -> None:
        """Members leave."""
        for (_, task), n in zip(self._tasks(event.run, event.tasks), event.ns, strict=True):
            if n not in task.live:
                self._broken("I2 one live attempt", f"{event.run}/{task.spec.id}: attempt {n} left, but was not live")
            task.live.pop(n, None)

    def adopted(self, event: ev.AttemptsAdopted) -> None:
        """Members go on in another generation."""
        for (_, task), n in zip(self._tasks(event.run, event.tasks), event.ns, strict=True):
            if n not in task.live:
                self._broken("I2 one live attempt", f"{event.run}/{task.spec.id}: attempt {n} adopted, but not live")

    def again(self, event: ev.RetriesSet) -> None:
        """Tasks are ready again."""
        for _, task in self._tasks(event.run, event.tasks):
            if task.state.final:
                self._broken("I6 monotone states", f"{event.run}/{task.spec.id}: retried although {task.state.name}")
            task.state = TaskState.READY

    def over(self, event: ev.TasksEnded) -> None:
        """Tasks end without success."""
        columns = zip(self._tasks(event.run, event.tasks), event.states, strict=True)
        for (_, task), state in columns:
            if task.state.final:
                text = f"{event.run}/{task.spec.id}: {task.state.name} became {state.name}"
                self._broken("I6 monotone states", text)
            task.live.clear()
            self._end(task, state)

    def _end(self, task: TaskModel, state: TaskState) -> None:
        task.state, task.final_at = state, self._written.at

    def cancelled(self, event: ev.RunCancelRequested) -> None:
        """No new placements from here."""
        self.runs[event.run].cancelled_at = self._written.revision

    def done(self, event: ev.RunFinished) -> None:
        """A run is final."""
        run = self.runs[event.run]
        self._alive(run, "an end")
        for task in run.tasks:
            if not task.state.final:
                self._broken("I6 monotone states", f"run {event.run} is final, {task.spec.id} is {task.state.name}")
        run.finished_at = self._written.at


FAILED = (TaskState.FAILED, TaskState.DEADLINE_EXCEEDED)

_HANDLERS: dict[type, Callable[[Fold, object], None]] = {
    ev.RunCreated: Fold.created,  # type: ignore[dict-item]  # each handler takes the type it is keyed by
    ev.TasksAdded: Fold.added,  # type: ignore[dict-item]
    ev.RunSealed: Fold.sealed,  # type: ignore[dict-item]
    ev.AttemptsPlaced: Fold.placed,  # type: ignore[dict-item]
    ev.AttemptsStarted: Fold.began,  # type: ignore[dict-item]
    ev.AttemptsFinished: Fold.finished,  # type: ignore[dict-item]
    ev.AttemptsRejected: Fold.left,  # type: ignore[dict-item]
    ev.AttemptsLost: Fold.left,  # type: ignore[dict-item]
    ev.AttemptsAdopted: Fold.adopted,  # type: ignore[dict-item]
    ev.RetriesSet: Fold.again,  # type: ignore[dict-item]
    ev.TasksEnded: Fold.over,  # type: ignore[dict-item]
    ev.RunCancelRequested: Fold.cancelled,  # type: ignore[dict-item]
    ev.RunFinished: Fold.done,  # type: ignore[dict-item]
}


def journal_is_lawful(record: Record, fold: Fold) -> Iterator[Violation]:
    """I1, I2, I3, I6, I7: no event that the model forbids."""
    del record
    yield from fold.violations


def spawned_once(record: Record, fold: Fold) -> Iterator[Violation]:
    """F4: an attempt has at most one process, ever, anywhere; and it was placed before it ran."""
    seen: dict[AttemptId, str] = {}
    for ran in record.ran:
        key = AttemptId(*_parts(ran.interval.key))
        if key in seen:
            text = f"{key} was spawned on {seen[key]} and again on {ran.cluster}"
            yield Violation("F4 one spawn", ran.interval.start, text)
        seen[key] = ran.cluster
        member = fold.attempts.get(key)
        if member is None or member.placed > ran.interval.start:
            yield Violation(
                "J7 effects after commit", ran.interval.start, f"{key} ran before it was placed in the journal"
            )


def no_overlap(record: Record, fold: Fold) -> Iterator[Violation]:
    """I9: two processes of one task never live at one time, unless that was said before the second started."""
    by_task: dict[tuple[str, int], list[tuple[float, float, AttemptId, str]]] = defaultdict(list)
    for ran in record.ran:
        key = AttemptId(*_parts(ran.interval.key))
        end = record.ended if ran.interval.end is None else ran.interval.end
        by_task[key.run, key.task].append((ran.interval.start, end, key, ran.cluster))
    for lives in by_task.values():
        lives.sort()
        for place, (start, _, key, cluster) in enumerate(lives):
            for before, end, other, at in lives[:place]:
                if end <= start or _declared(fold, key, other):
                    continue
                text = (
                    f"{other} ran on {at} from {before:.3f} to {end:.3f}, {key} on {cluster} from {start:.3f}, "
                    "and no overlap was declared"
                )
                yield Violation("I9 no overlap", start, text)


def _declared(fold: Fold, *keys: AttemptId) -> bool:
    """One of them was placed as a hedge, or with `overlap_possible`. (A placement comes before its process: J7.)"""
    members = [fold.attempts[key] for key in keys if key in fold.attempts]
    last = max(members, key=lambda member: member.id.n, default=None)
    return last is not None and (last.overlap or last.hedge)


def acknowledged_is_kept(record: Record, fold: Fold) -> Iterator[Violation]:
    """I4: a run whose creation was acknowledged was in the log by then."""
    for said in record.said:
        if said.op == "CreateRun" and said.ok:
            run = fold.runs.get(said.uid)
            if run is None or not run.sealed or run.created_at > said.answered:
                text = f"{said.run} ({said.uid}) was acknowledged but is not in the log"
                yield Violation("I4 acknowledged is kept", said.answered, text)


def created_once(record: Record, fold: Fold) -> Iterator[Violation]:
    """I5, O8: all tries of one intent make one run."""
    uids: dict[str, set[str]] = defaultdict(set)
    for said in record.said:
        if said.op == "CreateRun" and said.ok:
            uids[said.run].add(said.uid)
    for run, found in uids.items():
        if len(found) > 1:
            yield Violation("I5 once", 0.0, f"{run} was created as {sorted(found)}")
    intents = len({said.run for said in record.said if said.op == "CreateRun"})
    sealed = [run for run in fold.runs.values() if run.sealed]
    if len(sealed) > intents:
        yield Violation("I5 once", 0.0, f"{len(sealed)} runs came of {intents} intents")


def reads_go_forward(record: Record, fold: Fold) -> Iterator[Violation]:
    """J8, I6: what a client reads of a run never goes back, and is never older than what it was told before it asked."""
    del fold
    newest: dict[str, tuple[float, int, int]] = {}
    for said in sorted((s for s in record.said if s.ok), key=lambda s: s.answered):
        answered, number, state = newest.get(said.run, (-1.0, -1, 0))
        if said.op == "GetRun" and said.called >= answered and said.number < number:
            text = f"{said.run}: event {said.number} was shown {said.detail} after event {number}"
            yield Violation("J8 reads", said.answered, text)
        if state >= FINAL and said.called >= answered and said.state != state:
            yield Violation("I6 monotone states", said.answered, f"{said.run}: final {state} became {said.state}")
        if said.number >= number:
            newest[said.run] = (said.answered, said.number, said.state)


FINAL = 3


def final_in_time(record: Record, fold: Fold) -> Iterator[Violation]:
    """I8: every task is final within the bound of its run's deadline, or of healing."""
    names = {said.uid: said.run for said in record.said if said.uid}
    for run in fold.runs.values():
        deadline = record.deadlines.get(names.get(run.uid, ""))
        if deadline is None or not run.sealed:
            continue
        limit = max(deadline, record.healed) + DEADLINE_BOUND
        if record.ended < limit:
            continue
        for task in run.tasks:
            if not task.state.final or task.final_at > limit:
                when = f"final at {task.final_at:.1f}" if task.state.final else f"still {task.state.name}"
                text = f"task {task.spec.id} of {names[run.uid]} ({run.uid}) with deadline {deadline:.1f} is {when}"
                yield Violation("I8 deadline", limit, text)


def converged(record: Record, fold: Fold) -> Iterator[Violation]:
    """I15: long after healing nothing is left: no process, no open run, no cluster unwell."""
    for name in record.living:
        yield Violation("I15 convergence", record.ended, f"a process is left: {name}")
    for text in record.left:
        yield Violation("I15 convergence", record.ended, text)
    for run in fold.runs.values():
        if run.sealed and run.finished_at < 0:
            yield Violation("I15 convergence", record.ended, f"run {run.uid} never ended")


def nobody_died(record: Record, fold: Fold) -> Iterator[Violation]:
    """A program that ends by itself is broken, whatever befell it."""
    del fold
    for text in record.died:
        yield Violation("a program failed", record.ended, text)


Checker = Callable[[Record, Fold], Iterator[Violation]]

CHECKERS: tuple[Checker, ...] = (
    journal_is_lawful,
    spawned_once,
    no_overlap,
    acknowledged_is_kept,
    created_once,
    reads_go_forward,
    final_in_time,
    converged,
    nobody_died,
)


def judge(record: Record) -> list[Violation]:
    """All violations, in the order of time."""
    fold = Fold(record)
    return sorted((v for checker in CHECKERS for v in checker(record, fold)), key=lambda v: v.at)


def _parts(key: object) -> tuple[str, int, int, str]:
    return (key.run_uid, key.task, key.n, key.nonce)  # type: ignore[attr-defined]  # AttemptKey of either plane
