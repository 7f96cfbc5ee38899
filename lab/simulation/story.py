"""What happened in a seed, as lines that a person reads from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.core import events as ev
from control_plane.store import keys
from lab.checking.history import Record, Violation, Written
from lab.simulation.etcd import Revision


def tell(record: Record, violations: Sequence[Violation], revisions: Sequence[Revision] = ()) -> list[str]:
    """The story, in the order of true time."""
    lines: list[tuple[float, int, str]] = []
    lines += [(at, 0, f"*** {text}") for at, text in record.notes]
    lines += [(each.at, 2, f"    [{each.shard}] {_event(each)}") for each in record.journal]
    for ran in record.ran:
        key = ran.interval.key
        name = f"{key.run_uid[:6]}/{key.task} attempt {key.n} ({key.nonce[:6]})"
        lines.append((ran.interval.start, 3, f"  > {ran.cluster} runs {name}"))
        if ran.interval.end is not None:
            lines.append((ran.interval.end, 3, f"  < {ran.cluster} ends {name}"))
    for said in record.said:
        what = f"ok, state {said.state}, event {said.number}" if said.ok else "no answer"
        line = f"  ? client {said.op} {said.run} {said.uid[:6]} (asked at {said.called:.3f}): {what} {said.detail}"
        lines.append((said.answered, 4, line))
    lines += [line for revision in revisions for line in _small_keys(revision)]
    lines += [(each.at, 9, f"!!! {each.invariant}: {each.text}") for each in violations]
    return [f"{at:9.3f}  {text}" for at, _, text in sorted(lines, key=lambda line: line[:2])]


def _event(written: Written) -> str:  # noqa: PLR0911 - one sentence per kind of event
    event = written.event
    match event:
        case ev.AttemptsPlaced():
            flags = " hedge" * event.hedge + " overlap" * event.overlap
            pairs = _pairs(event.tasks, event.ns)
            nonce = written.stamp.nonce[:6]
            return (
                f"{event.run[:6]} placed {pairs} on {event.cluster[:6]} generation {event.generation} ({nonce}){flags}"
            )
        case ev.AttemptsFinished():
            words = ", ".join(
                f"{t}.{n} {state.name} {message}".strip()
                for t, n, state, message in zip(event.tasks, event.ns, event.states, event.messages, strict=True)
            )
            return f"{event.run[:6]} finished {words}"
        case ev.AttemptsStarted() | ev.StopsConfirmed() | ev.AttemptsRejected() | ev.ResultsRefused():
            return f"{event.run[:6]} {type(event).__name__} {_pairs(event.tasks, event.ns)}"
        case ev.AttemptsLost() | ev.AttemptsAdopted() | ev.StopsOrdered():
            how = getattr(event, "evidence", None) or getattr(event, "generation", None) or getattr(event, "reason", "")
            return f"{event.run[:6]} {type(event).__name__} {_pairs(event.tasks, event.ns)} ({how!s})"
        case ev.TasksEnded():
            words = ", ".join(
                f"{t} {state.name}: {reason}"
                for t, state, reason in zip(event.tasks, event.states, event.reasons, strict=True)
            )
            return f"{event.run[:6]} ended {words}"
        case ev.RunCreated():
            return f"{event.run[:6]} created {event.run_id} with {event.task_total} tasks"
        case ev.RunFinished():
            return f"{event.run[:6]} is {event.state.name}: {event.reason}"
        case ev.TasksAdded():
            return f"{event.run[:6]} has tasks {', '.join(task.id for task in event.tasks)}"
        case ev.SessionOpened():
            return (
                f"cluster {event.cluster[:6]} generation {event.generation} opens at {event.replica} ({event.boot_id})"
            )
        case ev.ClusterLost():
            return f"cluster {event.cluster[:6]} generation {event.generation} is lost: {event.evidence.name}, {event.reason}"
    return str(event)


def _pairs(tasks: Sequence[int], ns: Sequence[int]) -> str:
    return ", ".join(f"{task}.{n}" for task, n in zip(tasks, ns, strict=True))


def _small_keys(revision: Revision) -> list[tuple[float, int, str]]:
    """Members and the fleet shard's owner: who leads."""
    found = []
    for change in revision.events:
        key = change.kv.key
        if keys.parse_member(key) or key == keys.owner("fleet"):
            value = change.kv.value.decode() or "gone"
            found.append((revision.at, 1, f"    {key}: {value}"))
    return found
