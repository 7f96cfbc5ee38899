"""Keeping a replica's lease alive, and knowing how long it surely lived (PROTOCOL O2).

Theory: a renewal proves only that the lease was alive at the server some time after it was *sent*; so the send time of
the last acknowledged one is the only honest start of "my lease is good until". And a renewal must say "this replica
works", not "this machine has power": it is sent only while the main loop has ticked lately, so a hung loop loses its
shards. Success is still not ownership; only a fenced write is.

`Renewal` is the pure state machine; `TaskLeaseKeeper` runs it on the store's own event loop (memory store, simulator);
`etcd.keeper.ThreadedLeaseKeeper` runs it in a thread with a channel of its own, so that a stalled loop cannot stall it.
"""

from __future__ import annotations

import asyncio
import math
from typing import Protocol

from baton.clock import Clock
from control_plane.store.base import Lease, Store, StoreError

BEATS_PER_TTL = 3
"""Renewals per TTL: two may fail before the lease is in danger. More would load the leader, fewer forgive less."""

RETRY_PART = 12
"""A failed renewal is tried again after ttl/12: four tries fit between two regular ones."""

NEVER = -math.inf
"""`last_ack_sent` before the first acknowledgement: any deadline counted from it has passed."""


class LeaseKeeper(Protocol):
    """Renews one lease in the background. Not restartable: one keeper per lease."""

    def start(self, lease: Lease) -> None:
        """Begin renewing, at once. Call it once, from the main loop."""
        ...

    def tick(self) -> None:
        """The main loop works; renewals go on for `max_tick_age` seconds from here."""
        ...

    @property
    def last_ack_sent(self) -> float:
        """Boot clock at the sending of the last acknowledged renewal; `NEVER` before the first."""
        ...

    @property
    def lost(self) -> bool:
        """The server said that the lease is gone. Stays true."""
        ...

    async def stop(self) -> None:
        """Stop renewing. The lease is left to expire, or to be revoked by the caller."""
        ...


class Renewal:
    """When to renew one lease, and what its answers mean. Pure: `now` (boot clock, seconds) is an argument."""

    def __init__(self, lease: Lease, now: float, max_tick_age: float) -> None:
        self.lease_id = lease.id
        self.last_ack_sent = NEVER
        self.lost = False
        self._period = lease.ttl / BEATS_PER_TTL
        self._retry = lease.ttl / RETRY_PART
        self._max_tick_age = max_tick_age
        self._last_tick = now
        self._due = now

    @property
    def timeout(self) -> float:
        """Seconds that one renewal may take."""
        return self._period

    def tick(self, now: float) -> None:
        """The main loop works."""
        self._last_tick = now

    def wait(self, now: float) -> float:
        """Seconds until the next look; 0 means: renew now. While the main loop is silent it is looked at often, so
        that renewals go on as soon as it is back."""
        if now < self._due:
            return self._due - now
        if now - self._last_tick > self._max_tick_age:
            return self._retry
        return 0.0

    def answered(self, sent: float, ttl: float) -> None:
        """The server answered the renewal that was sent at `sent`; `ttl` <= 0 means that the lease is gone."""
        if ttl <= 0:
            self.lost = True
            return
        self.last_ack_sent = max(self.last_ack_sent, sent)
        self._due = sent + self._period

    def failed(self, now: float) -> None:
        """No answer."""
        self._due = now + self._retry


class TaskLeaseKeeper:
    """A `LeaseKeeper` as a task on the running loop, through `store`. For stores that live on the same loop."""

    def __init__(self, store: Store, clock: Clock, *, max_tick_age: float = 2.0) -> None:
        self._store = store
        self._clock = clock
        self._max_tick_age = max_tick_age
        self._renewal: Renewal | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self, lease: Lease) -> None:
        """See `LeaseKeeper.start`."""
        if self._renewal is not None:
            raise RuntimeError("a keeper keeps one lease")
        self._renewal = Renewal(lease, self._clock.boot(), self._max_tick_age)
        self._task = asyncio.get_running_loop().create_task(self._run(self._renewal))

    def tick(self) -> None:
        """See `LeaseKeeper.tick`."""
        if self._renewal is not None:
            self._renewal.tick(self._clock.boot())

    @property
    def last_ack_sent(self) -> float:
        """See `LeaseKeeper.last_ack_sent`."""
        return self._renewal.last_ack_sent if self._renewal else NEVER

    @property
    def lost(self) -> bool:
        """See `LeaseKeeper.lost`."""
        return self._renewal is not None and self._renewal.lost

    async def stop(self) -> None:
        """See `LeaseKeeper.stop`."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))

    async def _run(self, renewal: Renewal) -> None:
        while not renewal.lost:
            wait = renewal.wait(self._clock.boot())
            if wait > 0:
                await self._clock.sleep(wait)
                continue
            sent = self._clock.boot()
            try:
                ttl = await self._store.lease_keepalive(renewal.lease_id, timeout=renewal.timeout)
            except StoreError:
                renewal.failed(self._clock.boot())
            else:
                renewal.answered(sent, ttl)
