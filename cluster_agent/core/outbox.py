"""Reports that are not acknowledged yet: sent at least once, again on every new stream, and again on an unbroken one.

Rules J7 (agents re-send unacknowledged reports, also on an unbroken stream) and F8 (a stop is reported when the
executor has confirmed it, until it is acknowledged). What is reported is derived from the attempt, never remembered
here.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from cluster_agent.core.commands import SendReports
from cluster_agent.core.model import Attempt, AttemptKey, Ended, Phase

RESEND_SECONDS = 5.0
"""Silence after which a report goes again on the same stream. Smaller than a slow commit doubles traffic in the worst
moment; larger delays a result whose first report was lost inside the control plane."""

REPORTS_PER_STEP = 2048
"""Bounds one step's work after a long outage; the next tick goes on where this one ended."""


class Outbox:
    """Which attempts await the acknowledgement of their report, and when each was last sent."""

    def __init__(self) -> None:
        self._fresh: dict[AttemptKey, None] = {}
        self._sent: dict[AttemptKey, float] = {}  # in order of sending
        self._started: dict[AttemptKey, int] = {}

    def started(self, key: AttemptKey, wall_ms: int) -> None:
        """Say once that it runs; an inventory says it after a broken stream, and a finish makes it needless."""
        self._started[key] = wall_ms

    def add(self, key: AttemptKey) -> None:
        """It has something (new) to report."""
        self._sent.pop(key, None)
        self._started.pop(key, None)
        self._fresh[key] = None

    def told(self, key: AttemptKey) -> bool:
        """Whether its report, as it is now, has left at least once."""
        return key in self._sent

    def settle(self, key: AttemptKey) -> None:
        """Its report is acknowledged or void."""
        self._fresh.pop(key, None)
        self._sent.pop(key, None)

    def rewind(self) -> None:
        """A new stream: everything goes again; starts are in the inventory."""
        self._fresh = dict.fromkeys((*self._sent, *self._fresh))
        self._sent.clear()
        self._started.clear()

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
        started, self._started = self._started, {}
        if not keys and not started:
            return []
        by_shard: dict[str, _Shard] = {}
        for key, wall_ms in started.items():
            if key in attempts:
                by_shard.setdefault(attempts[key].shard, _Shard()).started.append((key, wall_ms))
        for key in keys:
            by_shard.setdefault(attempts[key].shard, _Shard()).add(attempts[key])
        return [report for shard, sheet in by_shard.items() for report in sheet.reports(stream, shard, generation)]

    def __len__(self) -> int:
        return len(self._fresh) + len(self._sent)


class _Shard:
    """The reports of one shard while they are gathered."""

    def __init__(self) -> None:
        self.started: list[tuple[AttemptKey, int]] = []
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
        if started or finished or stopped:
            yield SendReports(stream, shard, generation, started, finished, (), stopped)
        if self._rejected:
            yield SendReports(stream, shard, generation, rejected=tuple(self._rejected))
