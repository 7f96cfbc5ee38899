"""Metrics for Prometheus and spans for OpenTelemetry: the only importer of both libraries.

Theory. Neither library is on anybody's hot path, nor in a process that was not asked for it: metrics are plain values (`Family`)
which a process makes when it is scraped, and only `telemetry.prometheus` turns them into text; spans are made from a finished
run's record, and only `telemetry.otlp` gives them to the exporter. Both are imported by the first who wants them.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"


class Histogram:
    """Counts of values by upper bounds. Observing is a bisection and two additions; nothing is allocated."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` rise; above the last one is one more bucket."""
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, values up to it), the last is +Inf."""
        found: list[tuple[str, float]] = []
        sum_ = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            sum_ += count
            found.append(("+Inf" if bound == float("inf") else repr(float(bound)), sum_))
        return found


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: every sample has a value for each of `labels`. Counters' names end in _total."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()
    samples: list[tuple[tuple[str, ...], float | Histogram]] = field(default_factory=list)

    def add(self, value: float | Histogram, *labels: str) -> Family:
        """One more sample; returns itself."""
        self.samples.append((labels, value))
        return self


def exposition(families: Iterable[Family]) -> tuple[bytes, str]:
    """What Prometheus scrapes, and its content type. In a thread: the first call loads the library."""
    from baton.telemetry import prometheus  # noqa: PLC0415 - see the module

    return prometheus.text(families), prometheus.CONTENT_TYPE
