"""What a new guard must settle before it serves: the directory, and the work of a guard that died (PROTOCOL F4, G4).

An earlier guard's keepers are killed by the kernel, or kill their workloads themselves; either way it takes a moment.
Nothing is called LOST before it is *seen* dead: each recorded keeper is gone, and the lock that every keeper holds is
free.
"""

from __future__ import annotations

import select
from collections.abc import Callable
from pathlib import Path

from cluster_agent.executors.base import AttemptKey, Cause, Exited
from cluster_agent.guard import host, proctree
from cluster_agent.guard.ledger import Ledger
from cluster_agent.guard.protocol import exit_to_wire


def bury_predecessor(ledger: Ledger, keepers_gone: Callable[[], bool], timeout_seconds: float) -> list[str]:
    """Wait until everything an earlier guard ran is dead, then record it as LOST (F4). Returns the keys.

    Raises TimeoutError when something is still alive: then nothing may be said about it, and nothing served.
    """
    deadline = host.boot() + timeout_seconds
    while ledger.same_boot:
        alive = [
            f"{key} (keeper {record.keeper_pid})"
            for key, record in ledger.started_keys.items()
            if record.keeper_pid and proctree.alive(record.keeper_pid, record.keeper_ticks)
        ]
        if not alive and keepers_gone():
            break
        if host.boot() > deadline:
            raise TimeoutError(f"work of an earlier guard is still alive: {', '.join(alive) or 'unknown keepers'}")
        select.select([], [], [], 0.01)
    lost = list(ledger.started_keys)
    words = "the guard died with it" if ledger.same_boot else "the host was booted again"
    for key in lost:
        started = ledger.started_keys[key].wall
        exited = Exited(AttemptKey.parse(key), Cause.LOST, None, None, started, host.wall(), message=words)
        ledger.exited(key, exit_to_wire(exited))
    return lost


def private_directory(path: Path) -> Path:
    """`path`, made if need be, readable by this user only. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path.resolve()
