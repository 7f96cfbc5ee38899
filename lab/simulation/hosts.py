"""Hosts of simulated clusters: a guard and its workloads on a node of their own, which a suspension stops as a whole.

Theory. A suspended machine runs nothing, workloads included, while the clocks that count suspend (PROTOCOL F5, O2) go on; timers
do not, so each is late by the time asleep. What is read first after waking is therefore the clock and never a timer (G1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cluster_agent.executors.base import StartRequest
from cluster_agent.executors.fake_host import FakeHost
from cluster_agent.executors.fake_workload import Script
from lab.simulation.nodes import Node
from lab.virtual_time import VirtualClock


class SimHost(FakeHost):
    """A FakeHost whose timers are the host's own, whoever asks it something."""

    def __init__(self, node: Node, clock: VirtualClock, anything: Callable[[StartRequest], Script]) -> None:
        super().__init__(clock, true_time=lambda: asyncio.get_event_loop().time(), anything=anything)
        self._node = node
        self._asleep_since: float | None = None

    @property
    def frozen(self) -> bool:
        """The guard does not run."""
        return self._frozen

    @property
    def guarded(self) -> bool:
        """A guard is there, frozen or not, on a machine that is awake."""
        return self._guard_alive and not self.suspended

    @property
    def suspended(self) -> bool:
        """Nothing runs."""
        return self._asleep_since is not None

    def suspend(self) -> None:
        """The machine sleeps."""
        if self._asleep_since is None:
            self._pass_time()
            self._asleep_since = self.clock.boot()
            self._node.suspend()

    def resume(self) -> None:
        """It wakes: workloads go on where they were, and the guard looks at the clock."""
        if self._asleep_since is None:
            return
        slept, self._asleep_since = self.clock.boot() - self._asleep_since, None
        for process in [*self._live.values(), *self._orphans]:
            process.ends_at += slept
        self._node.thaw()
        self._step()

    def _step(self) -> None:
        if self._asleep_since is None:
            super()._step()

    def _pass_time(self) -> None:
        if self._asleep_since is None:
            super()._pass_time()

    def _arm(self) -> None:
        self._node.run(super()._arm)
