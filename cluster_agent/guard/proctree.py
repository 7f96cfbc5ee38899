"""Process trees as /proc tells them: who descends from a keeper, whether a recorded process is still there.

A keeper adopts the orphans of its workload (as init of a PID namespace, or as a subreaper), so its descendants are the
whole workload, double forks and setsid included. A pid alone is no identity; (pid, start ticks) is, within one boot.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One line of /proc/[pid]/stat."""

    pid: int
    ppid: int
    state: str
    start_ticks: int
    resident_bytes: int

    @property
    def alive(self) -> bool:
        """Not a zombie: kill(pid, 0) would lie here."""
        return self.state not in "ZX"


def read(pid: int) -> Process | None:
    """The process, or None when there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            text = stat.read().decode("ascii", "replace")
    except OSError:
        return None
    rest = text[text.rindex(")") + 2 :].split()
    return Process(pid, int(rest[1]), rest[0], int(rest[19]), int(rest[21]) * PAGE)


def everything() -> dict[int, Process]:
    """All processes that /proc shows, by pid."""
    found: dict[int, Process] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            process = read(int(name))
            if process is not None:
                found[process.pid] = process
    return found


def descendants(root: int, processes: dict[int, Process]) -> list[Process]:
    """Living processes below `root`, without it."""
    children: dict[int, list[Process]] = {}
    for process in processes.values():
        children.setdefault(process.ppid, []).append(process)
    found: list[Process] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(process for process in below if process.alive)
        queue.extend(process.pid for process in below)
    return found


def alive(pid: int, start_ticks: int) -> bool:
    """Whether the very process that was recorded still runs."""
    process = read(pid)
    return process is not None and process.alive and process.start_ticks == start_ticks
