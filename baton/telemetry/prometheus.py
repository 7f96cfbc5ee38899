"""Families of metrics as the text that Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from baton.telemetry import COUNTER, HISTOGRAM, Family, Histogram

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
"""Of `text`."""


class _Fixed:
    """A collector that has been asked already."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]:
        return [_prometheus(family) for family in self._families]


def text(families: Iterable[Family]) -> bytes:
    """What Prometheus scrapes, in CONTENT_TYPE."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(families))
    return generate_latest(registry)


def _prometheus(family: Family) -> CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily:
    if family.kind == HISTOGRAM:
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, value in family.samples:
            if isinstance(value, Histogram):
                histogram.add_metric(labels, value.buckets(), value.total)
        return histogram
    made: CounterMetricFamily | GaugeMetricFamily
    if family.kind == COUNTER:
        made = CounterMetricFamily(family.name, family.help, labels=family.labels)
    else:
        made = GaugeMetricFamily(family.name, family.help, labels=family.labels)
    for labels, value in family.samples:
        if not isinstance(value, Histogram):
            made.add_metric(labels, value)
    return made
