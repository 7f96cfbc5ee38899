"""In time, and clean in the end (I8, I15; the liveness mode of reliability.md 3.2).

Theory. Safety says what never happens; these say what must. Each has a bound that is stated: the deadline's, that of cleaning up after
faults are healed, and in liveness mode that of progress: with the faults gone and capacity there, runs end by their own work, long
before a deadline would end them.
"""

from __future__ import annotations

from collections.abc import Iterator

from lab.checking.fold import Fold
from lab.checking.history import Record, Violation

DEADLINE_BOUND = 30.0
"""Seconds after a deadline, or after healing if that is later, within which every task is final (I8): an expired lease, a takeover
and its recovery, an election, skewed wall clocks, and slack."""


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
            if (not task.state.final and run.finished_at < 0) or task.final_at > limit:
                when = f"final at {task.final_at:.1f}" if task.state.final else f"still {task.state.name}"
                text = f"task {task.spec.id} of {names[run.uid]} ({run.uid}) with deadline {deadline:.1f} is {when}"
                yield Violation("I8 deadline", limit, text)


def progressed(record: Record, fold: Fold) -> Iterator[Violation]:
    """I15 in liveness mode: once all is healed every run ends within the stated patience, and not by its deadline."""
    if record.patience is None:
        return
    for run in fold.runs.values():
        if not run.sealed:
            continue
        limit = max(record.healed, run.created_at) + record.patience
        if record.ended >= limit and not 0 <= run.finished_at <= limit:
            when = f"final at {run.finished_at:.1f}" if run.finished_at >= 0 else "not final"
            waiting = ", ".join(f"{task.spec.id} {task.state.name}" for task in run.tasks if not task.state.final)
            text = f"run {run.uid} is {when}; all was healed at {record.healed:.1f} {waiting}".rstrip()
            yield Violation("I15 progress", limit, text)


def converged(record: Record, fold: Fold) -> Iterator[Violation]:
    """I15: long after healing nothing is left: no process, no open run, no cluster unwell."""
    if not record.quiet:
        return
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
