"""Who is at the other end of the guard's socket: its agent, or one of the workloads it guards.

Theory: agent and workloads share a uid, so the socket's mode cannot tell them apart; ancestry can. Everything a guard
spawned stays below it (a keeper adopts the orphans of its workload, the guard those of a murdered keeper), and its agent
never is. A workload that could command its guard would stop its neighbours or renew a lease that has passed (F5, G1).
The kernel notes the peer's pid when it connects, so handing the connection to somebody else afterwards changes nothing.
"""

from __future__ import annotations

import os
import socket
import struct

from cluster_agent.guard import proctree

_CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""

ATTEMPTS = 3
"""Walks up to the first process: an ancestor may die between two looks. The agent, refused, simply connects again."""


def refusal(connection: socket.socket) -> str:
    """Why this connection must not be served; empty when it may be. Raises OSError when the kernel does not say."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid = _CREDENTIALS.unpack(credentials)[0]
    if pid in (0, os.getpid()):
        return ""  # 0: of a PID namespace that is not below ours, as all our workloads are
    below = descends(pid, os.getpid())
    if below is None:
        return f"the ancestry of process {pid} cannot be read"
    return f"process {pid} is one of its own workloads" if below else ""


def descends(pid: int, root: int) -> bool | None:
    """Whether `root` is an ancestor of `pid`; None when that cannot be found out."""
    for _ in range(ATTEMPTS):
        process = proctree.read(pid)
        while process is not None:
            if process.ppid == root:
                return True
            if process.ppid == 0:
                return False
            process = proctree.read(process.ppid)
    return None
