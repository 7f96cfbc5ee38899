"""A run's events as a person sees them go by.

Theory: events are the truth and lines are a view. On a terminal one live line shows how far the run is and lines above it
tell what is worth telling; elsewhere (a log, a pipe) there are lines only. A big run is summed up instead of told task by
task. Everything goes to standard error: standard output belongs to the outcome.
"""

from __future__ import annotations

import sys
from collections import Counter
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.status import Status
from rich.text import Text

from baton.cli import render, session
from baton.v1 import run_pb2

MAX_TOLD = 300
"""Tasks up to which every change is a line. More lines than that are not read but scrolled past."""

TELL_EVERY_SECONDS = 2.0
"""Event time between two summary lines of a big run."""

_FINAL = (
    run_pb2.TASK_STATE_SUCCEEDED,
    run_pb2.TASK_STATE_FAILED,
    run_pb2.TASK_STATE_SKIPPED,
    run_pb2.TASK_STATE_CANCELLED,
    run_pb2.TASK_STATE_DEADLINE_EXCEEDED,
)
_QUIET = frozenset({run_pb2.TASK_STATE_PENDING, run_pb2.TASK_STATE_READY})
_TROUBLE = frozenset({"lost", "retry", "failed", "deadline", "cancel", "moved", "refused"})


class Progress:
    """Shows the events of one watch. A context manager: the live line is gone afterwards."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._total = 0
        self._states: dict[int, int] = {}
        self._counts: Counter[int] = Counter()  # kept by change: summing 10,000 tasks for each event would be quadratic
        self._told = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._status = self._console.status("waiting for the first event")
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def show(self, message: run_pb2.WatchRunResponse) -> None:
        """Takes one message of the watch."""
        if message.HasField("run"):
            self._total = message.run.task_count
        for event in message.events:
            self._take(event)
        if self._status:
            self._status.update(self.summary())

    def summary(self) -> str:
        """`7/14 done, 4 RUNNING, 3 PENDING`."""
        counts = self._counts
        done = sum(counts[state] for state in _FINAL)
        rest = [
            f"{count} {render.task_state(state)}"
            for state, count in sorted(counts.items())
            if count and state not in _FINAL
        ]
        failed = [f"{counts[state]} {render.task_state(state)}" for state in _FINAL[1:] if counts[state]]
        return ", ".join([f"{done}/{self._total or len(self._states)} done", *failed, *rest])

    def _take(self, event: run_pb2.RunEvent) -> None:
        for change in event.changes:
            if change.index in self._states:
                self._counts[self._states[change.index]] -= 1
            self._states[change.index] = change.state
            self._counts[change.state] += 1
        when = render.seconds(event.time)
        if max(self._total, len(self._states)) > MAX_TOLD:
            if when - self._told >= TELL_EVERY_SECONDS:
                self._told = when
                self._tell(when, self.summary())
            return
        for change in event.changes:
            if change.state not in _QUIET or event.kind in _TROUBLE:
                self._tell(when, _line(change, event.kind))

    def _tell(self, when: float, text: str) -> None:
        clock = datetime.fromtimestamp(when, UTC).strftime("%H:%M:%S")
        self._console.print(Text(f"{clock} {session.clean(text)}"))


def _line(change: run_pb2.TaskChange, kind: str) -> str:
    parts = [change.id or f"task {change.index}", render.task_state(change.state)]
    if change.cluster:
        parts.append(f"on {change.cluster}")
    if change.attempt > 1:
        parts.append(f"(attempt {change.attempt})")
    if kind in _TROUBLE:
        parts.append(f"[{kind}]")
    if change.reason:
        parts.append(f"- {change.reason}")
    return " ".join(parts)
