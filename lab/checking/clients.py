"""What clients were told, against the journal and against itself (I4, I5, I6, I16, J8, O8; reliability.md 2).

Theory. A client's note has the true times of its call and of the answer. What it was told must have been true at some moment between
them; what it is told later can only be newer. A restore (J12) breaks both for what it undid: that is said in the README, so
the notes it concerns are left out here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from lab.checking.fold import Fold
from lab.checking.history import Record, Said, Violation

FINAL = 3
"""The first final state of baton.v1.RunState."""

TAKEN = ("NAME_TAKEN", "ALREADY_EXISTS")
"""Reasons that say: somebody else's run has this name."""


def acknowledged_is_kept(record: Record, fold: Fold) -> Iterator[Violation]:
    """I4: a run whose creation was acknowledged was in the log by then."""
    for said in record.said:
        if said.op == "CreateRun" and said.ok and not record.restored_between(said.called, record.ended):
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
    if intents and len(sealed) > intents:
        yield Violation("I5 once", 0.0, f"{len(sealed)} runs came of {intents} intents")


def tries_converge(record: Record, fold: Fold) -> Iterator[Violation]:
    """I5: tries of one request meet each other. Nobody is told that his own run stands in his way."""
    del fold
    for said in record.said:
        if said.op == "CreateRun" and not said.ok and said.reason in TAKEN:
            text = f"{said.run}: {said.reason}, though only this request ever wanted that name"
            yield Violation("I5 once", said.answered, text)


def refusals_are_honest(record: Record, fold: Fold) -> Iterator[Violation]:
    """I5: a try that is said not to be applied is not applied, neither before the answer nor after it."""
    uids = {said.run: said.uid for said in record.said if said.ok and said.uid}
    tries: dict[str, list[Said]] = defaultdict(list)
    for said in sorted((s for s in record.said if s.op == "CreateRun"), key=lambda s: s.called):
        tries[said.run].append(said)
    for run, asked in tries.items():
        created = fold.runs.get(uids.get(run, ""))
        if created is None:
            continue
        for place, said in enumerate(asked):
            if said.ok or not said.refused:
                break  # from here on an earlier try may be the one that was applied
            until = asked[place + 1].called if place + 1 < len(asked) else record.ended
            if said.called <= created.created_at < until:
                text = f"{run}: the try at {said.called:.3f} was said not to be applied ({said.reason}), and was"
                yield Violation("I5 honest", said.answered, text)


def reads_go_forward(record: Record, fold: Fold) -> Iterator[Violation]:
    """J8, I6: what a client reads of a run never goes back, and is never older than what it was told before it asked."""
    del fold
    newest: dict[str, Said] = {}
    for said in sorted((s for s in record.said if s.ok), key=lambda s: s.answered):
        before = newest.get(said.run)
        if before is None or record.restored_between(before.called, said.answered):
            newest[said.run] = said
            continue
        after = said.called >= before.answered
        if said.op == "GetRun" and after and said.number < before.number:
            text = f"{said.run}: event {said.number} was shown {said.detail} after event {before.number}"
            yield Violation("J8 reads", said.answered, text)
        if before.state >= FINAL and after and said.state != before.state:
            yield Violation(
                "I6 monotone states", said.answered, f"{said.run}: final {before.state} became {said.state}"
            )
        if said.number >= before.number:
            newest[said.run] = said


def watches_are_whole(record: Record, fold: Fold) -> Iterator[Violation]:
    """I16: what a watcher receives of a run has no gap, no repeat and one order, and every watcher receives the same."""
    del fold
    last: dict[tuple[str, str], int] = {}
    contents: dict[tuple[str, int], tuple[float, str]] = {}
    for seen in record.watched:
        key = (seen.watcher, seen.run)
        if not seen.fresh and seen.number != last.get(key, 0) + 1:
            text = f"{seen.watcher} received event {seen.number} of {seen.run} after event {last.get(key, 0)}"
            yield Violation("I16 event stream", seen.at, text)
        last[key] = seen.number
        at, content = contents.setdefault((seen.run, seen.number), (seen.at, seen.content))
        if content != seen.content and not record.restored_between(at, seen.at):
            yield Violation("I16 event stream", seen.at, f"event {seen.number} of {seen.run} was shown in two ways")
