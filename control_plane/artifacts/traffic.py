"""What moved through one replica's gateway, and what was swept: counted for /metrics, by kind and never by run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from baton.clock import Clock
from baton.telemetry import COUNTER, HISTOGRAM, Family, Histogram

UP, DOWN = "up", "down"
"""To the store, and from it: as agents say it."""

DAMAGED, TOO_LARGE, TAKEN, STALLED, BUSY = "damaged", "too_large", "name_taken", "stalled", "busy"
STORE_DOWN, STORE_FULL, STORE_REFUSED = "store_down", "store_full", "store_refused"
KINDS = (DAMAGED, TOO_LARGE, TAKEN, STALLED, BUSY, STORE_DOWN, STORE_FULL, STORE_REFUSED)
"""What a failure is of: the first three are the caller's, the next two of the moment, the rest an operator's."""

SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Bounds: a small file from a disk takes milliseconds, a gigabyte over a slow link a quarter of an hour."""


@dataclass(slots=True)
class Traffic:
    """Counts since the replica's start. Bytes are content's as it lies in the store, so compressed."""

    bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys((UP, DOWN), 0))
    failures: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    seconds: dict[str, Histogram] = field(default_factory=lambda: {way: Histogram(SECONDS) for way in (UP, DOWN)})
    swept: int = 0
    """Objects that the sweeper deleted."""
    sweeps_failed: int = 0

    def failed(self, kind: str) -> None:
        """Something was not done; `kind` is one of KINDS."""
        self.failures[kind] += 1

    @contextmanager
    def timed(self, way: str, clock: Clock) -> Iterator[None]:
        """How long a transfer takes, however it ends."""
        began = clock.boot()
        try:
            yield
        finally:
            self.seconds[way].observe(clock.boot() - began)

    def families(self) -> list[Family]:
        """As /metrics tells it; docs/metrics.md says what each one means."""
        moved = Family(
            "baton_artifact_bytes_total", COUNTER, "Content that passed this replica, as it is stored.", ("way",)
        )
        took = Family(
            "baton_artifact_transfer_seconds", HISTOGRAM, "One artifact's way through this replica.", ("way",)
        )
        for way in (UP, DOWN):
            moved.add(self.bytes[way], way)
            took.add(self.seconds[way], way)
        failures = Family(
            "baton_artifact_failures_total", COUNTER, "What could not be moved, by what it is of.", ("kind",)
        )
        for kind in KINDS:
            failures.add(self.failures[kind], kind)
        return [
            moved,
            took,
            failures,
            Family("baton_artifact_objects_swept_total", COUNTER, "Objects that were garbage.").add(self.swept),
            Family("baton_artifact_sweeps_failed_total", COUNTER, "Rounds that did not get through.").add(
                self.sweeps_failed
            ),
        ]
