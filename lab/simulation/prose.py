"""A record as prose: what happened to a run, in sentences that a person reads without knowing the code.

Times are whole seconds since the beginning of the story. Everything is taken from the record that the checkers judge: the journal, the
hosts' own notes of processes, what clients were told. Only bold lines are the script's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from control_plane.core import events as ev
from control_plane.core.model import AttemptState, shard_of
from lab.checking.convergence import final_in_time
from lab.checking.fold import Fold
from lab.checking.history import Key, Record, Violation, Written

FINAL = 3
"""The first final state of baton.v1.RunState."""

STATES = {3: "SUCCEEDED", 4: "FAILED", 5: "CANCELLED", 6: "DEADLINE_EXCEEDED"}

Line = tuple[float, int, int, str]
"""Time, order within a moment, place in the journal or 0, sentence."""

MOMENT = 1
"""Decimals of a second that are one moment: within it things are told in the order of cause and effect, and what is as good as
simultaneous by its words, so that microseconds do not change a story."""

NOTE, END, OWNER, DECISION, START = range(5)
"""The order within a moment."""


def _place(line: Line) -> Line:
    return round(line[0], MOMENT), *line[1:]


@dataclass(slots=True)
class _Names:
    """What people call things."""

    clusters: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=dict)
    fences: dict[tuple[str, int, int, str], str] = field(default_factory=dict)

    @staticmethod
    def of(record: Record) -> _Names:
        """From the journal."""
        names = _Names()
        for written in record.journal:
            match written.event:
                case ev.ClusterAdded(uid, name):
                    names.clusters[uid] = name
                case ev.RunCreated():
                    names.runs[written.event.run] = written.event.run_id
                case ev.TasksAdded(run, tasks):
                    names.tasks.setdefault(run, []).extend(task.id for task in tasks)
                case ev.AttemptsPlaced() as placed:
                    for task, n in zip(placed.tasks, placed.ns, strict=True):
                        key = (placed.run, task, n, written.stamp.nonce)
                        names.fences[key] = f"{written.stamp.incarnation}.{n}"
        return names

    def task(self, run: str, index: int) -> str:
        """`task`, with the run if there are several."""
        known = self.tasks.get(run, [])
        name = known[index] if index < len(known) else f"task {index}"
        return f"`{name}`" if len(self.runs) < 2 else f"`{self.runs.get(run, run)}/{name}`"

    def process(self, key: Key) -> str:
        """An attempt's process."""
        fence = self.fences.get((key.run_uid, key.task, key.n, key.nonce), "?")
        return f"{self.task(key.run_uid, key.task)} (attempt {key.n}, fence {fence})"


def tell(title: str, moral: str, record: Record, violations: Sequence[Violation], zero: float) -> str:
    """The story as a page of Markdown. `zero`: when it began."""
    names = _Names.of(record)
    lines = sorted((line for line in _lines(record, names) if line[0] >= zero), key=_place)
    told = [f"- {round(at - zero)} s: {text}" for at, _, _, text in lines]
    end = [f"- {text}" for text in _ends(record, names)]
    verdict = [f"- VIOLATED: {each.invariant}: {each.text}" for each in violations] or [
        "- Every checker of `lab.checking` judged the record, and found nothing."
    ]
    return "\n".join([f"# {title}", "", moral, "", "## What happened", *told, "", "## What holds", *end, *verdict, ""])


def _lines(record: Record, names: _Names) -> Iterator[Line]:
    yield from ((at, NOTE, place, f"**{text}**") for place, (at, text) in enumerate(record.notes))
    shards = {shard_of("default", run): run for run in names.runs.values()}
    for place, owned in enumerate(record.owners):
        if owned.shard in shards:
            who = f"{owned.replica} owns" if owned.replica else "Nobody owns"
            yield owned.at, OWNER, place, f"{who} the shard of `{shards[owned.shard]}` now."
    for place, written in enumerate(record.journal):
        for text in _event(written, names):
            yield written.at, DECISION, place, text
    for ran in record.ran:
        name = names.process(ran.interval.key)
        yield ran.interval.start, START, 0, f"{ran.cluster} starts {name}."
        if ran.interval.end is not None:
            yield ran.interval.end, END, 0, f"{ran.cluster} has no process of {name} any more."


