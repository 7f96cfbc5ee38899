"""Child processes of the supervisor: born with a death wish, known by more than a number.

Theory: a pid is used again; (pid, start ticks) is not, within one boot. So what is written down to be found later is both.
Children get SIGKILL from the kernel when the thread that started them ends (PR_SET_PDEATHSIG): call `spawn` from the main
thread only. Each child leads a session of its own, so that ctrl-C in the terminal reaches the supervisor alone, and so
that its own children can be signalled with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lab
from baton.clock import SystemClock
from cluster_agent.guard import proctree

ROOT = Path(lab.__file__).resolve().parent.parent
"""Where children find the code: next to ours."""

END_SECONDS = 15.0
"""For a process that was killed to be gone, and a machine to have lost all its processes."""

LOOK_SECONDS = 0.01


@dataclass(frozen=True, slots=True)
class Identity:
    """A process, for as long as this host runs."""

    pid: int
    start_ticks: int

    @property
    def alive(self) -> bool:
        """Whether this very process still runs."""
        return proctree.alive(self.pid, self.start_ticks)


def identify(pid: int) -> Identity:
    """The identity of a child of ours that was not reaped yet."""
    process = proctree.read(pid)
    return Identity(pid, process.start_ticks if process else 0)


def kill_remains(identity: Identity) -> None:
    """SIGKILL a process of an earlier supervisor and its session, if it is still that very process."""
    if identity.alive:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(identity.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGKILL)


def environment() -> dict[str, str]:
    """Ours, with this checkout first among the places where Python looks."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module with this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def bare_python(module: str, *arguments: str) -> list[str]:
    """As `python`, without what is installed: for a module that needs only the standard library, and starts at once."""
    return [sys.executable, "-S", "-m", module, *arguments]


_MORTAL = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
os._exit(1)
"""


def mortal(command: Sequence[str]) -> list[str]:
    """The command that runs another and is killed when the thread that started it ends (PR_SET_PDEATHSIG outlives exec).

    Not a `preexec_fn`: that is Python run after a fork of a process with gRPC's threads, which now and then kills the
    child before it has said a word."""
    return [sys.executable, "-I", "-S", "-c", _MORTAL, str(os.getpid()), *command]


def spawn(command: Sequence[str], log: Path, *, piped: bool = False) -> subprocess.Popen[bytes]:
    """Start a child that writes to `log` and dies with us. `piped`: its stdin and stdout are ours, unbuffered."""
    with log.open("ab") as out:
        return subprocess.Popen(
            command if piped else mortal(command),
            stdin=subprocess.PIPE if piped else subprocess.DEVNULL,
            stdout=subprocess.PIPE if piped else out,
            stderr=out,
            bufsize=0,
            env=environment(),
            start_new_session=True,
        )


async def gone(process: subprocess.Popen[bytes], seconds: float = END_SECONDS) -> bool:
    """Wait until the child has ended; False if it has not in time."""
    clock = SystemClock()
    deadline = clock.boot() + seconds
    while process.poll() is None and clock.boot() < deadline:
        await clock.sleep(LOOK_SECONDS)
    return process.poll() is not None


def tail(log: Path, count: int = 2_000) -> str:
    """The end of a log, for a message."""
    return log.read_text(errors="replace")[-count:].strip() if log.exists() else "(no log)"
