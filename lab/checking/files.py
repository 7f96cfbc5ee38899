"""Artifacts and checkpoints: by whose word they became visible (PROTOCOL F2; DESIGN 10).

Theory. The fold tells who is live; here it is enough to follow live sets by number. An artifact may be published only together, in
one batch, with the accepted success of its attempt; a checkpoint only while its attempt is live, its numbers rising. So no
reader ever sees what a loser made, and no attempt starts from a fenced-off one's later state.
"""

from __future__ import annotations

from collections.abc import Iterator

from control_plane.core import events as ev
from control_plane.core.files import checkpoint_number
from control_plane.core.model import AttemptState
from lab.checking.fold import Fold
from lab.checking.history import Record, Violation, Written

Attempt = tuple[str, int, int]
"""(run, task, n)"""


def only_winners_publish(record: Record, fold: Fold) -> Iterator[Violation]:
    """F2: the batch that publishes an artifact accepts its attempt's success, after it."""
    del fold
    waiting: dict[Attempt, Written] = {}
    batch = ("", "")
    for written in record.journal:
        here = (written.shard, written.stamp.nonce)
        if here != batch:
            yield from _unaccepted(waiting)
            waiting, batch = {}, here
        event = written.event
        if isinstance(event, ev.ArtifactsPublished):
            waiting |= {(event.run, task, n): written for task, n in zip(event.tasks, event.ns, strict=True)}
        elif isinstance(event, ev.AttemptsFinished):
            for task, n, state in zip(event.tasks, event.ns, event.states, strict=True):
                if state is AttemptState.SUCCEEDED:
                    waiting.pop((event.run, task, n), None)
    yield from _unaccepted(waiting)


def _unaccepted(waiting: dict[Attempt, Written]) -> Iterator[Violation]:
    for (run, task, n), written in waiting.items():
        text = f"task {task} of run {run}: artifacts of attempt {n} were published without its success"
        yield Violation("F2 artifacts", written.at, text)


def checkpoints_are_of_the_living(record: Record, fold: Fold) -> Iterator[Violation]:
    """F2: a checkpoint is committed only for a live attempt, with a number above its last."""
    del fold
    live: dict[tuple[str, int], set[int]] = {}
    last: dict[Attempt, int] = {}
    for written in record.journal:
        if record.forgotten(written.at, written.revision):
            continue
        event = written.event
        if isinstance(event, ev.CheckpointsCommitted):
            for task, n, name in zip(event.tasks, event.ns, event.names, strict=True):
                where, number = f"{name} of attempt {n} of task {task} of run {event.run}", checkpoint_number(name)
                if n not in live.get((event.run, task), ()):
                    yield Violation("F2 checkpoints", written.at, f"{where}: committed, but the attempt is not live")
                if number <= last.get((event.run, task, n), 0):
                    yield Violation("F2 checkpoints", written.at, f"{where}: its number does not rise")
                last[event.run, task, n] = number
        else:
            _follow(event, live)


def _follow(event: ev.Event, live: dict[tuple[str, int], set[int]]) -> None:
    """Keep the live sets."""
    if isinstance(event, ev.AttemptsPlaced):
        for task, n in zip(event.tasks, event.ns, strict=True):
            live.setdefault((event.run, task), set()).add(n)
    elif isinstance(event, ev.AttemptsFinished):
        for task, n, state in zip(event.tasks, event.ns, event.states, strict=True):
            live.get((event.run, task), set()).discard(n)
            if state is AttemptState.SUCCEEDED:
                live.pop((event.run, task), None)
    elif isinstance(event, ev.AttemptsRejected | ev.AttemptsLost):
        for task, n in zip(event.tasks, event.ns, strict=True):
            live.get((event.run, task), set()).discard(n)
    elif isinstance(event, ev.TasksEnded):
        for task in event.tasks:
            live.pop((event.run, task), None)
