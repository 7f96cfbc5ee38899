"""The guard's directory: where each attempt works, writes and logs, and how long what it left stays.

work/{key}/            private working directory; gone with `forget`. What it makes lies in .baton-artifacts/ below it
checkpoints/{run}.{task}/   survives attempts of the same task on this cluster; gone with the success of one
logs/{key}.log         captured output; stays by retention
trash/                 what is being deleted, by a child process, so that no big tree holds up the lease timers
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
from collections import OrderedDict
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from cluster_agent.executors.base import AttemptKey
from cluster_agent.guard import host
from cluster_agent.guard.meters import DiskMeter

RESULT, INPUTS, ARTIFACTS = ".baton-result", ".baton-inputs.json", ".baton-artifacts"
"""Inside the working directory; hidden, so that a workload that lists its directory finds it empty."""

LOG_BYTES = 1 << 30
"""All finished logs together. Enough for 128 tasks at the output cap or a day of ordinary ones; more would eat a
laptop."""
LOG_FILES = 50_000
"""Finished log files; directories far beyond it get slow to list."""
LOG_SECONDS = 7 * 86_400.0
"""A week: somebody who looks after a long weekend still finds them."""
CHECKPOINT_SECONDS = 7 * 86_400.0
"""Checkpoints untouched this long belong to runs that are over; shorter would take one from a task that waits for
capacity."""
READ_BYTES = 1 << 20
"""One log read; larger would hold up the lease timers."""


INLINE_BYTES = 32 << 10
"""Inputs of a python call up to this size need no file: beside arguments and environment at their limits they fit the worker's
pipe."""


def checkpoint_name(key: AttemptKey) -> str:
    """`{run}.{task}`: what all attempts of a task have in common."""
    return f"{key.run_uid}.{key.task}"


class Places:
    """Owner of the tree under one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.work, self.checkpoints = directory / "work", directory / "checkpoints"
        self.logs, self.trash = directory / "logs", directory / "trash"
        for path in (self.work, self.checkpoints, self.logs, self.trash):
            path.mkdir(exist_ok=True, mode=0o700)
        self._finished: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._finished_bytes = 0
        self._deleted = 0
        self._janitor = 0
        for mtime, size, name in sorted((e.stat().st_mtime, e.stat().st_size, e.name) for e in os.scandir(self.logs)):
            self._count(name, size, mtime)

    def free_bytes(self) -> int:
        """What an ordinary user may still write here; nothing if that cannot be found out."""
        try:
            disk = os.statvfs(self.work)
        except OSError:
            return 0
        return disk.f_bavail * disk.f_frsize

    def prepare(self, key: AttemptKey, inputs: bytes) -> dict[str, str]:
        """Make the attempt's directories; returns the environment that names them. Raises OSError."""
        work, checkpoint = self.work_of(key.text()), self.checkpoint_of(key)
        work.mkdir(mode=0o700)
        (work / ARTIFACTS).mkdir(mode=0o700)
        checkpoint.mkdir(mode=0o700, exist_ok=True)
        os.utime(checkpoint)
        if inputs:
            (work / INPUTS).write_bytes(inputs)
        return self.paths(key)

    def paths(self, key: AttemptKey) -> dict[str, str]:
        """The environment that names the attempt's directories, whether they are there or not."""
        work = f"{self.work}/{key.text()}"
        return {
            "BATON_RESULT": f"{work}/{RESULT}",
            "BATON_INPUTS": f"{work}/{INPUTS}",
            "BATON_ARTIFACTS_DIR": f"{work}/{ARTIFACTS}",
            "BATON_CHECKPOINT_DIR": f"{self.checkpoints}/{checkpoint_name(key)}",
        }

    def leave_inputs(self, key: AttemptKey, inputs: bytes) -> None:
        """Put the inputs where `paths` says, for a worker that makes its directories itself. Raises OSError."""
        work = self.work_of(key.text())
        work.mkdir(mode=0o700)
        (work / INPUTS).write_bytes(inputs)

    def inlined(self, inputs: bytes) -> bool:
        """Whether they travel to a worker with the call, and it makes the file if somebody wants it."""
        return len(inputs) <= INLINE_BYTES

    def log_of(self, key: str) -> str:
        """Where the attempt's output is captured."""
        return f"{self.logs}/{key}.log"

    def work_of(self, key: str) -> Path:
        """The private working directory."""
        return self.work / key

    def checkpoint_of(self, key: AttemptKey) -> Path:
        """The directory that this attempt shares with the others of its task."""
        return self.checkpoints / checkpoint_name(key)

    def meter(self, key: AttemptKey) -> DiskMeter:
        """Of what the attempt may fill: its working directory and its task's checkpoints."""
        return DiskMeter(self.work_of(key.text()), self.checkpoint_of(key))

    def drop_checkpoint(self, key: AttemptKey, *, full: bool) -> None:
        """The task's checkpoint directory goes if it is empty, or also `full`, when nobody needs it any more."""
        path = self.checkpoint_of(key)
        if full:
            self.throw_away(path)
        else:
            with suppress(OSError):  # not empty, or gone
                path.rmdir()

    def open_log(self, key: str) -> int:
        """A descriptor that appends to the attempt's log. Raises OSError."""
        return os.open(self.logs / f"{key}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def read_log(self, key: str, offset: int, limit: int) -> tuple[bytes, bool]:
        """Bytes from `offset`, and whether that reaches the present end; nothing for a log that is gone or closed to us."""
        try:
            fd = os.open(self.logs / f"{key}.log", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b"", True
        try:
            data = os.pread(fd, max(0, min(limit, READ_BYTES)), max(0, offset))
            return data, offset + len(data) >= os.fstat(fd).st_size
        finally:
            os.close(fd)

    def read_result(self, key: str, limit: int) -> tuple[bytes, str]:
        """The attempt's result, or why there is none: (bytes, ""), or (b"", message). No file is an empty result."""
        try:
            fd = os.open(self.work_of(key) / RESULT, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return b"", ""
        except OSError as error:
            return b"", f"the result is unreadable: {error.strerror}"
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode):
                return b"", "the result is not a regular file"
            data = os.read(fd, limit + 1)
        except OSError as error:
            return b"", f"the result is unreadable: {error.strerror}"
        finally:
            os.close(fd)
        if len(data) > limit:
            size = max(len(data), about.st_size)
            kib = f"{limit // 1024} KiB" if limit % 1024 == 0 else f"{limit} bytes"
            return b"", f"the result has {size} bytes, over the limit of {kib} for inline results; write an artifact"
        return data, ""

    def has_artifacts(self, key: str) -> bool:
        """Whether the attempt left anything where its artifacts belong; the agent judges what it is."""
        try:
            return any(os.scandir(f"{self.work}/{key}/{ARTIFACTS}"))
        except OSError:
            return False

    def cap_log(self, key: str, cap: int, marker: bytes) -> None:
        """Cut a log that its writer, not a keeper, lets grow past `cap` bytes (0: no cap)."""
        path = self.logs / f"{key}.log"
        with suppress(OSError):
            if cap and path.stat().st_size > cap + len(marker):
                os.truncate(path, cap)
                with open(path, "ab", buffering=0) as log:
                    log.write(marker)

    def discard(self, key: str) -> None:
        """The working directory goes; the log stays."""
        with suppress(OSError):
            os.rename(self.work_of(key), self.trash / f"{key}.{host.boot():.6f}")
            self._deleted += 1

    def throw_away(self, path: Path) -> None:
        """Move a file or folder of the executor's to the trash, if it is there."""
        with suppress(OSError):
            os.rename(path, self.trash / f"{path.name}.{host.boot():.6f}")
            self._deleted += 1

    def drop_log(self, key: str) -> None:
        """A log that nobody asks for goes at once."""
        with suppress(OSError):
            (self.logs / f"{key}.log").unlink()

    def finished(self, key: str) -> None:
        """The attempt's log is complete: it counts against retention from now on."""
        with suppress(OSError):
            self._count(f"{key}.log", (self.logs / f"{key}.log").stat().st_size, host.wall())

    def sweep(self) -> None:
        """Delete logs beyond retention; at most 100 at a time, for the lease timers wait."""
        for _ in range(100):
            if not self._finished:
                return
            name, (size, ended) = next(iter(self._finished.items()))
            young = host.wall() - ended <= LOG_SECONDS
            if young and self._finished_bytes <= LOG_BYTES and len(self._finished) <= LOG_FILES:
                return
            del self._finished[name]
            self._finished_bytes -= size
            with suppress(FileNotFoundError):
                (self.logs / name).unlink()

    def sweep_checkpoints(self, in_use: set[str]) -> None:
        """Move checkpoint directories nobody touched for long to the trash. `in_use`: names `{run}.{task}`."""
        for entry in os.scandir(self.checkpoints):
            if entry.name not in in_use and host.wall() - entry.stat().st_mtime > CHECKPOINT_SECONDS:
                with suppress(OSError):
                    os.rename(entry.path, self.trash / f"checkpoint.{entry.name}.{host.boot():.6f}")
                    self._deleted += 1

    def empty_trash(self) -> None:
        """Keep one child process deleting while there is something to delete."""
        if self._janitor:
            with suppress(ChildProcessError):
                if os.waitpid(self._janitor, os.WNOHANG)[0] == 0:
                    return
            self._janitor = 0
        if self._deleted == 0:
            return
        self._deleted = 0
        self._janitor = os.fork()
        if self._janitor == 0:
            try:
                os.closerange(3, 1 << 20)
                host.prctl(host.PR_SET_PDEATHSIG, signal.SIGKILL)
                for entry in os.scandir(self.trash):
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path, ignore_errors=True)
                    else:
                        os.unlink(entry.path)
            finally:
                os._exit(0)

    @property
    def janitor(self) -> int:
        """Pid of the deleting child, 0 when there is none."""
        return self._janitor

    def tidy(self, known: Container[str]) -> None:
        """Before serving: discard working directories of keys that were never started (a crash came between the two),
        and find what an earlier guard did not get to delete."""
        for entry in os.scandir(self.work):
            if entry.name not in known:
                self.discard(entry.name)
        if any(os.scandir(self.trash)):
            self._deleted += 1

    def _count(self, name: str, size: int, ended: float) -> None:
        self._finished[name] = (size, ended)
        self._finished_bytes += size
