"""Limits the kernel does not hold for us: disk use of a private directory, and memory and processes where no cgroup
counts.

Looking costs time that the lease timers need, so a directory is walked in small steps over many ticks, and /proc is
read once a tick for all workloads together, only while some workload needs it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from cluster_agent.executors.base import Limits
from cluster_agent.guard import proctree

STEP_ENTRIES = 256
"""Directory entries looked at per workload and tick: about 1 ms. Smaller finds overuse later, larger delays the
timers."""


class DiskMeter:
    """Bytes under some directories together, measured by an endless walk in steps."""

    def __init__(self, *directories: Path) -> None:
        self._directories = [str(directory) for directory in directories]
        self._walk = self._steps()
        self.used_bytes = 0
        """At the end of the last complete walk, or what the present one has found already, if that is more."""

    def step(self) -> int:
        """Look at a few more entries; returns `used_bytes`."""
        found, complete = next(self._walk)
        self.used_bytes = found if complete else max(self.used_bytes, found)
        return self.used_bytes

    def _steps(self) -> Iterator[tuple[int, bool]]:
        while True:
            found, seen = 0, 0
            queue = list(self._directories)
            while queue:
                try:
                    entries = os.scandir(queue.pop())
                except OSError:  # deleted or closed to us while we walk
                    continue
                with entries:
                    for entry in entries:
                        with suppress(OSError):
                            found += entry.stat(follow_symlinks=False).st_blocks * 512
                            if entry.is_dir(follow_symlinks=False):
                                queue.append(entry.path)
                        seen += 1
                        if seen % STEP_ENTRIES == 0:
                            yield found, False
            yield found, True


def tree_breach(limits: Limits, keeper: int, processes: dict[int, proctree.Process]) -> str:
    """Which limit the descendants of `keeper` are over, in words; empty when none."""
    below = proctree.descendants(keeper, processes)
    if limits.processes and len(below) > limits.processes:
        return f"it has {len(below)} processes, over its limit of {limits.processes} processes"
    resident = sum(process.resident_bytes for process in below)
    if limits.memory_bytes and resident > limits.memory_bytes:
        return f"it uses {resident} bytes of memory, over its limit of {limits.memory_bytes} bytes"
    return ""
