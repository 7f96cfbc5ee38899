"""Deadlines on this node's own clock: every wait for the outside has one, and the simulator sees all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from baton.clock import Clock

T = TypeVar("T")


async def within(clock: Clock, seconds: float, work: Awaitable[T]) -> T:
    """The result of `work` if it comes in time. Raises TimeoutError: what `work` did by then is unknown (it is
    cancelled). Runs in the caller's task: most work ends at once, and a task each would cost more than it."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as limit:
        alarm = clock.later(seconds, lambda: limit.reschedule(loop.time()))
        try:
            return await work
        finally:
            alarm.cancel()
