"""The keeper: one small process between the guard and each workload, so that nothing of the workload can outlive
either.

Theory (PROTOCOL G4): with PID namespaces the keeper is init of the workload's own namespace and asks to be killed when
the guard's thread dies. When init dies, the kernel kills every process of the namespace, whatever it did with setsid
and double forks, and only then reports init as dead: waiting for the keeper *is* the proof of death. The namespaces may
not be permitted; then the keeper is a subreaper, sees the guard's death as end of file on the `lives` pipe, and kills
its descendants until none is left. That is a strong effort and no proof (someone may kill the keeper itself), so
Features says `orphan_killer: false`.

The keeper also copies the workload's output into its log up to a cap, so a chatty workload costs the guard nothing.
It runs in a fork of the guard: it never returns, and it uses only what the guard already loaded.

Status lines to the guard: `started PID`, `failed MESSAGE`, `exit WAITSTATUS`.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from cluster_agent.guard import host, proctree

DRAIN_BYTES = 1 << 20
"""Output read after the workload's main process ended; more can only come from a process that is about to be killed."""

POLL_MILLIS = 20
"""How often a keeper without a namespace looks for survivors while it kills; smaller burns CPU, larger delays the
exit."""

OPEN_FILES = 65_536
"""Hard limit of open files of a workload (or the host's, if lower): servers fit, a leak cannot eat the host's table."""


IGNORED = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGHUP)
"""Signals that Python, the guard or the keeper ignore; a workload must meet them as any program does."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a keeper must know; made by the guard before it forks."""

    program: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    directory: str
    cgroup_files: tuple[str, ...]
    file_bytes: int
    memory_bytes: int
    """Address bound by rlimit where no cgroup does it; 0: none."""
    processes: int
    """Bound of the user's processes by rlimit where no cgroup does it; 0: none."""
    output_bytes: int
    namespace: bool
    own_proc: bool


@dataclass(slots=True)
class Pipes:
    """The keeper's ends; everything else that the guard had open is closed."""

    status: int
    output_read: int
    output_write: int
    log: int
    lives: int
    """End of file here means that the guard is dead."""
    lock: int
    """Open on the keepers' lock: held until this process ends (protocol.KEEPERS)."""
    control: int = -1
    """A Python worker's socket, which becomes its standard input; -1: none."""

    @property
    def kept(self) -> set[int]:
        """All that are open."""
        fds = {self.status, self.output_read, self.output_write, self.log, self.lives, self.lock, self.control}
        return fds - {-1}


def run(plan: Plan, pipes: Pipes) -> None:
    """Body of the forked child; does not return."""
    code = 70
    try:
        code = _Keeper(plan, pipes).main()
    except BaseException as error:  # noqa: BLE001 - the fork must never run the guard's code after this
        with suppress(OSError):
            os.write(pipes.status, f"failed keeper: {error!r}\n".encode()[:512])
    finally:
        os._exit(code)


