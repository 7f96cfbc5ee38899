"""Which refs of agents' reports become true (PROTOCOL F1, F2, J11; DESIGN 10).

Theory: an agent stores content first and reports its ref after, so a ref may be taken at its word once the attempt is known to be
live; where the content lies follows from the attempt, so a ref cannot point into another's. Artifacts come with the success that is
accepted in this batch, or not at all; a success with a ref that breaks a rule is a failure of the application that says which.
Checkpoints are taken from live attempts, each attempt's numbers rising; every report of one is settled by this batch (taken, known,
or of an attempt that is not live), so that the agent may forget it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from control_plane.core.commands import Finish, SavedCheckpoint
from control_plane.core.events import ARTIFACTS_LEVEL, ArtifactsPublished, CheckpointsCommitted
from control_plane.core.files import (
    ATTEMPT_ARTIFACTS,
    DIGEST_BYTES,
    RESULT,
    RUN_ARTIFACTS,
    checkpoint_number,
    name_problem,
)
from control_plane.core.machine import Batch
from control_plane.core.model import ArtifactRef, AttemptId
from control_plane.core.run import Attempt, Run

PART_REFS = 500
"""Refs in one event: at most 85 KB with names of full length, so that two fit a batch of 256 KiB (J2)."""

Row = tuple[int, int, str, int, bytes]
"""A row of ArtifactsPublished or CheckpointsCommitted."""

Find = Callable[[AttemptId], tuple[Run, Attempt] | None]
"""The attempt a report speaks of, None if it is not known or another cluster's."""


class Publishing:
    """Artifacts of the successes that one batch accepts."""

    __slots__ = ("_level", "_rows")

    def __init__(self, level: int) -> None:
        """`level`: the federation's feature level."""
        self._level = level
        self._rows: dict[str, list[Row]] = {}

    def add(self, run: Run, finish: Finish) -> str:
        """Publish what a success brings. Empty, or the fault for which it is none."""
        rows = self._rows.setdefault(run.uid, [])
        used = (run.files.total if run.files else 0) + len(rows)
        fault = self._fault(finish, used)
        if not fault:
            id_ = finish.attempt
            rows += [(id_.task, id_.n, ref.name, ref.size, ref.digest) for ref in finish.artifacts]
        return fault

    def _fault(self, finish: Finish, used: int) -> str:
        refs = finish.artifacts
        if self._level < ARTIFACTS_LEVEL:
            return (
                f"it made artifacts, which need feature level {ARTIFACTS_LEVEL}; the operator's federation is at "
                f"{self._level}: it rises by itself once every replica runs a newer version"
            )
        if len(refs) > ATTEMPT_ARTIFACTS:
            return f"it made {len(refs)} artifacts, over the limit of {ATTEMPT_ARTIFACTS}: pack them into fewer files"
        if used + len(refs) > RUN_ARTIFACTS:
            return f"artifacts of the run would exceed {RUN_ARTIFACTS}: pack them into fewer files"
        names = {ref.name for ref in refs}
        if len(names) < len(refs):
            return "two of its artifacts have one name"
        if RESULT in names and finish.result:
            return f"its result came twice: inline, and as the artifact {RESULT!r}"
        return next((f"artifact {problem}" for problem in map(_problem, refs) if problem), "")

    def emit(self, batch: Batch) -> None:
        """Before the AttemptsFinished that accept the attempts."""
        for run, rows in self._rows.items():
            for columns in _parts(rows):
                batch.emit(ArtifactsPublished(run, *columns))


def commit_checkpoints(saved: tuple[SavedCheckpoint, ...], find: Find, batch: Batch) -> None:
    """Take the newest checkpoint of each attempt that is live now."""
    if batch.level < ARTIFACTS_LEVEL:
        return
    newest: dict[AttemptId, ArtifactRef] = {}
    for said in saved:
        number, known = checkpoint_number(said.ref.name), newest.get(said.attempt)
        if number and _sound(said.ref) and (known is None or number > checkpoint_number(known.name)):
            newest[said.attempt] = said.ref
    rows: dict[str, list[Row]] = {}
    for id_, ref in newest.items():
        found = find(id_)
        if found is None or not found[0].is_live(found[1]):
            continue
        files = found[0].files
        if files is None or checkpoint_number(ref.name) > files.saved(id_):
            rows.setdefault(id_.run, []).append((id_.task, id_.n, ref.name, ref.size, ref.digest))
    for run, of_run in rows.items():
        for columns in _parts(of_run):
            batch.emit(CheckpointsCommitted(run, *columns))


def _problem(ref: ArtifactRef) -> str | None:
    return name_problem(ref.name) or (None if _sound(ref) else f"{ref.name!r} came without a size or a digest")


def _sound(ref: ArtifactRef) -> bool:
    return ref.size >= 0 and len(ref.digest) == DIGEST_BYTES


def _parts(rows: list[Row]) -> Iterator[Any]:
    """Columns, a bounded number of rows each."""
    for start in range(0, len(rows), PART_REFS):
        yield zip(*rows[start : start + PART_REFS], strict=True)
