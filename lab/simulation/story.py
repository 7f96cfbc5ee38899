"""What happened in a seed, as lines that a person reads from top to bottom.

Theory. A story is read to find out why a promise was broken, so everything has the short name that its maker gave it: a run what its
client calls it, a cluster its own name, attempt 2 of task t4 of run-0 is `run-0/t4 #2`. What a replica notes for itself, and answers
that tell a client nothing new, are left out unless the whole story is wanted. What was broken stands where it happened and at the end.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from control_plane.core import events as ev
from control_plane.core.model import AttemptState
from control_plane.store import keys
from lab.checking.history import Key, Record, Said, Violation, Written
from lab.simulation.etcd import Revision

AT_THE_END = 20
"""Violations told again at the end, at most: the first ones are the cause, and one cause may break a promise a hundred times."""

ATTEMPT = re.compile(
    r"AttemptId\(run='(?P<run>\w+)', task=(?P<task>\d+), n=(?P<n>\d+), nonce='(?P<nonce>\w+)'\)"
    r"|\b(?P<run_>[0-9a-f]{24})\.(?P<task_>\d+)\.(?P<n_>\d+)\.(?P<nonce_>[0-9a-f]{16})\b"
)
"""An attempt in the words of a checker or of an agent."""

UID = re.compile(r"\b[0-9a-f]{16,24}\b")

STATES = ("unspecified", "RUNNING", "CANCELLING", "SUCCEEDED", "FAILED", "CANCELLED", "DEADLINE_EXCEEDED")
"""Of baton.v1.RunState, by number."""


@dataclass(slots=True)
class Names:
    """What everything is called."""

    clusters: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    nonces: dict[tuple[str, int, int], set[str]] = field(default_factory=lambda: defaultdict(set))
    """Of each attempt: after a restore of the store there may be two of one number."""

    @staticmethod
    def of(record: Record) -> Names:
        """From the journal, and from what clients call their runs."""
        names = Names()
        wished = {said.uid: said.run for said in record.said if said.uid}
        for written in record.journal:
            match written.event:
                case ev.ClusterAdded(uid, name):
                    names.clusters[uid] = name
                case ev.RunCreated():
                    uid, taken = written.event.run, set(names.runs.values())
                    name = wished.get(uid, written.event.run_id)
                    names.runs.setdefault(uid, name if name not in taken else f"{name} ({uid[:6]})")
                case ev.TasksAdded(run, tasks):
                    names.tasks[run].extend(task.id for task in tasks)
                case ev.AttemptsPlaced() as placed:
                    for task, n in zip(placed.tasks, placed.ns, strict=True):
                        names.nonces[placed.run, task, n].add(written.stamp.nonce)
        return names

    def run(self, uid: str) -> str:
        """A run."""
        return self.runs.get(uid, uid[:6])

    def cluster(self, uid: str) -> str:
        """A cluster."""
        return self.clusters.get(uid, uid[:6])

    def task(self, run: str, index: int) -> str:
        """A task, without its run."""
        known = self.tasks.get(run, [])
        return known[index] if index < len(known) else f"task {index}"

    def attempt(self, run: str, task: int, n: int, nonce: str) -> str:
        """An attempt; with its nonce if there are two of its number."""
        which = f" ({nonce[:6]})" if len(self.nonces.get((run, task, n), ())) > 1 else ""
        return f"{self.run(run)}/{self.task(run, task)} #{n}{which}"

    def process(self, key: Key) -> str:
        """An attempt's process."""
        return self.attempt(key.run_uid, key.task, key.n, key.nonce)

    def plain(self, text: str) -> str:
        """A checker's or a program's words with short names in them."""

        def attempt(found: re.Match[str]) -> str:
            run, task, n, nonce = (found[name] or found[name + "_"] for name in ("run", "task", "n", "nonce"))
            return self.attempt(run, int(task), int(n), nonce)

        def uid(found: re.Match[str]) -> str:
            return self.runs.get(found[0]) or self.clusters.get(found[0]) or found[0][:6]

        return UID.sub(uid, ATTEMPT.sub(attempt, text))


Line = tuple[float, int, str]
"""Time, order within a moment, text."""


def tell(
    record: Record, violations: Sequence[Violation], revisions: Sequence[Revision] = (), *, whole: bool = False
) -> list[str]:
    """The story, in the order of true time; `whole`: with all that is left out else, and what `revisions` changed of the ring."""
    names = Names.of(record)
    lines: list[Line] = [(at, 0, f"*** {text}") for at, text in record.notes]
    for written in record.journal:
        text = _event(written, names) or (f"({type(written.event).__name__})" if whole else "")
        if text:
            lines.append((written.at, 2, f"    [{written.shard}] {text}"))
    for ran in record.ran:
        name = names.process(ran.interval.key)
        lines.append((ran.interval.start, 3, f"  > {ran.cluster} runs {name}"))
        if ran.interval.end is not None:
            lines.append((ran.interval.end, 3, f"  < {ran.cluster} ends {name}"))
    lines += [(said.answered, 4, _answer(said, names)) for said in (record.said if whole else _news(record.said))]
    lines += [line for revision in revisions for line in _small_keys(revision)]
    lines += [(each.at, 9, f"!!! {each.invariant}: {names.plain(each.text)}") for each in violations]
    told = [f"{at:9.3f}  {text}" for at, _, text in sorted(lines, key=lambda line: line[:2])]
    return [*told, *_broken(violations, names)]


