"""The worlds an executor is tested in: a real guard with real processes, and the fake host. Same workloads, same words.

`fake --seconds S --exit N --result TEXT --output TEXT --ignore-term` is built into the fake; for the real guard it is a
small shell program on the workload's PATH.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from baton.clock import SystemClock
from cluster_agent.executors.base import AttemptKey, Executor, StartRequest
from cluster_agent.executors.fake import FakeExecutor, FakeHost
from cluster_agent.executors.process import ProcessExecutor

PROGRAM = """#!/bin/sh
seconds=0; code=0
while [ $# -gt 0 ]; do
  case "$1" in
    --seconds) seconds=$2; shift 2;;
    --exit) code=$2; shift 2;;
    --result) printf %s "$2" > "$BATON_RESULT"; shift 2;;
    --output) printf %s "$2"; shift 2;;
    --ignore-term) trap '' TERM; shift;;
    *) exit 64;;
  esac
done
sleep "$seconds"
exit "$code"
"""


class ExecutorWorld(Protocol):
    """A host for workloads, and the means to hurt it."""

    clock: SystemClock

    def executor(self) -> Executor:
        """A new agent's end."""
        ...

    def kill_guard(self) -> None:
        """SIGKILL of the guard."""
        ...

    def freeze_guard(self) -> None:
        """SIGSTOP of the guard."""
        ...

    def thaw_guard(self) -> None:
        """SIGCONT of the guard."""
        ...

    def request(self, key: AttemptKey, *words: str, generation: int = 1, **more: object) -> StartRequest:
        """A start of the program `fake` with these words."""
        ...

    async def close(self) -> None:
        """Leave nothing behind."""
        ...


class ProcessWorld:
    """A real guard on a directory of its own; `flags` go to it."""

    def __init__(self, directory: Path, flags: Sequence[str] = ()) -> None:
        self.clock = SystemClock()
        self.directory = directory / "executor"
        self._flags = tuple(flags)
        self._made: list[ProcessExecutor] = []
        programs = directory / "bin"
        programs.mkdir()
        (programs / "fake").write_text(PROGRAM)
        (programs / "fake").chmod(0o755)
        self.path = f"{programs}:/usr/bin:/bin"

    def executor(self) -> ProcessExecutor:
        argv = [sys.executable, "-S", "-m", "cluster_agent.guard", *self._flags]
        made = self.adapter(argv)
        self._made.append(made)
        return made

    def adapter(self, guard_argv: Sequence[str]) -> ProcessExecutor:
        """One end, not connected yet."""
        return ProcessExecutor(self.directory, self.clock, guard_argv=guard_argv)

    @property
    def guard_pid(self) -> int:
        return next(made.guard_pid for made in reversed(self._made) if made.guard_pid)

    def kill_guard(self) -> None:
        os.kill(self.guard_pid, signal.SIGKILL)

    def freeze_guard(self) -> None:
        os.kill(self.guard_pid, signal.SIGSTOP)

    def thaw_guard(self) -> None:
        os.kill(self.guard_pid, signal.SIGCONT)

    def request(self, key: AttemptKey, *words: str, generation: int = 1, **more: object) -> StartRequest:
        return StartRequest(key, generation, ("fake", *words), {"PATH": self.path}, **more)  # type: ignore[arg-type]

    async def close(self) -> None:
        for made in self._made:
            await made.close()
        await end_guards({made.guard_pid for made in self._made} - {0}, self.clock)


async def end_guards(pids: set[int], clock: SystemClock) -> None:
    """Let guards end in order (they delete their control groups), and by force those that do not."""
    give_up = clock.boot() + 10.0
    for number in (signal.SIGCONT, signal.SIGTERM):
        _signal(pids, number)
    while left := {pid for pid in pids if _is_guard(pid)}:
        if clock.boot() > give_up:
            _signal(left, signal.SIGKILL)
        await clock.sleep(0.01)


def guards_under(directory: Path) -> set[int]:
    """Guards whose own directory lies in `directory`, which must be one test's alone."""
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            place = Path(os.fsdecode(words[words.index(b"--dir") + 1]))
            if b"cluster_agent.guard" in words and place.is_relative_to(directory):
                found.add(pid)
    return found


def _is_guard(pid: int) -> bool:
    """Whether it lives and still is what it was."""
    try:
        return b"cluster_agent.guard" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in filter(_is_guard, pids):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


class FakeWorld:
    """The fake host under the machine's own clock."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.host = FakeHost(self.clock)
        self.kill_guard = self.host.kill_guard
        self.freeze_guard = self.host.freeze_guard
        self.thaw_guard = self.host.thaw_guard

    def executor(self) -> FakeExecutor:
        return FakeExecutor(self.host)

    def request(self, key: AttemptKey, *words: str, generation: int = 1, **more: object) -> StartRequest:
        return StartRequest(key, generation, ("fake", *words), {}, **more)  # type: ignore[arg-type]

    async def close(self) -> None:
        await self.host.close()