def _event(written: Written, names: _Names) -> Iterator[str]:
    """One sentence for each thing that an event says."""
    event = written.event
    if template := _OF_ATTEMPTS.get(type(event)):
        for task, n in zip(event.tasks, event.ns, strict=True):  # type: ignore[union-attr]  # these classes have both
            yield template.format(n=n, task=names.task(event.run, task), event=event, dead=_evidence(event))  # type: ignore[union-attr]
        return
    match event:
        case ev.RunCreated():
            left = event.deadline - written.stamp.wall
            tasks = "1 task" if event.task_total == 1 else f"{event.task_total} tasks"
            yield f"`{event.run_id}` is accepted, with {tasks} and {left:.0f} s to its deadline."
        case ev.AttemptsPlaced():
            yield from _placed(event, names)
        case ev.AttemptsFinished():
            for task, n, state, message in zip(event.tasks, event.ns, event.states, event.messages, strict=True):
                name = names.task(event.run, task)
                if state is AttemptState.SUCCEEDED:
                    yield f"The result of {name} is accepted, from attempt {n}."
                else:
                    yield f"Attempt {n} of {name} is reported {state.name}: {message}."
        case ev.TasksEnded():
            for task, end, reason in zip(event.tasks, event.states, event.reasons, strict=True):
                yield f"{names.task(event.run, task)} is {end.name}: {reason}."
        case ev.RunFinished():
            yield f"`{names.runs[event.run]}` is {event.state.name}."
        case _:
            yield from _fleet(event, names)


def _placed(event: ev.AttemptsPlaced, names: _Names) -> Iterator[str]:
    how = " as a second copy; that both may run is said with it" * event.hedge
    how = how or "; that the earlier one may still run is said with it" * event.overlap
    where = names.clusters[event.cluster]
    for task, n in zip(event.tasks, event.ns, strict=True):
        yield f"Attempt {n} of {names.task(event.run, task)} is placed on {where}{how}."


_OF_ATTEMPTS: dict[type, str] = {
    ev.AttemptsLost: "Attempt {n} of {task} leaves as lost; its death is {dead}.",
    ev.AttemptsAdopted: "Attempt {n} of {task} goes on in session {event.generation}.",
    ev.ResultsRefused: "A late result of {task}, from attempt {n}, is refused: its fence is no longer good.",
    ev.StopsConfirmed: "It is confirmed that attempt {n} of {task} is stopped for good.",
}
"""Class of an event about attempts -> what it says of each."""


def _fleet(event: ev.Event, names: _Names) -> Iterator[str]:
    match event:
        case ev.SessionOpened():
            yield f"{names.clusters[event.cluster]} opens session {event.generation}."
        case ev.ClusterLost():
            name, dead = names.clusters[event.cluster], _evidence(event)
            yield f"Session {event.generation} of {name} is lost; the death of its work is {dead}."
        case ev.HealthChanged():
            yield f"{names.clusters[event.cluster]} is {event.health.name}."
        case ev.StormHeld():
            yield "Too many clusters are lost at once: their tasks are held, for the clusters may come back."


def _evidence(event: ev.Event) -> str:
    """F6, in words; empty for an event without evidence."""
    if not isinstance(event, ev.AttemptsLost | ev.ClusterLost):
        return ""
    return {"REPORTED": "reported", "TIMED": "certain by its guard's timer", "NONE": "not known"}[event.evidence.name]


def _ends(record: Record, names: _Names) -> Iterator[str]:
    """What became of every task, in the journal that counts."""
    fold = Fold(record)
    for run in fold.runs.values():
        for index, task in enumerate(run.tasks):
            name = names.task(run.uid, index)
            if task.accepted:
                lives = sum((ran.interval.key.run_uid, ran.interval.key.task) == (run.uid, index) for ran in record.ran)
                processes = "one process" if lives == 1 else f"{lives} processes"
                yield f"{name}: {task.accepted} result accepted, from attempt {task.accepted_n}; {processes} in all."
            else:
                yield f"{name}: {task.state.name}, no result accepted."
    for run_id, state in sorted({(said.run, said.state) for said in record.said if said.ok and said.state >= FINAL}):
        yield f"A client read that `{run_id}` is {STATES[state]}, and nothing else about its end."
    late = list(final_in_time(record, fold))
    yield "Every task was final in time." if not late else "A task was final too late."
