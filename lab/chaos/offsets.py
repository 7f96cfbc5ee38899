"""Clusters whose boot clocks differ by hours, where the kernel allows it: a time namespace for each.

Theory. Two machines' boot clocks have nothing to do with each other (baton/clock.py), but the processes of a laboratory share a host
and so a clock, and a comparison that should never be made would never be noticed. In a time namespace CLOCK_BOOTTIME,
CLOCK_MONOTONIC, /proc/uptime and the start times in /proc are another machine's. The date cannot be set for one process by any
kernel: wall clocks are skewed in the simulator only.
"""

from __future__ import annotations

import subprocess
import sys

from baton.clock import SystemClock

PROBE_SECONDS = 10.0
"""For a shell to say the time."""

_SHIFTED = """\
import ctypes, os, sys
CLONE_NEWTIME = 0x80
if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWTIME):
    sys.exit("no time namespaces: " + os.strerror(ctypes.get_errno()))
with open("/proc/self/timens_offsets", "w") as offsets:
    offsets.write(f"monotonic {sys.argv[1]} 0\\nboottime {sys.argv[1]} 0\\n")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def shifted(seconds: int) -> list[str]:
    """The words before a command that make its boot clock go so many seconds ahead, from its exec on; none for 0."""
    return [sys.executable, "-I", "-S", "-c", _SHIFTED, str(seconds)] if seconds else []


def why_not() -> str:
    """Why this host cannot do it; empty if it can. (Before Linux 6.1 a time namespace begins with a process's children only.)"""
    command = [*shifted(5_000), "cat", "/proc/uptime"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["the probe failed"])[-1]
    ahead = float(done.stdout.split()[0]) - SystemClock().boot()
    return "" if ahead > 4_000 else "this kernel moves a process into its time namespace only after a fork"
