"""A guard with real processes under test: its directory, its agents, and a census of what its workloads became.

Every test that uses the fixture `bench` (conftest.py) ends with that census: no process may be left that carries the
test's directory in its environment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from baton.clock import SystemClock
from baton.time_limits import time_limit
from cluster_agent.executors.base import AttemptKey, CensusEntry, ExecutorEvent, Exited, StartRequest
from cluster_agent.executors.process import ProcessExecutor
from tests.contract.executor_worlds import end_guards

PATH = "/usr/local/bin:/usr/bin:/bin"


GUARD = (sys.executable, "-S", "-m", "cluster_agent.guard")


def processes_with(mark: str) -> set[int]:
    """Living processes (no zombies) that carry `mark` in their environment: everything a workload of the test
    became."""
    found = set()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            environment = Path(f"/proc/{name}/environ").read_bytes()
            state = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[0]
            if mark.encode() in environment and state not in "ZX":
                found.add(int(name))
    return found


async def eventually(condition: Callable[[], bool], seconds: float = 15.0) -> None:
    """Wait until it holds."""
    async with time_limit(seconds):
        clock = SystemClock()
        while not condition():
            await clock.sleep(0.02)


class Bench:
    """A directory, its guards and the agents of one test."""

    def __init__(self, directory: Path) -> None:
        self.clock = SystemClock()
        self.directory = directory
        self.executors: list[ProcessExecutor] = []
        self.guards: set[int] = set()
        self.told: list[ExecutorEvent] = []
        self.census: dict[AttemptKey, CensusEntry] = {}
        self._tasks = 0

    async def agent(
        self, *flags: str, fence: float = 30.0, kill: float = 4.0, guard: Sequence[str] = GUARD
    ) -> ProcessExecutor:
        """A connected executor with lease 1 renewed now."""
        executor = ProcessExecutor(self.directory, self.clock, guard_argv=[*guard, *flags])
        self.executors.append(executor)
        self.census = {entry.key: entry for entry in await executor.connect()}
        self.guards.add(executor.guard_pid)
        await executor.configure(fence, kill)
        await executor.renew(1, self.clock.boot())
        return executor

    def key(self) -> AttemptKey:
        """A fresh one."""
        self._tasks += 1
        return AttemptKey("0193a1b2c3d4", self._tasks, 1, "beef")

    def request(self, *argv: str, **more: object) -> StartRequest:
        """A start of `argv` in generation 1, marked for the census."""
        return StartRequest(self.key(), 1, argv, {"PATH": PATH, **self.mark}, **more)  # type: ignore[arg-type]

    @property
    def mark(self) -> dict[str, str]:
        """Environment that `living` looks for."""
        return {"BATON_TEST": f"{self.directory}"}

    def living(self) -> set[int]:
        """Processes of this test's workloads."""
        return processes_with(f"BATON_TEST={self.directory}")

    async def until(self, executor: ProcessExecutor, kind: type, key: AttemptKey) -> ExecutorEvent:
        """The first event of this kind for this key."""
        async with time_limit(25):
            events = executor.events()
            while True:
                for event in self.told:
                    if isinstance(event, kind) and getattr(event, "key", None) == key:
                        return event
                self.told.extend(await anext(events))

    async def exit_of(self, executor: ProcessExecutor, key: AttemptKey) -> Exited:
        """How it ended."""
        event = await self.until(executor, Exited, key)
        assert isinstance(event, Exited)
        return event

    async def run(self, executor: ProcessExecutor, *argv: str, **more: object) -> tuple[Exited, bytes]:
        """Run to the end; its exit and its output."""
        request = self.request(*argv, **more)
        await executor.start([request])
        exited = await self.exit_of(executor, request.key)
        return exited, (await executor.read_log(request.key, 0, 1 << 20))[0]

    async def close(self) -> None:
        """End the guards; nothing may be left then."""
        for executor in self.executors:
            await executor.close()
        await end_guards(self.guards, self.clock)
        await eventually(lambda: not self.living())
