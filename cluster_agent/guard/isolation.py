"""How workloads are tied to the guard's life here: found by trying it at start (PROTOCOL G4).

From best to least: a PID namespace with its own /proc; one without; the same inside a user namespace (ordinary users);
nothing but subreapers (keeper.py). The trial is the promise itself: a child in the namespace starts a grandchild that
leaves its session, the child is killed, and the grandchild must be gone with it.
"""

from __future__ import annotations

import os
import select
import signal
from dataclasses import dataclass

from cluster_agent.guard import host

TRIAL_SECONDS = 2.0
"""The kernel needs milliseconds; a loaded host may need more. Too small: a good host is called a bad one."""


@dataclass(frozen=True, slots=True)
class Isolation:
    """What every spawn uses."""

    flags: int
    own_proc: bool
    words: str

    @property
    def namespace(self) -> bool:
        """Whether the kernel itself kills whole workloads."""
        return bool(self.flags & host.CLONE_NEWPID)


SCAN = Isolation(0, False, "subreapers and /proc scans")
"""The last resort, and what `--killer scan` asks for."""

_BEST = Isolation(host.CLONE_NEWPID | host.CLONE_NEWNS, True, "PID namespaces with their own /proc")
_GOOD = Isolation(host.CLONE_NEWPID, False, "PID namespaces")


def choose(killer: str) -> Isolation:
    """The best isolation that works here; may move this process into a user namespace. `killer`: `auto` or `scan`."""
    if killer == "scan":
        return SCAN
    for isolation in (_BEST, _GOOD):
        if _works(isolation, user_namespace=False):
            return isolation
    for isolation in (_BEST, _GOOD):
        if _works(isolation, user_namespace=True):
            host.enter_user_namespace()
            return Isolation(isolation.flags, isolation.own_proc, f"{isolation.words} in a user namespace")
    return SCAN


def _works(isolation: Isolation, *, user_namespace: bool) -> bool:
    """Make one, kill it, and see whether a process that left its session dies with it."""
    done_read, done_write = os.pipe()
    probe = os.fork()
    if probe == 0:
        os.close(done_read)
        code = 1
        try:
            code = 0 if _trial(isolation, user_namespace, done_write) else 1
        finally:
            os._exit(code)
    os.close(done_write)
    _pid, status = os.waitpid(probe, 0)
    os.close(done_read)
    return status == 0


def _trial(isolation: Isolation, user_namespace: bool, inherited: int) -> bool:
    os.close(inherited)
    if user_namespace:
        host.enter_user_namespace()
    ready_read, ready_write = os.pipe()
    held_read, held_write = os.pipe()
    init = host.fork_into(isolation.flags)
    if init == 0:
        _trial_init(isolation, ready_write)
    os.close(held_write)
    os.close(ready_write)
    ready = os.read(ready_read, 1) == b"+"
    os.kill(init, signal.SIGKILL)
    os.waitpid(init, 0)
    gone = bool(select.select([held_read], [], [], TRIAL_SECONDS)[0])
    return ready and gone


def _trial_init(isolation: Isolation, ready: int) -> None:
    """Init of the trial's namespace, and its grandchild, which holds the trial's pipe open until it is killed."""
    try:
        if isolation.own_proc:
            host.mount_own_proc()
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.write(ready, b"+")
                signal.pause()
            os._exit(0)
        signal.pause()
    finally:
        os._exit(1)
