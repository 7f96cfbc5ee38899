"""A bell: loops sleep until somebody rings or a time is over, whichever comes first, on the injected clock.

Why not `asyncio.wait_for(event.wait(), ...)`: its time is the loop's, not the node's, and a node's clock may drift in the
simulator as it does in life. And it would be two tasks a wait; this is one timer.
"""

from __future__ import annotations

import asyncio
from functools import partial

from baton.clock import Clock


class Bell:
    """One sleeper, any number of ringers. A ring while nobody sleeps is remembered once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rung = False
        self._sleeper: asyncio.Future[None] | None = None

    def ring(self) -> None:
        """Wake the sleeper."""
        self._rung = True
        if self._sleeper is not None:
            _wake(self._sleeper)

    async def wait(self, seconds: float) -> bool:
        """Sleep until rung, at most `seconds`; whether it was rung. The ring is used up."""
        if not self._rung and seconds > 0:
            sleeper = self._sleeper = asyncio.get_running_loop().create_future()
            alarm = self._clock.later(seconds, partial(_wake, sleeper))
            try:
                await sleeper
            finally:
                alarm.cancel()
        rung, self._rung = self._rung, False
        return rung


def _wake(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)
