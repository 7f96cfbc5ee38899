"""Deadlines on this node's own clock: every wait for the outside has one, and the simulator sees all of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from baton.clock import Clock

T = TypeVar("T")


async def within(clock: Clock, seconds: float, work: Awaitable[T]) -> T:
    """The result of `work` if it comes in time. Raises TimeoutError: what `work` did by then is unknown (it is
    cancelled)."""
    task = asyncio.ensure_future(work)
    alarm = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait((task, alarm), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise TimeoutError(f"no answer within {seconds} s")
    finally:
        for each in (task, alarm):
            each.cancel()
        await asyncio.gather(task, alarm, return_exceptions=True)
