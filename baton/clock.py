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
from collections.abc import Callable
from typing import Protocol


class Alarm(Protocol):
    """Something that will happen, and can be called off."""

    def cancel(self) -> object:
        """It does not happen any more; nothing, if it has."""
        ...


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

    def later(self, seconds: float, action: Callable[[], object]) -> Alarm:
        """Call `action` on the running loop after `seconds` of this node's time. Costs no task: for time-outs, which are
        set thousands of times and hardly ever come. `action` must be quick and must not raise."""
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

    def later(self, seconds: float, action: Callable[[], object]) -> Alarm:
        return asyncio.get_running_loop().call_later(seconds, action)


class SystemEntropy:
    """The kernel's random source."""

    def token(self, size: int = 16) -> str:
        return os.urandom(size).hex()

    def uniform(self) -> float:
        return int.from_bytes(os.urandom(7), "big") / (1 << 56)
