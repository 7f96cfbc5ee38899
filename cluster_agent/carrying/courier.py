"""Transfers that do not give up at once: tried again with growing pauses while the store is down, for a bounded time.

Theory: an outage of the store must cost neither the work that is done (its results wait here) nor hold a place for ever. PATIENCE
counts from the first failure since content came through; an upload begins anew with every try, so none of it counts. What no
patience mends is told at once: content that is not there, an agent that is refused, damage that comes again. The words say whose
fault it is; none of these is the application's.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Awaitable, Callable
from typing import BinaryIO, TypeVar

from baton.clock import Clock
from cluster_agent.carrying.port import (
    Carrier,
    CarrierCorrupt,
    CarrierDown,
    CarrierError,
    CarrierFull,
    CarrierLacks,
    CarrierRefused,
    Maker,
    NameUsed,
    NotConfigured,
    Wanted,
)
from cluster_agent.carrying.tally import Tally
from cluster_agent.core.model import ArtifactRef

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds of failures without progress until a transfer is given up. Smaller than an etcd failover or the restart of a replica, and
every such event would cost finished work; larger holds places on a cluster while others wait for work."""

FIRST_PAUSE, MAX_PAUSE = 0.2, 5.0
"""Between tries. A first one shorter than a replica's hand-over only adds load; a last one longer would sleep through a return."""

TRANSFERS = 4
"""At one time, each way: about 4 x 5 MiB. More would crowd the host's line; one would let a large file hold up all others."""

MAX_DAMAGED = 3
"""Times in a row that content may come damaged: once is a transmission, three times is what is stored."""

T = TypeVar("T")


class Undeliverable(Exception):
    """A transfer was given up; the text is a sentence for users. `setup`: not before an operator has changed the federation."""

    def __init__(self, message: str, *, setup: bool = False) -> None:
        super().__init__(message)
        self.setup = setup


class Missing(Undeliverable):
    """The store does not have the content, or has it damaged: no patience and no operator brings it back."""


class DiskFull(Undeliverable):
    """The agent's own disk has no room."""


class Courier:
    """Transfers of one agent. `patience`: seconds, see PATIENCE."""

    def __init__(self, carrier: Carrier, clock: Clock, tally: Tally, *, patience: float = PATIENCE) -> None:
        self._carrier, self._clock, self._tally, self._patience = carrier, clock, tally, patience
        self._up, self._down = asyncio.Semaphore(TRANSFERS), asyncio.Semaphore(TRANSFERS)

    async def store(self, maker: Maker, name: str, file: BinaryIO) -> ArtifactRef:
        """Have an open file stored. Raises Undeliverable, NameUsed, TooLarge, OSError of the file."""

        async def send() -> ArtifactRef:
            file.seek(0)
            return await self._carrier.put(maker, name, file)

        ref = await self._persist(self._up, send, f"artifact {name} could not be stored")
        self._tally.bytes_up += ref.size
        return ref

    async def fetch(self, wanted: Wanted, into: BinaryIO) -> None:
        """Have content written into an open, empty file. Raises Undeliverable, also when there is no room for it."""
        download = self._carrier.download(wanted, into)
        try:
            await self._persist(self._down, download.run, f"{wanted.words} could not be fetched")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            words = f"{wanted.words} could not be fetched: the agent's disk is full, at {into.name}"
            raise DiskFull(f"{words}: its operator has to free room there, or move --directory") from error
        self._tally.bytes_down += into.tell()

    async def _persist(self, room: asyncio.Semaphore, move: Callable[[], Awaitable[T]], failed: str) -> T:
        """One transfer with all its tries. Between them its place is others': an outage must not be waited for by turns."""
        pause, damaged = FIRST_PAUSE, 0
        until: float | None = None
        while True:
            try:
                async with room:
                    return await move()
            except NameUsed:
                raise
            except NotConfigured as error:
                raise Undeliverable(f"{failed}: {error}", setup=True) from error
            except CarrierLacks as error:
                raise Missing(f"{failed}: {error}") from error
            except CarrierRefused as error:
                raise Undeliverable(f"{failed}: {error}") from error
            except CarrierCorrupt as error:
                damaged = 1 if error.moved else damaged + 1
                if damaged >= MAX_DAMAGED:
                    words = f"{failed}: {error}, {damaged} times: the artifact store's content is damaged"
                    raise Missing(words) from error
                until, pause = self._after(error, until, pause)
            except (CarrierDown, CarrierFull) as error:
                until, pause = self._after(error, until, pause)
                log.warning("a transfer failed", extra={"what": failed, "error": str(error), "moved": error.moved})
                if self._clock.boot() + pause > until:
                    raise Undeliverable(_given_up(failed, error, self._patience)) from error
            except CarrierError as error:
                raise Undeliverable(f"{failed}: {error}") from error
            await self._clock.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE)

    def _after(self, error: CarrierError, until: float | None, pause: float) -> tuple[float, float]:
        """Until when, and how long before the next try: anew after progress."""
        if until is None or error.moved:
            return self._clock.boot() + self._patience, FIRST_PAUSE
        return until, pause


def _given_up(failed: str, error: CarrierError, patience: float) -> str:
    what = "artifact store full" if isinstance(error, CarrierFull) else "artifact store unreachable"
    return f"{failed}: {what} for {patience:g} s: {error}"
