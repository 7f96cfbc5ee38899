"""Reports that are not acknowledged yet: sent at least once, again on every new stream, and again on an unbroken one.

Rules J7 (agents re-send unacknowledged reports, also on an unbroken stream) and F8 (a stop is reported when the
executor has confirmed it, until it is acknowledged). What is reported is derived from the attempt, never remembered
here; only an attempt's newest checkpoint is, until it is acknowledged or the attempt is forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from cluster_agent.core.commands import SendReports
from cluster_agent.core.model import ArtifactRef, Attempt, AttemptKey, Ended, Phase

RESEND_SECONDS = 5.0
"""Silence after which a report goes again on the same stream. Smaller than a slow commit doubles traffic in the worst
moment; larger delays a result whose first report was lost inside the control plane."""

START_SECONDS = 0.1
"""How long a start waits for its end, which tells it too: a commit saved for every short task, and one hop in two of a chain. Smaller:
short tasks cost two reports; larger: people see later that a task runs."""

REPORTS_PER_STEP = 2048
"""Bounds one step's work after a long outage; the next tick goes on where this one ended."""


class Outbox:
    """Which attempts await the acknowledgement of their report, and when each was last sent."""

    def __init__(self) -> None:
        self._fresh: dict[AttemptKey, None] = {}
        self._sent: dict[AttemptKey, float] = {}  # in order of sending
        self._started: dict[AttemptKey, tuple[int, float]] = {}
        """Starts not told yet, in order: wall time, and when they were heard of (infinity: since the last look)."""
        self._saved: dict[AttemptKey, tuple[ArtifactRef, float]] = {}
        """Newest checkpoint that is not acknowledged, and when it was last sent."""

    def saved(self, key: AttemptKey, checkpoint: ArtifactRef) -> None:
        """It has a newer checkpoint, which replaces an older one that was not acknowledged."""
        self._saved[key] = (checkpoint, float("-inf"))

    def settle_saved(self, key: AttemptKey, name: str) -> None:
        """A checkpoint is acknowledged; a newer one is not."""
        held = self._saved.get(key)
        if held is not None and held[0].name == name:
            del self._saved[key]

    def started(self, key: AttemptKey, wall_ms: int) -> None:
        """Say once that it runs, unless it ends soon; an inventory says it after a broken stream, and a finish makes it needless."""
        self._started[key] = (wall_ms, float("inf"))

    def add(self, key: AttemptKey) -> None:
        """It has something (new) to report."""
        self._sent.pop(key, None)
        self._started.pop(key, None)
        self._fresh[key] = None

    @property
    def fresh(self) -> int:
        """Reports that never left."""
        return len(self._fresh)

    def told(self, key: AttemptKey) -> bool:
        """Whether its report, as it is now, has left at least once."""
        return key in self._sent

    def settle(self, key: AttemptKey) -> None:
        """Its report is acknowledged or void."""
        self._fresh.pop(key, None)
        self._sent.pop(key, None)
        self._saved.pop(key, None)

    def rewind(self) -> None:
        """A new stream: everything goes again; starts are in the inventory."""
        self._fresh = dict.fromkeys((*self._sent, *self._fresh))
        self._sent.clear()
        self._started.clear()
        self._saved = {key: (checkpoint, float("-inf")) for key, (checkpoint, _) in self._saved.items()}

    def due(
        self, attempts: Mapping[AttemptKey, Attempt], *, stream: int, generation: int, now: float
    ) -> list[SendReports]:
        """What must leave now, by shard."""
        silent = itertools.takewhile(lambda item: item[1] <= now - RESEND_SECONDS, self._sent.items())
        self._fresh.update((key, None) for key, _ in silent)
        keys = list(itertools.islice(self._fresh, REPORTS_PER_STEP))
        for key in keys:
            del self._fresh[key]
            self._sent.pop(key, None)
            self._sent[key] = now
        started = self._due_started(now) if self._started else []
        saved = self._due_saved(now) if self._saved else []
        if not keys and not started and not saved:
            return []
        by_shard: dict[str, _Shard] = {}
        for key, checkpoint in saved:
            if key in attempts:
                by_shard.setdefault(attempts[key].shard, _Shard()).saved.append((key, checkpoint))
            else:
                del self._saved[key]
        for key, wall_ms in started:
            if key in attempts:
                by_shard.setdefault(attempts[key].shard, _Shard()).started.append((key, wall_ms))
        for key in keys:
            by_shard.setdefault(attempts[key].shard, _Shard()).add(attempts[key])
        return [report for shard, sheet in by_shard.items() for report in sheet.reports(stream, shard, generation)]

    def _due_started(self, now: float) -> list[tuple[AttemptKey, int]]:
        """Starts whose ends did not come soon."""
        due: list[tuple[AttemptKey, int]] = []
        for key, (wall_ms, heard) in self._started.items():
            if heard > now:
                self._started[key] = (wall_ms, now)
            elif heard <= now - START_SECONDS:
                due.append((key, wall_ms))
        for key, _ in due:
            del self._started[key]
        return due

    def _due_saved(self, now: float) -> list[tuple[AttemptKey, ArtifactRef]]:
        """Checkpoints to be sent now."""
        silent = [(key, ref) for key, (ref, sent) in self._saved.items() if sent <= now - RESEND_SECONDS]
        self._saved.update((key, (ref, now)) for key, ref in silent)
        return silent

    def __len__(self) -> int:
        return len(self._fresh) + len(self._sent) + len(self._saved)

    @property
    def idle(self) -> bool:
        """Whether nothing waits to be told or acknowledged."""
        return not len(self) and not self._started


class _Shard:
    """The reports of one shard while they are gathered."""

    def __init__(self) -> None:
        self.started: list[tuple[AttemptKey, int]] = []
        self.saved: list[tuple[AttemptKey, ArtifactRef]] = []
        self._finished: list[tuple[AttemptKey, Ended]] = []
        self._rejected: list[tuple[AttemptKey, str]] = []
        self._stopped: list[AttemptKey] = []

    def add(self, attempt: Attempt) -> None:
        if attempt.ended is not None:
            self._finished.append((attempt.key, attempt.ended))
        if attempt.phase is Phase.TOMBSTONED:
            if attempt.rejected:
                self._rejected.append((attempt.key, attempt.rejected))
            else:
                self._stopped.append(attempt.key)

    def reports(self, stream: int, shard: str, generation: int) -> Iterator[SendReports]:
        """Rejections go by themselves: they alone wait for a journal that can be written (F3)."""
        started, finished, stopped = tuple(self.started), tuple(self._finished), tuple(self._stopped)
        if started or finished or stopped or self.saved:
            yield SendReports(stream, shard, generation, started, finished, (), stopped, tuple(self.saved))
        if self._rejected:
            yield SendReports(stream, shard, generation, rejected=tuple(self._rejected))
