"""Deadlines on this node's own clock: every wait for the outside has one, and the simulator sees all of them."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TypeVar

from baton.clock import Clock
from baton.time_limits import time_limit

T = TypeVar("T")


async def within(clock: Clock, seconds: float, work: Awaitable[T]) -> T:
    """The result of `work` if it comes in time. Raises TimeoutError: what `work` did by then is unknown (it is
    cancelled). Runs in the caller's task: most work ends at once, and a task each would cost more than it."""
    async with time_limit(None) as limit:
        alarm = clock.later(seconds, limit.expire)
        try:
            return await work
        finally:
            alarm.cancel()
