"""The fake executor: the Executor contract in memory, for the simulator and for tests of what uses an executor.

A `FakeExecutor` is one agent's connection to a `FakeHost` (fake_host.py), the machine that outlives the agent.
Workloads are scripts in argv: `fake --seconds 1.5 --exit 0 --result text --output text --ignore-term`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial

from cluster_agent.executors.base import (
    AttemptKey,
    CensusEntry,
    ExecutorEvent,
    Features,
    GuardLost,
    StartRequest,
)
from cluster_agent.executors.fake_host import FakeHost
from cluster_agent.executors.fake_workload import Interval, Script

__all__ = ["FakeExecutor", "FakeHost", "Interval", "Script"]


class FakeExecutor:
    """One agent's connection to a FakeHost; the Executor port (executors/base.py)."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._joined = False
        self._told_lost = False
        self._unread: list[ExecutorEvent] = []
        self._changed = asyncio.Event()
        self._ticked_at = 0.0

    async def connect(self) -> Sequence[CensusEntry]:
        """See Executor. Raises TimeoutError while the guard is frozen."""
        self._unread = []
        self._changed = asyncio.Event()
        census, lost = self._host.join(self)
        self._joined = True
        if lost and not self._told_lost:
            self.hear(GuardLost(killed=self._host.features.orphan_killer))
        self._told_lost = False
        return census

    def features(self) -> Features:
        """See Executor."""
        return self._host.features

    def ticked_at(self) -> float:
        """See Executor."""
        if self._joined and self._host.responsive:
            self._ticked_at = self._host.ticked_at()
        return self._ticked_at

    async def configure(self, fence_seconds: float, kill_seconds: float) -> None:
        """See Executor."""
        self._ask(lambda _now: self._host.configure(fence_seconds, kill_seconds))

    async def renew(self, generation: int, sent_boot: float) -> None:
        """See Executor."""
        self._ask(lambda now: self._host.renew(generation, sent_boot, now))

    async def adopt(self, keys: Sequence[AttemptKey], generation: int) -> None:
        """See Executor."""
        self._ask(lambda _now: self._host.adopt(keys, generation))

    async def start(self, requests: Sequence[StartRequest]) -> None:
        """See Executor."""
        for request in requests:
            self._ask(partial(self._host.start, request))

    async def widen(self, key: AttemptKey, slots: int) -> None:  # noqa: ARG002 - nothing waits here: all started at once
        """See Executor."""
        self._require()

    async def stop(self, keys: Sequence[AttemptKey], *, grace_seconds: float) -> None:
        """See Executor."""
        self._ask(lambda now: self._host.stop(keys, grace_seconds, now))

    async def forget(self, keys: Sequence[AttemptKey]) -> None:
        """See Executor."""
        self._ask(lambda _now: self._host.forget(keys))

    async def kill_all(self) -> None:
        """See Executor."""
        self._ask(self._host.kill_all)

    async def kill_if_silent(self) -> None:
        """See Executor."""
        if not self._host.responsive:
            self._host.kill_guard()

    async def read_log(self, key: AttemptKey, offset: int, limit: int) -> tuple[bytes, bool]:
        """See Executor. Raises TimeoutError while the guard is frozen."""
        self._require()
        if not self._host.responsive:
            raise TimeoutError("the guard does not answer")
        return self._host.read_log(key, offset, limit)

    async def events(self) -> AsyncIterator[Sequence[ExecutorEvent]]:
        """See Executor. Ends when the connection has ended and everything was told."""
        while True:
            while not self._unread:
                if not self._joined:
                    return
                self._changed.clear()
                await self._changed.wait()
            batch, self._unread = self._unread, []
            yield batch

    async def close(self) -> None:
        """See Executor."""
        self.leave()

    def leave(self) -> None:
        """`close` without waiting: an agent that crashes leaves the same way."""
        self._joined = False
        self._host.leave(self)
        self._changed.set()

    def hear(self, event: ExecutorEvent) -> None:
        """The guard tells something."""
        self._unread.append(event)
        self._changed.set()

    def guard_died(self, killed: bool) -> None:
        """The connection broke because the guard is dead."""
        self._joined, self._told_lost = False, True
        self.hear(GuardLost(killed))

    def taken_over(self) -> None:
        """Another connection took the guard."""
        self._joined = False
        self._changed.set()

    def _require(self) -> None:
        if not self._joined:
            raise ConnectionError("not connected to a guard")

    def _ask(self, request: Callable[[float], None]) -> None:
        self._require()
        self._host.ask(request)
