"""CPU seconds and peak memory by role, as the kernel counts them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")

Roles = Mapping[str, list[int]]


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, with that of children it has waited for; 0 when it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    rest = text[text.rindex(")") + 2 :].split()
    return sum(int(field) for field in rest[11:15]) / TICK


def peak_bytes(pid: int) -> int:
    """The most memory a process held at once (VmHWM); 0 when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def cpu_by_role(roles: Roles) -> dict[str, float]:
    """CPU seconds so far."""
    return {role: sum(cpu_seconds(pid) for pid in pids) for role, pids in roles.items()}


def peak_by_role(roles: Roles) -> dict[str, int]:
    """Peak memory so far: the sum of the processes' own peaks, which is no less than the peak of their sum."""
    return {role: sum(peak_bytes(pid) for pid in pids) for role, pids in roles.items()}


def spent(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds between two looks. Workers that came between count whole, and one that left between counts with its parent."""
    return {role: round(max(0.0, seconds - before.get(role, 0.0)), 3) for role, seconds in after.items()}
