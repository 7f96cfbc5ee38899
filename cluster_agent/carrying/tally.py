"""What was carried, for /metrics."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Tally:
    """Since the agent's start."""

    bytes_up: int = 0
    """Of content stored."""
    bytes_down: int = 0
    """Of content fetched."""
    cached: int = 0
    """Fetches that the cache answered."""
    failures_up: int = 0
    """Attempts whose files could not be stored."""
    failures_down: int = 0
    """Attempts whose files could not be fetched."""
