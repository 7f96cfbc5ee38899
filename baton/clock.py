"""The only door to time and chance. Everything else gets a `Clock` and an `Entropy` from its composition root.

Two kinds of time exist and are never mixed:

* `boot()`  seconds since some fixed point, counting suspend (CLOCK_BOOTTIME). All leases, fences and time-outs are
  measured on it (PROTOCOL O2, F5). Two machines' boot clocks are never compared.
* `wall()`  seconds since the Unix epoch (UTC). Only run deadlines (PROTOCOL D1) and information for people use it.

The simulator hands every node a `Clock` of its own, with its own offset and rate; tests hand one that they move.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Protocol


class Clock(Protocol):
    """A node's view of time. Units: seconds (float)."""

    def boot(self) -> float:
        """Seconds on a clock that never steps and counts suspend."""
        ...

    def wall(self) -> float:
        """Seconds since the Unix epoch, UTC; may step."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Suspend the calling task for `seconds` of this node's time."""
        ...


class Entropy(Protocol):
    """A source of unpredictable bytes (nonces, uids). Seeded in simulation."""

    def token(self, size: int = 16) -> str:
        """`size` random bytes as lower-case hex."""
        ...

    def uniform(self) -> float:
        """A float in [0, 1)."""
        ...


class SystemClock:
    """The machine's clocks."""

    def boot(self) -> float:
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall(self) -> float:
        return time.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class SystemEntropy:
    """The kernel's random source."""

    def token(self, size: int = 16) -> str:
        return os.urandom(size).hex()

    def uniform(self) -> float:
        return int.from_bytes(os.urandom(7), "big") / (1 << 56)
