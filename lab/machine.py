"""One machine of the local federation: the parent of a cluster's agent, guard and workloads, with a power switch.

    python -m lab.machine [--hide DIRECTORY]... COMMAND...

COMMAND is the agent's, and sees nothing in the hidden directories; orders come on stdin, news leaves on stdout.

Theory: a cluster dies "at once" only if somebody can name everything that belongs to it. The guard leaves its agent's
session on purpose (PROTOCOL G1) and workloads may do the same, so this process is a *subreaper*: whatever below it loses
its parent becomes its child, and its descendants are exactly the machine. Power off stops all of them, then kills all
of them, until none is left: what a power cut does, as close as one kernel allows. Nothing is found by its name.

The end of stdin means that the federation's supervisor is gone, however it died: then the power goes off too.
Orders: `start` `kill` `freeze` `freeze-all` `thaw` `off`; each is answered by `ok` when it has been carried out.
News: `agent PID`, `ended STATUS` (an exit code, or minus a signal).
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cluster_agent.guard import cgroups, host, proctree

OFF_SECONDS = 10.0
"""Longest power off. The kernel needs milliseconds; a process stuck on dead storage would keep us for ever."""

GUARD_DIRECTORY = "guard"
"""Where an agent has its guard, in its own directory (cluster_agent/__main__.py)."""

LOOK_SECONDS = 0.005
"""Between looks at what is left while the power goes off."""


class Machine:
    """See the module."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = list(command)
        self._agent = 0
        self._orders = b""
        self._off = False

    def run(self) -> int:
        """Serve until the power is off."""
        host.prctl(host.PR_SET_CHILD_SUBREAPER, 1)
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # a terminal's keys are the supervisor's to understand
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._ask_off())
        self._start()
        while not self._off:
            for fd in select.select([0, wake_read], [], [])[0]:
                if fd == wake_read:
                    with suppress(BlockingIOError):
                        os.read(fd, 512)
                elif not self._listen():
                    self._off = True
            self._reap()
        self._power_off()
        return 0

    def _ask_off(self) -> None:
        self._off = True

    def _listen(self) -> bool:
        """Carry out what was ordered; False when the power is to go off."""
        data = os.read(0, 4096)
        self._orders += data
        while b"\n" in self._orders:
            order, self._orders = self._orders.split(b"\n", 1)
            if order == b"off":
                return False
            self._obey(order.decode())
            self._say("ok")
        return bool(data)

    def _obey(self, order: str) -> None:
        match order:
            case "start":
                if not self._agent:
                    self._start()
            case "kill":
                self._signal_agent(signal.SIGKILL)
            case "freeze":
                self._signal_agent(signal.SIGSTOP)
            case "freeze-all":
                self._signal_all(signal.SIGSTOP)
            case "thaw":
                self._signal_all(signal.SIGCONT)

    def _start(self) -> None:
        parent = os.getpid()
        self._agent = os.fork()
        if self._agent == 0:
            try:
                host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
                if os.getppid() != parent:
                    os._exit(127)
                signal.set_wakeup_fd(-1)
                for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGCHLD):
                    signal.signal(number, signal.SIG_DFL)
                null = os.open("/dev/null", os.O_RDWR)
                os.dup2(null, 0)
                os.dup2(2, 1)
                os.closerange(3, 1024)
                os.execv(self._command[0], self._command)
            finally:
                os._exit(127)
        self._say(f"agent {self._agent}")

    def _reap(self) -> None:
        """Collect the dead; orphans are ours."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._agent:
                self._agent = 0
                self._say(f"ended {os.waitstatus_to_exitcode(status)}")

    def _signal_agent(self, number: int) -> None:
        if self._agent:  # not reaped yet, so the pid is its own
            os.kill(self._agent, number)

    def _signal_all(self, number: int) -> None:
        for process in proctree.descendants(os.getpid(), proctree.everything()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def _power_off(self) -> None:
        """Stop all first, so that none forks away while we look; then kill until none is left."""
        deadline = host.boot() + OFF_SECONDS
        while proctree.descendants(os.getpid(), proctree.everything()) and host.boot() < deadline:
            self._signal_all(signal.SIGSTOP)
            self._signal_all(signal.SIGKILL)
            select.select([], [], [], LOOK_SECONDS)
            self._reap()
        self._reap()
        self._tidy()

    def _tidy(self) -> None:
        """A power cut leaves no control groups either: those of a killed guard, which is below the agent's directory."""
        with suppress(ValueError, IndexError):  # another command, as tests have one
            directory = Path(self._command[self._command.index("--directory") + 1])
            cgroups.remove_left(directory / GUARD_DIRECTORY / cgroups.RECORD)

    @staticmethod
    def _say(words: str) -> None:
        with suppress(BrokenPipeError):
            os.write(1, f"{words}\n".encode())


def main(words: Sequence[str]) -> int:
    """Be a machine."""
    hidden: list[str] = []
    while words[:1] == ["--hide"]:
        hidden.append(words[1])
        words = words[2:]
    if hidden:
        try:
            host.cover(hidden)
        except OSError as error:
            sys.stderr.write(
                f"this host does not let the clusters be kept apart ({error}): run as root, or leave --apart out\n"
            )
            return 1
    return Machine(words).run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