def _broken(violations: Sequence[Violation], names: Names) -> Iterator[str]:
    if not violations:
        return
    yield f"broken promises: {len(violations)}"
    for each in violations[:AT_THE_END]:
        yield f"!!! {each.invariant} at {each.at:.3f} s: {names.plain(each.text)}"
    if len(violations) > AT_THE_END:
        yield f"    and {len(violations) - AT_THE_END} more"


def _news(answers: Iterable[Said]) -> Iterator[Said]:
    """Answers that tell a client something: all but reads of a state that it has read before."""
    known: dict[str, int] = {}
    for said in answers:
        if said.op != "GetRun" or not said.ok or known.get(said.run) != said.state:
            yield said
        if said.ok:
            known[said.run] = said.state


def _answer(said: Said, names: Names) -> str:
    if said.ok:
        state = STATES[said.state] if said.state < len(STATES) else str(said.state)
        what = f"{state}, event {said.number}, {said.detail}"
    else:
        what = f"no success: {names.plain(said.detail)}"
    return f"  ? client {said.op} {said.run} (asked at {said.called:.3f}): {what}"


def _event(written: Written, names: Names) -> str:  # noqa: PLR0911 - one sentence per kind of event
    """One sentence; empty for what a replica notes for itself."""
    event = written.event
    match event:
        case ev.ClusterAdded() | ev.SessionOpened() | ev.ClusterLost() | ev.HealthChanged() | ev.AdmissionSet():
            return _fleet(event, names)
        case ev.StormHeld():
            return "many clusters are lost at once: their tasks are held"
        case ev.RunCreated():
            return f"{names.run(event.run)} is created with {event.task_total} tasks"
        case ev.RunCancelRequested():
            return f"{names.run(event.run)} is to be cancelled: {event.reason}"
        case ev.RunFinished():
            return f"{names.run(event.run)} is {event.state.name}: {event.reason}".rstrip(": ")
        case ev.RunArchived():
            return f"{names.run(event.run)} is in history"
        case ev.TasksEnded():
            words = (
                f"{names.task(event.run, task)} {state.name}, {names.plain(reason)}"
                for task, state, reason in zip(event.tasks, event.states, event.reasons, strict=True)
            )
            return f"{names.run(event.run)}: ended: {'; '.join(words)}"
        case ev.RetriesSet():
            words = (
                f"{names.task(event.run, task)} ({names.plain(reason)})"
                for task, reason in zip(event.tasks, event.reasons, strict=True)
            )
            return f"{names.run(event.run)}: to be tried again: {', '.join(words)}"
    return _attempts(event, names)


def _attempts(event: ev.Event, names: Names) -> str:
    match event:
        case ev.AttemptsPlaced():
            flags = ", as a hedge" * event.hedge + ", an overlap is declared" * event.overlap
            words = f"placed on {names.cluster(event.cluster)}, session {event.generation}{flags}"
        case ev.AttemptsStarted():
            words = "reported running"
        case ev.AttemptsFinished():
            return f"{names.run(event.run)}: reported: {', '.join(_ends(event, names))}"
        case ev.AttemptsRejected():
            words = f"rejected, {event.reasons[0]}"
        case ev.AttemptsLost():
            words = f"lost, death {event.evidence.name}"
        case ev.AttemptsAdopted():
            words = f"adopted by session {event.generation}"
        case ev.StopsOrdered():
            words = f"to be stopped, {event.reason}"
        case ev.StopsConfirmed():
            words = "confirmed as stopped"
        case ev.ResultsRefused():
            words = "a late result is refused"
        case _:
            return ""
    which = ", ".join(f"{names.task(event.run, task)} #{n}" for task, n in zip(event.tasks, event.ns, strict=True))
    return f"{names.run(event.run)}: {which}: {words}"


def _ends(event: ev.AttemptsFinished, names: Names) -> Iterator[str]:
    for task, n, state, message in zip(event.tasks, event.ns, event.states, event.messages, strict=True):
        why = "" if state is AttemptState.SUCCEEDED or not message else f" ({names.plain(message)})"
        yield f"{names.task(event.run, task)} #{n} {state.name}{why}"


def _fleet(
    event: ev.ClusterAdded | ev.SessionOpened | ev.ClusterLost | ev.HealthChanged | ev.AdmissionSet, names: Names
) -> str:
    match event:
        case ev.ClusterAdded():
            return f"{event.name} is new"
        case ev.SessionOpened():
            return (
                f"{names.cluster(event.cluster)} opens session {event.generation} at {event.replica} ({event.boot_id})"
            )
        case ev.ClusterLost():
            name = names.cluster(event.cluster)
            return f"{name} is lost, session {event.generation}: death {event.evidence.name}, {event.reason}"
        case ev.HealthChanged():
            return f"{names.cluster(event.cluster)} is {event.health.name}"
    return f"{names.cluster(event.cluster)} is {event.admission.name}"


def _small_keys(revision: Revision) -> Iterator[Line]:
    """Members and the fleet shard's owner: who leads."""
    for change in revision.events:
        key = change.kv.key
        if keys.parse_member(key) or key == keys.owner("fleet"):
            yield revision.at, 1, f"    {key}: {change.kv.value.decode() or 'gone'}"
