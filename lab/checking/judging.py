"""All checkers, and the verdict over one history."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from lab.checking import clients, convergence, files, owners, processes, versions
from lab.checking.fold import Fold
from lab.checking.history import Record, Violation

Checker = Callable[[Record, Fold], Iterator[Violation]]


def journal_is_lawful(record: Record, fold: Fold) -> Iterator[Violation]:
    """I1, I2, I3, I6, I7, I12, I14, S5: no event that the model forbids."""
    del record
    yield from fold.violations


SAFETY: tuple[Checker, ...] = (
    journal_is_lawful,
    owners.owners_write,
    owners.seqs_are_whole,
    processes.spawned_once,
    processes.placed_first,
    processes.no_overlap,
    processes.results_have_a_source,
    processes.dead_is_dead,
    processes.within_capacity,
    files.only_winners_publish,
    files.checkpoints_are_of_the_living,
    clients.acknowledged_is_kept,
    clients.created_once,
    clients.tries_converge,
    clients.refusals_are_honest,
    clients.reads_go_forward,
    clients.watches_are_whole,
    versions.nobody_writes_above,
)
"""What never happens, at any moment of a history."""

LIVENESS: tuple[Checker, ...] = (
    convergence.final_in_time,
    convergence.progressed,
    convergence.converged,
    convergence.nobody_died,
    processes.released,
)
"""What must have happened by the end of one."""

CHECKERS: tuple[Checker, ...] = (*SAFETY, *LIVENESS)


def judge(record: Record, checkers: tuple[Checker, ...] = CHECKERS) -> list[Violation]:
    """All violations, in the order of time."""
    fold = Fold(record)
    return sorted((v for checker in checkers for v in checker(record, fold)), key=lambda v: v.at)
