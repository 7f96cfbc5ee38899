"""Without PID namespaces: processes whose keeper somebody killed become the guard's children; they are found and killed.

`ours` are the children of the guard that are no strays: keepers and the janitor.
"""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress

from cluster_agent.guard import proctree

STRAY_ROUNDS = 200
"""Rounds of 5 ms in which processes of a murdered keeper are hunted before its attempt is reported anyway."""


def hunt(ours: set[int]) -> None:
    """Kill all strays."""
    for _ in range(STRAY_ROUNDS):
        processes = proctree.everything()
        kept = {p.pid for root in ours for p in proctree.descendants(root, processes)} | ours
        strays = [p for p in proctree.descendants(os.getpid(), processes) if p.pid not in kept]
        if not strays:
            return
        for stray in strays:
            with suppress(ProcessLookupError):
                os.kill(stray.pid, signal.SIGKILL)
        select.select([], [], [], 0.005)
        reap(ours)


def reap(ours: set[int]) -> None:
    """Collect dead children that are not ours."""
    with suppress(ChildProcessError):
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if dead.si_pid in ours:
                return
            os.waitpid(dead.si_pid, os.WNOHANG)
