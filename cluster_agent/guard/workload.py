"""One running attempt as the guard holds it: how it is spawned, what its keeper said, and how it ended."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from cluster_agent.core.lease import Reason
from cluster_agent.executors.base import Cause, Exited, Limits, Phase, StartRequest
from cluster_agent.guard import host, keeper, proctree
from cluster_agent.guard.cgroups import Group, Groups
from cluster_agent.guard.isolation import Isolation
from cluster_agent.guard.meters import DiskMeter, tree_breach
from cluster_agent.guard.places import Places

RLIMIT_SLACK = 2
"""Where no cgroup counts memory, a process may map this many times its limit: polling of resident memory finds the
breach and names it, the rlimit only stops what is faster than polling. 1 would fail programs that reserve more than
they use."""


LAST_LOOK_STEPS = 8
"""Steps of the disk meter when a workload has failed: covers some thousand files without holding up the timers."""


@dataclass(slots=True)
class Workload:
    """A spawned attempt; descriptors are owned and closed by `close`."""

    request: StartRequest
    keeper_pid: int
    pidfd: int
    status_fd: int
    output_fd: int
    log_fd: int
    group: Group | None
    meter: DiskMeter | None
    start_wall: float
    phase: Phase = Phase.STARTING
    owed_term: bool = False
    """A TERM was ordered before there was a process to get it."""
    breach: str = ""
    failure: str = ""
    wait_status: int | None = None
    pid: int = 0
    """Of its main process, once that was started."""
    heard: bytearray = field(default_factory=bytearray)

    @property
    def name(self) -> str:
        """The key as text."""
        return self.request.key.text()

    def hear(self) -> int | None:
        """Read what the keeper said; returns the workload's pid when it was just started."""
        with suppress(BlockingIOError):
            while part := os.read(self.status_fd, 4096):
                self.heard += part
        started = None
        while (end := self.heard.find(b"\n")) >= 0:
            word, _, rest = self.heard[:end].decode("utf-8", "replace").partition(" ")
            del self.heard[: end + 1]
            if word == "started":
                started = self.pid = int(rest)
                self.phase = Phase.STOPPING if self.phase is Phase.STOPPING else Phase.RUNNING
            elif word == "failed":
                self.failure = rest
            elif word == "exit":
                self.wait_status = int(rest)
        return started

    def signal_keeper(self, number: signal.Signals) -> None:
        """To the keeper, whose zombie cannot be mistaken for another process: it is our child."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def salvage_output(self) -> None:
        """What a killed keeper left in the pipe."""
        os.set_blocking(self.output_fd, False)
        with suppress(OSError):
            data = os.read(self.output_fd, 65_536)
            cap = self.request.limits.output_bytes
            room = cap - os.fstat(self.log_fd).st_size
            if not cap or len(data) <= room:
                os.write(self.log_fd, data)
            elif room > 0:
                os.write(self.log_fd, data[:room] + keeper.dropped_marker(cap))

    def close(self) -> None:
        """Give the descriptors back."""
        for fd in (self.pidfd, self.status_fd, self.output_fd, self.log_fd):
            os.close(fd)


@dataclass(frozen=True, slots=True)
class Spawner:
    """Makes workloads."""

    places: Places
    groups: Groups
    isolation: Isolation
    lives_fd: int
    """Read end of the pipe that ends with the guard."""
    lock_fd: int
    """Open on the keepers' lock."""

    def spawn(self, request: StartRequest, paths: Mapping[str, str], program: str, control: int = -1) -> Workload:
        """Fork the keeper, which starts `program`, with `control` (if any) as its standard input. Raises OSError, and
        then nothing runs and nothing is held."""
        name, limits = request.key.text(), request.limits
        group = self.groups.make(name, limits)
        meter = self.places.meter(request.key) if limits.disk_bytes else None
        with ExitStack() as ours, ExitStack() as theirs:
            if group is not None:
                ours.callback(group.remove)
            status_read, status_write = _pipe(ours, theirs)
            output_read, output_write = _pipe(ours, theirs)
            log = self.places.open_log(name)
            ours.callback(os.close, log)
            pipes = keeper.Pipes(status_write, output_read, output_write, log, self.lives_fd, self.lock_fd, control)
            plan = self._plan(request, {**request.env, **paths}, program, group)
            start_wall = host.wall()
            pid = host.fork_into(self.isolation.flags)
            if pid == 0:
                keeper.run(plan, pipes)
            ours.callback(bury_keeper, pid)
            pidfd = os.pidfd_open(pid)
            os.set_blocking(status_read, False)
            ours.pop_all()
        return Workload(request, pid, pidfd, status_read, output_read, log, group, meter, start_wall)

    def _plan(self, request: StartRequest, env: dict[str, str], program: str, group: Group | None) -> keeper.Plan:
        limits, found = request.limits, self.groups.found
        processes = limits.processes if "pids" not in found else 0
        return keeper.Plan(
            program=program,
            argv=request.argv,
            env=env,
            directory=str(self.places.work_of(request.key.text())),
            cgroup_files=group.procs_files() if group is not None else (),
            file_bytes=limits.disk_bytes,
            memory_bytes=RLIMIT_SLACK * limits.memory_bytes if "memory" not in found else 0,
            processes=_own_processes() + processes if processes else 0,
            output_bytes=limits.output_bytes,
            namespace=self.isolation.namespace,
            own_proc=self.isolation.own_proc,
        )


