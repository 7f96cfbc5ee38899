"""The recorder: watches etcd past every proxy, from its first revision on, and makes the history that the checkers read.

Theory. The journal is the product's only truth, so whoever sees every revision of it knows what was decided, by whom, and in which
order. The time of a decision is that of its stamp: all processes here have one date (offsets.py), and a decision is taken after
what it decides on has happened and before its effects begin. The time at which the recorder hears of it would be too late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

from baton.clock import SystemClock
from control_plane.store import keys
from control_plane.store.base import Compacted, StoreError
from control_plane.store.etcd import EtcdStore
from lab.checking.history import Owned, Written
from lab.simulation.etcd import Revision
from lab.simulation.record import read_journal, read_owners

READ_SECONDS = 5.0
"""For one read of etcd; an election takes one or two."""

AGAIN = 0.2
"""Seconds until a watch that failed is tried again."""


class Recorder:
    """See the module. `run` until cancelled."""

    def __init__(self, endpoints: Sequence[str], zero: float) -> None:
        """`zero`: the boot clock at the beginning of the history."""
        self._clock = SystemClock()
        self._store = EtcdStore(list(endpoints), clock=self._clock)
        self._zero = zero
        self._wall_zero = self._clock.wall() - (self._clock.boot() - zero)
        self.revisions: list[Revision] = []
        self._heard = 0

    async def run(self) -> None:
        """Follow. Raises `Compacted` if history was forgotten before it was heard: then there is nothing to judge."""
        while True:
            after = self.revisions[-1].number if self.revisions else 0
            try:
                # The adapter's watch is a generator, to be closed; the port only promises an iterator.
                watch = cast("Any", self._store.watch("", from_revision=after + 1))
                async with aclosing(watch) as batches:
                    async for batch in batches:
                        now = self._clock.boot() - self._zero
                        for number, events in groupby(batch.events, key=lambda event: event.kv.mod_revision):
                            self.revisions.append(Revision(now, number, tuple(events)))
                        self._heard = batch.revision
            except Compacted:
                raise
            except StoreError:
                await asyncio.sleep(AGAIN)

    async def caught_up(self, seconds: float) -> bool:
        """Wait until everything that is in the store by now was heard; False if that takes longer."""
        end, wanted = self._clock.boot() + seconds, 0
        while self._clock.boot() < end:
            try:
                if not wanted:
                    _, wanted = await self._store.get(keys.INCARNATION, timeout=READ_SECONDS)
            except StoreError:
                pass  # an election, perhaps: again
            if wanted and self._heard >= wanted:
                return True
            await asyncio.sleep(AGAIN)
        return False

    async def close(self) -> None:
        """Leave the store."""
        await self._store.close()

    def skew(self) -> float:
        """Seconds by which the date of this host was set since the beginning: times of decisions are wrong by so much."""
        return abs(self._clock.wall() - self._wall_zero - (self._clock.boot() - self._zero))

    def journal(self) -> list[Written]:
        """Every event, in the order of commits."""
        return [replace(each, at=each.stamp.wall - self._wall_zero) for each in read_journal(self.revisions)]

    def owners(self) -> list[Owned]:
        """Every change of an owner key."""
        return read_owners(self.revisions)