class _Keeper:
    def __init__(self, plan: Plan, pipes: Pipes) -> None:
        self._plan = plan
        self._pipes = pipes
        self._written = 0
        self._full = False
        self._main = 0
        self._early: dict[int, int] = {}
        """Children that a signal's handler collected before `fork` had told who the main one is."""
        self._status: int | None = None
        self._wake = -1

    def main(self) -> int:
        if not self._settle():
            return 0
        if not self._launch():
            return 0
        self._watch()
        self._drain()
        if not self._plan.namespace:
            self._kill_below()
        if self._status is not None:
            os.write(self._pipes.status, b"exit %d\n" % self._status)
        return 0

    def _settle(self) -> bool:
        """Bind our life to the guard's. False when it is dead already."""
        pipes = self._pipes
        os.setsid()
        self._close_all_but(pipes.kept)
        if self._plan.namespace:
            host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
        else:
            host.prctl(host.PR_SET_CHILD_SUBREAPER, 1)
        if select.select([pipes.lives], [], [], 0)[0]:
            return False
        wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        self._wake = wake_read
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.signal(signal.SIGTERM, lambda _number, _frame: self._term_below())
        signal.signal(signal.SIGUSR2, lambda _number, _frame: self._kill_below())
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        return True

    def _launch(self) -> bool:
        """Fork and exec the workload; tell the guard how that went."""
        host_proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if self._plan.own_proc:
            host.mount_own_proc()
        said_read, said_write = os.pipe2(os.O_CLOEXEC)
        self._main = os.fork()
        if self._main == 0:
            _become_workload(self._plan, self._pipes, said_write, host_proc)
        if self._main in self._early:
            self._status = self._early[self._main]
        for fd in (said_write, self._pipes.output_write, host_proc, *({self._pipes.control} - {-1})):
            os.close(fd)
        said = b""
        while part := os.read(said_read, 1024):  # ends when exec has closed the other side
            said += part
        os.close(said_read)
        pid, _, failure = said.partition(b"\n")
        if failure or not pid:
            os.write(self._pipes.status, b"failed " + (failure or b"it died before exec") + b"\n")
            return False
        os.write(self._pipes.status, b"started " + pid + b"\n")
        return True

    def _watch(self) -> None:
        """Until the main process has ended or the guard is dead."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._pipes.lives, select.POLLIN)
        poll.register(self._pipes.output_read, select.POLLIN)
        self._reap()
        while self._status is None:
            for fd, _event in poll.poll():
                if fd == self._pipes.lives:
                    self._kill_below()
                    os._exit(0)
                if fd == self._wake:
                    with suppress(BlockingIOError):
                        os.read(self._wake, 512)
                elif not self._copy():
                    poll.unregister(fd)
            self._reap()

    def _reap(self) -> None:
        """Collect every dead child; orphans of the workload are ours too."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self._main:
                self._status = status
            elif not self._main:
                self._early[pid] = status

    def _copy(self) -> bool:
        """Move one piece of output into the log. False at its end."""
        data = os.read(self._pipes.output_read, 65_536)
        if data:
            self._log(data)
        return bool(data)

    def _log(self, data: bytes) -> None:
        room = self._plan.output_bytes - self._written
        keep = data if self._plan.output_bytes == 0 else data[: max(0, room)]
        self._written += len(keep)
        if len(keep) < len(data) and not self._full:
            self._full = True
            keep += dropped_marker(self._plan.output_bytes)
        with suppress(OSError):  # a full disk costs output, never the workload
            os.write(self._pipes.log, keep)

    def _drain(self) -> None:
        os.set_blocking(self._pipes.output_read, False)
        left = DRAIN_BYTES
        with suppress(BlockingIOError):
            while left > 0 and self._copy():
                left -= 65_536

    def _term_below(self) -> None:
        if self._plan.namespace:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGTERM)  # everything in this namespace but us
            return
        for process in proctree.descendants(os.getpid(), proctree.everything()):
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGTERM)

    def _kill_below(self) -> None:
        """Kill all descendants until none is left: stop them first, so that none forks away while we look."""
        if self._plan.namespace:
            os._exit(0)
        while below := proctree.descendants(os.getpid(), proctree.everything()):
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for process in below:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)
            select.select([], [], [], POLL_MILLIS / 1000)
            self._reap()

    @staticmethod
    def _close_all_but(kept: set[int]) -> None:
        low = 0
        for fd in sorted(kept):
            os.closerange(low, fd)
            low = fd + 1
        os.closerange(low, 1 << 20)


def dropped_marker(cap: int) -> bytes:
    """The line that stands in a log where output was dropped."""
    return b"\n[baton: the output limit of %d bytes was reached; the rest was dropped]\n" % cap


def _become_workload(plan: Plan, pipes: Pipes, said: int, host_proc: int) -> None:
    """The last steps before exec, in the workload's own process; never returns. `said` closes with exec."""
    try:
        os.write(said, os.readlink("self", dir_fd=host_proc).encode() + b"\n")
        os.setsid()
        for path in plan.cgroup_files:
            with open(path, "wb", buffering=0) as procs:
                procs.write(b"0")
        _bound(plan)
        os.chdir(plan.directory)
        os.dup2(os.open("/dev/null", os.O_RDONLY) if pipes.control < 0 else pipes.control, 0)
        os.dup2(pipes.output_write, 1)
        os.dup2(pipes.output_write, 2)
        os.dup2(said, 3, inheritable=False)
        said = 3
        os.closerange(4, 1 << 20)
        signal.set_wakeup_fd(-1)
        for number in IGNORED:  # handlers end with exec by themselves, ignoring does not
            signal.signal(number, signal.SIG_DFL)
        os.umask(0o022)
        host.prctl(host.PR_SET_NO_NEW_PRIVS, 1)
        if (
            pipes.control >= 0
        ):  # a Python worker sees by its own children whether its task left a process (python_worker.py)
            host.prctl(host.PR_SET_CHILD_SUBREAPER, 1)
        os.execve(plan.program, plan.argv, dict(plan.env))
    except BaseException as error:  # noqa: BLE001 - it has to reach the guard in words, whatever it was
        text = f"{error.strerror or error}" if isinstance(error, OSError) else repr(error)
        os.write(said, f"{plan.program}: {text}".replace("\n", " ").encode()[:900])
    finally:
        os._exit(127)


def _bound(plan: Plan) -> None:
    """Resource limits of this process and all its children; a host's lower hard limit wins."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NOFILE, OPEN_FILES)
    if plan.file_bytes:
        _limit(resource.RLIMIT_FSIZE, plan.file_bytes)
    if plan.memory_bytes:
        _limit(resource.RLIMIT_DATA, plan.memory_bytes)
    if plan.processes:
        _limit(resource.RLIMIT_NPROC, plan.processes)


def _limit(which: int, value: int) -> None:
    hard = resource.getrlimit(which)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(which, (value, value))
