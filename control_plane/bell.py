"""A bell: loops sleep until somebody rings or a time is over, whichever comes first, on the injected clock.

Why not `asyncio.wait_for(event.wait(), ...)`: its time is the loop's, not the node's, and a node's clock may drift in the
simulator as it does in life.
"""

from __future__ import annotations

import asyncio

from baton.clock import Clock


class Bell:
    """One sleeper, any number of ringers. A ring while nobody sleeps is remembered once."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rung = asyncio.Event()

    def ring(self) -> None:
        """Wake the sleeper."""
        self._rung.set()

    async def wait(self, seconds: float) -> bool:
        """Sleep until rung, at most `seconds`; whether it was rung. The ring is used up."""
        if not self._rung.is_set() and seconds > 0:
            sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
            ringing = asyncio.ensure_future(self._rung.wait())
            try:
                await asyncio.wait((sleeping, ringing), return_when=asyncio.FIRST_COMPLETED)
            finally:
                sleeping.cancel()
                ringing.cancel()
        rung = self._rung.is_set()
        self._rung.clear()
        return rung