def _pipe(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    """Read end for the guard, write end for the keeper; each stack closes its own."""
    read, write = os.pipe2(os.O_CLOEXEC)
    ours.callback(os.close, read)
    theirs.callback(os.close, write)
    return read, write


def bury_keeper(keeper_pid: int) -> None:
    """End a keeper that cannot be supervised: unsupervised work would know no lease, no stop and no deadline (G1)."""
    os.kill(keeper_pid, signal.SIGKILL)
    os.waitpid(keeper_pid, 0)


def resolve(argv0: str, env: Mapping[str, str], directory: Path) -> str:
    """The program's path, by the workload's own PATH. Raises FileNotFoundError naming what was looked for, and
    where."""
    if "/" in argv0:
        path = os.path.join(directory, argv0)
        if not os.path.exists(path):
            raise FileNotFoundError(f"program {argv0!r} does not exist")
        return path
    search = env.get("PATH", os.defpath)
    found = shutil.which(argv0, path=search)
    if found is None:
        raise FileNotFoundError(f"program {argv0!r} was not found on PATH {search!r}")
    return found


def outcome(workload: Workload, reason: Reason | None, late: bool, places: Places) -> Exited:
    """How a workload whose last process is gone has ended."""
    status = workload.wait_status
    code = os.waitstatus_to_exitcode(status) if status is not None else -signal.SIGKILL
    exit_code, number = (code, None) if code >= 0 else (None, -code)
    cause, message, result, files_of = Cause.EXIT, "", b"", ""
    if workload.failure:
        cause, message, exit_code, number = Cause.SPAWN, workload.failure, None, None
    elif reason is not None:
        cause, message = Cause(reason.value), workload.breach
    elif status is None:
        cause, message = Cause.LOST, "its keeper was killed from outside the guard"
    elif code != 0:
        message = _breach(workload, number)
        cause = Cause.LIMIT if message else Cause.EXIT
    else:
        result, message = places.read_result(workload.name, workload.request.limits.result_bytes)
        cause = Cause.RESULT if message else Cause.EXIT
        if cause is Cause.EXIT and places.has_artifacts(workload.name):
            files_of = run_of(workload.request)
    return Exited(
        key=workload.request.key,
        cause=cause,
        exit_code=exit_code,
        signal=number,
        start_wall=workload.start_wall,
        end_wall=host.wall(),
        result=result,
        message=message,
        late=late,
        files_of=files_of,
    )


def run_of(request: StartRequest) -> str:
    """Name of the attempt's run, as its workload knows it."""
    return request.env.get("BATON_RUN", "")


def _breach(workload: Workload, number: int | None) -> str:
    """The limit behind a failure, in words; empty when there was none."""
    limits = workload.request.limits
    if number == signal.SIGXFSZ:
        return f"wrote a file over its disk limit of {limits.disk_bytes} bytes"
    if workload.meter is not None:
        # Python, for one, ignores SIGXFSZ and fails with EFBIG: then the full disk explains the exit code.
        used = max(workload.meter.step() for _ in range(LAST_LOOK_STEPS))
        if used >= limits.disk_bytes:
            return f"failed with {used} bytes of disk in use, at its disk limit of {limits.disk_bytes} bytes"
    return workload.group.breach() if workload.group is not None else ""


def breaches(workloads: Sequence[Workload], found: tuple[str, ...]) -> Iterator[tuple[Workload, str]]:
    """Those over limits that the kernel does not hold for us, and which, in words. `found`: controllers that work here."""
    polled = [workload for workload in workloads if needs_tree_polling(workload.request.limits, found)]
    processes = proctree.everything() if polled else {}
    for workload in polled:
        breach = tree_breach(workload.request.limits, workload.keeper_pid, processes)
        if breach:
            yield workload, breach
    for workload in workloads:
        limit = workload.request.limits.disk_bytes
        if workload.meter is not None and workload.meter.step() > limit:
            yield workload, f"it uses {workload.meter.used_bytes} bytes of disk, over its limit of {limit} bytes"


def needs_tree_polling(limits: Limits, found: tuple[str, ...]) -> bool:
    """Whether memory or processes of this workload are limited by looking, for want of a cgroup."""
    return bool((limits.memory_bytes and "memory" not in found) or (limits.processes and "pids" not in found))


def _own_processes() -> int:
    """Processes of this user now: RLIMIT_NPROC counts all of them, not just the workload's."""
    uid, count = os.getuid(), 0
    for pid in proctree.everything():
        with suppress(OSError):
            count += os.stat(f"/proc/{pid}").st_uid == uid
    return count
