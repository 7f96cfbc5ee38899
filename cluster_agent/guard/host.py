"""What the guard asks of the kernel and Python does not offer: its clock, clone(2), prctl(2), mount(2).

The guard reads CLOCK_BOOTTIME here and not through `baton.clock`: that module loads asyncio, and the guard forks for
every workload, so what it loads is paid at each spawn.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import signal
import time
from collections.abc import Iterable
from pathlib import Path

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_MS_NOSUID_NODEV_NOEXEC = 2 | 4 | 8

_CLONE_NUMBER = {"x86_64": 56, "aarch64": 220, "riscv64": 220}
"""System call number of clone(2); both arguments we pass come first on all of them. Elsewhere: no namespaces."""

_libc = ctypes.PyDLL(None, use_errno=True)
"""PyDLL keeps the interpreter lock held across the call: a child of clone(2) must own it."""


def boot() -> float:
    """Seconds on this host's boot clock (counts suspend)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def wall() -> float:
    """Seconds since the epoch, for people."""
    return time.time()


def boot_id() -> str:
    """Identity of this boot of the kernel: a changed one means that all processes are dead (F4)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def prctl(option: int, value: int) -> None:
    """prctl(2) with one argument. Raises OSError."""
    _check(_libc.prctl(option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)), "prctl")


def unshare(flags: int) -> None:
    """unshare(2). Raises OSError."""
    _check(_libc.unshare(flags), "unshare")


def fork_into(flags: int) -> int:
    """Like `os.fork`, with the child in new namespaces: 0 in the child, its pid in the parent.

    Raises OSError (EPERM: not permitted here; ENOSYS: this machine's call number is unknown).
    """
    if not flags:
        return os.fork()
    number = _CLONE_NUMBER.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"clone(2) is not known on {platform.machine()}")
    ctypes.pythonapi.PyOS_BeforeFork()
    zero = ctypes.c_ulong(0)
    pid = int(_libc.syscall(ctypes.c_long(number), ctypes.c_ulong(flags | signal.SIGCHLD), zero, zero, zero, zero))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
        return 0
    error = ctypes.get_errno()
    ctypes.pythonapi.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(error, f"clone: {os.strerror(error)}")
    return pid


def mount_own_proc() -> None:
    """Give this mount namespace a /proc of this PID namespace; nothing of it reaches the host's. Raises OSError."""
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "mount /")
    _check(_libc.mount(b"proc", b"/proc", b"proc", ctypes.c_ulong(_MS_NOSUID_NODEV_NOEXEC), None), "mount /proc")


def cover(directories: Iterable[str]) -> None:
    """Let this process and its children see nothing in these, and others everything as before: a mount namespace of its own. An
    ordinary user needs to be permitted user namespaces. Raises OSError."""
    if os.getuid() != 0:
        enter_user_namespace()
    unshare(CLONE_NEWNS)
    _check(_libc.mount(b"none", b"/", None, ctypes.c_ulong(_MS_REC | _MS_SLAVE), None), "mount /")
    for directory in directories:
        empty = _libc.mount(b"none", os.fsencode(directory), b"tmpfs", ctypes.c_ulong(0), b"size=4k,mode=0500")
        _check(empty, f"mount {directory}")


def enter_user_namespace() -> None:
    """Become the owner of a new user namespace under the same uid and gid (how an ordinary user gets PID namespaces).

    Raises OSError when the host does not permit it.
    """
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")


def _check(result: int, what: str) -> None:
    if result != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
