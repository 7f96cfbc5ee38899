"""How fast this machine is right now: the time of a fixed piece of interpreter work.

Figures of two machines, or of one machine on two days, are compared by their ratio to this.
"""

from __future__ import annotations

import json

from baton.clock import SystemClock

ROUNDS = 1_500_000
"""About 0.2 s here: long enough to average over the scheduler's slices, short enough for every run."""

TRIES = 3


def seconds() -> float:
    """The best of some tries: noise only adds."""
    return min(_once() for _ in range(TRIES))


def _once() -> float:
    clock = SystemClock()
    began = clock.boot()
    table: dict[int, str] = {}
    for number in range(ROUNDS):
        table[number & 1023] = str(number)
        if not number & 255:
            json.loads(json.dumps({"a": list(table.values())[:16]}))
    return clock.boot() - began
